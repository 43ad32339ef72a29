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

// 8 scales from index `at`, times `factor`.
inline __m256 load_scales(const void* scale, Type type, std::int64_t at, float factor) {
  return _mm256_mul_ps(load_floats(scale, type, at, 8), _mm256_set1_ps(factor));
}

}  // namespace
}  // namespace parco::linear::avx2
