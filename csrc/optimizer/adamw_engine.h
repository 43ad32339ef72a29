// AdamW for vectors V of an instruction set: floats F, and integers I of as many lanes. Included by one translation
// unit per instruction set; everything is unnamed (see linear/floats.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cast/cast_engine.h"
#include "optimizer/adamw.h"

namespace parco::optimizer {
namespace {

constexpr std::int64_t numbers_worth_a_thread = 1 << 15;
constexpr std::uint32_t infinity = 0x7f800000u;

// The 8-bit code of states.py: a magnitude of `bits` bits, 7 under a sign or 8 without one.
template <class V, bool with_sign>
struct Code {
  using F = typename V::F;
  using I = typename V::I;
  static constexpr int bits = with_sign ? 7 : 8;

  static F decode(I code) {
    const I magnitude = with_sign ? V::both(code, V::whole(127)) : code;
    const F c = V::from_whole(magnitude), zero = V::set(0.0f);
    const F power = V::floats(V::both(V::bits(V::max(c, V::set(1.0f))), V::whole(infinity)));
    const F scale = V::multiply(V::multiply(power, power), V::set(linear::power_of_two(-3 * bits)));
    const F steps = V::subtract(V::add(V::multiply(c, V::set(7.0f)), V::set(7.0f)), V::multiply(power, V::set(6.0f)));
    const F value = V::where_greater(c, zero, V::multiply(steps, scale), zero);
    if constexpr (!with_sign) return value;
    return V::floats(V::either(V::bits(value), V::template left<24>(V::both(code, V::whole(128)))));
  }

  // Of x over the block's greatest magnitude, of which `inverse` is the reciprocal.
  static I encode(F x, F inverse) {
    constexpr float slope = linear::power_of_two(bits + 2) / 7, start = 3 * linear::power_of_two(bits) / 7;
    const F y = V::multiply(V::abs(x), inverse), zero = V::set(0.0f);
    // In which power of 1/8 y lies: floor((d + 2) / 3) - 1 of the exponent's distance from that of 1.
    const I distance = V::max_whole(V::subtract_whole(V::whole(127), V::template right<23>(V::bits(y))), V::whole(1));
    const I third = V::template right<7>(V::multiply_whole(V::add_whole(distance, V::whole(2)), V::whole(43)));
    const I regime = V::subtract_whole(third, V::whole(1));
    const F up = V::floats(V::template left<23>(V::add_whole(V::add_whole(regime, regime), V::whole(127))));
    const F down = V::floats(V::template left<23>(V::subtract_whole(V::whole(127), regime)));
    const F place = V::add(V::multiply(V::multiply(y, up), V::set(slope)),
                           V::subtract(V::multiply(down, V::set(start)), V::set(1.0f)));
    const F least = with_sign ? zero : V::where_greater(y, zero, V::set(1.0f), zero);
    const F most = V::set(linear::power_of_two(bits) - 1);
    const I code = V::to_whole(V::min(most, V::max(least, place)));
    if constexpr (!with_sign) return code;
    const I sign = V::both(V::bits(x), V::subtract_whole(V::whole(0), code));  // none of a zero
    return V::either(code, V::both(V::template right<24>(sign), V::whole(128)));
  }
};

// The scale of a block whose greatest magnitude has this pattern, and what numbers are multiplied with. Blocks below
// 2^-120, where a reciprocal overflows, are zero; one with an infinity or NaN is NaN.
struct Scale {
  float scale, inverse;
  explicit Scale(std::uint32_t most) {
    const float amax = linear::float_of(most);
    if (most >= infinity)
      scale = inverse = linear::float_of(0x7fc00000u);
    else
      scale = amax < 0x1p-120f ? 0.0f : amax, inverse = amax < 0x1p-120f ? 0.0f : 1.0f / amax;
  }
};

// What numbers of one parameter go through. `grad` is the gradient as it lies there.
template <class V>
struct Update {
  using F = typename V::F;
  F factor, decay, first_weight, second_decay, second_weight, epsilon, step_size, second_root;
  bool from_grad;

