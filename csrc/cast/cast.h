// Numbers into codes, as parco.kernels.cast.rounding defines them, and the greatest magnitudes that scales are found
// from. Elementwise, so every instruction set and thread count gives the same bits.
#pragma once
#include "linear/coded.h"

namespace parco::cast {

using linear::Type;

enum class Kind : int { floating = 0, integer = 1, listed = 2 };
enum class Rounding : int { nearest = 0, zero = 1, stochastic = 2 };
// What brings a number into the element's range: nothing, a product with 1 / scale, or a division by the scale.
enum class Rescaling : int { none = 0, multiply = 1, divide = 2 };

// How the scale of a block follows from its greatest magnitude; see parco.kernels.cast.scaling. Blocks lie in one row.
enum class Rule : int { given = 0, absmax = 1, floor = 2, ceil = 3, even = 4, rceil = 5, e4m3 = 6 };

struct CastCall {
  const void* x;             // [rows, columns] of x_type
  void* scale;               // scales[n / block_rows * scale_stride + k / group] of scale_type, read or found
  const std::uint8_t* zero;  // the same, added to rounded numbers; null: offset
  const float* factor;       // of every scale (`multiply` divides 1 by it first), or null
  const float* entries;      // [2^bits], ascending: of `listed`
  std::uint8_t* codes;       // [rows, ceil(columns * bits / 8)], each row an LSB-first bit stream
  std::int64_t rows, columns, group, block_rows, scale_stride;
  std::uint64_t seed;
  Kind kind;
  Rule rule;
  Rounding rounding;
  Rescaling rescaling;
  int bits;
  int mantissa_bits, least_exponent, max_code, nan_code;  // of `floating`; nan_code -1: NaN becomes max_code, unsigned
  int least, greatest, offset;                            // of `integer`
  float largest;          // number of the element, to which the rules but floor, ceil and even map a greatest magnitude
  int greatest_exponent;  // of the element, for those
  int threads;
  Type x_type, scale_type;
  std::int64_t x_stride, code_stride;    // from row to row: numbers, bytes
  std::int64_t first_row, first_column;  // of what this is a part of: random bits belong to its rows and columns
};

void cast_generic(const CastCall& call);
void cast_avx2(const CastCall& call);
void cast_avx512(const CastCall& call);

// The same matrix cast by rows and, transposed, by columns, in one read; either may lack its codes. A random Hadamard
// transform of `size` numbers goes first, along a row of what is written: numbers times `signs` (of 1 / sqrt(size)),
// then log2(size) steps of sums and differences of neighbours 1, 2, 4 ... apart. Groups have 16, 32, 64, 128 or 256
// numbers.
struct TilesCall {
  CastCall rows, columns;     // `columns`: of the transposed matrix; x is that of `rows`
  int row_size, column_size;  // 0: none
  const float* signs;         // [row_size or column_size], the same for both
};

void tiles_generic(const TilesCall& call);
void tiles_avx2(const TilesCall& call);
void tiles_avx512(const TilesCall& call);

struct AmaxCall {
  const void* x;  // [rows, columns] of x_type
  float* amax;    // [rows, ceil(columns / group)]: NaN where the group has one
  std::int64_t rows, columns, group;
  int threads;
  Type x_type;
};

void amax_generic(const AmaxCall& call);
void amax_avx2(const AmaxCall& call);
void amax_avx512(const AmaxCall& call);

// The greatest of those that are no NaN, infinity counting as the greatest fp32 number, to amax[0].
void greatest_generic(const AmaxCall& call);
void greatest_avx2(const AmaxCall& call);
void greatest_avx512(const AmaxCall& call);

}  // namespace parco::cast
