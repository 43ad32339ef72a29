// Greatest magnitudes and the scales that follow from them, 16 groups at a time, with AVX-512.
#pragma once
#include "cast/avx512_codes.h"
#include "cast/cast_engine.h"

namespace parco::cast::avx512 {
namespace {

using linear::size_of;
using linear::Type;
using linear::avx512::load_floats;
using linear::avx512::widen;

// Groups side by side whose scales are found together.
constexpr int together = 16;

// What numbers are multiplied with or divided by, of 16 groups, or of 1.
struct Scales {
  alignas(64) float by[together];
  alignas(64) float reciprocal[together];  // of `by`, for quotients
};

// How numbers are brought under a scale. A quotient is a division's result, found with products.
enum class Under { none, product, quotient, division };

// `use(type)` with the type as a constant.
template <class Use>
inline void with_type(Type type, const Use& use) {
  if (type == Type::fp32) return use(std::integral_constant<Type, Type::fp32>{});
  if (type == Type::bf16) return use(std::integral_constant<Type, Type::bf16>{});
  use(std::integral_constant<Type, Type::fp16>{});
}

template <Type type>
inline __m512 load(const char* from) {
  if constexpr (type == Type::fp32) return _mm512_loadu_ps(from);
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  if constexpr (type == Type::bf16) return linear::avx512::widen_bf16(halves);
  return _mm512_cvtph_ps(halves);
}

// Patterns of the greatest magnitudes among every 16th of `count` numbers, 16 or a multiple of 32: those of 16 bits
// order as their numbers too.
template <Type type>
inline __m512i greatest_lanes(const char* from, std::int64_t count) {
  constexpr int ahead = 4096;  // bytes: one page, beyond which the processor does not look by itself
  __m512i most = _mm512_setzero_si512();
  if constexpr (type == Type::fp32) {
    for (std::int64_t i = 0; i < count; i += 16) {
      _mm_prefetch(from + 4 * i + ahead, _MM_HINT_T0);
      most = _mm512_max_epu32(most, _mm512_and_si512(_mm512_loadu_si512(from + 4 * i), dwords(0x7fffffff)));
    }
    return most;
  }
  if (count == 16) {
    most = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return _mm512_and_si512(most, dwords(0x7fff));
  }
  for (std::int64_t i = 0; i < count; i += 32) {
    _mm_prefetch(from + 2 * i + ahead, _MM_HINT_T0);
    most = _mm512_max_epu16(most, _mm512_and_si512(_mm512_loadu_si512(from + 2 * i), dwords(0x7fff7fff)));
  }
  return _mm512_and_si512(_mm512_max_epu16(most, _mm512_srli_epi32(most, 16)), dwords(0xffff));
}

// The greatest lane of each of 16 vectors.
inline __m512i greatest_of_each(const __m512i* lanes) {
  __m512i fours[4];
  for (int i = 0; i < 4; i++) {
    const __m512i* four = lanes + 4 * i;
    const __m512i a =
        _mm512_max_epu32(_mm512_unpacklo_epi32(four[0], four[1]), _mm512_unpackhi_epi32(four[0], four[1]));
    const __m512i b =
        _mm512_max_epu32(_mm512_unpacklo_epi32(four[2], four[3]), _mm512_unpackhi_epi32(four[2], four[3]));
    fours[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  }
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_max_epu32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

// Patterns of the greatest magnitudes of `count` groups side by side, as fp32.
template <Type type>
inline __m512i greatest_of_groups(const char* from, std::int64_t group, int count) {
  alignas(64) __m512i lanes[together];
  const std::int64_t bytes = group * size_of(type);
  if (group == 16)
    for (int i = 0; i < count; i++) lanes[i] = greatest_lanes<type>(from + i * bytes, 16);
  else if (group == 32)
    for (int i = 0; i < count; i++) lanes[i] = greatest_lanes<type>(from + i * bytes, 32);
  else
    for (int i = 0; i < count; i++) lanes[i] = greatest_lanes<type>(from + i * bytes, group);
  for (int i = count; i < together; i++) lanes[i] = _mm512_setzero_si512();
  return _mm512_castps_si512(widen(greatest_of_each(lanes), type));
}

// As group_amax of amax_engine.h.
inline std::uint32_t row_amax(const void* x, Type type, std::int64_t index, std::int64_t count) {
  const char* from = static_cast<const char*>(x) + index * size_of(type);
  const std::int64_t whole = count / 32 * 32;
  if (whole == 0) return group_amax(x, type, index, count);
  std::uint32_t most = 0;
  with_type(type, [&](auto of_type) {
    const __m512i lanes = greatest_lanes<decltype(of_type)::value>(from, whole);
    const std::uint32_t pattern = _mm512_reduce_max_epu32(lanes);
    most = bits_of(load_float(&pattern, type, 0));
  });
  return whole == count ? most : std::max(most, group_amax(x, type, index + whole, count - whole));
}

// The codes of e8m0 and e4m3 scales, as store_scale of cast_engine.h finds them, and `by`.
inline __m512i e8m0_codes(const CastCall& call, __m512i most, __m512* by) {
  const __m512i fraction = dwords((1u << 23) - 1), one = dwords(1);
  __m512i code;
  if (call.rule == Rule::rceil) {
    const __m512 descale = _mm512_div_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(call.largest));
    const __m512i bits = _mm512_castps_si512(descale), exponent = _mm512_srli_epi32(bits, 23);
    code = _mm512_mask_add_epi32(exponent, _mm512_test_epi32_mask(bits, fraction), exponent, one);
    code = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(descale, _mm512_set1_ps(0x1p-127f), _CMP_GT_OQ), code);
  } else {
    if (call.rule == Rule::even) most = _mm512_add_epi32(most, dwords(1u << (22 - call.mantissa_bits)));
    code = _mm512_srli_epi32(most, 23);
    if (call.rule == Rule::ceil) code = _mm512_mask_add_epi32(code, _mm512_test_epi32_mask(most, fraction), code, one);
    code = _mm512_max_epi32(_mm512_sub_epi32(code, _mm512_set1_epi32(call.greatest_exponent)), _mm512_setzero_si512());
  }
  code = _mm512_min_epi32(code, dwords(254));
  // 2^(127 - code), of which the least is subnormal.
  *by = _mm512_castsi512_ps(
      _mm512_max_epi32(_mm512_slli_epi32(_mm512_sub_epi32(dwords(254), code), 23), dwords(1u << 22)));
  return code;
}

inline __m512i e4m3_codes(const CastCall& call, __m512i most, __m512* by) {
  const float factor = load_float(call.factor, Type::fp32, 0);
  const __m512 scale =
      _mm512_div_ps(_mm512_div_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(call.largest)), _mm512_set1_ps(factor));
  const __m512i code = E4m3(call).codes<Rounding::nearest>(scale, _mm512_setzero_si512());
  const __m512 number = widen(code, Type::e4m3);
  *by = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(number, _mm512_setzero_ps(), _CMP_NEQ_UQ), _mm512_set1_ps(1.0f / factor),
                            number);
  return code;
}

