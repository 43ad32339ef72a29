// Attention of one query, and sums, for vector instruction sets (see rowwise_engine.h).
//
// Scores, the softmax and the sum of values are fp32, in an order that depends on nothing but the sizes. Up to 4 heads
// of queries that share their keys are computed together, so that a key is read and widened once for them.
#pragma once
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

constexpr int heads_together = 4;

// scores[i][t] = scale * q[i] . key[t] of `queries` heads from `head` on.
template <class V, Type type, int queries>
void score(const Attention& call, std::int64_t q, std::int64_t key, float* scores) {
  using F = typename V::F;
  constexpr int keys = 4;
  const auto products = [&](std::int64_t first, auto together) {
    constexpr int wide = together();
    F sum[queries][wide];
    for (int i = 0; i < queries; i++)
      for (int j = 0; j < wide; j++) sum[i][j] = V::set(0.0f);
    each_vector<V>(call.columns, [&](std::int64_t k, int count) {
      F of_key[wide];
      for (int j = 0; j < wide; j++)
        of_key[j] = V::template load<type>(call.keys, key + (first + j) * call.key_stride[2] + k, count);
#pragma GCC unroll 4
      for (int i = 0; i < queries; i++) {
        const F of_query = V::template load<type>(call.q, q + i * call.q_stride[1] + k, count);
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) sum[i][j] = V::fma(of_query, of_key[j], sum[i][j]);
      }
    });
    for (int i = 0; i < queries; i++)
      for (int j = 0; j < wide; j++) scores[i * call.count + first + j] = V::total(sum[i][j]) * call.scale;
  };
  std::int64_t t = 0;
  for (; t + keys <= call.count; t += keys) products(t, std::integral_constant<int, keys>{});
  for (; t < call.count; t++) products(t, std::integral_constant<int, 1>{});
}

// Scores as softcap * tanh(score / softcap).
template <class V>
void cap(std::int64_t count, float softcap, float* scores) {
  each_vector<V>(count, [&](std::int64_t t, int some) {
    const typename V::F part = V::divide(V::template load<Type::fp32>(scores, t, some), V::set(softcap));
    V::template store<Type::fp32>(scores, t, some, V::multiply(linear::hyperbolic_tangent<V>(part), V::set(softcap)));
  });
}

// Scores as exp(score - the largest); returns 1 / their sum. With a sink both are of that score too.
template <class V>
float soften(std::int64_t count, float* scores, const float* sink) {
  using F = typename V::F;
  float largest = sink ? *sink : scores[0];
  for (std::int64_t t = 0; t < count; t++) largest = scores[t] > largest ? scores[t] : largest;
  F sum = V::set(0.0f);
  float last = 0;
  each_vector<V>(count, [&](std::int64_t t, int some) {
    const F score = V::template load<Type::fp32>(scores, t, some);
    const F power = exponential<V>(V::subtract(score, V::set(largest)));
    V::template store<Type::fp32>(scores, t, some, power);
    if (some == V::lanes)
      sum = V::add(sum, power);
    else
      for (int i = 0; i < some; i++) last += scores[t + i];
  });
  if (sink) {
    float power;
    V::template store<Type::fp32>(&power, 0, 1, exponential<V>(V::set(*sink - largest)));
    last += power;
  }
  return 1.0f / (V::total(sum) + last);
}

template <class V, Type type, int queries>
void attend_heads(const Attention& call, std::int64_t b, std::int64_t head, float* scores) {
  using F = typename V::F;
  const std::int64_t shared = head / (call.heads / call.key_heads);
  const std::int64_t value = b * call.value_stride[0] + shared * call.value_stride[1];
  score<V, type, queries>(call, b * call.q_stride[0] + head * call.q_stride[1],
                          b * call.key_stride[0] + shared * call.key_stride[1], scores);
  if (call.softcap != 0) cap<V>(queries * call.count, call.softcap, scores);
  float scale[queries];
  for (int i = 0; i < queries; i++) {
    float sink;
    if (call.sinks) V::template store<Type::fp32>(&sink, 0, 1, V::template load<type>(call.sinks, head + i, 1));
    scale[i] = soften<V>(call.count, scores + i * call.count, call.sinks ? &sink : nullptr);
  }
  constexpr int parts = heads_together / queries;  // sums of every so many tokens, for there to be work meanwhile
  each_vector<V>(call.columns, [&](std::int64_t k, int count) {
    F sum[queries][parts];
    for (int i = 0; i < queries; i++)
      for (int p = 0; p < parts; p++) sum[i][p] = V::set(0.0f);
    const auto add_token = [&](std::int64_t t, int p) {
      const F of_value = V::template load<type>(call.values, value + t * call.value_stride[2] + k, count);
#pragma GCC unroll 4
      for (int i = 0; i < queries; i++) sum[i][p] = V::fma(V::set(scores[i * call.count + t]), of_value, sum[i][p]);
    };
    std::int64_t t = 0;
    for (; t + parts <= call.count; t += parts)
#pragma GCC unroll 4
      for (int p = 0; p < parts; p++) add_token(t + p, p);
    for (; t < call.count; t++) add_token(t, 0);
    for (int i = 0; i < queries; i++) {
      F all = sum[i][0];
      for (int p = 1; p < parts; p++) all = V::add(all, sum[i][p]);
      const std::int64_t y = (b * call.heads + head + i) * call.columns + k;
      V::template store<type>(call.y, y, count, V::multiply(all, V::set(scale[i])));
    }
  });
}

template <class V, Type type>
void run_attention(const Attention& call) {
  const std::int64_t group = call.heads / call.key_heads;
  const std::int64_t in_group = (group + heads_together - 1) / heads_together;
  const std::int64_t tasks = call.batch * call.key_heads * in_group;
  const int threads = static_cast<int>(
      std::min<std::int64_t>(tasks, useful_threads(call.batch * call.heads * call.count * call.columns, call.threads)));
  const std::size_t size = linear::rounded(static_cast<std::size_t>(heads_together * call.count) * sizeof(float));
  char* memory = static_cast<char*>(linear::scratch(size * static_cast<std::size_t>(threads)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int part = 0; part < threads; part++) {
    float* scores = reinterpret_cast<float*>(memory + size * static_cast<std::size_t>(part));
    for (std::int64_t task = tasks * part / threads; task < tasks * (part + 1) / threads; task++) {
      const std::int64_t first = task % in_group * heads_together, left = group - first;
      const std::int64_t b = task / in_group / call.key_heads, head = task / in_group % call.key_heads * group + first;
      if (left >= 4)
        attend_heads<V, type, 4>(call, b, head, scores);
      else if (left == 3) {
        attend_heads<V, type, 2>(call, b, head, scores);
        attend_heads<V, type, 1>(call, b, head + 2, scores);
      } else
        left == 2 ? attend_heads<V, type, 2>(call, b, head, scores) : attend_heads<V, type, 1>(call, b, head, scores);
    }
  }
}

template <class V>
void attend(const Attention& call) {
  with_type(call.type, [&](auto type) { run_attention<V, type()>(call); });
}

template <class V>
void add(const Sum& call) {
  with_type(call.type, [&](auto type) {
    each_vector<V>(call.count, [&](std::int64_t k, int count) {
      const auto load = [&](const void* from) { return V::template load<type()>(from, k, count); };
      V::template store<type()>(call.y, k, count, V::add(load(call.a), load(call.b)));
    });
  });
}

}  // namespace
}  // namespace parco::rowwise
