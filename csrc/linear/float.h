// y = x @ (value of each code * scale).T + bias, computed in fp32: for codes whose values are no small integers, and
// for scales that integers cannot take.
//
// With few rows of x, weights go from memory through registers into the products, a vector of them at a time; a sum is
// kept in partial sums along k that are added up in a fixed order. With more, `float_block` columns of some outputs are
// expanded to fp32 in the cache and multiplied with as many of all rows of x: a sum of each block in ascending k, and
// the sum of the blocks. Neither order depends on the number of rows beside a row, or of threads.
#pragma once
#include "linear/coded.h"

namespace parco::linear {

// Groups have a multiple of 16 columns, or all of them.
void float_generic(const CodedCall& call);
// These take `listed` codes of 4 bits only; by rows groups of 16 * 2^i columns, or of all, and in panels those of
// whole dwords or, where codes lie in planes, of whole runs.
void float_avx2(const CodedCall& call);
void float_avx512(const CodedCall& call);
void float_avx512_vbmi(const CodedCall& call);
// x is bf16, codes are of 4 or 6 bits or floats of 8, and groups have a multiple of 16 columns, or all of them. Weights
// are rounded once to bf16 (bf16_panels.h). The second has the tile instructions written out in C++: for tests on
// machines without them.
void float_amx(const CodedCall& call);
void float_amx_emulated(const CodedCall& call);

// Row n of the matrix in fp32.
void expand_row(const CodedCall& call, std::int64_t n, float* to);

constexpr std::int64_t float_block = 256;
constexpr std::int64_t streamed_rows = 8;

}  // namespace parco::linear
