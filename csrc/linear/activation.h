// Activation functions on vectors of fp32. V is an instruction set's arithmetic; everything is unnamed (see floats.h).
//
// exp and tanh are Cephes' expf and tanhf, and the error function is Norbert Juffa's: polynomials of fp32, within 2
// units in the last place.
#pragma once
#include <type_traits>

#include "linear/coded.h"

namespace parco::linear {
namespace {

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
  if constexpr (activation == Activation::none) return x;
  const F positive = V::max(x, V::set(0.0f));
  return activation == Activation::relu ? positive : V::multiply(positive, positive);
}

// f(activation) with the activation as a constant.
template <class F>
void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu_squared:
      return f(std::integral_constant<Activation, Activation::relu_squared>{});
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>{});
  }
}

}  // namespace
}  // namespace parco::linear
