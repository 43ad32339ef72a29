// The operations of rowwise.h for vector instruction sets. Included by one translation unit per instruction set; V is
// its vector type. Everything is unnamed (see linear/floats.h).
//
// exp and tanh are Cephes' expf and tanhf, and the error function is Norbert Juffa's: polynomials of fp32, within 2
// units in the last place.
#pragma once
#include <algorithm>

#include "rowwise/rowwise.h"

namespace parco::rowwise {
namespace {

constexpr std::int64_t numbers_worth_a_thread = 32 * 1024;

inline int useful_threads(std::int64_t numbers, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>(numbers / numbers_worth_a_thread, 1, threads));
}

// f(first, count) for every vector of [0, columns).
template <class V, class F>
void each_vector(std::int64_t columns, const F& f) {
  std::int64_t k = 0;
  for (; k + V::lanes <= columns; k += V::lanes) f(k, V::lanes);
  if (k < columns) f(k, static_cast<int>(columns - k));
}

template <class V, Type type>
void norm_rows(const Norm& call, std::int64_t first, std::int64_t last) {
  using F = typename V::F;
  for (std::int64_t m = first; m < last; m++) {
    const std::int64_t row = m * call.columns;
    float means[V::lanes] = {};
    // The row less its mean; behind its end there are zeros.
    const auto load = [&](std::int64_t k, int count) {
      const F value = V::template load<type>(call.x, row + k, count);
      return call.centered ? V::subtract(value, V::template load<Type::fp32>(means, 0, count)) : value;
    };
    const auto mean_of = [&](const auto& add) {
      F sums[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
      each_vector<V>(call.columns, [&](std::int64_t k, int count) { add(sums[k / V::lanes % 4], load(k, count)); });
      return V::total(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]))) / static_cast<float>(call.columns);
    };
    if (call.centered) std::fill_n(means, V::lanes, mean_of([](F& sum, F value) { sum = V::add(sum, value); }));
    const float square = mean_of([](F& sum, F value) { sum = V::fma(value, value, sum); });
    const F scale = V::set(1.0f / __builtin_sqrtf(square + call.epsilon));
    const F offset = V::set(call.offset);
    each_vector<V>(call.columns, [&](std::int64_t k, int count) {
      F value = V::multiply(load(k, count), scale);
      if (call.rounded) value = V::template rounded<type>(value);
      value = V::multiply(value, V::add(V::template load<type>(call.weight, k, count), offset));
      if (call.bias) value = V::add(value, V::template load<type>(call.bias, k, count));
      V::template store<type>(call.y, row + k, count, value);
    });
  }
}

template <class V>
typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  x = V::min(V::max(x, V::set(-87.0f)), V::set(88.0f));
  const F whole = V::nearest(V::multiply(x, V::set(1.44269504f)));
  F rest = V::fma(whole, V::set(-0.693359375f), x);
  rest = V::fma(whole, V::set(2.12194440e-4f), rest);
  F p = V::set(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = V::fma(p, rest, V::set(c));
  p = V::fma(p, V::multiply(rest, rest), V::add(rest, V::set(1.0f)));
  return V::multiply(p, V::power_of_two(whole));
}

