// The integer product for vector instruction sets. One lane is one output (a row of the weights): `lanes` rows are read
// a vector each and transposed, so that a vector holds the same codes of `lanes` rows, every sum of a block stays in
// its lane and no reduction across lanes is ever needed. A vector of dwords becomes 4 (nibbles) or 2 (bytes) vectors of
// 16-bit pairs by a shift and a mask; the words of x are stored in the order of those pairs.
//
// With few words per column of x (decode), weights go from memory through registers into the products; packed ones need
// no turning, and several panels are read at once, as one stream of memory does not keep the memory busy. With more
// words, 2 * lanes rows are expanded once into a panel that stays in the L2 cache and is multiplied by tiles of x.
//
// Included by one translation unit per instruction set; V is its vector type. Everything is unnamed (see floats.h).
#pragma once
#include <algorithm>
#include <utility>

#include "linear/quantize.h"

namespace parco::linear {
namespace {

template <class V>
struct Job {
  const CodedCall& call;
  Plan plan;
  int words;                 // per value of x
  std::int16_t* x[2];        // [slab][plan.words] each
  float* x_scale;            // [slab][blocks]
  std::int32_t* x_sum[2];    // [slab][blocks]: minus the sum of the words, times the zero when that is the same for all
  std::int64_t first, rows;  // the rows of x at work
  std::int64_t block_stride;
};

// Where the packed codes of the outputs from n on begin.
inline const std::uint8_t* packed_codes(const CodedCall& call, std::int64_t n) {
  return call.codes + n / panel_rows * (call.columns * call.bits / 32) * panel_rows * 4 + n % panel_rows * 4;
}

// What belongs to `lanes * vectors` outputs: scales and zeros turned so that a group's values of all lanes are
// neighbours.
template <class V, int vectors>
struct Outputs {
  std::int64_t first, count;
  const std::uint8_t* rows[V::lanes * vectors];
  float* scale;        // [groups][vectors][lanes]
  std::int32_t* zero;  // the same, or null when all are equal

  void take(const CodedCall& call, std::int64_t first_output) {
    first = first_output;
    count = std::min<std::int64_t>(V::lanes * vectors, call.outputs - first);
    zero = nullptr;
  }

  // Lanes past the last output repeat it; they are computed and not stored.
  void gather(const CodedCall& call, const Plan& plan, std::int64_t first_output, float* scales, std::int32_t* zeros) {
    constexpr int wide = V::lanes * vectors;
    take(call, first_output);
    const char* scale_rows[wide];
    for (int i = 0; i < wide; i++) {
      const std::int64_t n = first + std::min<std::int64_t>(i, count - 1);
      rows[i] = call.codes + n * plan.row_bytes;
      scale_rows[i] = static_cast<const char*>(call.scale) + call.scale_index(n, 0) * size_of(call.scale_type);
    }
    scale = scales;
    zero = call.zero ? zeros : nullptr;
    const std::int32_t groups = plan.groups;
    const float factor = call.scale_factor() * call.unit;
    for (int v = 0; v < vectors; v++) {
      if (call.packed_scales()) {
        // Vectors past the last panel repeat it.
        const std::int64_t n = std::min(first + v * V::lanes, call.outputs - 1) / V::lanes * V::lanes;
        for (std::int32_t g = 0; g < groups; g++) {
          const std::int64_t at = call.scale_index(n, g);
          V::store(scales + (g * vectors + v) * V::lanes, V::load_scales(call, at, factor));
          if (zero) V::store(zeros + (g * vectors + v) * V::lanes, V::load_zeros(call.zero + at));
        }
        continue;
      }
      V::transpose_scales(scale_rows + v * V::lanes, call.scale_type, groups, factor, scales + v * V::lanes, wide);
    }
    if (!zero || call.packed_scales()) return;
    for (int i = 0; i < wide; i++) {
      const std::int64_t n = first + std::min<std::int64_t>(i, count - 1);
      for (std::int32_t g = 0; g < groups; g++) zeros[g * wide + i] = call.zero[call.scale_index(n, g)];
    }
  }

