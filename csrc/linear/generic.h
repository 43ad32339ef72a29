// What several translation units in plain C++ share: one number to a vector. Unnamed: see floats.h.
#pragma once
#include <cmath>

#include "linear/floats.h"

namespace parco::linear::generic {
namespace {

// Floats as activation.h and the engines want them.
struct Arithmetic {
  using F = float;
  static constexpr int lanes = 1;

  static F set(float value) { return value; }
  static F add(F a, F b) { return a + b; }
  static F subtract(F a, F b) { return a - b; }
  static F multiply(F a, F b) { return a * b; }
  static F divide(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }  // rounded twice: without the instruction one is a long function
  static F max(F a, F b) { return b > a ? b : a; }
  static F min(F a, F b) { return b < a ? b : a; }
  static F abs(F a) { return std::fabs(a); }
  static F where_greater(F a, F b, F yes, F no) { return a > b ? yes : no; }
  static F nearest(F a) { return std::nearbyint(a); }
  static F power_of_two(F whole) { return float_of(static_cast<std::uint32_t>(static_cast<int>(whole) + 127) << 23); }
  static float total(F a) { return a; }
  static F load(const float* from) { return *from; }
  static void store(float* to, F value) { *to = value; }
  template <Type type>
  static F load(const void* from, std::int64_t index, int) {
    return load_float(from, type, index);
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int, F value) {
    store_float(to, type, index, value);
  }
  static F load_floats(const void* from, Type type, std::int64_t index, int) { return load_float(from, type, index); }
  static void store_floats(void* to, Type type, std::int64_t index, int, F value) {
    store_float(to, type, index, value);
  }
};

}  // namespace
}  // namespace parco::linear::generic
