// One number to a vector.
#include <cmath>
#include <type_traits>

#include "linear/floats.h"
#include "rowwise/attention_engine.h"
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

struct V1 {
  using F = float;
  static constexpr int lanes = 1;

  template <Type type>
  static F load(const void* from, std::int64_t index, int) {
    return linear::load_float(from, type, index);
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int, F value) {
    linear::store_float(to, type, index, value);
  }
  template <Type type>
  static F rounded(F value) {
    char held[4];
    linear::store_float(held, type, 0, value);
    return linear::load_float(held, type, 0);
  }
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
  static F power_of_two(F whole) {
    return linear::float_of(static_cast<std::uint32_t>(static_cast<int>(whole) + 127) << 23);
  }
  static float total(F a) { return a; }
};

}  // namespace

void norm_generic(const Norm& call) { norm<V1>(call); }
void gate_generic(const Gate& call) { gate<V1>(call); }
void rotate_generic(const Rotation& call) { rotate<V1>(call); }
void attend_generic(const Attention& call) { attend<V1>(call); }
void add_generic(const Sum& call) { add<V1>(call); }

}  // namespace parco::rowwise
