// The product of bf16 x with dense bf16 weights on AMX tiles; see bf16_tiles.h. The weights are read where they lie,
// and the tiles of y come out with a lane for each row of x, so they are turned before they are stored.
#pragma once
#include "linear/bf16_tiles.h"
#include "linear/dense.h"

namespace parco::linear {
namespace {

struct DenseSide {
  const DenseCall& call;
  const char* x;  // [pair of tiles of rows][step][2][16] rows of pairs of columns
  std::int64_t steps, first_row, rows, first_output;

  const char* right(const Pass& pass, std::int64_t pair) const {
    return x + ((pass.first / 2 + pair) * steps + pass.step) * pair_size;
  }
  std::int64_t units(const Pass&) const { return 0; }
  void fill(const Pass&, std::int64_t) const {}
  void finish(const float* sums, std::int64_t left, std::int64_t right) const {
    const std::int64_t n = first_output + left;
    const int count = static_cast<int>(std::min(tile_rows, call.outputs - n));
    const __m512 bias = bias_of(call, n, count), one = _mm512_set1_ps(1.0f);
    alignas(64) __m512i turned[tile_rows];
    avx512::transpose([&](int i) { return _mm512_load_si512(sums + i * tile_rows); }, turned);
    for (std::int64_t m = right; m < std::min(right + tile_rows, rows); m++)
      store_sums(call, first_row + m, n, count, _mm512_castsi512_ps(turned[m - right]), one, bias);
  }
};

// 32 rows of x from row m on by the columns of one step, as pairs of columns; zero past the last row and column.
inline void turn_pair(const DenseCall& call, std::int64_t m, std::int64_t last_row, std::int64_t step, __m512i* to) {
  const std::int64_t k = step * step_columns, left = call.columns - k;
  const __mmask32 mask = left >= step_columns ? ~__mmask32{0} : static_cast<__mmask32>((1ull << left) - 1);
  const char* x = static_cast<const char*>(call.x) + k * 2;
  for (int tile = 0; tile < 2; tile++, m += tile_rows, to += tile_rows)
    avx512::transpose(
        [&](int i) {
          return m + i < last_row ? _mm512_maskz_loadu_epi16(mask, x + (m + i) * call.columns * 2)
                                  : _mm512_setzero_si512();
        },
        to);
}

// 192 rows of x (768 KB of 2,048 columns) stay in the L2 cache; fewer rows leave room for more columns.
constexpr std::int64_t most_pairs = 6, pair_steps = 384, fewest_steps = 72, most_steps = 144;
constexpr std::int64_t pairs_of_a_thread = 16, slab_rows = 1024;
// Bands of weights that pass over all rows of x before the next ones do: their sums are kept between two blocks of k.
constexpr std::int64_t bands_at_once = 44;

template <class T>
void run_bf16_dense(const DenseCall& call) {
  const std::int64_t slab_pairs = over(over(call.rows, over(call.rows, slab_rows)), 2 * tile_rows);
  const std::int64_t slab = slab_pairs * 2 * tile_rows;
  const std::int64_t steps = over(call.columns, step_columns), tiles = over(call.outputs, tile_rows);
  const std::int64_t work = call.outputs * call.columns * 2 * call.rows / 4;
  const int wanted = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));
  // Threads share out the rows of x while each has many, so that it turns to others less often; then the outputs, and
  // the rows again where those are too few for all.
  std::int64_t down = std::clamp<std::int64_t>(slab_pairs / pairs_of_a_thread, 1, wanted);
  while (wanted % down) down--;
  const std::int64_t across = std::clamp<std::int64_t>(tiles / (2 * band_tiles), 1, wanted / down);
  down = std::clamp<std::int64_t>(wanted / across, 1, slab_pairs);
  const int threads = static_cast<int>(across * down);

  const std::int64_t own_pairs = over(slab_pairs, down), chunk = over(own_pairs, over(own_pairs, most_pairs));
  const std::int64_t longest = std::clamp(pair_steps / chunk, fewest_steps, most_steps);
  Cut cut{0, 0, 2 * chunk, steps, over(steps, longest), true};
  const std::int64_t range = std::min(bands_at_once * band_tiles, over(tiles, across));
  const std::size_t x_size = static_cast<std::size_t>(slab_pairs * steps * pair_size);
  const std::size_t own_size = Share<T, DenseSide>::memory(range, cut);
  char* memory = static_cast<char*>(scratch(x_size + own_size * static_cast<std::size_t>(threads)));
  const TileConfig config = whole_tiles();

  for (std::int64_t first = 0; first < call.rows; first += slab) {
    const std::int64_t rows = std::min(slab, call.rows - first), pairs = over(rows, 2 * tile_rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (std::int64_t u = 0; u < pairs * steps; u++)
        turn_pair(call, first + u / steps * 2 * tile_rows, first + rows, u % steps,
                  reinterpret_cast<__m512i*>(memory + u * pair_size));
#pragma omp for schedule(static) nowait
      for (int t = 0; t < threads; t++) {
        const std::int64_t a = t % across, d = t / across, last = tiles * (a + 1) / across;
        Cut own = cut;
        own.first = 2 * (pairs * d / down), own.last = std::min(2 * (pairs * (d + 1) / down), over(rows, tile_rows));
        if (own.first >= own.last) continue;
        T::configure(config);
        for (std::int64_t tile = tiles * a / across; tile < last; tile += range) {
          const std::int64_t n = tile * tile_rows,
                             end = std::min(std::min(tile + range, last) * tile_rows, call.outputs);
          const Left weights{static_cast<const char*>(call.weight) + n * call.columns * 2, end - n, call.columns};
          const DenseSide side{call, memory, steps, first, rows, n};
          Share<T, DenseSide>(side, weights, own, memory + x_size + own_size * static_cast<std::size_t>(t)).run();
        }
        T::release();
      }
    }
  }
}

}  // namespace
}  // namespace parco::linear
