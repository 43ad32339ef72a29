#include <immintrin.h>

#include "linear/dense_engine.h"

namespace parco::linear {
namespace {

struct Dense256 {
  using F = __m256;
  static constexpr int lanes = 8, sums = 8;

  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_load_ps(from); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(F value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // 16 weights: the even and the odd ones of bf16, the first and the last 8 of other types.
  template <Type type>
  static void widen(const char* from, F* to) {
    if constexpr (type == Type::bf16) {
      const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      to[0] = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
      to[1] = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<std::int32_t>(0xffff0000u))));
    } else if constexpr (type == Type::fp16) {
      to[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      to[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16)));
    } else {
      to[0] = _mm256_loadu_ps(reinterpret_cast<const float*>(from));
      to[1] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + 32));
    }
  }
};

}  // namespace

void dense_avx2(const DenseCall& call) { run_dense<Dense256>(call); }

}  // namespace parco::linear
