// The operations of rowwise.h for vector instruction sets. Included by one translation unit per instruction set; V is
// its vector type. Everything is unnamed (see linear/floats.h).
#pragma once
#include <algorithm>

#include "linear/activation.h"
#include "rowwise/rowwise.h"

namespace parco::rowwise {
namespace {

using linear::activate;
using linear::exponential;

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

template <class V, Type type, Type y_type>
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
      value = V::multiply(value, V::add(V::load_floats(call.weight, call.weight_type, k, count), offset));
      if (call.bias) value = V::add(value, V::load_floats(call.bias, call.weight_type, k, count));
      V::template store<y_type>(call.y, row + k, count, value);
    });
  }
}

// Numbers `first` to `last` of a row.
template <class V, Type type, Activation activation>
void gate_part(const Gate& call, std::int64_t row, std::int64_t first, std::int64_t last) {
  const std::int64_t from = row * call.stride + first, to = row * call.count + first;
  using F = typename V::F;
  const auto run = [&](const auto& of_gate, const auto& of_up) {
    each_vector<V>(last - first, [&](std::int64_t k, int count) {
      F value = activate<V, activation>(of_gate(V::template load<type>(call.gate, from + k, count)));
      if (call.up) value = V::multiply(value, of_up(V::template load<type>(call.up, from + k, count)));
      V::template store<type>(call.y, to + k, count, value);
    });
  };
  const auto same = [](F value) { return value; };
  if (!call.cut) return run(same, same);
  const F limit = V::set(call.cut->limit), least = V::set(-call.cut->limit), slope = V::set(call.cut->slope);
  const F raised = V::set(call.cut->raised), inverse = V::set(1.0f / call.cut->slope);
  run([&](F gate) { return V::multiply(V::min(gate, limit), slope); },
      [&](F up) { return V::multiply(V::add(V::max(V::min(up, limit), least), raised), inverse); });
}

template <class V, Type type>
void mix_row(const Mix& call, std::int64_t row) {
  const std::int64_t* places = call.places + row * call.count;
  const float* factors = call.factors + row * call.count;
  each_vector<V>(call.columns, [&](std::int64_t k, int count) {
    typename V::F sum = V::set(0.0f);
    for (std::int64_t i = 0; i < call.count; i++)
      if (places[i] >= 0)
        sum = V::fma(V::template load<type>(call.x, places[i] * call.columns + k, count), V::set(factors[i]), sum);
    V::template store<type>(call.y, row * call.columns + k, count, sum);
  });
}

template <class V, Type type>
void rotate_head(const Rotation& call, const Heads& heads, std::int64_t b, std::int64_t h, std::int64_t t) {
  using F = typename V::F;
  const std::int64_t x = b * heads.x_stride[0] + h * heads.x_stride[1] + t * heads.x_stride[2];
  const std::int64_t y = b * heads.y_stride[0] + h * heads.y_stride[1] + t * heads.y_stride[2];
  const std::int64_t angle = b * call.angle_stride[0] + t * call.angle_stride[1], half = call.columns / 2;
  each_vector<V>(half, [&](std::int64_t k, int count) {
    const auto load = [&](std::int64_t at) { return V::template load<type>(heads.x, at, count); };
    const auto part = [&](const void* from, std::int64_t at) {
      return V::load_floats(from, call.angle_type, angle + at, count);
    };
    const F low = load(x + k), high = load(x + half + k);
    const F low_sin = V::multiply(high, part(call.sin, k)), high_sin = V::multiply(low, part(call.sin, half + k));
    const F minus_low_sin = V::multiply(low_sin, V::set(-1.0f));
    V::template store<type>(heads.y, y + k, count, V::fma(low, part(call.cos, k), minus_low_sin));
    V::template store<type>(heads.y, y + half + k, count, V::fma(high, part(call.cos, half + k), high_sin));
  });
  constexpr int size = linear::size_of(type);
  if (call.rest)
    std::memcpy(static_cast<char*>(heads.y) + (y + call.columns) * size,
                static_cast<const char*>(heads.x) + (x + call.columns) * size,
                static_cast<std::size_t>(call.rest * size));
}

template <class V, Type type, Type y_type>
void run_norm(const Norm& call) {
  const int threads = useful_threads(call.rows * call.columns, call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++)
    norm_rows<V, type, y_type>(call, call.rows * t / threads, call.rows * (t + 1) / threads);
}

template <class V, Type type, Activation activation>
void run_gate(const Gate& call) {
  const int threads = useful_threads(call.rows * call.count, call.threads);
  const std::int64_t vectors = (call.count + V::lanes - 1) / V::lanes, all = call.rows * vectors;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    const std::int64_t last = all * (t + 1) / threads;
    for (std::int64_t at = all * t / threads; at < last;) {
      const std::int64_t row = at / vectors, end = std::min(last, (row + 1) * vectors);
      gate_part<V, type, activation>(call, row, at % vectors * V::lanes,
                                     std::min(call.count, (end - row * vectors) * V::lanes));
      at = end;
    }
  }
}

template <class V, Type type>
void run_mix(const Mix& call) {
  const int threads = useful_threads(call.rows * call.count * call.columns, call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++)
    for (std::int64_t row = call.rows * t / threads; row < call.rows * (t + 1) / threads; row++)
      mix_row<V, type>(call, row);
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

// f(type, other) for pairs of which either both are the same or the first is fp32.
template <class F>
void with_types(Type type, Type other, const F& f) {
  with_type(type, [&](auto first) {
    if constexpr (first() == Type::fp32)
      with_type(other, [&](auto second) { f(first, second); });
    else
      f(first, first);
  });
}

template <class V>
void norm(const Norm& call) {
  with_types(call.type, call.y_type, [&](auto type, auto y_type) { run_norm<V, type(), y_type()>(call); });
}

template <class V>
void gate(const Gate& call) {
  with_type(call.type, [&](auto type) {
    linear::with_activation(call.activation, [&](auto activation) {
      if constexpr (activation() != Activation::none) run_gate<V, type(), activation()>(call);
    });
  });
}

template <class V>
void mix(const Mix& call) {
  with_type(call.type, [&](auto type) { run_mix<V, type()>(call); });
}

template <class V>
void rotate(const Rotation& call) {
  with_type(call.type, [&](auto type) { run_rotation<V, type()>(call); });
}

}  // namespace
}  // namespace parco::rowwise
