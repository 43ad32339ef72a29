// The integer product on AMX tiles: the same sums as int_engine.h's, so the same bits.
//
// A 16-bit word is high * 256 + low with both bytes signed, and a block's sum is that of the high bytes times 256 plus
// that of the low ones; the codes are used unsigned (tdpbsud). A tile of x holds 16 rows by up to 64 bytes of k; a
// panel of the weights is expanded to bytes, 32 outputs to a row. T supplies the tile instructions (tiles.h). Of int8
// there is one byte, and a second tile of x holds 16 more rows instead.
#pragma once
#include "linear/int_avx512_vbmi.h"
#include "linear/tiles.h"

namespace parco::linear {
namespace {

// Every block takes the same `quads` (of 4 values of k) of memory, in steps of one tile of at most 16; what a short
// block leaves over is zero in x.
struct Tiling {
  std::int32_t step, steps, quads;
  std::int64_t row_bytes;  // of one digit of one row of x

  explicit Tiling(const Plan& plan) {
    std::int32_t most = 1;
    for (std::int32_t b = 0; b < plan.block_count; b++) most = std::max(most, plan.blocks[b].dwords * plan.unit / 4);
    step = std::min(most, 16);
    steps = (most + step - 1) / step;
    quads = step * steps;
    row_bytes = (static_cast<std::int64_t>(plan.block_count) * quads * 4 + 63) / 64 * 64;
  }
};

struct TileJob {
  const CodedCall& call;
  Plan plan;
  Tiling tiling;
  Digits kind;
  std::int8_t* digits[2][2];  // [word][high, low]: [slab rounded up to 32][tiling.row_bytes]; int8 in the first
  float* x_scale;             // [slab rounded up to 32][blocks]; of int8 the first alone, the row's
  std::int32_t* x_sum[2];     // the same
  std::int64_t first, rows;
};

// Tiles 0 to 3: sums of (high, low) x (left, right outputs). 4, 5: high and low bytes of x, or int8 of 16 rows and of
// 16 more. 6, 7: left and right weights.
inline TileConfig tile_config(const Tiling& tiling) {
  TileConfig config;
  for (int t = 0; t < 8; t++) {
    config.row_bytes[t] = static_cast<std::uint16_t>(t == 4 || t == 5 ? 4 * tiling.step : 64);
    config.rows[t] = static_cast<std::uint8_t>(t < 6 ? 16 : tiling.step);
  }
  return config;
}

// Row m of the slab: words in `own`, then split into bytes in the order in which the codes of a dword come out of it.
inline void split_row(const TileJob& job, std::int64_t m, std::int16_t* own) {
  const Plan& plan = job.plan;
  std::int16_t* words[2] = {own, own + plan.words};
  std::int32_t* sums[2] = {job.x_sum[0] + m * plan.block_count, job.x_sum[1] + m * plan.block_count};
  const auto as_they_come = [](__m512i values, std::int16_t* to) { _mm512_storeu_si512(to, values); };
  Bytes512::quantize_to(as_they_come, job.call, plan, job.first + m, words, job.x_scale + m * plan.block_count, sums);
  const std::int32_t times = job.call.zero ? -1 : -job.call.zero_point;
  alignas(64) std::int8_t from[64];
  for (int i = 0; i < 64; i++)
    from[i] = static_cast<std::int8_t>(plan.unit == 4 ? i : i / 8 * 8 + i % 8 / 4 + i % 4 * 2);
  const __m512i order = _mm512_load_si512(from), half = _mm512_set1_epi16(128);
  for (int w = 0; w < count_of(job.kind); w++) {
    for (std::int32_t b = 0; b < plan.block_count; b++) {
      sums[w][b] *= times;
      const std::int64_t to = m * job.tiling.row_bytes + static_cast<std::int64_t>(b) * job.tiling.quads * 4;
      for (std::int32_t k = 0; k < job.tiling.quads * 4; k += 64) {
        const auto part = [&](int offset) {
          const std::int32_t left = std::clamp(plan.blocks[b].length - k - offset, 0, 32);
          const __mmask32 mask = static_cast<__mmask32>((1ull << left) - 1);
          return _mm512_maskz_loadu_epi16(mask, words[w] + plan.blocks[b].k + k + offset);
        };
        const auto store = [&](std::int8_t* at, __m256i first, __m256i second) {
          const __m512i joined = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
          const std::int32_t left = std::min(64, job.tiling.quads * 4 - k);
          const __mmask64 mask = left == 64 ? ~0ull : (1ull << left) - 1;
          _mm512_mask_storeu_epi8(at + to + k, mask, _mm512_permutexvar_epi8(order, joined));
        };
        const __m512i first = part(0), second = part(32);
        const auto high = [&](__m512i value) {
          return _mm512_cvtepi16_epi8(_mm512_srai_epi16(_mm512_add_epi16(value, half), 8));
        };
        store(job.digits[w][0], high(first), high(second));
        store(job.digits[w][1], _mm512_cvtepi16_epi8(first), _mm512_cvtepi16_epi8(second));
      }
    }
  }
}

// Row m of the slab as int8, via `own`, every block where the tiles look for it.
inline void split_bytes(const TileJob& job, std::int64_t m, std::int8_t* own) {
  const Plan& plan = job.plan;
  std::int32_t* sums = job.x_sum[0] + m * plan.block_count;
  avx512::quantize_bytes(job.call, plan, job.first + m, own, job.x_scale + m * plan.block_count, sums);
  const std::int32_t times = job.call.zero ? -1 : -job.call.zero_point;
  std::int8_t* to = job.digits[0][0] + m * job.tiling.row_bytes;
  for (std::int32_t b = 0; b < plan.block_count; b++, to += job.tiling.quads * 4) {
    const Block& block = plan.blocks[b];
    if (block.opens) sums[b] *= times;
    const std::int32_t bytes = block.dwords * plan.unit;
    std::memcpy(to, own + block.k, static_cast<std::size_t>(bytes));
    std::memset(to + bytes, 0, static_cast<std::size_t>(job.tiling.quads * 4 - bytes));
  }
}

// 32 outputs as bytes: [block][quad][2][16] dwords of 4 codes.
inline void expand_bytes(const TileJob& job, const Outputs<Bytes512, 2>& outputs, __m512i* panel) {
  const bool nibbles = job.plan.unit == 8;
  const Bytes512::Reader reader(job.call, job.plan);
  alignas(64) __m512i codes[piece_dwords];
  for (std::int32_t p = 0; p < job.plan.piece_count; p++) {
    const Piece& piece = job.plan.pieces[p];
    for (int v = 0; v < 2; v++) {
      outputs.read(job.call, reader, v, piece, codes);
      const __m512i* code = codes;
      for (std::int32_t b = piece.first; b < piece.last; b++) {
        __m512i* to = panel + static_cast<std::int64_t>(b) * job.tiling.quads * 2 + v;
        for (std::int32_t d = 0; d < job.plan.blocks[b].dwords; d++, code++) {
          const __m512i dword = _mm512_load_si512(code), mask = Bytes512::byte_mask(job.call.bits);
          _mm512_store_si512(to, nibbles ? _mm512_and_si512(dword, mask) : dword);
          to += 2;
          if (!nibbles) continue;
          _mm512_store_si512(to, _mm512_and_si512(_mm512_srli_epi16(dword, 4), mask));
          to += 2;
        }
      }
    }
  }
}

// Rows of x that a set of sums belongs to.
constexpr int band_rows(Digits digits) { return digits == Digits::byte ? 32 : 16; }

template <class T, Digits digits>
void tile_block(const TileJob& job, std::int64_t m0, std::int32_t b, int w, const __m512i* panel,
                std::int32_t (*sums)[256]) {
  const std::int8_t* first = job.digits[w][0];
  const std::int8_t* second = digits == Digits::byte ? first + 16 * job.tiling.row_bytes : job.digits[w][1];
  const std::int64_t at = m0 * job.tiling.row_bytes + static_cast<std::int64_t>(b) * job.tiling.quads * 4;
  const __m512i* weights = panel + static_cast<std::int64_t>(b) * job.tiling.quads * 2;
  if (opens<digits>(job.plan.blocks[b]))
    T::template zero<0>(), T::template zero<1>(), T::template zero<2>(), T::template zero<3>();
  for (std::int32_t s = 0; s < job.tiling.steps; s++) {
    T::template load<4>(first + at + s * job.tiling.step * 4, job.tiling.row_bytes);
    T::template load<5>(second + at + s * job.tiling.step * 4, job.tiling.row_bytes);
    T::template load<6>(weights + s * job.tiling.step * 2, 128);
    T::template load<7>(weights + s * job.tiling.step * 2 + 1, 128);
    T::template multiply<0, 4, 6>(), T::template multiply<1, 4, 7>();
    T::template multiply<2, 5, 6>(), T::template multiply<3, 5, 7>();
  }
  if (!closes<digits>(job.plan.blocks[b])) return;
  T::template store<0>(sums[0], 64), T::template store<1>(sums[1], 64);
  T::template store<2>(sums[2], 64), T::template store<3>(sums[3], 64);
}

// The exact sums of row m of a band and the outputs of vector v, for their block's scale.
template <Digits digits>
inline __m512 exact_sum(const std::int32_t (*sums)[4][256], std::int64_t m, int v, const __m512i* first) {
  constexpr int words = count_of(digits);
  __m512i sum[words];
  for (int w = 0; w < words; w++) {
    const auto part = [&](int half) { return _mm512_load_si512(sums[w][2 * half + v] + m % 16 * 16); };
    const __m512i both = digits == Digits::byte ? part(static_cast<int>(m / 16))
                                                : _mm512_add_epi32(_mm512_slli_epi32(part(0), 8), part(1));
    sum[w] = _mm512_add_epi32(both, first[w]);
  }
  return exact<Bytes512, digits>(sum);
}

// A band of x by 32 outputs.
template <class T, Digits digits>
void tile_rows(const TileJob& job, const Outputs<Bytes512, 2>& outputs, const __m512i* panel, std::int64_t m0) {
  constexpr int words = count_of(digits), band = band_rows(digits);
  const Plan& plan = job.plan;
  const std::int64_t rows = std::min<std::int64_t>(band, job.rows - m0);
  const Job<Bytes512> whole{job.call, plan, digits, {}, job.x_scale, {}, job.first, job.rows, plan.block_count};
  ask_for_addend(job.call, job.first + m0, rows, outputs.first, outputs.count);
  alignas(64) std::int32_t sums[words][4][256];
  alignas(64) float totals[band][2][16] = {};
  std::int32_t open = 0;
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    if (opens<digits>(plan.blocks[b])) open = b;
    for (int w = 0; w < words; w++) tile_block<T, digits>(job, m0, b, w, panel, sums[w]);
    if (!closes<digits>(plan.blocks[b])) continue;
    for (std::int64_t m = 0; m < rows; m++) {
      for (int v = 0; v < 2; v++) {
        __m512i first[words];
        for (int w = 0; w < words; w++)
          first[w] = first_sum(outputs, plan.blocks[b], v, job.x_sum[w][(m0 + m) * plan.block_count + open]);
        const float* scales = outputs.scale + (plan.blocks[b].group * 2 + v) * 16;
        const __m512 scale = plan.groups > 1 ? _mm512_load_ps(scales) : _mm512_set1_ps(1.0f);
        const __m512 unit = digits == Digits::byte
                                ? scale
                                : _mm512_mul_ps(_mm512_set1_ps(job.x_scale[(m0 + m) * plan.block_count + b]), scale);
        _mm512_store_ps(totals[m][v],
                        _mm512_fmadd_ps(exact_sum<digits>(sums, m, v, first), unit, _mm512_load_ps(totals[m][v])));
      }
    }
  }
  for (std::int64_t m = 0; m < rows; m++)
    for (int v = 0; v < 2; v++) finish(whole, outputs, m0 + m, v, _mm512_load_ps(totals[m][v]));
}

template <class T>
void tile_band(const TileJob& job, const Outputs<Bytes512, 2>& outputs, const __m512i* panel, std::int64_t band) {
  if (job.kind == Digits::byte) return tile_rows<T, Digits::byte>(job, outputs, panel, 32 * band);
  job.kind == Digits::word ? tile_rows<T, Digits::word>(job, outputs, panel, 16 * band)
                           : tile_rows<T, Digits::two_words>(job, outputs, panel, 16 * band);
}

template <class T>
void run_tiles(const CodedCall& call) {
  const Digits kind = digits_of(call);
  const int words = count_of(kind), parts_of_word = kind == Digits::byte ? 1 : 2, high = band_rows(kind);
  const std::int64_t slab = std::min(call.rows, slab_rows), tall = (slab + high - 1) / high * high;
  const std::int64_t panels = (call.outputs + 31) / 32;
  const std::size_t plan_size = rounded(plan_bytes(call));
  const Plan sized = make_plan(call, scratch(plan_size));
  const Tiling tiling(sized);
  const std::size_t digit_size = rounded(static_cast<std::size_t>(tall * tiling.row_bytes));
  const std::size_t block_size = rounded(static_cast<std::size_t>(tall) * sized.block_count * 4);
  const std::size_t scale_size = rounded(static_cast<std::size_t>(sized.block_count) * 32 * 4);
  const std::size_t words_size = rounded(static_cast<std::size_t>(2 * sized.words) * sizeof(std::int16_t));
  const std::size_t panel_size = static_cast<std::size_t>(sized.block_count) * tiling.quads * 2 * 64;
  const std::size_t thread_size = 2 * scale_size + words_size + panel_size;
  const int threads = call.threads;

  char* memory = static_cast<char*>(
      scratch(plan_size + (parts_of_word * digit_size + block_size) * words + block_size + thread_size * threads));
  TileJob job{call, make_plan(call, memory), tiling, kind, {}, {}, {}, 0, 0};
  memory += plan_size;
  for (int w = 0; w < words; w++)
    for (int d = 0; d < parts_of_word; d++, memory += digit_size)
      job.digits[w][d] = reinterpret_cast<std::int8_t*>(memory);
  for (int w = 0; w < words; w++, memory += block_size) job.x_sum[w] = reinterpret_cast<std::int32_t*>(memory);
  if (words == 1) job.x_sum[1] = job.x_sum[0];
  job.x_scale = reinterpret_cast<float*>(memory);
  memory += block_size;
  // Rows past the last fill their tile; they only have to be readable numbers.
  for (int w = 0; w < words; w++)
    for (int d = 0; d < parts_of_word; d++)
      std::memset(job.digits[w][d] + slab * tiling.row_bytes, 0, (tall - slab) * tiling.row_bytes);

  const TileConfig config = tile_config(tiling);
  for (job.first = 0; job.first < call.rows; job.first += slab) {
    job.rows = std::min(slab, call.rows - job.first);
    const std::int64_t bands = (job.rows + high - 1) / high;
    const std::int64_t parts = panels >= 4 * threads ? 1 : std::clamp<std::int64_t>(bands / 2, 1, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (int t = 0; t < threads; t++) {
        std::int16_t* own = reinterpret_cast<std::int16_t*>(memory + thread_size * t + 2 * scale_size);
        for (std::int64_t m = job.rows * t / threads; m < job.rows * (t + 1) / threads; m++)
          kind == Digits::byte ? split_bytes(job, m, reinterpret_cast<std::int8_t*>(own)) : split_row(job, m, own);
      }
#pragma omp for schedule(static) nowait
      for (int t = 0; t < threads; t++) {
        char* own = memory + thread_size * t;
        float* scales = reinterpret_cast<float*>(own);
        std::int32_t* zeros = reinterpret_cast<std::int32_t*>(own + scale_size);
        __m512i* panel = reinterpret_cast<__m512i*>(own + 2 * scale_size + words_size);
        T::configure(config);
        const std::int64_t tasks = panels * parts;
        for (std::int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; task++) {
          const std::int64_t part = task % parts;
          Outputs<Bytes512, 2> outputs;
          outputs.gather(call, job.plan, task / parts * 32, scales, zeros);
          expand_bytes(job, outputs, panel);
          for (std::int64_t band = bands * part / parts; band < bands * (part + 1) / parts; band++)
            tile_band<T>(job, outputs, panel, band);
        }
        T::release();
      }
    }
  }
}

}  // namespace
}  // namespace parco::linear