  // A piece of vector v.
  void read(const CodedCall& call, const typename V::Reader& reader, int v, const Piece& piece,
            typename V::I* to) const {
    if (!call.packed) return reader.read(rows + v * V::lanes, piece.dword, piece.dwords, to);
    const std::int64_t n = std::min(first + v * V::lanes, call.outputs - 1) / V::lanes * V::lanes;
    reader.read_packed(packed_codes(call, n), piece.dword, piece.dwords, to);
  }
};

// Where a block's sum starts: at minus zero times the sum of its words, so that the codes themselves are used as they
// are.
template <class V, int vectors>
inline typename V::I first_sum(const Outputs<V, vectors>& outputs, const Block& block, int v, std::int32_t sum) {
  if (!outputs.zero) return V::set(sum);
  return V::multiply(V::load(outputs.zero + (block.group * vectors + v) * V::lanes), V::set(sum));
}

// One output vector of row m, finished: scale per output, bias, one rounding.
template <class V, int vectors>
inline void finish(const Job<V>& job, const Outputs<V, vectors>& outputs, std::int64_t m, int v, typename V::F sum) {
  const CodedCall& call = job.call;
  const std::int64_t left = outputs.count - v * V::lanes;
  if (left <= 0) return;
  const int count = static_cast<int>(std::min<std::int64_t>(left, V::lanes));
  const std::int64_t n = outputs.first + v * V::lanes;
  if (job.plan.groups <= 1) sum = V::multiply(sum, V::load(outputs.scale + v * V::lanes));
  if (call.bias) sum = V::add(sum, V::load_floats(call.bias, call.bias_type, n, count));
  V::store_floats(call.y, call.x_type, (job.first + m) * call.outputs + n, count, sum);
}

// The block's exact sum(s) as fp32, in units of the block's scale.
template <class V, int words>
inline typename V::F exact(const typename V::I* sums) {
  if constexpr (words == 1) return V::to_float(sums[0]);
  return V::fma(V::to_float(sums[0]), V::set(32768.0f), V::to_float(sums[1]));
}

template <class V, bool nibbles, int columns, int words>
void decode(const Job<V>& job, std::int64_t first_output, float* scales, std::int32_t* zeros) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int all = columns * words;
  const Plan& plan = job.plan;
  Outputs<V, 1> outputs;
  outputs.gather(job.call, plan, first_output, scales, zeros);
  const bool grouped = plan.groups > 1;
  const typename V::Reader reader(job.call, plan);
  // The scales of the outputs that follow, a part with each piece: their rows are too short for the processor to
  // foresee.
  const std::int64_t scale_bytes = V::lanes * job.call.scale_stride * size_of(job.call.scale_type);
  const std::int64_t ahead = scale_bytes / plan.piece_count;
  const char* next_scales = static_cast<const char*>(job.call.scale) + (first_output / V::lanes + 1) * scale_bytes;
  alignas(64) I codes[piece_dwords];
  F total[columns];
  for (int m = 0; m < columns; m++) total[m] = V::set(0.0f);
  for (std::int32_t p = 0; p < plan.piece_count; p++) {
    const Piece& piece = plan.pieces[p];
    outputs.read(job.call, reader, 0, piece, codes);
    for (std::int64_t i = p * ahead; i < (p + 1) * ahead; i += 64) __builtin_prefetch(next_scales + i);
    const I* code = codes;
    for (std::int32_t b = piece.first; b < piece.last; b++) {
      const Block& block = plan.blocks[b];
      const char* x[all];
      I sum[all];
      for (int m = 0; m < columns; m++) {
        for (int w = 0; w < words; w++) {
          x[m * words + w] = reinterpret_cast<const char*>(job.x[w] + m * plan.words + block.k);
          sum[m * words + w] = first_sum(outputs, block, 0, job.x_sum[w][m * job.block_stride + b]);
        }
      }
      V::template block_sums<nibbles, all>(code, block.dwords, job.call.bits, x, sum);
      code += block.dwords;
      const F scale = grouped ? V::load(outputs.scale + block.group * V::lanes) : V::set(1.0f);
      for (int m = 0; m < columns; m++) {
        const F unit = V::multiply(V::set(job.x_scale[m * job.block_stride + b]), scale);
        total[m] = V::fma(exact<V, words>(sum + m * words), unit, total[m]);
      }
    }
  }
  for (int m = 0; m < columns; m++) finish(job, outputs, m, 0, total[m]);
}

// f(i, vector i) for the vectors of a step of packed memory.
template <class V, int bits, class F, int... i>
void each_vector(const std::uint8_t* at, const F& f, std::integer_sequence<int, i...>) {
  (f(i, V::template packed_bytes<bits, i>(at)), ...);
}

// `dwords` dwords from dword `first` of codes in planes, as `reader` gives those that are not: in their order, nibbles
// of 3 bits and bytes of 5 or 6.
template <class V, int width>
void read_planes_of(const typename V::Reader& reader, const std::uint8_t* panel, std::int32_t first,
                    std::int32_t dwords, typename V::I* to) {
  using I = typename V::I;
  const int in_run = 32 / reader.unit;
  const std::uint8_t* at = panel + first / in_run * width * panel_rows * 4;
  for (std::int32_t d = 0; d < dwords; d += in_run, at += width * panel_rows * 4) {
    I vectors[8];
    each_vector<V, width>(at, [&](int i, I codes) { vectors[i] = codes; }, std::make_integer_sequence<int, 8>());
    const auto store = [&](I even, I odd) {
      for (int upper = 0; upper < 2; upper++) V::store(to++, reader.join(even, odd, upper));
    };
    for (int i = 0; i < 8; i += width == 3 ? 4 : 2) {
      if constexpr (width == 3) {  // codes 4 t and 4 t + 1, and the two that follow
        const auto nibbles = [&](int n) { return V::either(vectors[n], V::template moved<4>(vectors[n + 1])); };
        store(nibbles(i), nibbles(i + 2));
      } else {
        const auto bytes = [&](int n) { return reader.mapped ? reader.map(vectors[n]) : vectors[n]; };
        store(bytes(i), bytes(i + 1));
      }
    }
  }
}

template <class V>
void read_planes(const typename V::Reader& reader, const std::uint8_t* panel, std::int32_t first, std::int32_t dwords,
                 typename V::I* to) {
  if (reader.bits == 3) return read_planes_of<V, 3>(reader, panel, first, dwords, to);
  if (reader.bits == 5) return read_planes_of<V, 5>(reader, panel, first, dwords, to);
  read_planes_of<V, 6>(reader, panel, first, dwords, to);
}

constexpr std::int64_t read_ahead = 1024;  // bytes of each stream

// `strips` times `lanes` packed outputs, from first[strip] on, against `columns` rows of x.
template <class V, int bits, bool mapped, int strips, int columns, int words>
void decode_strips(const Job<V>& job, const std::int64_t* first, float* scales, std::int32_t* zeros) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int all = columns * words;
  const CodedCall& call = job.call;
  const Plan& plan = job.plan;
  const bool grouped = plan.groups > 1, direct = call.packed_scales();
  const float factor = call.scale_factor() * call.unit;
  const typename V::Lookup lookup(call);
  Outputs<V, 1> outputs[strips];
  const std::uint8_t* codes[strips];
  F total[strips][columns];
  for (int s = 0; s < strips; s++) {
    const std::int64_t kept = s * static_cast<std::int64_t>(plan.groups) * V::lanes;
    direct ? outputs[s].take(call, first[s]) : outputs[s].gather(call, plan, first[s], scales + kept, zeros + kept);
    codes[s] = packed_codes(call, first[s]);
    for (int m = 0; m < columns; m++) total[s][m] = V::set(0.0f);
  }
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    const char* x[all];
    I sum[strips][all][V::parts];
#pragma GCC unroll 8
    for (int r = 0; r < all; r++) {
      const int m = r / words, w = r % words;
      x[r] = reinterpret_cast<const char*>(job.x[w] + m * plan.words + block.k);
      const std::int32_t of_words = job.x_sum[w][m * job.block_stride + b];
#pragma GCC unroll 4
      for (int s = 0; s < strips; s++) {
        sum[s][r][0] =
            direct && call.zero
                ? V::multiply(V::load_zeros(call.zero + call.scale_index(first[s], block.group)), V::set(of_words))
                : first_sum(outputs[s], block, 0, of_words);
        for (int part = 1; part < V::parts; part++) sum[s][r][part] = V::set(0);
      }
    }
    constexpr std::int64_t step_bytes = step_dwords(bits) * panel_rows * 4;
    const std::int64_t from = block.k / step_codes(bits) * step_bytes;
    const std::int32_t steps = (block.length + step_codes(bits) - 1) / step_codes(bits);
    for (std::int32_t d = 0; d < steps; d++) {
#pragma GCC unroll 4
      for (int s = 0; s < strips; s++) {
        const std::uint8_t* at = codes[s] + from + d * step_bytes;
        for (int i = 0; i < step_dwords(bits); i++) __builtin_prefetch(at + i * panel_rows * 4 + read_ahead);
        V::template add_products<bits, mapped, all>(at, lookup, x, d, sum[s]);
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < strips; s++) {
      F scale = V::set(1.0f);
      if (grouped)
        scale = direct ? V::load_scales(call, call.scale_index(first[s], block.group), factor)
                       : V::load(outputs[s].scale + block.group * V::lanes);
      for (int m = 0; m < columns; m++) {
        I whole[words];
        for (int w = 0; w < words; w++) whole[w] = V::whole(sum[s][m * words + w]);
        const F unit = V::multiply(V::set(job.x_scale[m * job.block_stride + b]), scale);
        total[s][m] = V::fma(exact<V, words>(whole), unit, total[s][m]);
      }
    }
  }
  for (int s = 0; s < strips; s++)
    for (int m = 0; m < columns; m++) finish(job, outputs[s], m, 0, total[s][m]);
}

