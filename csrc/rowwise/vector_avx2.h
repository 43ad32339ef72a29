// The vector type of AVX2 for rowwise_engine.h and what is made of it. Unnamed: see linear/floats.h.
#pragma once
#include <algorithm>
#include <cstring>

#include "cast/philox_avx2.h"
#include "linear/avx2.h"

namespace parco::rowwise {
namespace {

using linear::Type;

struct V256 : linear::avx2::Arithmetic {
  using Random = cast::avx2::Random;
  using Arithmetic::load, Arithmetic::store;
  template <Type type>
  static F load(const void* from, std::int64_t index, int count) {
    constexpr int size = linear::size_of(type);
    const char* bytes = static_cast<const char*>(from) + size * index;
    alignas(32) char held[32] = {};
    if (count < lanes) {
      std::memcpy(held, bytes, static_cast<std::size_t>(size * count));
      bytes = held;
    }
    if constexpr (type == Type::fp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(bytes));
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    if constexpr (type == Type::fp16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int count, F value) {
    constexpr int size = linear::size_of(type);
    char* bytes = static_cast<char*>(to) + size * index;
    alignas(32) char held[32];
    if constexpr (type == Type::fp32)
      _mm256_store_ps(reinterpret_cast<float*>(held), value);
    else
      _mm_store_si128(reinterpret_cast<__m128i*>(held), narrow<type>(value));
    std::memcpy(bytes, held, static_cast<std::size_t>(size * std::min(count, lanes)));
  }
  template <Type type>
  static __m128i narrow(F value) {
    if constexpr (type == Type::fp16) return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i nearest =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i kept =
        _mm256_blendv_epi8(nearest, quiet, _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  }
  template <Type type>
  static F rounded(F value) {
    if constexpr (type == Type::fp32) return value;
    const __m128i halves = narrow<type>(value);
    return load<type>(&halves, 0, lanes);
  }
};

}  // namespace
}  // namespace parco::rowwise
