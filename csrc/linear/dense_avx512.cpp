#include "linear/avx512.h"
#include "linear/dense_engine.h"

namespace parco::linear {
namespace {

struct Dense512 {
  using F = __m512;
  static constexpr int lanes = 16, sums = 16;

  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_load_ps(from); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(F value) { return _mm512_reduce_add_ps(value); }

  // 32 weights: the even and the odd ones of bf16, the first and the last 16 of other types.
  template <Type type>
  static void widen(const char* from, F* to) {
    if constexpr (type == Type::bf16) {
      const __m512i pairs = _mm512_loadu_si512(from);
      to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      to[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<std::int32_t>(0xffff0000u))));
    } else if constexpr (type == Type::fp16) {
      to[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      to[1] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32)));
    } else {
      to[0] = _mm512_loadu_ps(from), to[1] = _mm512_loadu_ps(from + 64);
    }
  }
};

}  // namespace

void dense_avx512(const DenseCall& call) { run_dense<Dense512>(call); }

}  // namespace parco::linear