// Strips [first, last) in as many contiguous streams as are read at once.
template <class V, int bits, bool mapped, int columns, int words>
void decode_streams(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  constexpr int streams = V::streams(columns * words);
  const std::int64_t length = (last - first) / streams;
  for (std::int64_t i = 0; i < length; i++) {
    std::int64_t outputs[streams];
    for (int s = 0; s < streams; s++) outputs[s] = (first + s * length + i) * V::lanes;
    decode_strips<V, bits, mapped, streams, columns, words>(job, outputs, scales, zeros);
  }
  for (std::int64_t i = first + streams * length; i < last; i++) {
    const std::int64_t output = i * V::lanes;
    decode_strips<V, bits, mapped, 1, columns, words>(job, &output, scales, zeros);
  }
}

template <class V, int bits, bool mapped, int columns, int words>
void decode_packed_rows(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  if (job.rows == columns) return decode_streams<V, bits, mapped, columns, words>(job, first, last, scales, zeros);
  if constexpr (columns > 1) decode_packed_rows<V, bits, mapped, columns - 1, words>(job, first, last, scales, zeros);
}

template <class V, int bits, bool mapped = false>
void decode_coding(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  job.words == 2 ? decode_packed_rows<V, bits, mapped, V::decode_words / 2, 2>(job, first, last, scales, zeros)
                 : decode_packed_rows<V, bits, mapped, V::decode_words, 1>(job, first, last, scales, zeros);
}