inline __m512 absmax_scales(const CastCall& call, __m512i most) {
  const float limit = call.scale_type == Type::fp16   ? 65504.0f
                      : call.scale_type == Type::bf16 ? 0x1.fep127f
                                                      : 0x1.fffffep127f;
  const __m512 scale = _mm512_div_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(call.largest));
  return _mm512_min_ps(scale, _mm512_set1_ps(limit));
}

// What numbers under a scale are divided by, where they are divided.
inline void set_divisors(__m512 scale, Scales* scales) {
  const __mmask16 zero = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_EQ_OQ);
  const __m512 by = _mm512_mask_mov_ps(scale, zero, _mm512_set1_ps(__builtin_inff()));
  _mm512_store_ps(scales->by, by);
  _mm512_store_ps(scales->reciprocal, _mm512_div_ps(_mm512_set1_ps(1.0f), by));
}

// The scales of `count` groups with these greatest magnitudes, stored from scales[at] on. False where cast_engine.h is
// to find them, for one of the numbers is no finite one; then nothing has been stored.
inline bool find_scales(const CastCall& call, __m512i most, int count, std::int64_t at, Scales* scales) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (_mm512_mask_cmpge_epu32_mask(mask, most, dwords(0x7f800000))) return false;
  char* to = static_cast<char*>(call.scale) + at * size_of(call.scale_type);
  if (call.rule == Rule::absmax) {
    const __m512 scale = absmax_scales(call, most);
    linear::avx512::store_floats(to, call.scale_type, 0, count, scale);
    set_divisors(load_floats(to, call.scale_type, 0, count), scales);
    return true;
  }
  __m512 by;
  const __m512i code = call.rule == Rule::e4m3 ? e4m3_codes(call, most, &by) : e8m0_codes(call, most, &by);
  if (_mm512_mask_cmp_ps_mask(mask, by, _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ)) return false;
  _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(code));
  _mm512_store_ps(scales->by, by);
  return true;
}