  Update(const Adamw& call, const Parameter& own)
      : factor(V::set(call.grad_factor)),
        decay(V::set(call.decay)),
        first_weight(V::set(call.first_weight < 0.5f ? call.first_weight : call.first_weight - 1)),
        second_decay(V::set(call.second_decay)),
        second_weight(V::set(call.second_weight)),
        epsilon(V::set(call.epsilon)),
        step_size(V::set(own.step_size)),
        second_root(V::set(own.second_root)),
        from_grad(!(call.first_weight < 0.5f)) {}

  F operator()(F value, F grad, F& first, F& second, F& root) const {
    grad = V::multiply(grad, factor);
    const F towards = V::multiply(V::subtract(grad, first), first_weight);
    first = V::add(from_grad ? grad : first, towards);
    second = V::add(V::multiply(second, second_decay), V::multiply(V::multiply(grad, second_weight), grad));
    root = V::root(second);
    const F bottom = V::add(V::divide(root, second_root), epsilon);
    return V::add(V::multiply(value, decay), V::divide(V::multiply(first, step_size), bottom));
  }
};

// Random bits of a span's numbers, if its values take some.
template <class V, bool drawn>
class Bits {
 public:
  Bits(const Adamw& call, const Parameter& own)
      : random(call.seed, static_cast<std::int64_t>(own.stream)), offset(own.offset) {}
  void draw(std::int64_t at) {
    const std::int64_t from = offset + at;
    random.template draw<block>(from / 4 * 4, memory), first = memory + from % 4;
    if (from % 4) random.template draw<block>(from / 4 * 4 + block, memory + block);
  }
  const std::uint32_t* first = nullptr;

