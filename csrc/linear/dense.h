// y = x @ weight.T + bias, summed in fp32. With few rows of x, weights are read once from memory and widened in
// registers; a sum is kept in 2 * lanes partial sums along k and added up in a fixed order. With more than
// `streamed_rows`, see float_tiles.h. Neither order depends on the number of rows beside a row, or of threads.
#pragma once
#include <cstdint>

#include "linear/coded.h"

namespace parco::linear {

// Every pointer may have any alignment. Rows are contiguous, one after the other.
struct DenseCall {
  const void* x;       // [rows, columns] of x_type
  const void* weight;  // [outputs, columns] of weight_type
  const void* bias;    // [outputs] of bias_type, or null
  void* y;             // [rows, outputs] of y_type
  std::int64_t rows, outputs, columns;
  int threads;
  Type x_type, weight_type, bias_type;
  Type y_type = x_type;
  Epilogue after{};
};

void dense_generic(const DenseCall& call);
void dense_avx2(const DenseCall& call);
void dense_avx512(const DenseCall& call);
// x and weights are bf16. The second has the tile instructions written out in C++: for tests on machines without them.
void dense_amx(const DenseCall& call);
void dense_amx_emulated(const DenseCall& call);

}  // namespace parco::linear
