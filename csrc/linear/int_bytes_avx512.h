// The integer product of many rows of int8 for AVX-512, with V::dot_bytes for the products: bands of rows against
// strips of 16 outputs.
//
// x lies in bands of up to 12 rows, 4 columns of each row after the other, so that a band is one stream whose dwords
// are broadcast; 12 rows by 2 strips of sums, the weights and one broadcast fill the registers, or 6 rows where groups
// have scales. x may also be codes of 4 bits under scales of their own (CodedCall::x_scale). Codes of 8 bits are
// used where they lie in panels; others become bytes, in the same order, in a panel that stays in the L2 cache.
#pragma once
#include <cassert>

#include "linear/bytes_avx512.h"

namespace parco::linear {
namespace {

constexpr int most_band_rows = 12, grouped_rows = 6, strips_at_once = 2;

// Whether sums are scaled group by group.
inline bool in_groups(const CodedCall& call) { return call.group < call.columns || call.x_scale; }

template <class V>
struct Bands {
  Job<V> job;
  int height;               // rows of a band
  std::int64_t band_bytes;  // of a band in memory
  std::int8_t* x;           // [band][quad][height] dwords

  std::int8_t* band(std::int64_t index) const { return x + index * band_bytes; }
};

// Rows of band `index`, quantized in `own` and dealt out; rows past the last stay zero.
template <class V>
void fill_band(const Bands<V>& bands, std::int64_t index, std::int8_t* own) {
  const Job<V>& job = bands.job;
  std::int8_t* band = bands.band(index);
  const std::int64_t quads = bands.band_bytes / 4 / bands.height;
  const std::int32_t times = job.call.zero ? -1 : -job.call.zero_point;
  for (int r = 0; r < bands.height; r++) {
    const std::int64_t m = index * bands.height + r;
    if (m < job.rows) {
      std::int32_t* sums = job.x_sum[0] + m * job.block_stride;
      const auto take = job.call.x_scale ? avx512::take_codes : avx512::quantize_bytes;
      take(job.call, job.plan, job.first + m, own, job.x_scale + m * job.block_stride, sums);
      for (std::int32_t b = 0; b < job.plan.block_count; b++)
        if (job.plan.blocks[b].opens) sums[b] *= times;
    } else {
      std::memset(own, 0, static_cast<std::size_t>(quads * 4));
    }
    for (std::int64_t q = 0; q < quads; q++) std::memcpy(band + (q * bands.height + r) * 4, own + q * 4, 4);
  }
}

// Strip v of `outputs` as bytes: [quad][16] dwords of 4 codes.
template <class V>
void expand_strip(const Job<V>& job, const Outputs<V, strips_at_once>& outputs, int v, __m512i* to) {
  const bool nibbles = job.plan.unit == 8;
  const typename V::Reader reader(job.call, job.plan);
  const __m512i mask = V::byte_mask(job.call.bits);
  alignas(64) __m512i codes[piece_dwords];
  for (std::int32_t p = 0; p < job.plan.piece_count; p++) {
    const Piece& piece = job.plan.pieces[p];
    outputs.read(job.call, reader, v, piece, codes);
    __m512i* at = to + static_cast<std::int64_t>(piece.dword) * (nibbles ? 2 : 1);
    for (std::int32_t d = 0; d < piece.dwords; d++) {
      const __m512i dword = _mm512_load_si512(codes + d);
      _mm512_store_si512(at++, nibbles ? _mm512_and_si512(dword, mask) : dword);
      if (nibbles) _mm512_store_si512(at++, _mm512_and_si512(_mm512_srli_epi16(dword, 4), mask));
    }
  }
}

// Adds the products of columns [4 * from, 4 * to) to the sums. A function of its own: among the other vectors of
// multiply_band GCC 12 keeps half of the sums in memory, which takes 1.5 times as long.
template <class V, int rows>
[[gnu::noinline]] void add_quads(__m512i (*sums)[strips_at_once], const std::uint8_t* const* weights, std::int64_t from,
                                 std::int64_t to, const std::int8_t* x) {
  constexpr int strips = strips_at_once;
  __m512i sum[rows][strips];
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
    for (int v = 0; v < strips; v++) sum[m][v] = sums[m][v];
  const std::uint8_t *w0 = weights[0] + from * 64, *w1 = weights[1] + from * 64;
  const std::int8_t* dwords = x + from * rows * 4;
  const auto ahead = [](const void* stream) {
    _mm_prefetch(static_cast<const char*>(stream) + read_ahead, _MM_HINT_T0);
  };
  for (std::int64_t q = from; q < to; q++, dwords += rows * 4, w0 += 64, w1 += 64) {
    const __m512i codes[2] = {_mm512_loadu_si512(w0), _mm512_loadu_si512(w1)};
    ahead(w0), ahead(w1), ahead(dwords);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
      const __m512i dword = V::broadcast(dwords + 4 * m);
#pragma GCC unroll 2
      for (int v = 0; v < strips; v++) sum[m][v] = V::dot_bytes(sum[m][v], codes[v], dword);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
    for (int v = 0; v < strips; v++) sums[m][v] = sum[m][v];
}

// What scales a group's sums.
enum class Grouped {
  scales,            // those of the weights
  zeros_and_scales,  // those too, and the sums begin at zeros of the weights'
  both_scales,       // x has scales of groups as well
};

// The sums of each group, scaled, of `rows` rows of x from m0 on. Of no more than `grouped_rows`, so that the sums of a
// group and of all groups stay in registers.
template <class V, int rows, Grouped grouped>
[[gnu::noinline]] void add_groups(const Job<V>& job, const Outputs<V, strips_at_once>& outputs,
                                  const std::uint8_t* const* weights, const std::int8_t* x, std::int64_t m0,
                                  __m512 (*totals)[strips_at_once]) {
  constexpr int strips = strips_at_once;
  const Plan& plan = job.plan;
  const Block* blocks = plan.blocks;
  const std::int32_t count = plan.block_count, unit = plan.unit;
  const std::int64_t stride = job.block_stride;
  const std::int32_t* sums[rows];
  const float* scales[rows];
  for (int m = 0; m < rows; m++) {
    // Rows past the last are not stored.
    const std::int64_t row = std::min<std::int64_t>(m0 + m, job.rows - 1);
    sums[m] = job.x_sum[0] + row * stride;
    if constexpr (grouped == Grouped::both_scales) scales[m] = job.call.x_scale + (job.first + row) * plan.groups;
  }
  __m512 total[rows][strips];
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
    for (int v = 0; v < strips; v++) total[m][v] = _mm512_setzero_ps();
  const std::uint8_t *w0 = weights[0], *w1 = weights[1];
  for (std::int32_t b = 0; b < count; b++) {
    const std::int32_t open = b, group = blocks[b].group;
    std::int64_t quads = blocks[b].dwords;
    while (!blocks[b].closes) quads += blocks[++b].dwords;
    quads = quads * unit / 4;
    const float* scale = outputs.scale + static_cast<std::int64_t>(group) * strips * V::lanes;
    __m512i sum[rows][strips];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
      for (int v = 0; v < strips; v++) {
        if constexpr (grouped == Grouped::zeros_and_scales)
          sum[m][v] = first_sum(outputs, blocks[open], v, sums[m][open]);
        else
          sum[m][v] = _mm512_set1_epi32(sums[m][open]);
      }
    for (std::int64_t q = 0; q < quads; q++, x += rows * 4, w0 += 64, w1 += 64) {
      const __m512i codes[2] = {_mm512_loadu_si512(w0), _mm512_loadu_si512(w1)};
#pragma GCC unroll 12
      for (int m = 0; m < rows; m++) {
        const __m512i dword = V::broadcast(x + 4 * m);
#pragma GCC unroll 2
        for (int v = 0; v < strips; v++) sum[m][v] = V::dot_bytes(sum[m][v], codes[v], dword);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < strips; v++) {
      // The scale of a row that has but one multiplies at the end (finish).
      const __m512 of_weights = plan.groups > 1 ? _mm512_load_ps(scale + v * V::lanes) : _mm512_set1_ps(1.0f);
#pragma GCC unroll 12
      for (int m = 0; m < rows; m++) {
        __m512 both = of_weights;
        if constexpr (grouped == Grouped::both_scales) both = _mm512_mul_ps(both, _mm512_set1_ps(scales[m][group]));
        total[m][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][v]), both, total[m][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
    for (int v = 0; v < strips; v++) totals[m][v] = total[m][v];
}

// The sums of `rows` whole rows of x from m0 on.
template <class V, int rows>
void add_whole_rows(const Job<V>& job, const Outputs<V, strips_at_once>& outputs, const std::uint8_t* const* weights,
                    const std::int8_t* x, std::int64_t m0, __m512 (*total)[strips_at_once]) {
  constexpr int strips = strips_at_once;
  const Plan& plan = job.plan;
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < strips; v++) total[m][v] = _mm512_setzero_ps();
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& first = plan.blocks[b];
    while (!plan.blocks[b].closes) b++;
    const Block& last = plan.blocks[b];
    const std::int64_t from = first.k / 4, to = last.k / 4 + last.dwords * plan.unit / 4;
    __m512i sum[rows][strips];
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
      const std::int64_t row = std::min<std::int64_t>(m0 + m, job.rows - 1);
      const std::int32_t of_x = job.x_sum[0][row * job.block_stride + (&first - plan.blocks)];
#pragma GCC unroll 2
      for (int v = 0; v < strips; v++) sum[m][v] = first_sum(outputs, first, v, of_x);
    }
    add_quads<V, rows>(sum, weights, from, to, x);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
      for (int v = 0; v < strips; v++) total[m][v] = _mm512_add_ps(total[m][v], _mm512_cvtepi32_ps(sum[m][v]));
  }
}

// `rows` rows of x from m0 on, which `x` holds, against the strips of `outputs`.
template <class V, int rows>
void multiply_band(const Job<V>& job, const Outputs<V, strips_at_once>& outputs, const std::uint8_t* const* weights,
                   const std::int8_t* x, std::int64_t m0) {
  constexpr int strips = strips_at_once;
  const std::int64_t left = std::min<std::int64_t>(rows, job.rows - m0);
  ask_for_addend(job.call, job.first + m0, left, outputs.first, outputs.count);
  __m512 total[rows][strips];
  auto add = add_whole_rows<V, rows>;
  assert(!in_groups(job.call) || rows <= grouped_rows);
  if constexpr (rows <= grouped_rows) {
    if (in_groups(job.call))
      add = job.call.x_scale ? add_groups<V, rows, Grouped::both_scales>
            : outputs.zero   ? add_groups<V, rows, Grouped::zeros_and_scales>
                             : add_groups<V, rows, Grouped::scales>;
  }
  add(job, outputs, weights, x, m0, total);
  for (std::int64_t m = 0; m < left; m++)
    for (int v = 0; v < strips; v++) finish(job, outputs, m0 + m, v, total[m][v]);
}

template <class V, int rows = most_band_rows>
void multiply_bands(const Bands<V>& bands, const Outputs<V, strips_at_once>& outputs,
                    const std::uint8_t* const* weights, std::int64_t first, std::int64_t last) {
  if (bands.height == rows) {
    for (std::int64_t i = first; i < last; i++)
      multiply_band<V, rows>(bands.job, outputs, weights, bands.band(i), i * rows);
    return;
  }
  if constexpr (rows > 1) multiply_bands<V, rows - 1>(bands, outputs, weights, first, last);
}

template <class V>
void run_bytes(const CodedCall& call) {
  constexpr int wide = strips_at_once * V::lanes;
  const std::int64_t slab = std::min(call.rows, slab_rows), panels = (call.outputs + wide - 1) / wide;
  const int most_rows = in_groups(call) ? grouped_rows : most_band_rows;
  const std::int64_t most_bands = (slab + most_rows - 1) / most_rows;
  const int height = static_cast<int>((slab + most_bands - 1) / most_bands);
  const bool direct = call.packed && call.bits == 8;
  const std::size_t plan_size = rounded(plan_bytes(call));
  const std::int64_t blocks = static_cast<std::int64_t>(plan_bytes(call) / (sizeof(Block) + sizeof(Piece)));
  const std::int64_t padded = (call.columns + 63) / 64 * 64;
  const std::int64_t band_bytes = padded * height;
  const std::size_t x_size = rounded(static_cast<std::size_t>(band_bytes * most_bands));
  const std::size_t block_size = rounded(static_cast<std::size_t>(slab * blocks) * 4);
  const std::size_t scale_size = rounded(static_cast<std::size_t>(blocks * wide) * 4);
  const std::size_t strip_size = direct ? 0 : static_cast<std::size_t>(padded) * V::lanes;
  const std::size_t row_size = static_cast<std::size_t>(padded);
  const std::size_t thread_size = 2 * scale_size + strips_at_once * strip_size + row_size;
  const int threads = static_cast<int>(
      std::clamp<std::int64_t>(call.rows * call.outputs * call.columns / 8 / worth_a_thread, 1, call.threads));

  char* memory = static_cast<char*>(scratch(plan_size + x_size + 2 * block_size + thread_size * threads));
  Bands<V> bands{{call, make_plan(call, memory), Digits::byte, {}, {}, {}, 0, 0, blocks}, height, band_bytes, {}};
  Job<V>& job = bands.job;
  memory += plan_size;
  bands.x = reinterpret_cast<std::int8_t*>(memory), memory += x_size;
  job.x_sum[0] = reinterpret_cast<std::int32_t*>(memory), memory += block_size;
  job.x_scale = reinterpret_cast<float*>(memory), memory += block_size;

  for (job.first = 0; job.first < call.rows; job.first += slab) {
    job.rows = std::min(slab, call.rows - job.first);
    const std::int64_t count = (job.rows + height - 1) / height;
    const std::int64_t parts = panels >= 4 * threads ? 1 : std::clamp<std::int64_t>(count / 2, 1, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int t = 0; t < threads; t++) {
        std::int8_t* own = reinterpret_cast<std::int8_t*>(memory + thread_size * (t + 1) - row_size);
        for (std::int64_t i = count * t / threads; i < count * (t + 1) / threads; i++) fill_band<V>(bands, i, own);
      }
#pragma omp for schedule(static) nowait
      for (int t = 0; t < threads; t++) {
        char* own = memory + thread_size * t;
        float* scales = reinterpret_cast<float*>(own);
        std::int32_t* zeros = reinterpret_cast<std::int32_t*>(own + scale_size);
        __m512i* strips = reinterpret_cast<__m512i*>(own + 2 * scale_size);
        const std::int64_t tasks = panels * parts;
        for (std::int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; task++) {
          const std::int64_t output = task / parts * wide, part = task % parts;
          Outputs<V, strips_at_once> outputs;
          outputs.gather(call, job.plan, output, scales, zeros);
          const std::uint8_t* weights[strips_at_once];
          for (int v = 0; v < strips_at_once; v++) {
            __m512i* strip = strips + v * strip_size / sizeof(__m512i);
            // Strips past the last repeat it.
            const std::int64_t n = std::min(output + v * V::lanes, call.outputs - 1) / V::lanes;
            weights[v] = direct ? call.packed_codes(n * V::lanes) : reinterpret_cast<std::uint8_t*>(strip);
            if (!direct) expand_strip(job, outputs, v, strip);
          }
          multiply_bands<V>(bands, outputs, weights, count * part / parts, count * (part + 1) / parts);
        }
      }
    }
  }
}

}  // namespace
}  // namespace parco::linear
