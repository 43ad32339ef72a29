// The fp32 product of many rows of x: `float_block` columns of some outputs are expanded to fp32 in the cache, and
// multiplied with a few rows of x at a time. A lane is an output. Included by one translation unit per instruction set,
// everything is unnamed (see floats.h). V is its vector type.
#pragma once
#include <algorithm>

#include "linear/float.h"
#include "linear/floats.h"
#include "linear/write.h"

namespace parco::linear {
namespace {

constexpr std::int64_t panel_outputs = 256, slab_rows = 512;

// Rows of x in tiles of at most V::tile_rows, as equal as can be: for every block of columns, and every tile, [column]
// [row of the tile].
template <class V>
struct Tiles {
  std::int64_t rows, columns;
  std::int64_t count() const { return (rows + V::tile_rows - 1) / V::tile_rows; }
  std::int64_t first(std::int64_t t) const { return rows * t / count(); }
  std::int64_t height(std::int64_t t) const { return first(t + 1) - first(t); }
  std::int64_t width(std::int64_t k) const { return std::min(float_block, columns - k); }
  std::int64_t start(std::int64_t t, std::int64_t k) const { return rows * k + first(t) * width(k); }
};

// Expanded weights: [pair of vectors of outputs][column][2][lanes].
template <class V>
float* expanded(float* panel, std::int64_t output, std::int64_t column) {
  return panel + output / (2 * V::lanes) * (2 * V::lanes * float_block) + column * 2 * V::lanes +
         output / V::lanes % 2 * V::lanes;
}

// By the unit of an element, E::unit. Not a part of the scale, which may be the greatest that there is.
template <class V, class E>
typename V::F scaled(typename V::F value) {
  if constexpr (E::unit == 1.0f) return value;
  return V::multiply(value, V::set(E::unit));
}

// One tile of x against 2 * lanes outputs: sums [rows][stride].
template <class V, int rows>
void multiply_tile(const float* x, const float* weights, std::int64_t count, bool first, float* sums,
                   std::int64_t stride) {
  using F = typename V::F;
  F sum[rows][2];
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++) sum[m][0] = sum[m][1] = V::set(0.0f);
  for (std::int64_t k = 0; k < count; k++) {
    const F low = V::load(weights + 2 * k * V::lanes), high = V::load(weights + (2 * k + 1) * V::lanes);
#pragma GCC unroll 12
    for (int m = 0; m < rows; m++) {
      const F value = V::set(x[k * rows + m]);
      sum[m][0] = V::fma(value, low, sum[m][0]);
      sum[m][1] = V::fma(value, high, sum[m][1]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++) {
    for (int v = 0; v < 2; v++) {
      float* to = sums + m * stride + v * V::lanes;
      V::store(to, first ? sum[m][v] : V::add(V::load(to), sum[m][v]));
    }
  }
}

template <class V, int rows>
void multiply_rows(std::int64_t height, const float* x, const float* weights, std::int64_t count, bool first,
                   float* sums, std::int64_t stride) {
  if (height == rows) return multiply_tile<V, rows>(x, weights, count, first, sums, stride);
  if constexpr (rows > 1) multiply_rows<V, rows - 1>(height, x, weights, count, first, sums, stride);
}

// Outputs [first, last), of which `first` begins a panel. expand(n, outputs, k, count, panel) puts columns [k, k +
// count) of `outputs` rows from n on into `panel`.
template <class V, class Call, class Expand>
void multiply_outputs(const Call& call, const Tiles<V>& tiles, const float* x, std::int64_t first_row,
                      std::int64_t first, std::int64_t last, float* own, Expand& expand) {
  float* panel = own;
  float* sums = own + panel_outputs * float_block;
  for (std::int64_t n = first; n < last; n += panel_outputs) {
    const std::int64_t outputs = std::min(panel_outputs, last - n);
    for (std::int64_t k = 0; k < call.columns; k += float_block) {
      const std::int64_t count = tiles.width(k);
      expand(n, outputs, k, count, panel);
      // The second vector of a pair that is not there; its sums are not stored.
      if ((outputs + V::lanes - 1) / V::lanes % 2)
        for (std::int64_t i = 0; i < count; i++) V::store(expanded<V>(panel, outputs + V::lanes - 1, i), V::set(0.0f));
      for (std::int64_t o = 0; o < outputs; o += 2 * V::lanes)
        for (std::int64_t t = 0; t < tiles.count(); t++)
          multiply_rows<V, V::tile_rows>(tiles.height(t), x + tiles.start(t, k), expanded<V>(panel, o, 0), count,
                                         k == 0, sums + tiles.first(t) * panel_outputs + o, panel_outputs);
    }
    for (std::int64_t m = 0; m < tiles.rows; m++) {
      for (std::int64_t o = 0; o < outputs; o += V::lanes) {
        const int width = static_cast<int>(std::min<std::int64_t>(V::lanes, outputs - o));
        const auto bias = call.bias ? V::load_floats(call.bias, call.bias_type, n + o, width) : V::set(0.0f);
        write<V>(call, (first_row + m) * call.outputs + n + o, width,
                 V::add(V::load(sums + m * panel_outputs + o), bias));
      }
    }
  }
}

// x in slabs of rows, each in tiles: body(tiles, x, first row, t, memory) for every thread t, with `own_bytes` of
// memory.
template <class V, class Call, class Body>
void in_slabs(const Call& call, int threads, std::size_t own_bytes, const Body& body) {
  const std::int64_t slab = std::min(call.rows, slab_rows);
  const std::size_t x_size = rounded(static_cast<std::size_t>(slab * call.columns) * 4);
  char* memory = static_cast<char*>(scratch(x_size + own_bytes * threads));
  float* x = reinterpret_cast<float*>(memory);
  for (std::int64_t first = 0; first < call.rows; first += slab) {
    const Tiles<V> tiles{std::min(slab, call.rows - first), call.columns};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
      for (std::int64_t t = 0; t < tiles.count(); t++)
        for (std::int64_t k = 0; k < call.columns; k += float_block)
          V::turn(call.x, call.x_type, call.columns, first + tiles.first(t), tiles.height(t), k, tiles.width(k),
                  x + tiles.start(t, k), tiles.height(t), static_cast<int>(tiles.height(t)));
#pragma omp for schedule(static) nowait
      for (int t = 0; t < threads; t++) body(tiles, x, first, t, memory + x_size + own_bytes * t);
    }
  }
}

// `make(floats)` makes an expander for one thread that may use `floats` floats at its argument.
template <class V, class Call, class Make>
void run_tiles(const Call& call, int threads, std::int64_t floats, const Make& make) {
  const std::int64_t slab = std::min(call.rows, slab_rows);
  const std::size_t sums_size = static_cast<std::size_t>(panel_outputs * (float_block + slab)) * 4;
  const std::size_t own_size = sums_size + rounded(static_cast<std::size_t>(floats) * 4);
  const std::int64_t panels = (call.outputs + panel_rows - 1) / panel_rows;
  in_slabs<V>(call, threads, own_size,
              [&](const Tiles<V>& tiles, const float* x, std::int64_t first, int t, char* own) {
                auto expand = make(reinterpret_cast<float*>(own + sums_size));
                multiply_outputs(call, tiles, x, first, panels * t / threads * panel_rows,
                                 std::min(call.outputs, panels * (t + 1) / threads * panel_rows),
                                 reinterpret_cast<float*>(own), expand);
              });
}

}  // namespace
}  // namespace parco::linear
