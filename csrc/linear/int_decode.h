// The integer product for few rows of x: weights go from memory through registers into the products.
#pragma once
#include "linear/int_job.h"

namespace parco::linear {
namespace {

// Row m of x from column k on, as the products take it.
template <Digits digits, class V>
inline const char* x_of(const Job<V>& job, int word, std::int64_t m, std::int64_t k) {
  return reinterpret_cast<const char*>(job.x[word] + m * job.plan.words) + k * V::x_bytes(digits);
}

template <class V, bool nibbles, int columns, Digits digits>
void decode(const Job<V>& job, std::int64_t first_output, float* scales, std::int32_t* zeros) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int words = count_of(digits), all = columns * words;
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
  I sum[all];
  for (int m = 0; m < columns; m++) total[m] = V::set(0.0f);
  for (I& one : sum) one = V::set(0);
  for (std::int32_t p = 0; p < plan.piece_count; p++) {
    const Piece& piece = plan.pieces[p];
    outputs.read(job.call, reader, 0, piece, codes);
    for (std::int64_t i = p * ahead; i < (p + 1) * ahead; i += 64) __builtin_prefetch(next_scales + i);
    const I* code = codes;
    for (std::int32_t b = piece.first; b < piece.last; b++) {
      const Block& block = plan.blocks[b];
      const char* x[all];
      for (int m = 0; m < columns; m++) {
        for (int w = 0; w < words; w++) {
          x[m * words + w] = x_of<digits>(job, w, m, block.k);
          if (opens<digits>(block))
            sum[m * words + w] = first_sum(outputs, block, 0, job.x_sum[w][m * job.block_stride + b]);
        }
      }
      V::template block_sums<nibbles, all, digits>(code, block.dwords, job.call.bits, x, sum);
      code += block.dwords;
      if (!closes<digits>(block)) continue;
      const F scale = grouped ? V::load(outputs.scale + block.group * V::lanes) : V::set(1.0f);
      for (int m = 0; m < columns; m++) total[m] = add_scaled<V, digits>(job, m, b, sum + m * words, scale, total[m]);
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
template <class V, int bits, bool mapped, int strips, int columns, Digits digits>
void decode_strips(const Job<V>& job, const std::int64_t* first, float* scales, std::int32_t* zeros) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int words = count_of(digits), all = columns * words, parts = V::parts(digits);
  const CodedCall& call = job.call;
  const Plan& plan = job.plan;
  const bool grouped = plan.groups > 1, direct = call.packed_scales();
  const float factor = call.scale_factor() * call.unit;
  const typename V::Lookup lookup(call);
  Outputs<V, 1> outputs[strips];
  const std::uint8_t* codes[strips];
  F total[strips][columns];
  I sum[strips][all][parts];
  for (int s = 0; s < strips; s++) {
    const std::int64_t kept = s * static_cast<std::int64_t>(plan.groups) * V::lanes;
    direct ? outputs[s].take(call, first[s]) : outputs[s].gather(call, plan, first[s], scales + kept, zeros + kept);
    codes[s] = call.packed_codes(first[s]);
    for (int m = 0; m < columns; m++) total[s][m] = V::set(0.0f);
    for (auto& of_row : sum[s])
      for (I& one : of_row) one = V::set(0);
  }
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    const char* x[all];
#pragma GCC unroll 8
    for (int r = 0; r < all; r++) {
      const int m = r / words, w = r % words;
      x[r] = x_of<digits>(job, w, m, block.k);
      if (!opens<digits>(block)) continue;
      const std::int32_t of_words = job.x_sum[w][m * job.block_stride + b];
#pragma GCC unroll 4
      for (int s = 0; s < strips; s++) {
        sum[s][r][0] =
            direct && call.zero
                ? V::multiply(V::load_zeros(call.zero + call.scale_index(first[s], block.group)), V::set(of_words))
                : first_sum(outputs[s], block, 0, of_words);
        for (int part = 1; part < parts; part++) sum[s][r][part] = V::set(0);
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
        V::template add_products<bits, mapped, all, digits>(at, lookup, x, d, sum[s]);
      }
    }
    if (!closes<digits>(block)) continue;
#pragma GCC unroll 4
    for (int s = 0; s < strips; s++) {
      F scale = V::set(1.0f);
      if (grouped)
        scale = direct ? V::load_scales(call, call.scale_index(first[s], block.group), factor)
                       : V::load(outputs[s].scale + block.group * V::lanes);
      for (int m = 0; m < columns; m++) {
        I whole[words];
        for (int w = 0; w < words; w++) whole[w] = V::template whole<parts>(sum[s][m * words + w]);
        total[s][m] = add_scaled<V, digits>(job, m, b, whole, scale, total[s][m]);
      }
    }
  }
  for (int s = 0; s < strips; s++)
    for (int m = 0; m < columns; m++) finish(job, outputs[s], m, 0, total[s][m]);
}

// Strips [first, last) in as many contiguous streams as are read at once.
template <class V, int bits, bool mapped, int columns, Digits digits>
void decode_streams(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  constexpr int streams = V::streams(columns * count_of(digits) * V::parts(digits));
  const std::int64_t length = (last - first) / streams;
  for (std::int64_t i = 0; i < length; i++) {
    std::int64_t outputs[streams];
    for (int s = 0; s < streams; s++) outputs[s] = (first + s * length + i) * V::lanes;
    decode_strips<V, bits, mapped, streams, columns, digits>(job, outputs, scales, zeros);
  }
  for (std::int64_t i = first + streams * length; i < last; i++) {
    const std::int64_t output = i * V::lanes;
    decode_strips<V, bits, mapped, 1, columns, digits>(job, &output, scales, zeros);
  }
}

template <class V, int bits, bool mapped, int columns, Digits digits>
void decode_packed_rows(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  if (job.rows == columns) return decode_streams<V, bits, mapped, columns, digits>(job, first, last, scales, zeros);
  if constexpr (columns > 1) decode_packed_rows<V, bits, mapped, columns - 1, digits>(job, first, last, scales, zeros);
}

template <class V, int bits, bool mapped = false>
void decode_coding(const Job<V>& job, std::int64_t first, std::int64_t last, float* scales, std::int32_t* zeros) {
  constexpr int most = V::decode_words;
  if (job.digits == Digits::byte)
    return decode_packed_rows<V, bits, mapped, most, Digits::byte>(job, first, last, scales, zeros);
  job.digits == Digits::two_words
      ? decode_packed_rows<V, bits, mapped, most / 2, Digits::two_words>(job, first, last, scales, zeros)
      : decode_packed_rows<V, bits, mapped, most, Digits::word>(job, first, last, scales, zeros);
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

template <class V, bool nibbles, int columns, Digits digits>
void decode_rows(const Job<V>& job, std::int64_t first_output, float* scales, std::int32_t* zeros) {
  if (job.rows == columns) return decode<V, nibbles, columns, digits>(job, first_output, scales, zeros);
  if constexpr (columns > 1) decode_rows<V, nibbles, columns - 1, digits>(job, first_output, scales, zeros);
}

template <class V, bool nibbles>
void decode_any(const Job<V>& job, std::int64_t first_output, float* scales, std::int32_t* zeros) {
  constexpr int most = V::decode_words;
  if (job.digits == Digits::byte) return decode_rows<V, nibbles, most, Digits::byte>(job, first_output, scales, zeros);
  job.digits == Digits::two_words
      ? decode_rows<V, nibbles, most / 2, Digits::two_words>(job, first_output, scales, zeros)
      : decode_rows<V, nibbles, most, Digits::word>(job, first_output, scales, zeros);
}

}  // namespace
}  // namespace parco::linear
