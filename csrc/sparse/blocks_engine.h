// The product with blocks; see sparse.h. Included by one translation unit per instruction set, everything is unnamed
// (see linear/floats.h). V is its vector type, V::kept<kept> a vector of kept numbers as they come.
#pragma once
#include "linear/float_tiles.h"
#include "sparse/kept.h"

namespace parco::sparse {
namespace {

// `streams` rows of W, whose kept numbers all count, against `columns` rows of x that lie `padded` numbers apart: sums
// [streams][columns].
template <class V, Kept kept, int streams, int columns>
void multiply_kept(const SparseCall& call, int offset, const Row* rows, const float* x, std::int64_t padded,
                   float* sums) {
  using F = typename V::F;
  constexpr int size = size_of(kept);
  F sum[streams][columns];
  for (int s = 0; s < streams; s++)
    for (int m = 0; m < columns; m++) sum[s][m] = V::set(0.0f);
  for (std::int64_t k = 0; k < call.kept; k += 16) {
#pragma GCC unroll 4
    for (int s = 0; s < streams; s++) {
      __builtin_prefetch(rows[s].from + k * size + read_ahead);
#pragma GCC unroll 2
      for (int i = 0; i < 16; i += V::lanes) {
        const char* from = rows[s].from + (k + i) * size;
        const F numbers = V::template kept<kept>(from, rows[s].end - from, offset);
        for (int m = 0; m < columns; m++) sum[s][m] = V::fma(numbers, V::load(x + m * padded + k + i), sum[s][m]);
      }
    }
  }
  for (int s = 0; s < streams; s++)
    for (int m = 0; m < columns; m++) sums[s * columns + m] = V::total(sum[s][m]);
}

template <class V, Kept kept, int streams, int columns>
void kept_rows(const SparseCall& call, const Source& source, const std::int64_t* n, const Row* rows, const float* x,
               std::int64_t m) {
  float sums[streams * columns];
  multiply_kept<V, kept, streams, columns>(call, source.offset, rows, x + m * call.kept, call.kept, sums);
  for (int s = 0; s < streams; s++) {
    const float scale = source.scale(n[s]);
    const float bias = call.bias ? linear::load_float(call.bias, call.bias_type, n[s]) : 0.0f;
    for (int c = 0; c < columns; c++)
      linear::store_float(call.y, call.y_type, (m + c) * call.outputs + n[s], sums[s * columns + c] * scale + bias);
  }
}

template <class V, Kept kept, int streams>
void kept_streams(const SparseCall& call, const Source& source, const std::int64_t* n, const float* x, char* own) {
  Row rows[streams];
  for (int s = 0; s < streams; s++) rows[s] = source.row(n[s], own + s * source.row_bytes());
  std::int64_t m = 0;
  for (; m + 4 <= call.rows; m += 4)
    for (int s = 0; s < streams; s += V::streams_of_four)
      kept_rows<V, kept, std::min(streams, V::streams_of_four), 4>(call, source, n + s, rows + s, x, m);
  for (; m < call.rows; m++) kept_rows<V, kept, streams, 1>(call, source, n, rows, x, m);
}

// What a band's blocks multiply, [rows][kept].
inline void gather_x(const SparseCall& call, std::int64_t band, const float* x, float* to) {
  const std::int64_t padded = call.across() * call.block, each = call.kept / call.block;
  for (std::int64_t m = 0; m < call.rows; m++)
    for (std::int64_t j = 0; j < each; j++)
      std::memcpy(to + m * call.kept + j * call.block, x + m * padded + call.block_column(band, j) * call.block,
                  static_cast<std::size_t>(call.block) * 4);
}

template <class V, Kept kept>
void stream_blocks(const SparseCall& call, const Source& source) {
  constexpr int streams = 4;
  const std::int64_t padded = call.across() * call.block, bands = call.bands();
  const std::size_t x_bytes = static_cast<std::size_t>(call.rows * padded) * 4;
  const std::size_t own_bytes = static_cast<std::size_t>(call.rows * call.kept) * 4 + streams * source.row_bytes();
  const int threads = threads_for(call, size_of(kept));
  char* memory = static_cast<char*>(linear::scratch(x_bytes + own_bytes * threads));
  float* x = reinterpret_cast<float*>(memory);
  widen_x(call, padded, x);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    float* gathered = reinterpret_cast<float*>(memory + x_bytes + own_bytes * t);
    char* own = reinterpret_cast<char*>(gathered + call.rows * call.kept);
    for (std::int64_t band = bands * t / threads; band < bands * (t + 1) / threads; band++) {
      gather_x(call, band, x, gathered);
      in_streams<streams>(
          band * call.block, std::min(call.outputs, (band + 1) * call.block),
          [&](const std::int64_t* n) { kept_streams<V, kept, streams>(call, source, n, gathered, own); },
          [&](const std::int64_t* n) { kept_streams<V, kept, 1>(call, source, n, gathered, own); });
    }
  }
}

// `length` columns of a tile of x that a block multiplies, from column `column` of its block of columns on.
struct Run {
  std::int64_t column, length;
  const float* weights;
};

// One tile of x against `vectors` vectors of outputs: the sum over some blocks, onto what is there unless it is the
// first.
template <class V, int rows, int vectors>
void multiply_runs(const float* x, const Run* runs, std::int64_t count, bool first, float* sums, std::int64_t stride) {
  using F = typename V::F;
  F sum[rows][vectors];
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < vectors; v++) sum[m][v] = first ? V::set(0.0f) : V::load(sums + m * stride + v * V::lanes);
  for (std::int64_t j = 0; j < count; j++) {
    const float* at = x + runs[j].column * rows;
    const float* weights = runs[j].weights;
    // Where the next run begins nothing else would foresee.
    const std::int64_t ahead = j + 1 < count ? (runs[j + 1].column - runs[j].column) * rows : 0;
    const auto add = [&]() __attribute__((always_inline)) {
      __builtin_prefetch(at + ahead);
      F number[vectors];
      for (int v = 0; v < vectors; v++) number[v] = V::load(weights + v * V::lanes);
#pragma GCC unroll 12
      for (int m = 0; m < rows; m++) {
        const F value = V::set(at[m]);
        for (int v = 0; v < vectors; v++) sum[m][v] = V::fma(value, number[v], sum[m][v]);
      }
      at += rows, weights += vectors * V::lanes;
    };
    // Four at a time: the end of so short a loop would be guessed wrong each time.
    std::int64_t k = 0;
    for (; k + 4 <= runs[j].length; k += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) add();
    for (; k < runs[j].length; k++) add();
  }
#pragma GCC unroll 12
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < vectors; v++) V::store(sums + m * stride + v * V::lanes, sum[m][v]);
}

