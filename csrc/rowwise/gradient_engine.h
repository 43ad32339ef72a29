// Derivatives of norms and gates, for vector instruction sets (see rowwise_engine.h).
#pragma once
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

// With n the normalized x, r its factor and i = grad * (weight + offset): grad_x = r * (i - n * mean(i * n)), less
// r * mean(i) where `centered`; grad_weight = sum of grad * n, grad_bias = sum of grad, added to `sums` and `bias`.
template <class V, Type type, Type y_type>
void norm_grad_rows(const NormGrad& call, std::int64_t first, std::int64_t last, float* sums, float* bias) {
  using F = typename V::F;
  const Norm& norm = call.norm;
  const std::int64_t columns = norm.columns;
  const F offset = V::set(norm.offset);
  for (std::int64_t m = first; m < last; m++) {
    const std::int64_t row = m * columns;
    const auto total = [&](const auto& add) {
      F parts[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
      each_vector<V>(columns, [&](std::int64_t k, int count) { add(parts[k / V::lanes % 4], k, count); });
      return V::total(V::add(V::add(parts[0], parts[1]), V::add(parts[2], parts[3]))) / static_cast<float>(columns);
    };
    const auto load = [&](std::int64_t k, int count) { return V::template load<type>(norm.x, row + k, count); };
    const auto grad = [&](std::int64_t k, int count) { return V::template load<y_type>(call.grad, row + k, count); };
    const auto inner = [&](std::int64_t k, int count) {
      return V::multiply(grad(k, count), V::add(V::load_floats(norm.weight, norm.weight_type, k, count), offset));
    };
    float means[V::lanes] = {};
    if (norm.centered)
      std::fill_n(means, V::lanes,
                  total([&](F& sum, std::int64_t k, int count) { sum = V::add(sum, load(k, count)); }));
    // The row less its mean; behind its end there are zeros.
    const auto centered = [&](std::int64_t k, int count) {
      return V::subtract(load(k, count), V::template load<Type::fp32>(means, 0, count));
    };
    const float square = total([&](F& sum, std::int64_t k, int count) {
      const F value = centered(k, count);
      sum = V::fma(value, value, sum);
    });
    const float scale = 1.0f / __builtin_sqrtf(square + norm.epsilon);
    const float along = scale * total([&](F& sum, std::int64_t k, int count) {
                          sum = V::fma(inner(k, count), centered(k, count), sum);
                        });
    const float mean_inner =
        norm.centered ? total([&](F& sum, std::int64_t k, int count) { sum = V::add(sum, inner(k, count)); }) : 0.0f;
    const F factor = V::set(scale), less = V::set(mean_inner), back = V::set(-along);
    each_vector<V>(columns, [&](std::int64_t k, int count) {
      const F normalized = V::multiply(centered(k, count), factor);
      const F value = V::fma(normalized, back, V::subtract(inner(k, count), less));
      V::template store<type>(call.grad_x, row + k, count, V::multiply(value, factor));
      if (sums)
        V::template store<Type::fp32>(sums, k, count,
                                      V::fma(grad(k, count), normalized, V::template load<Type::fp32>(sums, k, count)));
      if (bias)
        V::template store<Type::fp32>(bias, k, count,
                                      V::add(grad(k, count), V::template load<Type::fp32>(bias, k, count)));
    });
  }
}

template <class V, Type type, Type y_type>
void run_norm_grad(const NormGrad& call) {
  const std::int64_t columns = call.norm.columns, rows = call.norm.rows;
  const std::int64_t blocks = (rows + rows_of_a_sum - 1) / rows_of_a_sum;
  const int threads =
      static_cast<int>(std::min<std::int64_t>(blocks, useful_threads(2 * rows * columns, call.norm.threads)));
  const std::size_t count = static_cast<std::size_t>(blocks * columns);
  float* sums = static_cast<float*>(linear::scratch(2 * count * sizeof(float)));
  std::fill_n(sums, 2 * count, 0.0f);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t b = 0; b < blocks; b++)
    norm_grad_rows<V, type, y_type>(call, b * rows_of_a_sum, std::min(rows, (b + 1) * rows_of_a_sum),
                                    call.grad_weight ? sums + b * columns : nullptr,
                                    call.grad_bias ? sums + (blocks + b) * columns : nullptr);
  const auto add_up = [&](const float* from, float* to) {
    if (to == nullptr) return;
    each_vector<V>(columns, [&](std::int64_t k, int some) {
      typename V::F sum = V::set(0.0f);
      for (std::int64_t b = 0; b < blocks; b++)
        sum = V::add(sum, V::template load<Type::fp32>(from, b * columns + k, some));
      V::template store<Type::fp32>(to, k, some, sum);
    });
  };
  add_up(sums, call.grad_weight);
  add_up(sums + count, call.grad_bias);
}

