#include "linear/dense_engine.h"
#include "linear/generic.h"

namespace parco::linear {
namespace {

// Four lanes in plain C++; the compiler may use what vectors the target always has.
struct Dense4 {
  struct F {
    float lane[4];
  };
  using Written = generic::Arithmetic;
  static constexpr int lanes = 4, dense_sums = 8;

  static F set(float value) { return {{value, value, value, value}}; }
  static F load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
  static F add(F a, F b) {
    for (int i = 0; i < 4; i++) a.lane[i] += b.lane[i];
    return a;
  }
  // Product and sum rounded apart: a fused one is a library call here.
  static F fma(F a, F b, F c) {
    for (int i = 0; i < 4; i++) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float total(F value) { return (value.lane[0] + value.lane[2]) + (value.lane[1] + value.lane[3]); }

  template <Type type>
  static void widen(const char* from, F* to) {
    for (int i = 0; i < 8; i++) {
      const float value = load_float(from, type, i);
      if (type == Type::bf16)
        to[i % 2].lane[i / 2] = value;
      else
        to[i / 4].lane[i % 4] = value;
    }
  }
};

}  // namespace

void dense_generic(const DenseCall& call) { run_dense<Dense4>(call); }

}  // namespace parco::linear