template <class V, int vectors, int rows>
void multiply_run_rows(std::int64_t height, const float* x, const Run* runs, std::int64_t count, bool first,
                       float* sums, std::int64_t stride) {
  if (height == rows) return multiply_runs<V, rows, vectors>(x, runs, count, first, sums, stride);
  if constexpr (rows > 1) multiply_run_rows<V, vectors, rows - 1>(height, x, runs, count, first, sums, stride);
}

// One band of W against the rows of x in tiles. `vectors` vectors of outputs are multiplied at a time.
template <class V, int vectors>
class Band {
 public:
  static constexpr std::int64_t wide = vectors * V::lanes, most_runs = linear::float_block / 16;

  // Bytes for the rows of a band that are decoded, for a block of columns of it in panels, and for its sums.
  static std::size_t bytes(const SparseCall& call, const Source& source) {
    const std::int64_t slab = std::min(call.rows, linear::slab_rows);
    return call.block * source.row_bytes() + static_cast<std::size_t>(call.block * (linear::float_block + slab)) * 4;
  }

  Band(const SparseCall& call, const Source& source, char* memory)
      : call(call),
        source(source),
        decoded(memory),
        panel(reinterpret_cast<float*>(memory + call.block * source.row_bytes())),
        sums(panel + call.block * linear::float_block) {}

