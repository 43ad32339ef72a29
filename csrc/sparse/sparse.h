// y = x @ W.T + bias for a matrix W of which every row keeps as many numbers as every other, stored one after the
// other; the rest are zeros that no memory holds. A mask has a bit for each number of W, or blocks say which columns a
// band of rows keeps.
//
// With up to `streamed_rows` rows of x the kept numbers go from memory through registers into the products, several
// rows of W at a time. With more, masked rows are expanded to fp32 in the cache and multiplied as a dense matrix is
// (linear/float_tiles.h), and blocks are multiplied one by one, so that what is not stored costs nothing. Sums are
// fp32, in an order that does not depend on the number of threads, nor on the rows beside a row, but for which of the
// two ways they make it go.
#pragma once
#include "cast/decode.h"
#include "linear/coded.h"

namespace parco::sparse {

using linear::Type;

// Every pointer may have any alignment. Rows are contiguous, one after the other.
struct SparseCall {
  const void* x;             // [rows, columns] of x_type
  const void* values;        // [outputs, kept] of value_type; null where the numbers are `codes`
  const std::uint8_t* mask;  // [outputs, ceil(columns / 8)], lowest bit first: `kept` bits of each row; or null
  const void* blocks;        // [ceil(outputs / block), kept / block] columns of blocks, of index_bytes; or null
  const void* bias;          // [outputs] of bias_type, or null
  void* y;                   // [rows, outputs] of x_type
  std::int64_t rows, outputs, columns, kept;
  int block, index_bytes, threads;
  Type x_type, value_type, bias_type;
  cast::DecodeCall codes;  // [outputs, kept]: how they become numbers; its y, rows and threads are the kernel's
  Type y_type = x_type;
  linear::Epilogue after{};

  std::int64_t bands() const { return (outputs + block - 1) / block; }
  std::int64_t across() const { return (columns + block - 1) / block; }
  // The column of block j of a band.
  std::int64_t block_column(std::int64_t band, std::int64_t j) const {
    const char* at = static_cast<const char*>(blocks) + (band * (kept / block) + j) * index_bytes;
    std::int16_t narrow;
    std::int32_t wide;
    index_bytes == 2 ? std::memcpy(&narrow, at, 2) : std::memcpy(&wide, at, 4);
    return index_bytes == 2 ? narrow : wide;
  }
};

// A row of the mask with more than `kept` bits makes no read past the kept numbers: its result means nothing. Generic
// kernels take at most `streamed_rows` rows of x at a time from memory.
void masked_generic(const SparseCall& call);
void masked_avx2(const SparseCall& call);
void masked_avx512(const SparseCall& call);
void masked_avx512_vbmi(const SparseCall& call);

// Each band's block columns must ascend within the matrix, none twice: the memory of a kernel is for as many as fit in
// a row. See `first_misplaced`.
void blocks_generic(const SparseCall& call);
void blocks_avx2(const SparseCall& call);
void blocks_avx512(const SparseCall& call);

// The first entry of `blocks` that is no block column of the matrix, or not after the one before it in its band; or -1.
std::int64_t first_misplaced(const SparseCall& call);

constexpr std::int64_t streamed_rows = 8;

}  // namespace parco::sparse
