#include <type_traits>

#include "linear/avx512.h"
#include "rowwise/attention_engine.h"
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

struct V512 {
  using F = __m512;
  static constexpr int lanes = 16;

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
  static F set(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // Of a NaN these give the NaN, which stands second.
  static F max(F a, F b) { return _mm512_max_ps(b, a); }
  static F min(F a, F b) { return _mm512_min_ps(b, a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F where_greater(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
  }
  static F nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(F whole) { return _mm512_scalef_ps(set(1.0f), whole); }
  static float total(F a) { return _mm512_reduce_add_ps(a); }
};

}  // namespace

void norm_avx512(const Norm& call) { norm<V512>(call); }
void gate_avx512(const Gate& call) { gate<V512>(call); }
void rotate_avx512(const Rotation& call) { rotate<V512>(call); }
void attend_avx512(const Attention& call) { attend<V512>(call); }
void add_avx512(const Sum& call) { add<V512>(call); }

}  // namespace parco::rowwise
