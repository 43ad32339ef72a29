// The product of bf16 x with codes on AMX tiles; see bf16_tiles.h. What stands at the same place of the 16 rows of a
// panel (coded.h) is read at once, so that pairs of columns come out as a tile takes them; codes by rows become such
// panels on the way. The weights of the next pass are expanded between the steps of this one.
//
// A scale of groups is a factor of the weight, which is rounded once to bf16: exact for e8m0 scales, and for e4m3 ones
// of fp4. The scale of a row, or of all, multiplies the sum.
#pragma once
#include "linear/bf16_tiles.h"
#include "linear/coded.h"
#include "linear/floats.h"
#include "linear/panels.h"

namespace parco::linear {
namespace {

constexpr std::int64_t codes_ahead = 2048;  // bytes of each panel

inline __m512i odd_halves() { return _mm512_set1_epi32(static_cast<int>(0xffff0000)); }

// Two neighbouring columns of 16 outputs, as floats whose lower halves are cut off.
inline __m512i joined(__m512i even, __m512i odd) {
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, odd_halves(), 0xf8);  // a | (b & c)
}

// The same rounded to the nearest, ties away from zero. NaN has to have room above it (lane_scales).
inline __m512i narrowed(__m512 even, __m512 odd) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  return joined(_mm512_add_epi32(_mm512_castps_si512(even), half), _mm512_add_epi32(_mm512_castps_si512(odd), half));
}

// What E::pairs gives of two columns: `plain` without a scale, or `scaled` by one of each output.
struct FloatPair {
  __m512 even, odd;
  __m512i plain() const { return narrowed(even, odd); }
  __m512i scaled(__m512 scale) const { return narrowed(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale)); }
};

struct HalfPair {
  __m512i both;
  __m512i plain() const { return both; }
  __m512i scaled(__m512 scale) const {
    return FloatPair{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                     _mm512_castsi512_ps(_mm512_and_si512(both, odd_halves()))}
        .scaled(scale);
  }
};

// pairs(at, use) calls use(i, columns 2 i and 2 i + 1) for the `step` codes of 16 rows at `at`.
struct NibblePairs {
  static constexpr int bits = 4, step = 8;
  __m512 table;

  explicit NibblePairs(const CodedCall& call) : table(_mm512_loadu_ps(call.values)) {}
  template <class Use>
  void pairs(const std::uint8_t* at, const Use& use) const {
    const __m512i codes = _mm512_loadu_si512(at);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)  // the table takes the low 4 bits
      use(i, FloatPair{_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * i), table),
                       _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 8 * i + 4), table)});
  }
};

// The upper halves of a number's fp32 pattern hold all of it.
inline std::uint16_t upper_half(float value) { return static_cast<std::uint16_t>(bits_of(value) >> 16); }

struct BytePairs {
  static constexpr int bits = 8, step = 4;
  __m512i upper[2], lower[2];

  explicit BytePairs(const CodedCall& call) {
    alignas(64) std::uint8_t high[128], low[128];
    for (int i = 0; i < 128; i++)
      high[i] = static_cast<std::uint8_t>(upper_half(call.values[i]) >> 8),
      low[i] = static_cast<std::uint8_t>(upper_half(call.values[i]));
    for (int i = 0; i < 2; i++) upper[i] = _mm512_load_si512(high + 64 * i), lower[i] = _mm512_load_si512(low + 64 * i);
  }
  template <class Use>
  void pairs(const std::uint8_t* at, const Use& use) const {
    const __m512i codes = _mm512_loadu_si512(at);
    const __m512i magnitude = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);                   // sees 7 bits
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(-128), 0xf8);  // a | (b & c)
    const __m512i low = _mm512_permutex2var_epi8(lower[0], codes, lower[1]);
    const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
    const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
    use(0, HalfPair{_mm512_castps_si512(_mm512_shuffle_ps(first, second, 0x88))});
    use(1, HalfPair{_mm512_castps_si512(_mm512_shuffle_ps(first, second, 0xdd))});
  }
};

// Of 32 codes in planes, vector v has the even or odd ones of an eight, a byte each.
struct SixPairs {
  static constexpr int bits = 6, step = 32;
  __m512i table[2];

