// What several AVX-512 translation units share. Unnamed: see floats.h.
#pragma once
// GCC 12 writes "undefined" vectors as a variable set to itself in its own header and then warns of it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "linear/coded.h"

namespace parco::linear::avx512 {
namespace {

inline __m512 widen_bf16(__m256i halves) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The numbers in the low bits of 16 dwords.
inline __m512 widen(__m512i bits, Type type) {
  if (type == Type::fp32) return _mm512_castsi512_ps(bits);
  if (type == Type::bf16) return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  if (type == Type::fp16) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
  const __m512i byte = _mm512_and_si512(bits, _mm512_set1_epi32(255)), nan = _mm512_set1_epi32(0x7fc00000);
  if (type == Type::e8m0) {
    // The pattern of an exponent alone, but for the least one, 2^-127, which is subnormal.
    const __m512i power = _mm512_max_epu32(_mm512_slli_epi32(byte, 23), _mm512_set1_epi32(1 << 22));
    return _mm512_castsi512_ps(
        _mm512_mask_mov_epi32(power, _mm512_cmpeq_epi32_mask(byte, _mm512_set1_epi32(255)), nan));
  }
  // e4m3 is fp16's pattern with an exponent that is 8 too small.
  const __m512i magnitude = _mm512_and_si512(byte, _mm512_set1_epi32(127));
  const __m512i half = _mm512_or_si512(_mm512_slli_epi32(magnitude, 7),
                                       _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(128)), 8));
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(half)), _mm512_set1_ps(256.0f));
  return _mm512_mask_mov_ps(value, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(127)),
                            _mm512_castsi512_ps(nan));
}

// 16 scales from index `at`, times `factor`.
inline __m512 load_scales(const void* scale, Type type, std::int64_t at, float factor) {
  const char* from = static_cast<const char*>(scale) + at * size_of(type);
  __m512i bits;
  if (type == Type::fp32)
    bits = _mm512_loadu_si512(from);
  else if (size_of(type) == 2)
    bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  else
    bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_mul_ps(widen(bits, type), _mm512_set1_ps(factor));
}

// `count` (at most 16) values from index `index`; the rest are zero.
inline __m512 load_floats(const void* from, Type type, std::int64_t index, int count) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (type == Type::fp32) return _mm512_maskz_loadu_ps(mask, static_cast<const char*>(from) + 4 * index);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, static_cast<const char*>(from) + 2 * index);
  return type == Type::bf16 ? widen_bf16(halves) : _mm512_cvtph_ps(halves);
}

// Nearest even, written out: vcvtneps2bf16 would treat subnormals as zero.
inline __m256i narrow_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i nearest =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), quiet));
}

inline void store_floats(void* to, Type type, std::int64_t index, int count, __m512 value) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (type == Type::fp32) return _mm512_mask_storeu_ps(static_cast<char*>(to) + 4 * index, mask, value);
  const __m256i halves = type == Type::bf16 ? narrow_bf16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(static_cast<char*>(to) + 2 * index, mask, halves);
}

// Floats as activation.h and the engines want them.
struct Arithmetic {
  using F = __m512;
  static constexpr int lanes = 16;

  static F set(float value) { return _mm512_set1_ps(value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F subtract(F a, F b) { return _mm512_sub_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F divide(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // A NaN in `a` is kept, one in `b` is not.
  static F max(F a, F b) { return _mm512_max_ps(b, a); }
  static F min(F a, F b) { return _mm512_min_ps(b, a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F where_greater(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), yes);
  }
  static F nearest(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F power_of_two(F whole) { return _mm512_scalef_ps(set(1.0f), whole); }
  static float total(F a) { return _mm512_reduce_add_ps(a); }
  static F load(const float* from) { return _mm512_load_ps(from); }
  static void store(float* to, F value) { _mm512_store_ps(to, value); }
  template <Type type>
  static F load(const void* from, std::int64_t index, int count) {
    return avx512::load_floats(from, type, index, count);
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int count, F value) {
    avx512::store_floats(to, type, index, count, value);
  }
  static F load_floats(const void* from, Type type, std::int64_t index, int count) {
    return avx512::load_floats(from, type, index, count);
  }
  static void store_floats(void* to, Type type, std::int64_t index, int count, F value) {
    avx512::store_floats(to, type, index, count, value);
  }
};

// 16 rows of 16 dwords become 16 columns: dword i of every row goes to to[i], a vector with a lane for each row.
// `row(i)` gives row i. Four rows at a time, so that everything stays in registers.
template <class Row>
inline void transpose(const Row& row, __m512i* to) {
  __m512i quarter[4][4];  // [rows 4q to 4q + 3][dword modulo 4]
  for (int q = 0; q < 4; q++) {
    const __m512i r0 = row(4 * q), r1 = row(4 * q + 1), r2 = row(4 * q + 2), r3 = row(4 * q + 3);
    const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpackhi_epi32(r0, r1);
    const __m512i c = _mm512_unpacklo_epi32(r2, r3), d = _mm512_unpackhi_epi32(r2, r3);
    quarter[q][0] = _mm512_unpacklo_epi64(a, c);
    quarter[q][1] = _mm512_unpackhi_epi64(a, c);
    quarter[q][2] = _mm512_unpacklo_epi64(b, d);
    quarter[q][3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {
    const __m512i a = _mm512_shuffle_i32x4(quarter[0][i], quarter[1][i], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(quarter[2][i], quarter[3][i], 0x88);
    const __m512i c = _mm512_shuffle_i32x4(quarter[0][i], quarter[1][i], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(quarter[2][i], quarter[3][i], 0xdd);
    _mm512_store_si512(to + i, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_store_si512(to + 8 + i, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_store_si512(to + 4 + i, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_store_si512(to + 12 + i, _mm512_shuffle_i32x4(c, d, 0xdd));
  }
}

}  // namespace
}  // namespace parco::linear::avx512