// Strips [first, last) of packed outputs; the plan's dwords are those of memory.
template <class V>
void decode_packed(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  const bool mapped = job.call.table;
  switch (job.call.bits) {
    case 2:
      return decode_coding<V, 2>(job, first, last, scales, zeros);
    case 3:
      return decode_coding<V, 3>(job, first, last, scales, zeros);
    case 4:
      return mapped ? decode_coding<V, 4, true>(job, first, last, scales, zeros)
                    : decode_coding<V, 4>(job, first, last, scales, zeros);
    case 5:
      return decode_coding<V, 5>(job, first, last, scales, zeros);
    case 6:
      return mapped ? decode_coding<V, 6, true>(job, first, last, scales, zeros)
                    : decode_coding<V, 6>(job, first, last, scales, zeros);
    default:
      return decode_coding<V, 8>(job, first, last, scales, zeros);
  }
}

// 2 * lanes outputs expanded to 16-bit pairs: [pair of k][2][lanes] dwords.
template <class V, bool nibbles>
void expand(const Job<V>& job, const Outputs<V, 2>& outputs, typename V::I* panel) {
  using I = typename V::I;
  constexpr int shifts = nibbles ? 4 : 2;
  const typename V::Reader reader(job.call, job.plan);
  alignas(64) I codes[piece_dwords];
  for (std::int32_t p = 0; p < job.plan.piece_count; p++) {
    const Piece& piece = job.plan.pieces[p];
    for (int v = 0; v < 2; v++) {
      outputs.read(job.call, reader, v, piece, codes);
      I* to = panel + static_cast<std::int64_t>(piece.dword) * shifts * 2 + v;
      for (std::int32_t d = 0; d < piece.dwords; d++) {
        const I dword = V::load(codes + d);
        for (int s = 0; s < shifts; s++, to += 2) V::store(to, V::template pairs<nibbles>(dword, s, job.call.bits));
      }
    }
  }
}