template <class V>
void norm_grad(const NormGrad& call) {
  with_types(call.norm.type, call.norm.y_type,
             [&](auto type, auto y_type) { run_norm_grad<V, type(), y_type()>(call); });
}

// The derivative of `activate`.
template <class V, Activation activation>
typename V::F slope_of(typename V::F x) {
  using F = typename V::F;
  const F one = V::set(1.0f), zero = V::set(0.0f);
  const auto sigmoid = [&](F t) { return V::divide(one, V::add(one, exponential<V>(V::multiply(t, V::set(-1.0f))))); };
  // d (x * sigmoid(t)) = sigmoid(t) * (1 + x * t' * (1 - sigmoid(t)))
  const auto with_sigmoid = [&](F t, F of_t) {
    const F found = sigmoid(t);
    return V::multiply(found, V::fma(V::multiply(x, of_t), V::subtract(one, found), one));
  };
  if constexpr (activation == Activation::silu) return with_sigmoid(x, one);
  if constexpr (activation == Activation::gelu) {
    const F below = V::multiply(V::set(0.5f), linear::one_plus_erf<V>(V::multiply(x, V::set(0.70710678f))));
    const F density = exponential<V>(V::multiply(V::multiply(x, x), V::set(-0.5f)));
    return V::fma(V::multiply(x, V::set(0.39894228f)), density, below);
  }
  if constexpr (activation == Activation::gelu_tanh) {
    const F square = V::multiply(x, x);
    const F t = V::multiply(V::fma(V::multiply(square, x), V::set(0.044715f), x), V::set(1.59576912f));
    return with_sigmoid(t, V::fma(square, V::set(0.2140644488f), V::set(1.59576912f)));
  }
  if constexpr (activation == Activation::relu) return V::where_greater(x, zero, one, zero);
  return V::multiply(V::set(2.0f), V::max(x, zero));
}

template <class V, Type type, Activation activation>
void gate_grad_part(const GateGrad& call, std::int64_t first, std::int64_t last) {
  using F = typename V::F;
  each_vector<V>(last - first, [&](std::int64_t k, int count) {
    const auto load = [&](const void* from) { return V::template load<type>(from, first + k, count); };
    const F gate = load(call.gate.gate), grad = load(call.grad);
    const F grad_gate = V::multiply(V::multiply(grad, load(call.gate.up)), slope_of<V, activation>(gate));
    V::template store<type>(call.grad_gate, first + k, count, grad_gate);
    V::template store<type>(call.grad_up, first + k, count, V::multiply(grad, activate<V, activation>(gate)));
  });
}

template <class V>
void gate_grad(const GateGrad& call) {
  const std::int64_t count = call.gate.count, vectors = (count + V::lanes - 1) / V::lanes;
  const int threads = useful_threads(2 * count, call.gate.threads);
  with_type(call.gate.type, [&](auto type) {
    linear::with_activation(call.gate.activation, [&](auto activation) {
      if constexpr (activation() != Activation::none) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int t = 0; t < threads; t++)
          gate_grad_part<V, type(), activation()>(call, vectors * t / threads * V::lanes,
                                                  std::min(count, vectors * (t + 1) / threads * V::lanes));
      }
    });
  });
}

}  // namespace
}  // namespace parco::rowwise
