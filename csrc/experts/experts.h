// The feed-forward block of a transformer, and many of them of which every row takes a few (Shazeer et al.,
// arXiv 1701.06538): y = the sum of the chosen blocks' results, each times its weight.
//
// Rows of one block are multiplied together. What stands between two products is rounded to the type of x, as it is
// where each is an operation of its own; the weighted sum is fp32, in the order of a row's choices, and rounded once.
#pragma once
#include <optional>
#include <vector>

#include "linear/chain.h"
#include "rowwise/operations.h"

namespace parco::experts {

using linear::Type;

// down(activation(gate) * up); where it is not gated, down(activation(up)). Gate and up are the two halves of one
// product's result, or of two products.
struct Block {
  std::vector<linear::Chain> gate_up;
  linear::Chain down;
  bool gated;
  rowwise::Activation activation;
  rowwise::Operations rowwise;
  std::optional<rowwise::Cut> cut = {};  // of gate and up

  std::int64_t columns() const { return down.outputs(); }
  std::int64_t inner() const { return down.columns(); }
  Type type() const { return down.type; }
};

// Numbers for which `run` of a block needs room for each row, besides some bytes.
std::int64_t numbers_of(const Block& block);
constexpr std::size_t room_beside = 64;

// x [rows, columns] to y [rows, columns]. Throws std::bad_alloc.
void run(const Block& block, const void* x, void* y, std::int64_t rows, char* room, int threads);

// The blocks of every row, `choices` of them, and their weights. A number that is no block's adds nothing.
struct Routes {
  const std::int64_t* blocks;  // [rows, choices]
  const float* weights;        // [rows, choices]
  std::int64_t choices;
};

// x [rows, columns] to y [rows, columns], by the blocks of the numbers where there is one; those that are there take
// the same columns and type. At least one is. Throws std::bad_alloc.
void run(const std::vector<const Block*>& blocks, const Routes& routes, const void* x, void* y, std::int64_t rows,
         int threads);

}  // namespace parco::experts