template <class V, int rows, int words>
void tile(const Job<V>& job, const Outputs<V, 2>& outputs, const typename V::I* panel, std::int64_t m0) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int all = rows * words;
  const Plan& plan = job.plan;
  const bool grouped = plan.groups > 1;
  F total[rows][2];
  for (int m = 0; m < rows; m++) total[m][0] = total[m][1] = V::set(0.0f);
  const std::int16_t* x[all];
  for (int m = 0; m < rows; m++)
    for (int w = 0; w < words; w++) x[m * words + w] = job.x[w] + (m0 + m) * plan.words;
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    I sum[all][2];
    for (int m = 0; m < rows; m++)
      for (int w = 0; w < words; w++)
        for (int v = 0; v < 2; v++)
          sum[m * words + w][v] = first_sum(outputs, block, v, job.x_sum[w][(m0 + m) * job.block_stride + b]);
    const std::int32_t pairs = block.dwords * plan.unit / 2;
    const I* weights = panel + static_cast<std::int64_t>(block.k);
    const std::int64_t at = block.k;
    for (std::int32_t i = 0; i < pairs; i++) {
      const I low = V::load(weights + 2 * i), high = V::load(weights + 2 * i + 1);
      for (int r = 0; r < all; r++) {
        const I pair = V::broadcast(x[r] + at + 2 * i);
        sum[r][0] = V::dot(sum[r][0], low, pair);
        sum[r][1] = V::dot(sum[r][1], high, pair);
      }
    }
    const float* scale = outputs.scale + block.group * 2 * V::lanes;
    for (int m = 0; m < rows; m++) {
      const F x_scale = V::set(job.x_scale[(m0 + m) * job.block_stride + b]);
      for (int v = 0; v < 2; v++) {
        I block_sum[words];
        for (int w = 0; w < words; w++) block_sum[w] = sum[m * words + w][v];
        const F unit = grouped ? V::multiply(x_scale, V::load(scale + v * V::lanes)) : x_scale;
        total[m][v] = V::fma(exact<V, words>(block_sum), unit, total[m][v]);
      }
    }
  }
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < 2; v++) finish(job, outputs, m0 + m, v, total[m][v]);
}

template <class V, int rows, int words>
void last_tile(const Job<V>& job, const Outputs<V, 2>& outputs, const typename V::I* panel, std::int64_t m0,
               std::int64_t left) {
  if constexpr (rows > 0) {
    if (left == rows) return tile<V, rows, words>(job, outputs, panel, m0);
    last_tile<V, rows - 1, words>(job, outputs, panel, m0, left);
  }
}

template <class V, int words>
void tiles(const Job<V>& job, const Outputs<V, 2>& outputs, const typename V::I* panel, std::int64_t first,
           std::int64_t last) {
  constexpr int rows = words == 1 ? V::tile_rows : V::tile_rows_of_two_words;
  std::int64_t m = first;
  for (; m + rows <= last; m += rows) tile<V, rows, words>(job, outputs, panel, m);
  last_tile<V, rows - 1, words>(job, outputs, panel, m, last - m);
}

template <class V, bool nibbles, int columns, int words>
void decode_rows(const Job<V>& job, std::int64_t first_output, float* scales, std::int32_t* zeros) {
  if (job.rows == columns) return decode<V, nibbles, columns, words>(job, first_output, scales, zeros);
  if constexpr (columns > 1) decode_rows<V, nibbles, columns - 1, words>(job, first_output, scales, zeros);
}

template <class V, bool nibbles>
void decode_any(const Job<V>& job, std::int64_t first_output, float* scales, std::int32_t* zeros) {
  if (job.words == 2) return decode_rows<V, nibbles, V::decode_words / 2, 2>(job, first_output, scales, zeros);
  decode_rows<V, nibbles, V::decode_words, 1>(job, first_output, scales, zeros);
}

template <class V>
void quantize(const Job<V>& job, std::int64_t m) {
  const std::int64_t words = m * job.plan.words, blocks = m * job.block_stride;
  std::int16_t* to[2] = {job.x[0] + words, job.x[1] + words};
  std::int32_t* sums[2] = {job.x_sum[0] + blocks, job.x_sum[1] + blocks};
  V::quantize(job.call, job.plan, job.first + m, to, job.x_scale + blocks, sums);
  const std::int32_t times = job.call.zero ? -1 : -job.call.zero_point;
  for (int w = 0; w < job.words; w++)
    for (std::int32_t b = 0; b < job.plan.block_count; b++) sums[w][b] *= times;
}

constexpr std::int64_t slab_rows = 1024, rows_repaying_expansion = 128;

