// A decoder's layer for one token: what lies between two residual streams, in one call.
//
//   h = x + out(attention(rotate(q), keys, values)), with q, k, v of norm(x)
//   y = h + down(activation(gate) * up), with gate, up of norm(h)
//
// Without gate it is down(activation(up)). What is added to x and h may be normalized first, and of a parallel layer
// gate and up are of norm(x), the same one or another. k, turned, and v are first written behind the keys and values of
// the tokens before. Intermediate results are rounded to the type of x, as they are where each step is an operation of
// its own; the kernels are the same.
//
// down(..) may stand for a mixture of experts, with its router.
#pragma once
#include <optional>
#include <vector>

#include "experts/mixture.h"
#include "linear/chain.h"
#include "rowwise/operations.h"

namespace parco::decode {

using linear::Type;

// How a row is normalized, as rowwise::Norm.
struct Scaling {
  const void *weight, *bias;
  float epsilon, offset;
  bool rounded, centered;
};

struct Layer {
  std::int64_t columns, heads, key_heads, head, turning;  // numbers in x, a head, those that turn
  float scale, softcap;                                   // of scores
  Type type;
  bool parallel;     // the feed-forward block reads x, not h
  bool interleaved;  // the results of qkv: those of a head, then those of the next one
  rowwise::Operations rowwise;
  // Products of one input: their results lie one after the other.
  std::vector<linear::Chain> qkv, out;
  std::optional<experts::Block> block;  // this or a mixture
  std::optional<experts::Mixture> mixture;
  Scaling before;
  std::vector<Scaling> between;   // one, or none where gate and up read what q, k, v do
  std::vector<Scaling> after;     // of what is added to x, and to h, or none
  std::vector<Scaling> of_heads;  // of queries and of keys, or none
};

struct Token {
  const void *x, *cos, *sin;                     // [columns], [turning] twice
  void* y;                                       // [columns]
  void *keys, *values;                           // [key_heads, .., head]: `known` tokens, and room for one
  std::int64_t known, key_stride, value_stride;  // from head to head, in numbers
  int threads;
};

// Throws std::bad_alloc.
void run(const Layer& layer, const Token& token);

}  // namespace parco::decode