// Cephes' tanhf.
template <class V>
typename V::F hyperbolic_tangent(typename V::F x) {
  using F = typename V::F;
  const F square = V::multiply(x, x), one = V::set(1.0f), two = V::set(2.0f);
  F near = V::set(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    near = V::fma(near, square, V::set(c));
  near = V::fma(V::multiply(near, square), x, x);
  const F magnitude = V::abs(x);
  F far = V::subtract(one, V::divide(two, V::add(exponential<V>(V::multiply(magnitude, two)), one)));
  far = V::where_greater(x, V::set(0.0f), far, V::multiply(far, V::set(-1.0f)));
  return V::where_greater(magnitude, V::set(0.625f), far, near);
}

// 1 + erf(x), without cancellation where x is far below 0.
template <class V>
typename V::F one_plus_erf(typename V::F x) {
  using F = typename V::F;
  const F magnitude = V::abs(x), square = V::multiply(x, x), one = V::set(1.0f);
  F far = V::fma(V::set(-1.72853470e-5f), magnitude, V::set(3.83197126e-4f));
  far = V::fma(far, square, V::fma(V::set(-3.88396438e-3f), magnitude, V::set(2.42546219e-2f)));
  for (const float c : {-1.06777877e-1f, -6.34846687e-1f, -1.28717512e-1f}) far = V::fma(far, magnitude, V::set(c));
  far = exponential<V>(V::fma(far, magnitude, V::multiply(magnitude, V::set(-1.0f))));  // 1 - erf(|x|)
  far = V::where_greater(x, V::set(0.0f), V::subtract(V::set(2.0f), far), far);
  F near = V::set(-5.96761703e-4f);
  for (const float c : {4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f, 1.28379166e-1f})
    near = V::fma(near, square, V::set(c));
  near = V::add(one, V::fma(near, x, x));
  return V::where_greater(magnitude, V::set(0.927734375f), far, near);
}

template <class V, Activation activation>
typename V::F activate(typename V::F x) {
  using F = typename V::F;
  const auto sigmoid_times = [&](F t) {  // x / (1 + exp(-t))
    return V::divide(x, V::add(V::set(1.0f), exponential<V>(V::multiply(t, V::set(-1.0f)))));
  };
  if constexpr (activation == Activation::silu) return sigmoid_times(x);
  if constexpr (activation == Activation::gelu) {
    return V::multiply(V::multiply(x, V::set(0.5f)), one_plus_erf<V>(V::multiply(x, V::set(0.70710678f))));
  }
  if constexpr (activation == Activation::gelu_tanh) {  // (1 + tanh(t)) / 2 is the sigmoid of 2 t
    const F cube = V::multiply(V::multiply(x, x), x);
    return sigmoid_times(V::multiply(V::fma(cube, V::set(0.044715f), x), V::set(1.59576912f)));
  }
  const F positive = V::max(x, V::set(0.0f));
  return activation == Activation::relu ? positive : V::multiply(positive, positive);
}

template <class V, Type type, Activation activation>
void gate_part(const Gate& call, std::int64_t first, std::int64_t last) {
  each_vector<V>(last - first, [&](std::int64_t k, int count) {
    typename V::F value = activate<V, activation>(V::template load<type>(call.gate, first + k, count));
    if (call.up) value = V::multiply(value, V::template load<type>(call.up, first + k, count));
    V::template store<type>(call.y, first + k, count, value);
  });
}

template <class V, Type type>
void rotate_head(const Rotation& call, const Heads& heads, std::int64_t b, std::int64_t h, std::int64_t t) {
  using F = typename V::F;
  const std::int64_t x = b * heads.x_stride[0] + h * heads.x_stride[1] + t * heads.x_stride[2];
  const std::int64_t y = b * heads.y_stride[0] + h * heads.y_stride[1] + t * heads.y_stride[2];
  const std::int64_t angle = b * call.angle_stride[0] + t * call.angle_stride[1], half = call.columns / 2;
  each_vector<V>(half, [&](std::int64_t k, int count) {
    const auto load = [&](const void* from, std::int64_t at) { return V::template load<type>(from, at, count); };
    const F low = load(heads.x, x + k), high = load(heads.x, x + half + k);
    const F low_sin = V::multiply(high, load(call.sin, angle + k));
    const F high_sin = V::multiply(low, load(call.sin, angle + half + k));
    const F minus_low_sin = V::multiply(low_sin, V::set(-1.0f));
    V::template store<type>(heads.y, y + k, count, V::fma(low, load(call.cos, angle + k), minus_low_sin));
    V::template store<type>(heads.y, y + half + k, count, V::fma(high, load(call.cos, angle + half + k), high_sin));
  });
  constexpr int size = linear::size_of(type);
  if (call.rest)
    std::memcpy(static_cast<char*>(heads.y) + (y + call.columns) * size,
                static_cast<const char*>(heads.x) + (x + call.columns) * size,
                static_cast<std::size_t>(call.rest * size));
}

template <class V, Type type>
void run_norm(const Norm& call) {
  const int threads = useful_threads(call.rows * call.columns, call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) norm_rows<V, type>(call, call.rows * t / threads, call.rows * (t + 1) / threads);
}

template <class V, Type type, Activation activation>
void run_gate(const Gate& call) {
  const int threads = useful_threads(call.count, call.threads);
  const std::int64_t vectors = (call.count + V::lanes - 1) / V::lanes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++)
    gate_part<V, type, activation>(call, vectors * t / threads * V::lanes,
                                   std::min(call.count, vectors * (t + 1) / threads * V::lanes));
}

template <class V, Type type>
void run_rotation(const Rotation& call) {
  const std::int64_t heads = call.of[0].heads + call.of[1].heads;
  const int threads = useful_threads(call.batch * call.tokens * heads * (call.columns + call.rest), call.threads);
  const std::int64_t places = call.batch * call.tokens;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    for (std::int64_t i = places * part / threads; i < places * (part + 1) / threads; i++) {
      for (const Heads& each : call.of)
        for (std::int64_t h = 0; h < each.heads; h++)
          rotate_head<V, type>(call, each, i / call.tokens, h, i % call.tokens);
    }
  }
}

// f(type) with the type as a constant.
template <class F>
void with_type(Type type, const F& f) {
  if (type == Type::fp32) return f(std::integral_constant<Type, Type::fp32>{});
  if (type == Type::bf16) return f(std::integral_constant<Type, Type::bf16>{});
  f(std::integral_constant<Type, Type::fp16>{});
}

template <class V>
void norm(const Norm& call) {
  with_type(call.type, [&](auto type) { run_norm<V, type()>(call); });
}

template <class V>
void gate(const Gate& call) {
  with_type(call.type, [&](auto type) {
    switch (call.activation) {
      case Activation::silu:
        return run_gate<V, type(), Activation::silu>(call);
      case Activation::gelu:
        return run_gate<V, type(), Activation::gelu>(call);
      case Activation::gelu_tanh:
        return run_gate<V, type(), Activation::gelu_tanh>(call);
      case Activation::relu:
        return run_gate<V, type(), Activation::relu>(call);
      case Activation::relu_squared:
        return run_gate<V, type(), Activation::relu_squared>(call);
    }
  });
}

template <class V>
void rotate(const Rotation& call) {
  with_type(call.type, [&](auto type) { run_rotation<V, type()>(call); });
}

}  // namespace
}  // namespace parco::rowwise