  explicit SixPairs(const CodedCall& call) {
    alignas(64) std::uint16_t halves[64];
    for (int i = 0; i < 64; i++) halves[i] = upper_half(call.values[i]);
    for (int i = 0; i < 2; i++) table[i] = _mm512_load_si512(halves + 32 * i);
  }
  template <int v>
  static __m512i codes(const std::uint8_t* at) {
    const __m512i first = _mm512_loadu_si512(at + v / 2 * 64), second = _mm512_loadu_si512(at + (4 + v / 4) * 64);
    return _mm512_ternarylogic_epi32(
        _mm512_and_si512(_mm512_srli_epi32(first, v % 2 * 4), _mm512_set1_epi8(15)),
        v % 4 == 3 ? _mm512_srli_epi32(second, 2) : _mm512_slli_epi32(second, 4 - v % 4 * 2), _mm512_set1_epi8(48),
        0xf8);
  }
  template <class Use>
  void pairs(const std::uint8_t* at, const Use& use) const {
    unroll(
        [&](auto eight) {
          const __m512i even = codes<2 * decltype(eight)::value>(at), odd = codes<2 * decltype(eight)::value + 1>(at);
          const auto pair = [&](int t, __m512i low, __m512i high) {  // the table takes the low 6 bits
            const __m512i code = _mm512_mask_mov_epi16(low, 0xaaaaaaaa, high);
            use(4 * decltype(eight)::value + t, HalfPair{_mm512_permutex2var_epi16(table[0], code, table[1])});
          };
          pair(0, even, _mm512_slli_epi32(odd, 16));
          pair(1, _mm512_srli_epi32(even, 8), _mm512_slli_epi32(odd, 8));
          pair(2, _mm512_srli_epi32(even, 16), odd);
          pair(3, _mm512_srli_epi32(even, 24), _mm512_srli_epi32(odd, 8));
        },
        std::make_integer_sequence<int, 4>());
  }
};

