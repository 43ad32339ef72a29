// Attention of many queries at once and its derivative, in tiles: scores are never whole. fp32 from operands of one
// type, results rounded to it once.
#pragma once
#include "linear/coded.h"

namespace parco::attention {

using linear::Type;

// A tensor [batch, heads, tokens, width] by its address; strides are in numbers, those of a head are neighbours.
struct Heads {
  const void* at;
  std::int64_t stride[3];  // batch, head, token

  std::int64_t index(std::int64_t b, std::int64_t head, std::int64_t token) const {
    return b * stride[0] + head * stride[1] + token * stride[2];
  }
};

// y = softmax(scale * q . keys) . values. As many heads of queries in a row share a head of keys and values as there
// are more of them. `causal`: the last query sees all keys, each one before it one key less. Of these keys it sees
// those that the mask [batch, heads, queries, keys] marks, bytes of 0 and 1, where there is one; y of a query that sees
// none is 0, and its logarithm infinite. With dropout each softmax's numbers count 1 / (1 - p) times or not at all,
// which Philox says by the query's row in [batch, heads, queries] and the key.
struct Forward {
  Heads q, keys, values;  // of `heads`, and of `key_heads` twice
  void* y;                // [batch, queries, heads, width], contiguous
  float* logs;            // [batch, heads, queries]: the logarithm of each softmax's denominator
  std::int64_t batch, heads, key_heads, queries, count, width;
  float scale;
  bool causal;
  Type type;
  int threads;
  const std::uint8_t* mask = nullptr;
  std::int64_t mask_stride[3] = {};  // batch, head, query
  double p = 0;                      // the share that is dropped
  std::uint64_t seed = 0;

  // How many keys query t sees, those that the mask hides counted.
  std::int64_t seen(std::int64_t t) const { return causal ? t + 1 + count - queries : count; }

  const std::uint8_t* marks(std::int64_t b, std::int64_t head, std::int64_t t) const {
    return mask + b * mask_stride[0] + head * mask_stride[1] + t * mask_stride[2];
  }
};

// Of that and the gradient of y: those of q, keys and values, which lie as y does.
struct Backward {
  Forward forward;  // of which y and logs are read
  Heads grad;
  void *grad_q, *grad_keys, *grad_values;
};

void attention_generic(const Forward& call);
void attention_avx2(const Forward& call);
void attention_avx512(const Forward& call);
void attention_grad_generic(const Backward& call);
void attention_grad_avx2(const Backward& call);
void attention_grad_avx512(const Backward& call);

}  // namespace parco::attention
