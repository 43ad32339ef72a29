// AdamW (Loshchilov and Hutter, arXiv 1711.05101), one pass over each parameter: gradient, moments and values are read
// once and written once. Elementwise in fp32, without fused multiply-adds: every instruction set and thread count gives
// the same bits, those of parco.kernels.optimizer's reference.
#pragma once
#include "linear/coded.h"

namespace parco::optimizer {

using linear::Type;

constexpr int block = 256;  // codes that share a scale

// rows x columns numbers, one after the other. Where there are scales the moments are codes of 8 bits, blocks of each
// row under a scale of their own; else they are fp32.
struct Parameter {
  void* values;
  const void* grad;
  void *first, *second;                // moments; codes are of the second's root
  void *first_scale, *second_scale;    // [rows, ceil(columns / block)], or null
  std::int64_t rows, columns, offset;  // `offset`: of what the first number is among those random bits are counted by
  std::uint64_t stream;                // row of Philox's counter
  Type type, grad_type;
  float step_size, second_root;    // minus lr / (1 - beta1^step), sqrt(1 - beta2^step)
  std::int64_t first_span, spans;  // blocks, or as many numbers under fp32 moments; and those of earlier parameters
};

struct Adamw {
  const Parameter* parameters;
  std::int64_t count, spans;
  float grad_factor, decay;                                  // of the gradient; of the values: 1 - lr * weight_decay
  float first_weight, second_decay, second_weight, epsilon;  // 1 - beta1, beta2, 1 - beta2
  std::uint64_t seed;
  bool stochastic;  // of bf16 values
  int threads;
};

void adamw_generic(const Adamw& call);
void adamw_avx2(const Adamw& call);
void adamw_avx512(const Adamw& call);

}  // namespace parco::optimizer
