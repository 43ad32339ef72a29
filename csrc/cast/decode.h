// Codes into numbers, as parco.kernels.cast.decoding defines them: a product in fp32, rounded once. Elementwise, so
// every instruction set and thread count gives the same bits.
#pragma once
#include "cast/cast.h"

namespace parco::cast {

// How a code becomes a number faster than by looking it up: as an integer less its zero, or as a pattern of fp16.
enum class Pattern : int { none = 0, integer = 1, e4m3 = 2, e5m2 = 3 };

struct DecodeCall {
  const std::uint8_t* codes;  // [rows, ceil(columns * bits / 8)], each row an LSB-first bit stream
  const float* values;        // [2^bits]: the number that a code stands for, but for `zero`
  const void* scale;          // scales[n / block_rows * scale_stride + k / group] of scale_type, or null
  const std::uint8_t* zero;   // the same, subtracted from codes that are numbers themselves; null: `offset`
  const float* factor;        // of every scale, or null
  void* y;                    // [rows, columns] of y_type
  std::int64_t rows, columns, group, block_rows, scale_stride;
  int bits, offset, threads;
  Pattern pattern;
  Type y_type, scale_type;
};

void decode_generic(const DecodeCall& call);
void decode_avx2(const DecodeCall& call);
void decode_avx512(const DecodeCall& call);

}  // namespace parco::cast