template <class V>
void run(const CodedCall& call) {
  const int words = call.x_type == Type::fp32 ? 2 : 1;
  const std::int64_t slab = std::min(call.rows, slab_rows);
  const bool decoding = call.rows * words <= V::decode_words;
  const std::int64_t wide = decoding ? V::lanes : 2 * V::lanes;
  const std::int64_t panels = (call.outputs + wide - 1) / wide;

  const std::size_t plan_size = rounded(plan_bytes(call));
  const std::int64_t blocks = static_cast<std::int64_t>(plan_bytes(call) / (sizeof(Block) + sizeof(Piece)));
  const std::int64_t padded = (call.columns + 31) / 32 * 32 + 32;
  const std::size_t x_size = rounded(static_cast<std::size_t>(slab * padded) * sizeof(std::int16_t));
  const std::size_t block_size = rounded(static_cast<std::size_t>(slab * blocks) * 4);
  const bool straight = decoding && call.packed;
  const std::size_t scale_size = rounded(static_cast<std::size_t>(blocks * wide * (straight ? V::streams(1) : 1)) * 4);
  const std::size_t panel_size = decoding ? 0 : rounded(static_cast<std::size_t>(padded * wide) * 2);
  const std::size_t thread_size = 2 * scale_size + panel_size;
  const std::int64_t bytes = call.outputs * ((call.columns * call.bits + 7) / 8);
  const std::int64_t work = std::max(bytes, bytes * call.rows * words / 4);
  const int threads = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));

  char* memory =
      static_cast<char*>(scratch(plan_size + (x_size + block_size) * words + block_size + thread_size * threads));
  Job<V> job{call, make_plan(call, memory, straight), words, {}, {}, {}, 0, 0, blocks};
  memory += plan_size;
  for (int w = 0; w < words; w++, memory += x_size) job.x[w] = reinterpret_cast<std::int16_t*>(memory);
  for (int w = 0; w < words; w++, memory += block_size) job.x_sum[w] = reinterpret_cast<std::int32_t*>(memory);
  if (words == 1) job.x[1] = job.x[0], job.x_sum[1] = job.x_sum[0];
  job.x_scale = reinterpret_cast<float*>(memory);
  memory += block_size;

  const bool nibbles = job.plan.unit == 8;
  for (job.first = 0; job.first < call.rows; job.first += slab) {
    job.rows = std::min(slab, call.rows - job.first);
    if (decoding)
      for (std::int64_t m = 0; m < job.rows; m++) quantize(job, m);
    // Threads share out the outputs, or, where each still gets rows enough to repay expanding every weight for itself,
    // the rows of x: then none has to wait for the others' words.
    const bool by_rows = !decoding && job.rows >= rows_repaying_expansion * threads;
    const std::int64_t parts =
        decoding || panels >= 4 * threads ? 1 : std::clamp<std::int64_t>(job.rows / 24, 1, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      if (!decoding && !by_rows) {
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < job.rows; m++) quantize(job, m);
      }
#pragma omp for schedule(static) nowait
      for (int t = 0; t < threads; t++) {
        char* own = memory + thread_size * t;
        float* scales = reinterpret_cast<float*>(own);
        std::int32_t* zeros = reinterpret_cast<std::int32_t*>(own + scale_size);
        typename V::I* panel = reinterpret_cast<typename V::I*>(own + 2 * scale_size);
        const auto multiply = [&](std::int64_t output, std::int64_t from, std::int64_t to) {
          Outputs<V, 2> outputs;
          outputs.gather(call, job.plan, output, scales, zeros);
          nibbles ? expand<V, true>(job, outputs, panel) : expand<V, false>(job, outputs, panel);
          words == 1 ? tiles<V, 1>(job, outputs, panel, from, to) : tiles<V, 2>(job, outputs, panel, from, to);
        };
        if (straight) {
          decode_packed(job, panels * t / threads, panels * (t + 1) / threads, scales, zeros);
          continue;
        }
        if (by_rows) {
          const std::int64_t from = job.rows * t / threads, to = job.rows * (t + 1) / threads;
          for (std::int64_t m = from; m < to; m++) quantize(job, m);
          for (std::int64_t output = 0; output < call.outputs; output += wide) multiply(output, from, to);
          continue;
        }
        const std::int64_t tasks = panels * parts;
        for (std::int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; task++) {
          const std::int64_t output = task / parts * wide, part = task % parts;
          if (decoding)
            nibbles ? decode_any<V, true>(job, output, scales, zeros)
                    : decode_any<V, false>(job, output, scales, zeros);
          else
            multiply(output, job.rows * part / parts, job.rows * (part + 1) / parts);
        }
      }
    }
  }
}

}  // namespace
}  // namespace parco::linear
