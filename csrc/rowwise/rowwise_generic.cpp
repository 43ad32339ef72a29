// One number to a vector.
#include <type_traits>

#include "linear/generic.h"
#include "rowwise/attention_engine.h"
#include "rowwise/gradient_engine.h"
#include "rowwise/loss_engine.h"
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

struct V1 : linear::generic::Arithmetic {
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
};

}  // namespace

void norm_generic(const Norm& call) { norm<V1>(call); }
void gate_generic(const Gate& call) { gate<V1>(call); }
void norm_grad_generic(const NormGrad& call) { norm_grad<V1>(call); }
void gate_grad_generic(const GateGrad& call) { gate_grad<V1>(call); }
void cross_entropy_generic(const CrossEntropy& call) { cross_entropy<V1>(call); }
void rotate_generic(const Rotation& call) { rotate<V1>(call); }
void attend_generic(const Attention& call) { attend<V1>(call); }
void add_generic(const Sum& call) { add<V1>(call); }

}  // namespace parco::rowwise