 private:
  typename V::Random random;
  std::int64_t offset;
  alignas(64) std::uint32_t memory[2 * block];
};

template <class V>
class Bits<V, false> {
 public:
  Bits(const Adamw&, const Parameter&) {}
  void draw(std::int64_t) {}
  const std::uint32_t* first = nullptr;
};

// f(k, count) for every vector of [0, numbers).
template <class V, class F>
inline void each_vector(int numbers, const F& f) {
  int k = 0;
  for (; k + V::lanes <= numbers; k += V::lanes) f(k, V::lanes);
  if (k < numbers) f(k, numbers - k);
}

template <class V, Type type, bool drawn>
inline void store_value(void* to, std::int64_t index, int count, typename V::F value, const std::uint32_t* random) {
  if constexpr (drawn)
    V::store_drawn(to, index, count, value, random);
  else
    V::template store<type>(to, index, count, value);
}

// Spans [first, last) of a parameter: each a block, or as many numbers under fp32 moments.
template <class V, Type type, Type grad_type, bool drawn>
void plain_spans(const Adamw& call, const Parameter& own, std::int64_t first, std::int64_t last) {
  using F = typename V::F;
  const Update<V> update(call, own);
  Bits<V, drawn> bits(call, own);
  const std::int64_t numbers = own.rows * own.columns;
  for (std::int64_t at = first * block; at < std::min(last * block, numbers); at += block) {
    bits.draw(at);
    each_vector<V>(static_cast<int>(std::min<std::int64_t>(block, numbers - at)), [&](int k, int count) {
      F moment = V::template load<Type::fp32>(own.first, at + k, count);
      F square = V::template load<Type::fp32>(own.second, at + k, count), root;
      const F value = update(V::template load<type>(own.values, at + k, count),
                             V::template load<grad_type>(own.grad, at + k, count), moment, square, root);
      V::template store<Type::fp32>(own.first, at + k, count, moment);
      V::template store<Type::fp32>(own.second, at + k, count, square);
      store_value<V, type, drawn>(own.values, at + k, count, value, bits.first + k);
    });
  }
}

template <class V, Type type, Type grad_type, bool drawn>
void coded_spans(const Adamw& call, const Parameter& own, std::int64_t first, std::int64_t last) {
  using F = typename V::F;
  const Update<V> update(call, own);
  Bits<V, drawn> bits(call, own);
  const std::int64_t in_row = (own.columns + block - 1) / block;
  alignas(64) float moments[block], roots[block];
  std::uint8_t *first_codes = static_cast<std::uint8_t*>(own.first),
               *second_codes = static_cast<std::uint8_t*>(own.second);
  for (std::int64_t span = first; span < last; span++) {
    const std::int64_t k0 = span % in_row * block, at = span / in_row * own.columns + k0;
    const int numbers = static_cast<int>(std::min<std::int64_t>(block, own.columns - k0));
    const F first_scale = V::set(linear::load_float(own.first_scale, Type::fp32, span)),
            second_scale = V::set(linear::load_float(own.second_scale, Type::fp32, span));
    typename V::I most_first = V::whole(0), most_second = V::whole(0);
    bits.draw(at);
    each_vector<V>(numbers, [&](int k, int count) {
      F moment = V::multiply(Code<V, true>::decode(V::load_codes(first_codes + at + k, count)), first_scale);
      F root = V::multiply(Code<V, false>::decode(V::load_codes(second_codes + at + k, count)), second_scale);
      F square = V::multiply(root, root);
      const F value = update(V::template load<type>(own.values, at + k, count),
                             V::template load<grad_type>(own.grad, at + k, count), moment, square, root);
      store_value<V, type, drawn>(own.values, at + k, count, value, bits.first + k);
      V::template store<Type::fp32>(moments, k, count, moment);
      V::template store<Type::fp32>(roots, k, count, root);
      // Magnitudes are compared as their patterns: those of NaN are the greatest. Lanes past the end count only where
      // a scale or a factor of NaN has made them NaN, as it has made all.
      most_first = V::max_whole(most_first, V::bits(V::abs(moment)));
      most_second = V::max_whole(most_second, V::bits(V::abs(root)));
    });
    const Scale moment_scale(V::greatest(most_first)), root_scale(V::greatest(most_second));
    linear::store_float(own.first_scale, Type::fp32, span, moment_scale.scale);
    linear::store_float(own.second_scale, Type::fp32, span, root_scale.scale);
    const F first_inverse = V::set(moment_scale.inverse), second_inverse = V::set(root_scale.inverse);
    each_vector<V>(numbers, [&](int k, int count) {
      const F moment = V::template load<Type::fp32>(moments, k, count);
      const F root = V::template load<Type::fp32>(roots, k, count);
      V::store_codes(first_codes + at + k, count, Code<V, true>::encode(moment, first_inverse));
      V::store_codes(second_codes + at + k, count, Code<V, false>::encode(root, second_inverse));
    });
  }
}

template <class F>
inline void with_type(Type type, const F& f) {
  if (type == Type::fp32) return f(std::integral_constant<Type, Type::fp32>{});
  if (type == Type::bf16) return f(std::integral_constant<Type, Type::bf16>{});
  f(std::integral_constant<Type, Type::fp16>{});
}

template <class V>
void run_spans(const Adamw& call, const Parameter& own, std::int64_t first, std::int64_t last) {
  const auto run = [&](auto type, auto drawn) {
    with_type(own.grad_type, [&](auto grad_type) {
      if (own.first_scale)
        coded_spans<V, type(), grad_type(), drawn()>(call, own, first, last);
      else
        plain_spans<V, type(), grad_type(), drawn()>(call, own, first, last);
    });
  };
  if (own.type == Type::fp32)
    run(std::integral_constant<Type, Type::fp32>{}, std::false_type{});
  else if (call.stochastic)
    run(std::integral_constant<Type, Type::bf16>{}, std::true_type{});
  else
    run(std::integral_constant<Type, Type::bf16>{}, std::false_type{});
}

// All parameters as one row of spans, of which each thread takes its share.
template <class V>
void run_adamw(const Adamw& call) {
  const int threads =
      static_cast<int>(std::clamp<std::int64_t>(call.spans * block / numbers_worth_a_thread, 1, call.threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    const std::int64_t first = call.spans * t / threads, last = call.spans * (t + 1) / threads;
    for (std::int64_t i = 0; i < call.count; i++) {
      const Parameter& own = call.parameters[i];
      const std::int64_t from = std::max(first, own.first_span), to = std::min(last, own.first_span + own.spans);
      if (from < to) run_spans<V>(call, own, from - own.first_span, to - own.first_span);
    }
  }
}

}  // namespace
}  // namespace parco::optimizer