// The scales of 16 outputs from n on, which begins a panel; what lies past the last one repeats it. One quiet NaN
// stands for all.
inline __m512 lane_scales(const CodedCall& call, std::int64_t n, std::int64_t group, float factor) {
  __m512 scale;
  const std::int64_t last = call.outputs - 1, at = call.scale_index(n, group);
  if (call.packed_scales()) {
    scale = avx512::load_scales(call.scale, call.scale_type, at, factor);
  } else if (call.scale_index(std::min(n + tile_rows - 1, last), group) == at) {
    scale = _mm512_set1_ps(load_float(call.scale, call.scale_type, at) * factor);
  } else {
    alignas(64) float found[tile_rows];
    for (std::int64_t i = 0; i < tile_rows; i++)
      found[i] = load_float(call.scale, call.scale_type, call.scale_index(std::min(n + i, last), group)) * factor;
    scale = _mm512_load_ps(found);
  }
  return _mm512_mask_mov_ps(scale, _mm512_cmp_ps_mask(scale, scale, _CMP_UNORD_Q),
                            _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
}

template <class E>
struct PanelSide {
  const CodedCall& call;
  const E& element;
  bool grouped;
  std::int64_t first_row, rows;
  char* weights[2];  // of passes in turn: [pair][step][2] tiles

  const char* right(const Pass& pass, std::int64_t pair) const {
    return weights[pass.index % 2] + pair * pass.steps * pair_size;
  }
  std::int64_t units(const Pass& pass) const { return pass.pairs() * pass.steps; }
  void fill(const Pass& pass, std::int64_t unit) const {
    const std::int64_t n = (pass.first + unit / pass.steps * 2) * tile_rows;
    const std::int64_t k = (pass.step + unit % pass.steps) * step_columns;
    __m512i* to = reinterpret_cast<__m512i*>(weights[pass.index % 2] + unit * pair_size);
    for (int tile = 0; tile < 2; tile++, to += tile_rows)
      grouped ? expand<true>(n + tile * tile_rows, k, to) : expand<false>(n + tile * tile_rows, k, to);
  }
  void finish(const float* sums, std::int64_t left, std::int64_t n) const {
    const int count = static_cast<int>(std::min(tile_rows, call.outputs - n));
    const float factor = call.scale_factor();
    const __m512 scale = grouped ? _mm512_set1_ps(factor) : lane_scales(call, n, 0, factor);
    const __m512 bias = bias_of(call, n, count);
    for (std::int64_t m = left; m < std::min(left + tile_rows, rows); m++, sums += tile_rows)
      store_sums(call, first_row + m, n, count, _mm512_load_ps(sums), scale, bias);
  }

 private:
  static constexpr std::int64_t dwords = step_columns * E::bits / 32;

  // Columns [k, k + 32) of 16 outputs from n on, zero past the last column and panel.
  template <bool scaled>
  void expand(std::int64_t n, std::int64_t k, __m512i* to) const {
    const std::int64_t columns = n < call.outputs ? std::min(step_columns, call.columns - k) : 0;
    alignas(64) std::uint8_t turned[dwords * panel_rows * 4];
    __m512 scale[2];  // groups are whole 16s of columns
    const std::uint8_t* at = turned;
    if (columns > 0 && call.packed) at = call.packed_codes(n) + k * E::bits / 8 * panel_rows;
    if (columns > 0 && !call.packed) turn(n, k, turned);
    if (columns > 0 && scaled) {
      const std::int64_t group = k / call.group, next = columns > 16 ? (k + 16) / call.group : group;
      scale[0] = lane_scales(call, n, group, 1.0f);
      scale[1] = next == group ? scale[0] : lane_scales(call, n, next, 1.0f);
    }
    for (std::int64_t i = 0; i < columns; i += E::step, at += E::step * E::bits / 8 * panel_rows) {
      for (int d = 0; call.packed && d < E::step * E::bits / 32; d++) __builtin_prefetch(at + d * 64 + codes_ahead);
      element.pairs(at, [&](int j, auto pair) {
        _mm512_store_si512(to + i / 2 + j, scaled ? pair.scaled(scale[(i / 2 + j) / 8]) : pair.plain());
      });
    }
    if (columns % 2)
      _mm512_store_si512(to + columns / 2, _mm512_andnot_si512(odd_halves(), _mm512_load_si512(to + columns / 2)));
    for (std::int64_t i = (columns + 1) / 2; i < tile_rows; i++) _mm512_store_si512(to + i, _mm512_setzero_si512());
  }

  // Codes by rows as a panel has them; rows past the last one repeat it.
  void turn(std::int64_t n, std::int64_t k, std::uint8_t* panel) const {
    constexpr std::int64_t bytes = dwords * 4;
    const std::int64_t row_bytes = (call.columns * E::bits + 7) / 8, from = k * E::bits / 8;
    std::uint8_t rows[panel_rows * bytes] = {};
    for (std::int64_t r = 0; r < panel_rows; r++)
      std::memcpy(rows + r * bytes, call.codes + std::min(n + r, call.outputs - 1) * row_bytes + from,
                  static_cast<std::size_t>(std::min(bytes, row_bytes - from)));
    if (E::bits == 6) return pack_codes(rows, panel, panel_rows, step_columns, E::bits, 1);
    for (std::int64_t d = 0; d < dwords; d++)
      for (std::int64_t r = 0; r < panel_rows; r++)
        std::memcpy(panel + (d * panel_rows + r) * 4, rows + r * bytes + d * 4, 4);
  }
};

// Where all of x stays in the L2 cache, 32 outputs by 2,048 columns are expanded at a time; else 192 outputs by 1,024
// columns, 384 KB and as much for the next, because every chunk of them reads x again.
constexpr std::int64_t kept_x = 768 * 1024, block_steps = 64, streamed_steps = 32, streamed_pairs = 6;
// Rows of x for which the weights are expanded once.
constexpr std::int64_t expansion_rows = 512;

template <class T, class E>
void run_bf16_panels(const CodedCall& call) {
  const std::int64_t slab_tiles = over(over(call.rows, over(call.rows, expansion_rows)), tile_rows);
  const std::int64_t slab = slab_tiles * tile_rows;
  const std::int64_t steps = over(call.columns, step_columns), tiles = over(call.outputs, tile_rows);
  const std::int64_t pairs = over(tiles, 2), work = call.outputs * call.columns * E::bits / 8 * call.rows / 4;
  const int wanted = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));
  // Threads share out the outputs and, where those are too few for all, the rows of x.
  const std::int64_t across = std::min<std::int64_t>(pairs, wanted);
  const std::int64_t down = std::clamp<std::int64_t>(wanted / across, 1, over(slab_tiles, band_tiles));
  const int threads = static_cast<int>(across * down);

  const std::int64_t left_tiles = over(slab_tiles, down);
  const bool streams = left_tiles * tile_rows * call.columns * 2 > kept_x;
  const std::int64_t chunk = streams ? std::min(streamed_pairs, over(pairs, across)) : 1;
  const Cut cut{0, 0, 2 * chunk, steps, over(steps, streams ? streamed_steps : block_steps), streams};
  const std::size_t weights_size = static_cast<std::size_t>(cut.chunk / 2 * cut.longest() * pair_size);
  const std::size_t share_size = Share<T, PanelSide<E>>::memory(left_tiles, cut);
  const std::size_t own_size = 2 * weights_size + share_size;
  char* memory = static_cast<char*>(scratch(own_size * static_cast<std::size_t>(threads)));
  const TileConfig config = whole_tiles();
  const E element(call);

  for (std::int64_t first = 0; first < call.rows; first += slab) {
    const std::int64_t row_tiles = over(std::min(slab, call.rows - first), tile_rows);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
      const std::int64_t a = t % across, d = t / across;
      const std::int64_t from = first + row_tiles * d / down * tile_rows;
      const std::int64_t to = std::min(first + row_tiles * (d + 1) / down * tile_rows, call.rows);
      if (from >= to) continue;
      char* own = memory + own_size * static_cast<std::size_t>(t);
      Cut share = cut;
      share.first = 2 * (pairs * a / across), share.last = std::min(2 * (pairs * (a + 1) / across), tiles);
      const Left x{static_cast<const char*>(call.x) + from * call.columns * 2, to - from, call.columns};
      const bool grouped = call.group < call.columns;
      const PanelSide<E> side{call, element, grouped, from, to - from, {own, own + weights_size}};
      T::configure(config);
      Share<T, PanelSide<E>>(side, x, share, own + 2 * weights_size).run();
      T::release();
    }
  }
}

// Codes of 4 and 6 bits, and floats of 8.
template <class T>
void run_bf16_codes(const CodedCall& call) {
  call.bits == 4   ? run_bf16_panels<T, NibblePairs>(call)
  : call.bits == 6 ? run_bf16_panels<T, SixPairs>(call)
                   : run_bf16_panels<T, BytePairs>(call);
}

}  // namespace
}  // namespace parco::linear
