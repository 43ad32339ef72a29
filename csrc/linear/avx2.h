// What several AVX2 translation units share. Unnamed: see floats.h.
#pragma once
#include <immintrin.h>

#include "linear/floats.h"

namespace parco::linear::avx2 {
namespace {

// `count` (at most 8) values from index `index`; the rest are zero.
inline __m256 load_floats(const void* from, Type type, std::int64_t index, int count) {
  const char* bytes = static_cast<const char*>(from) + index * size_of(type);
  if (count == 8 && type == Type::fp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(bytes));
  if (count == 8 && size_of(type) == 2) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return type == Type::fp16 ? _mm256_cvtph_ps(halves)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  alignas(32) float found[8] = {};
  for (int i = 0; i < count; i++) found[i] = load_float(from, type, index + i);
  return _mm256_load_ps(found);
}

inline void store_floats(void* to, Type type, std::int64_t index, int count, __m256 value) {
  if (type == Type::fp32 && count == 8) {
    _mm256_storeu_ps(reinterpret_cast<float*>(static_cast<char*>(to) + 4 * index), value);
    return;
  }
  alignas(32) float found[8];
  _mm256_store_ps(found, value);
  for (int i = 0; i < count; i++) store_float(to, type, index + i, found[i]);
}

// Floats as activation.h and the engines want them.
struct Arithmetic {
  using F = __m256;
  static constexpr int lanes = 8;

  static F set(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm256_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  // A NaN in `a` is kept, one in `b` is not.
  static F max(F a, F b) { return _mm256_max_ps(b, a); }
  static F min(F a, F b) { return _mm256_min_ps(b, a); }
  static F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static F where_greater(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
  static F nearest(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(F whole) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
  }
  static float total(F value) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  static F load(const float* from) { return _mm256_load_ps(from); }
  static void store(float* to, F value) { _mm256_store_ps(to, value); }
  static F load_floats(const void* from, Type type, std::int64_t index, int count) {
    return avx2::load_floats(from, type, index, count);
  }
  static void store_floats(void* to, Type type, std::int64_t index, int count, F value) {
    avx2::store_floats(to, type, index, count, value);
  }
};

// 8 scales from index `at`, times `factor`.
inline __m256 load_scales(const void* scale, Type type, std::int64_t at, float factor) {
  return _mm256_mul_ps(load_floats(scale, type, at, 8), _mm256_set1_ps(factor));
}

}  // namespace
}  // namespace parco::linear::avx2