  void multiply(const linear::Tiles<V>& tiles, const float* x, std::int64_t first_row, std::int64_t band) {
    const std::int64_t n = band * call.block, outputs = std::min<std::int64_t>(call.block, call.outputs - n);
    if (!source.direct)
      for (std::int64_t r = 0; r < outputs; r++) source.row(n + r, decoded + r * source.row_bytes());
    for (std::int64_t k = 0; k < call.columns; k += linear::float_block) {
      const std::int64_t count = turn_blocks(band, n, outputs, k);
      for (std::int64_t o = 0; o < outputs; o += wide) {
        Run own[most_runs];
        for (std::int64_t j = 0; j < count; j++)
          own[j] = runs[j], own[j].weights += o / wide * linear::float_block * wide;
        for (std::int64_t t = 0; t < tiles.count(); t++)
          multiply_run_rows<V, vectors, V::tile_rows>(tiles.height(t), x + tiles.start(t, k), own, count, k == 0,
                                                      sums + tiles.first(t) * call.block + o, call.block);
      }
    }
    for (std::int64_t m = 0; m < tiles.rows; m++) {
      for (std::int64_t o = 0; o < outputs; o += V::lanes) {
        const int width = static_cast<int>(std::min<std::int64_t>(V::lanes, outputs - o));
        const auto bias = call.bias ? V::load_floats(call.bias, call.bias_type, n + o, width) : V::set(0.0f);
        V::store_floats(call.y, call.y_type, (first_row + m) * call.outputs + n + o, width,
                        V::add(V::load(sums + m * call.block + o), bias));
      }
    }
  }

 private:
  // The band's blocks in columns [k, k + float_block), turned so that a lane is an output: [vectors of outputs][column]
  // [lane]. Returns how many there are.
  std::int64_t turn_blocks(std::int64_t band, std::int64_t n, std::int64_t outputs, std::int64_t k) {
    const void* rows = source.direct ? call.values : decoded;
    const Type type = source.direct ? call.value_type : Type::fp32;
    const std::int64_t width = source.direct ? call.kept : static_cast<std::int64_t>(source.row_bytes()) / 4;
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < call.kept / call.block && count < most_runs; j++) {
      const std::int64_t column = call.block_column(band, j) * call.block;
      if (column < k || column >= k + linear::float_block) continue;
      const std::int64_t length = std::min<std::int64_t>(call.block, call.columns - column);
      float* const to = panel + count * call.block * wide;
      for (std::int64_t o = 0; o < outputs; o += V::lanes)
        V::turn(rows, type, width, (source.direct ? n : 0) + o, std::min<std::int64_t>(V::lanes, outputs - o),
                j * call.block, length, to + o / wide * linear::float_block * wide + o % wide, wide, V::lanes);
      if (outputs % wide && outputs % wide <= wide - V::lanes) clear(to, outputs, length);
      runs[count++] = {column - k, length, to};
    }
    return count;
  }

  // The vectors of a last pair that are not there; their sums are not stored.
  void clear(float* to, std::int64_t outputs, std::int64_t length) const {
    const std::int64_t from = (outputs + V::lanes - 1) / V::lanes * V::lanes;
    for (std::int64_t i = 0; i < length; i++)
      for (std::int64_t o = from; o % wide; o += V::lanes)
        V::store(to + from / wide * linear::float_block * wide + i * wide + o % wide, V::set(0.0f));
  }

  const SparseCall& call;
  const Source& source;
  char* decoded;
  float *panel, *sums;
  Run runs[most_runs];
};

template <class V, int vectors>
void tile_blocks(const SparseCall& call, const Source& source) {
  const int threads = threads_for(call, call.rows);
  const std::int64_t bands = call.bands();
  linear::in_slabs<V>(call, threads, linear::rounded(Band<V, vectors>::bytes(call, source)),
                      [&](const linear::Tiles<V>& tiles, const float* x, std::int64_t first_row, int t, char* own) {
                        Band<V, vectors> product(call, source, own);
                        for (std::int64_t band = bands * t / threads; band < bands * (t + 1) / threads; band++)
                          product.multiply(tiles, x, first_row, band);
                      });
}

}  // namespace
}  // namespace parco::sparse
