// Blocks that a router chooses by the logits to which it multiplies a row, and perhaps one that every row takes.
#pragma once
#include <optional>
#include <vector>

#include "experts/experts.h"

namespace parco::experts {

struct Mixture {
  std::vector<Block> blocks;
  linear::Chain router;  // to one logit for each block
  std::int64_t choices;  // of blocks, those of the greatest logits
  bool normalized;       // their weights, of the softmax of all logits, are divided by their sum
  std::optional<Block> shared;
  std::optional<linear::Chain> shared_gate;  // to one number, whose logistic function is the weight of `shared`, else 1
};

// x [columns] to y [columns], one row. Throws std::bad_alloc.
void run(const Mixture& mixture, const void* x, void* y, int threads);

}  // namespace parco::experts
