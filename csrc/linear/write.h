// The end of every product: what is left to do to a sum once its bias is added. V is an instruction set's arithmetic;
// everything is unnamed (see floats.h).
#pragma once
#include <algorithm>

#include "linear/activation.h"
#include "linear/floats.h"

namespace parco::linear {
namespace {

// A function of its own, so that where there is no epilogue the products lose no registers to it.
template <class V>
[[gnu::noinline]] typename V::F ended(const Epilogue& after, std::int64_t at, int count, typename V::F value) {
  with_activation(after.activation, [&](auto activation) { value = activate<V, activation()>(value); });
  if (after.addend) value = V::add(value, V::load_floats(after.addend, after.addend_type, at, count));
  return value;
}

// `count` numbers of y from index `at` on, with the call's epilogue.
template <class V, class Call>
void write(const Call& call, std::int64_t at, int count, typename V::F value) {
  if (__builtin_expect(call.after.any(), false)) value = ended<V>(call.after, at, count, value);
  V::store_floats(call.y, call.y_type, at, count, value);
}

// Asks for the addend of `rows` rows from `row` on and `count` outputs from `first` on, before the products that it is
// added to: rows lie so far apart that nothing else would foresee it.
template <class Call>
void ask_for_addend(const Call& call, std::int64_t row, std::int64_t rows, std::int64_t first, std::int64_t count) {
  if (__builtin_expect(!call.after.addend, true)) return;
  const int size = size_of(call.after.addend_type);
  for (std::int64_t m = row; m < row + rows; m++) {
    const char* const from = static_cast<const char*>(call.after.addend) + (m * call.outputs + first) * size;
    for (std::int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(from + byte);
  }
}

// As `write`, of aligned numbers in memory, of which whole vectors can be read: only where there is an epilogue, since
// a vector read of numbers just written one by one has to wait for them.
template <class V, class Call>
void write_all(const Call& call, std::int64_t at, int count, const float* values) {
  if (__builtin_expect(!call.after.any(), true)) {
    for (int i = 0; i < count; i++) store_float(call.y, call.y_type, at + i, values[i]);
    return;
  }
  for (int i = 0; i < count; i += V::lanes) write<V>(call, at + i, std::min(V::lanes, count - i), V::load(values + i));
}

}  // namespace
}  // namespace parco::linear
