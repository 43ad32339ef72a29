#include <type_traits>

#include "linear/avx512.h"
#include "rowwise/attention_engine.h"
#include "rowwise/gradient_engine.h"
#include "rowwise/loss_engine.h"
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

struct V512 : linear::avx512::Arithmetic {
  template <Type type>
  static F load(const void* from, std::int64_t index, int count) {
    return linear::avx512::load_floats(from, type, index, count);
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int count, F value) {
    linear::avx512::store_floats(to, type, index, count, value);
  }
  template <Type type>
  static F rounded(F value) {
    if constexpr (type == Type::bf16) return linear::avx512::widen_bf16(linear::avx512::narrow_bf16(value));
    if constexpr (type == Type::fp16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return value;
  }
};

}  // namespace

void norm_avx512(const Norm& call) { norm<V512>(call); }
void gate_avx512(const Gate& call) { gate<V512>(call); }
void norm_grad_avx512(const NormGrad& call) { norm_grad<V512>(call); }
void gate_grad_avx512(const GateGrad& call) { gate_grad<V512>(call); }
void cross_entropy_avx512(const CrossEntropy& call) { cross_entropy<V512>(call); }
void rotate_avx512(const Rotation& call) { rotate<V512>(call); }
void attend_avx512(const Attention& call) { attend<V512>(call); }
void add_avx512(const Sum& call) { add<V512>(call); }

}  // namespace parco::rowwise
