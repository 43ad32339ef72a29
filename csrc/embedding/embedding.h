// Rows of a table of integer codes, expanded to floats.
#pragma once
#include <cstdint>

#include "linear/int.h"

namespace parco::embedding {

// The stored tensors are those of linear::IntCall; table_rows of them.
struct EmbeddingCall {
  const std::int64_t* indices;
  const std::uint8_t* codes;
  const void* scale;
  const std::uint8_t* zero;
  void* y;  // [rows, columns] of y_type
  std::int64_t rows, table_rows, columns, group, scale_stride;
  int bits, threads;
  linear::Type scale_type, y_type;
};

// Position of the first index outside the table, or -1: then y is whole.
std::int64_t embedding_generic(const EmbeddingCall& call);

}  // namespace parco::embedding