// The scales of `count` groups that are there; false as above, where a number or a scale is no finite one.
inline bool read_scales(const CastCall& call, __m512i most, int count, std::int64_t at, Scales* scales) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if (_mm512_mask_cmpge_epu32_mask(mask, most, dwords(0x7f800000))) return false;
  if (call.rescaling == Rescaling::none) return true;
  for (int i = 0; i < count; i++) scales->by[i] = rescale_by(call, at + i);
  const __m512 by = _mm512_loadu_ps(scales->by);
  if (call.rescaling == Rescaling::divide) {
    if (_mm512_mask_cmp_ps_mask(mask, by, by, _CMP_UNORD_Q)) return false;
    _mm512_store_ps(scales->reciprocal, _mm512_div_ps(_mm512_set1_ps(1.0f), by));
    return true;
  }
  return !_mm512_mask_cmp_ps_mask(mask, _mm512_abs_ps(by), _mm512_set1_ps(__builtin_inff()), _CMP_NLT_UQ);
}

// Whether quotient() gives the bits of a division: nothing in it may leave the range of normal numbers but what is too
// small to count. Nearest and toward zero, that is below 2^-18.
inline bool quotients_are_exact(__m512i most, int count, const Scales& scales) {
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512 by = _mm512_load_ps(scales.by);
  const __mmask16 fits = _mm512_mask_cmp_ps_mask(
      _mm512_mask_cmp_ps_mask(mask, by, _mm512_set1_ps(0x1p-30f), _CMP_GE_OQ), by, _mm512_set1_ps(0x1p60f), _CMP_LE_OQ);
  return _mm512_mask_cmple_epu32_mask(fits, most, dwords((127 + 60) << 23)) == mask;
}

// x / by of a positive `by`, correctly rounded (Markstein): two corrections by the exact remainder, after which a zero
// has lost its sign. `reciprocal` is 1 / by, rounded.
inline __m512 quotient(__m512 x, __m512 by, __m512 reciprocal) {
  const __m512 first = _mm512_mul_ps(x, reciprocal);
  const __m512 second = _mm512_fmadd_ps(_mm512_fnmadd_ps(first, by, x), reciprocal, first);
  const __m512 third = _mm512_fmadd_ps(_mm512_fnmadd_ps(second, by, x), reciprocal, second);
  return _mm512_or_ps(third, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

// `count` numbers, whole vectors, of groups of 2^shift, under their scales.
template <Type type, Under under>
inline void scale_numbers(const char* from, std::int64_t count, int shift, const Scales& scales, float* to) {
  for (std::int64_t i = 0; i < count; i += 16) {
    const std::int64_t g = i >> shift;
    __m512 x = load<type>(from + i * size_of(type));
    if constexpr (under == Under::product) x = _mm512_mul_ps(x, _mm512_set1_ps(scales.by[g]));
    if constexpr (under == Under::division) x = _mm512_div_ps(x, _mm512_set1_ps(scales.by[g]));
    if constexpr (under == Under::quotient)
      x = quotient(x, _mm512_set1_ps(scales.by[g]), _mm512_set1_ps(scales.reciprocal[g]));
    _mm512_store_ps(to + i, x);
  }
}

inline void scale_numbers(const char* from, Type type, Under under, std::int64_t count, int shift, const Scales& scales,
                          float* to) {
  with_type(type, [&](auto of_type) {
    constexpr Type known = decltype(of_type)::value;
    if (under == Under::product) return scale_numbers<known, Under::product>(from, count, shift, scales, to);
    if (under == Under::quotient) return scale_numbers<known, Under::quotient>(from, count, shift, scales, to);
    if (under == Under::division) return scale_numbers<known, Under::division>(from, count, shift, scales, to);
    scale_numbers<known, Under::none>(from, count, shift, scales, to);
  });
}

}  // namespace
}  // namespace parco::cast::avx512
