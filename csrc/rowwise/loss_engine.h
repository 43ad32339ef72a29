// Softmax and cross entropy of rows of logits, for vector instruction sets (see rowwise_engine.h).
//
// A row is read three times: for its largest logit, for the sum of powers and for the gradient. It stays in the second
// level of cache meanwhile, so the powers are computed again instead of being stored and rounded.
#pragma once
#include <cmath>

#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

constexpr std::int64_t columns_of_a_sum = 4096;

template <class V, Type type, Type rounded>
struct Row {
  using F = typename V::F;
  const CrossEntropy& call;
  std::int64_t at;  // of its first logit

  F raw(std::int64_t k, int count) const { return V::template load<type>(call.logits, at + k, count); }
  F load(std::int64_t k, int count) const { return capped(raw(k, count)); }
  F capped(F value) const {
    if (call.softcap == 0) return value;
    const F cap = V::set(call.softcap);
    return V::multiply(linear::hyperbolic_tangent<V>(V::divide(value, cap)), cap);
  }
  void put(std::int64_t k, int count, F value) const {
    V::template store<type>(call.logits, at + k, count, V::template rounded<rounded>(value));
  }
  void zero() const {
    each_vector<V>(call.columns, [&](std::int64_t k, int count) { put(k, count, V::set(0.0f)); });
  }

  // As the logits are, before any cap.
  float largest() const {
    float last = first(raw(0, 1));
    F found[4] = {V::set(last), V::set(last), V::set(last), V::set(last)};
    each_vector<V>(call.columns, [&](std::int64_t k, int count) {
      if (count == V::lanes)
        found[k / V::lanes % 4] = V::max(raw(k, count), found[k / V::lanes % 4]);
      else
        for (int i = 0; i < count; i++) last = std::max(last, first(raw(k + i, 1)));
    });
    float lanes[V::lanes];
    V::template store<Type::fp32>(lanes, 0, V::lanes, V::max(V::max(found[0], found[1]), V::max(found[2], found[3])));
    for (const float each : lanes) last = std::max(last, each);
    return last;
  }

  // The sum of f(logits) over all columns: of every few thousand in fp32, of these in double.
  template <class Term>
  double sum(const Term& f) const {
    double all = 0;
    for (std::int64_t begin = 0; begin < call.columns; begin += columns_of_a_sum) {
      F sums[4] = {V::set(0.0f), V::set(0.0f), V::set(0.0f), V::set(0.0f)};
      each_vector<V>(std::min(columns_of_a_sum, call.columns - begin), [&](std::int64_t k, int count) {
        const F term = f(load(begin + k, count));
        if (count == V::lanes) {
          sums[k / V::lanes % 4] = V::add(sums[k / V::lanes % 4], term);
          return;
        }
        float lanes[V::lanes];
        V::template store<Type::fp32>(lanes, 0, V::lanes, term);
        for (int i = 0; i < count; i++) all += static_cast<double>(lanes[i]);
      });
      all += static_cast<double>(V::total(V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]))));
    }
    return all;
  }

  static float first(F value) {
    float found;
    V::template store<Type::fp32>(&found, 0, 1, value);
    return found;
  }

  // The derivative of `capped` by what it returns.
  F slope(F capped) const {
    const F part = V::divide(capped, V::set(call.softcap));
    return V::subtract(V::set(1.0f), V::multiply(part, part));
  }

  void run(std::int64_t m) const {
    const std::int64_t label = call.labels[m];
    if (label < 0 || label >= call.columns) {
      call.losses[m] = 0.0f;
      if (call.gradient) zero();
      return;
    }
    const F top = capped(V::set(largest())), of_label = capped(V::set(first(raw(label, 1))));
    const auto power = [&](F value) { return exponential<V>(V::subtract(value, top)); };
    const double total = sum(power), width = static_cast<double>(call.columns);
    const double log_sum = static_cast<double>(first(top)) + std::log(total),
                 smoothing = static_cast<double>(call.smoothing);
    double loss = (1 - smoothing) * (log_sum - static_cast<double>(first(of_label)));
    if (smoothing != 0) loss += smoothing * (log_sum - sum([](F value) { return value; }) / width);
    call.losses[m] = static_cast<float>(loss);
    if (!call.gradient) return;

    const F share = V::set(static_cast<float>(1 / total)), spread = V::set(static_cast<float>(smoothing / width));
    const F factor = V::set(call.factors ? call.factors[m] : 1.0f);
    const auto derivative = [&](F value, F target) {
      F found = V::subtract(V::multiply(power(value), share), target);
      if (call.softcap != 0) found = V::multiply(found, slope(value));
      return V::multiply(found, factor);
    };
    const F on_label = V::set(static_cast<float>(1 - smoothing + smoothing / width));
    const F at_label = derivative(of_label, on_label);
    each_vector<V>(call.columns, [&](std::int64_t k, int count) { put(k, count, derivative(load(k, count), spread)); });
    put(label, 1, at_label);
  }
};

template <class V, Type type, Type rounded>
void run_cross_entropy(const CrossEntropy& call) {
  const int threads =
      static_cast<int>(std::min<std::int64_t>(call.rows, useful_threads(call.rows * call.columns * 4, call.threads)));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++)
    for (std::int64_t m = call.rows * t / threads; m < call.rows * (t + 1) / threads; m++)
      Row<V, type, rounded>{call, m * call.columns}.run(m);
}

template <class V>
void cross_entropy(const CrossEntropy& call) {
  with_types(call.type, call.rounded, [&](auto type, auto rounded) { run_cross_entropy<V, type(), rounded()>(call); });
}

}  // namespace
}  // namespace parco::rowwise
