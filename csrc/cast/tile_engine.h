// A matrix cast by rows and, transposed, by columns, tile by tile, so that it is read once. Numbers that are transposed
// or transformed go through a strip of fp32 in the L1 cache; the casts are those of whole rows. Unnamed: see
// cast_engine.h.
#pragma once
#include "cast/cast_engine.h"

namespace parco::cast {
namespace {

constexpr std::int64_t tile_length = 256;  // numbers along a row, and along a column: a multiple of groups and sizes
constexpr std::int64_t tile_width = 16;    // of rows (or columns) that are transformed side by side

constexpr std::int64_t tile_strips = 4;  // of neighbouring columns that are read together, whole cache lines

// `strips` strips [length][tile_width] from numbers that lie `along` and `across` elements apart; zeros fill the width.
inline void load_strips(const CastCall& call, std::int64_t index, std::int64_t along, std::int64_t across,
                        std::int64_t length, std::int64_t width, float* to) {
  constexpr std::int64_t ahead = 8;  // rows whose cache lines are asked for before they are needed
  for (std::int64_t i = 0; i < length; i++, index += along) {
    if (across == 1 && i + ahead < length) {
      const char* next = static_cast<const char*>(call.x) + (index + ahead * along) * size_of(call.x_type);
      for (std::int64_t byte = 0; byte < width * size_of(call.x_type); byte += 64) __builtin_prefetch(next + byte);
    }
    for (std::int64_t start = 0; start < width; start += tile_width) {
      float* strip = to + (start * tile_length + i * tile_width);
      const std::int64_t at = index + start * across, left = width - start;
      const bool whole = across == 1 && left >= tile_width;
      if (whole && call.x_type == Type::fp32) {
        std::memcpy(strip, static_cast<const char*>(call.x) + 4 * at, 4 * tile_width);
      } else if (whole && call.x_type == Type::bf16) {
        std::uint16_t halves[tile_width];
        std::memcpy(halves, static_cast<const char*>(call.x) + 2 * at, sizeof(halves));
#pragma omp simd
        for (int j = 0; j < tile_width; j++) strip[j] = float_of(static_cast<std::uint32_t>(halves[j]) << 16);
      } else {
        for (std::int64_t j = 0; j < tile_width; j++)
          strip[j] = j < left ? load_float(call.x, call.x_type, at + j * across) : 0.0f;
      }
    }
  }
}

// Every `size` numbers along the length, of each column of the strip by itself.
inline void transform_strip(int size, const float* signs, std::int64_t length, float* strip) {
  for (std::int64_t start = 0; start < length; start += size) {
    float* block = strip + start * tile_width;
    for (int i = 0; i < size; i++) {
#pragma omp simd
      for (int j = 0; j < tile_width; j++) block[i * tile_width + j] *= signs[i];
    }
    for (int apart = 1; apart < size; apart *= 2)
      for (int i = 0; i < size; i++) {
        if (i & apart) continue;
        float *a = block + i * tile_width, *b = a + apart * tile_width;
#pragma omp simd
        for (int j = 0; j < tile_width; j++) {
          const float sum = a[j] + b[j], difference = a[j] - b[j];
          a[j] = sum, b[j] = difference;
        }
      }
  }
}

// [length][tile_width] to [tile_width][tile_length]; the length is rounded up to whole widths.
inline void turn_tile(const float* from, std::int64_t length, float* to) {
  for (std::int64_t c = 0; c < tile_width; c++)
    for (std::int64_t i = 0; i < length; i++) to[c * tile_length + i] = from[i * tile_width + c];
}

// Rows [n, n + rows) and columns [k, k + columns) of what `call` writes, read from where `call` does.
inline CastCall part_of(const CastCall& call, std::int64_t n, std::int64_t rows, std::int64_t k, std::int64_t columns) {
  CastCall part = call;
  part.rows = rows, part.columns = columns;
  part.first_row = n, part.first_column = k;
  part.x = static_cast<const char*>(call.x) + (n * call.x_stride + k) * size_of(call.x_type);
  part.codes = call.codes + n * call.code_stride + k * call.bits / 8;
  part.scale = static_cast<char*>(call.scale) + (n * call.scale_stride + k / call.group) * size_of(call.scale_type);
  return part;
}

template <class Cast, class Turn>
class Tiles {
 public:
  Tiles(const TilesCall& call, const Cast& cast, const Turn& turn) : call(call), cast(cast), turn(turn) {}

  // Of x: rows [n, n_end), columns [k, k_end).
  void tile(std::int64_t n, std::int64_t n_end, std::int64_t k, std::int64_t k_end) const {
    if (call.rows.codes && !call.row_size) rounded(part_of(call.rows, n, n_end - n, k, k_end - k));
    if (call.rows.codes && call.row_size)
      for (std::int64_t r = n; r < n_end; r += tile_width)
        strips(call.rows, call.row_size, r, std::min(n_end, r + tile_width), k, k_end, call.rows.x_stride, 1);
    constexpr std::int64_t together = tile_strips * tile_width;
    if (call.columns.codes)
      for (std::int64_t c = k; c < k_end; c += together)
        strips(call.columns, call.column_size, c, std::min(k_end, c + together), n, n_end, 1, call.rows.x_stride);
  }

 private:
  const TilesCall& call;
  const Cast& cast;
  const Turn& turn;

  // Rows [n, n_end), at most tile_strips * tile_width, and columns [k, k_end) of what is written; in x they are
  // `by_row` and `by_column` elements apart.
  void strips(const CastCall& written, int size, std::int64_t n, std::int64_t n_end, std::int64_t k, std::int64_t k_end,
              std::int64_t by_row, std::int64_t by_column) const {
    constexpr std::int64_t numbers = tile_length * tile_width;
    alignas(64) float loaded[tile_strips * numbers], turned[numbers];
    const std::int64_t length = k_end - k;
    load_strips(call.rows, n * by_row + k * by_column, by_column, by_row, length, n_end - n, loaded);
    for (std::int64_t r = n; r < n_end; r += tile_width) {
      float* strip = loaded + (r - n) * tile_length;
      if (size) transform_strip(size, call.signs, length, strip);
      turn(strip, (length + tile_width - 1) / tile_width * tile_width, turned);
      CastCall part = part_of(written, r, std::min(n_end - r, tile_width), k, length);
      part.x = turned, part.x_stride = tile_length, part.x_type = Type::fp32;
      rounded(part);
    }
  }

  void rounded(const CastCall& part) const {
    if (part.rounding == Rounding::nearest)
      cast(part, std::integral_constant<Rounding, Rounding::nearest>{});
    else if (part.rounding == Rounding::zero)
      cast(part, std::integral_constant<Rounding, Rounding::zero>{});
    else
      cast(part, std::integral_constant<Rounding, Rounding::stochastic>{});
  }
};

// `cast(part, rounding)` casts the rows of a part; `turn` is turn_tile, or what does the same faster.
template <class Cast, class Turn>
inline void run_tiles(const TilesCall& call, const Cast& cast, const Turn& turn) {
  const std::int64_t rows = call.rows.rows, columns = call.rows.columns;
  const std::int64_t across = (columns + tile_length - 1) / tile_length;
  const std::int64_t tiles = (rows + tile_length - 1) / tile_length * across;
  const Tiles<Cast, Turn> all(call, cast, turn);
  const int threads = threads_for(rows * columns, call.rows.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t t = 0; t < tiles; t++) {
    const std::int64_t n = t / across * tile_length, k = t % across * tile_length;
    all.tile(n, std::min(rows, n + tile_length), k, std::min(columns, k + tile_length));
  }
}

}  // namespace
}  // namespace parco::cast
