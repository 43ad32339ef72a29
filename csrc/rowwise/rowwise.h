// What a transformer does between its products, a row at a time: normalisation, gates, rotations. Everything is
// computed in fp32 from operands of one type and rounded to it.
#pragma once
#include "linear/coded.h"

namespace parco::rowwise {

using linear::Activation;
using linear::Type;

// y = x / sqrt(mean(x^2) + epsilon) * (weight + offset) + bias, where `centered` of x less its mean. With `rounded` the
// quotient is rounded to x's type before it is multiplied.
struct Norm {
  const void *x, *weight;  // [rows, columns], [columns]
  void* y;
  std::int64_t rows, columns;
  float epsilon, offset;
  bool rounded;
  Type type;
  int threads;
  bool centered = false;
  const void* bias = nullptr;  // [columns], or none
  Type weight_type = type;     // of weight and bias
  Type y_type = type;          // x's, or any where x is fp32
};

// Of a norm and the gradient of its y: the gradients of x, and, where they are wanted, of weight and bias, summed over
// `rows_of_a_sum` rows at a time, and those sums one after the other, whatever the number of threads.
struct NormGrad {
  Norm norm;                       // of which y is not read
  const void* grad;                // [rows, columns] of y's type
  void* grad_x;                    // of x's type, as y has
  float *grad_weight, *grad_bias;  // [columns], or none
};
constexpr std::int64_t rows_of_a_sum = 64;

// With these a gate is cut to `limit` and up to [-limit, limit], which is then `raised`, and the activation is that of
// slope * gate, over the slope (gpt-oss).
struct Cut {
  float limit, slope, raised;
};

// y = activation(gate) * up, `count` numbers; without `up` the activation alone. Of several rows those of gate and up
// begin `stride` numbers apart, and those of y follow one another.
struct Gate {
  const void *gate, *up;
  void* y;
  std::int64_t count;
  Activation activation;
  Type type;
  int threads;
  std::int64_t rows = 1, stride = 0;
  const Cut* cut = nullptr;
};

// Of a gate and the gradient of its y: those of gate and up.
struct GateGrad {
  Gate gate;  // of which y is not read
  const void* grad;
  void *grad_gate, *grad_up;
};

// The cross entropy of each row's softmax with its label; with `gradient` the logits become its derivative, times the
// row's factor where there are factors, and rounded to a number of type `rounded`. Logits z count as
// softcap * tanh(z / softcap) where that is not 0; of the target `smoothing` is spread over all columns. A row whose
// label is no column has no loss and no gradient.
struct CrossEntropy {
  void* logits;                // [rows, columns]
  const std::int64_t* labels;  // [rows]
  const float* factors;        // [rows], or none
  float* losses;               // [rows]
  std::int64_t rows, columns;
  float softcap, smoothing;
  bool gradient;
  Type type, rounded;  // `rounded` is the type, or any where that is fp32
  int threads;
};

// y = x with each number 0 where its random bits, those of its row and column under `seed` (cast/philox.h), are below
// p * 2^32, and 1 / (1 - p) times as much elsewhere.
struct Dropout {
  const void* x;
  void* y;
  std::int64_t rows, columns;
  std::uint64_t seed;
  double p;  // below 1
  Type type;
  int threads;
};

// Heads, the first `columns` numbers of which turn: their two halves are the parts of complex numbers, y = x * cos +
// (-upper half of x, lower half) * sin. `rest` more follow and are copied. Strides are in numbers.
struct Heads {
  const void* x;
  void* y;
  std::int64_t heads, x_stride[3], y_stride[3];  // batch, head, token
};
struct Rotation {
  Heads of[2];            // queries and keys
  const void *cos, *sin;  // [batch, tokens, columns], of one stride
  std::int64_t batch, tokens, columns, rest, angle_stride[2];
  Type type;
  int threads;
  Type angle_type = type;
};

// One query for every head: y = softmax(scale * q . keys) . values, of scores s as softcap * tanh(s / softcap) where
// that is not 0. With sinks each head's softmax has one score more, of no value. As many heads of queries in a row
// share a head of keys and values as there are more of them. Strides are in numbers; the numbers of a head are
// neighbours.
struct Attention {
  const void *q, *keys, *values;  // [batch, heads, columns], [batch, key_heads, count, columns] twice
  void* y;                        // [batch, heads, columns], contiguous
  std::int64_t batch, heads, key_heads, count, columns;
  std::int64_t q_stride[2], key_stride[3], value_stride[3];  // batch, head, token
  float scale;
  Type type;
  int threads;
  float softcap = 0;
  const void* sinks = nullptr;  // [heads] of q's type, or none
};

// Every row of y is the sum of `count` rows of x, those at its `places`, times its factors, in this order and rounded
// once. A place below 0 is of no row and adds nothing.
struct Mix {
  const void* x;               // [.., columns]
  const std::int64_t* places;  // [rows, count]
  const float* factors;        // [rows, count]
  void* y;                     // [rows, columns]
  std::int64_t rows, count, columns;
  Type type;
  int threads;
};

// y = a + b, `count` numbers.
struct Sum {
  const void *a, *b;
  void* y;
  std::int64_t count;
  Type type;
};

void norm_generic(const Norm& call);
void norm_avx2(const Norm& call);
void norm_avx512(const Norm& call);
void gate_generic(const Gate& call);
void norm_grad_generic(const NormGrad& call);
void gate_grad_generic(const GateGrad& call);
void cross_entropy_generic(const CrossEntropy& call);
void gate_avx2(const Gate& call);
void norm_grad_avx2(const NormGrad& call);
void gate_grad_avx2(const GateGrad& call);
void cross_entropy_avx2(const CrossEntropy& call);
void gate_avx512(const Gate& call);
void norm_grad_avx512(const NormGrad& call);
void gate_grad_avx512(const GateGrad& call);
void cross_entropy_avx512(const CrossEntropy& call);
void dropout_generic(const Dropout& call);
void dropout_avx2(const Dropout& call);
void dropout_avx512(const Dropout& call);
void rotate_generic(const Rotation& call);
void rotate_avx2(const Rotation& call);
void rotate_avx512(const Rotation& call);
void attend_generic(const Attention& call);
void attend_avx2(const Attention& call);
void attend_avx512(const Attention& call);
void add_generic(const Sum& call);
void mix_generic(const Mix& call);
void add_avx2(const Sum& call);
void mix_avx2(const Mix& call);
void add_avx512(const Sum& call);
void mix_avx512(const Mix& call);

}  // namespace parco::rowwise
