// Scaled numbers into codes, 16 at a time, with AVX-512: the bits of cast_engine.h for numbers that are finite.
#pragma once
#include "cast/cast.h"
#include "cast/philox_avx512.h"
#include "linear/avx512.h"

namespace parco::cast::avx512 {
namespace {

inline __m512i dwords(std::uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }

template <int bits_, int mantissa_bits, int least_exponent, int max_code>
struct Float {
  static constexpr int bits = bits_;
  static constexpr unsigned drop = 23 - mantissa_bits;  // of a normal number's significand
  static constexpr std::uint32_t least = static_cast<std::uint32_t>(least_exponent + 127);
  static constexpr std::uint32_t greatest = (static_cast<std::uint32_t>(max_code) << drop) + ((least - 1) << 23);

  explicit Float(const CastCall&) {}

  static bool is_of(const CastCall& call) {
    return call.kind == Kind::floating && call.bits == bits && call.mantissa_bits == mantissa_bits &&
           call.least_exponent == least_exponent && call.max_code == max_code;
  }

  template <Rounding rounding>
  __m512i codes(__m512 x, __m512i random) const {
    const __m512i pattern = _mm512_castps_si512(x);
    const __m512i magnitude = _mm512_min_epu32(_mm512_and_si512(pattern, dwords(0x7fffffff)), dwords(greatest));
    const __m512i code = rounding == Rounding::stochastic ? drawn(magnitude, random) : rounded<rounding>(magnitude);
    // code | (pattern >> ... & sign)
    return _mm512_ternarylogic_epi32(code, _mm512_srli_epi32(pattern, 32 - bits), dwords(1u << (bits - 1)), 0xf8);
  }

 private:
  // Adding 2^23 times the spacing of the element's numbers rounds to a multiple of it, which the low bits then hold.
  template <Rounding rounding>
  static __m512i rounded(__m512i magnitude) {
    constexpr int direction = rounding == Rounding::zero ? _MM_FROUND_TO_ZERO : _MM_FROUND_TO_NEAREST_INT;
    const __m512i exponent = _mm512_and_si512(magnitude, dwords(0x7f800000));
    const __m512i binade = _mm512_max_epi32(_mm512_sub_epi32(exponent, dwords(least << 23)), _mm512_setzero_si512());
    const __m512i shift = _mm512_add_epi32(binade, dwords((least + drop) << 23));
    const __m512 sum =
        _mm512_add_round_ps(_mm512_castsi512_ps(magnitude), _mm512_castsi512_ps(shift), direction | _MM_FROUND_NO_EXC);
    const __m512i multiple = _mm512_sub_epi32(_mm512_castps_si512(sum), shift);
    return _mm512_add_epi32(multiple, _mm512_srli_epi32(binade, drop));
  }

  // As float_code of cast_engine.h. The significand of a subnormal pattern is wrong here, and dropped whole.
  static __m512i drawn(__m512i magnitude, __m512i random) {
    const __m512i zero = _mm512_setzero_si512();
    const __m512i below = _mm512_sub_epi32(dwords(least), _mm512_srli_epi32(magnitude, 23));
    const __m512i extra = _mm512_max_epi32(below, zero);
    const __m512i dropped = _mm512_add_epi32(extra, dwords(drop));
    // magnitude & fraction | leading one
    const __m512i significand = _mm512_ternarylogic_epi32(magnitude, dwords(0x7fffff), dwords(1u << 23), 0xea);
    const __m512i cut = _mm512_srlv_epi32(significand, _mm512_max_epi32(_mm512_sub_epi32(dropped, dwords(32)), zero));
    const __m512i chance = _mm512_andnot_si512(_mm512_sllv_epi32(dwords(~0u), dropped), random);
    const __m512i sum = _mm512_add_epi32(cut, chance);
    const __m512i kept = _mm512_srlv_epi32(sum, dropped);
    const __m512i carried = _mm512_mask_mov_epi32(kept, _mm512_cmplt_epu32_mask(sum, cut), dwords(1));
    return _mm512_add_epi32(carried, _mm512_slli_epi32(_mm512_sub_epi32(extra, below), 23 - drop));
  }
};

using E4m3 = Float<8, 3, -6, 126>;
using E5m2 = Float<8, 2, -14, 123>;
using E3m2 = Float<6, 2, -2, 31>;
using E2m3 = Float<6, 3, 0, 31>;
using E2m1 = Float<4, 1, 0, 7>;

// Integers without a zero point of their own.
struct Integer {
  int bits;
  __m512 least, greatest;
  __m512i offset;

  explicit Integer(const CastCall& call)
      : bits(call.bits),
        least(_mm512_set1_ps(static_cast<float>(call.least))),
        greatest(_mm512_set1_ps(static_cast<float>(call.greatest))),
        offset(_mm512_set1_epi32(call.offset)) {}

  static bool is_of(const CastCall& call) { return call.kind == Kind::integer && !call.zero; }

  template <Rounding rounding>
  __m512i codes(__m512 x, __m512i random) const {
    const __m512 bounded = _mm512_min_ps(_mm512_max_ps(x, least), greatest);
    __m512i number;
    if constexpr (rounding == Rounding::nearest) {
      number = _mm512_cvt_roundps_epi32(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else if constexpr (rounding == Rounding::zero) {
      number = _mm512_cvttps_epi32(bounded);
    } else {
      // Up where random < fraction * 2^32, which itself is no word where the fraction has been rounded to 1.
      number = _mm512_cvt_roundps_epi32(bounded, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
      const __m512 fraction = _mm512_sub_ps(bounded, _mm512_cvtepi32_ps(number));
      const __m512i bound = _mm512_cvt_roundps_epu32(_mm512_mul_ps(fraction, _mm512_set1_ps(0x1p32f)),
                                                     _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
      const __mmask16 up = static_cast<__mmask16>(_mm512_cmplt_epu32_mask(random, bound) |
                                                  _mm512_cmp_ps_mask(fraction, _mm512_set1_ps(1.0f), _CMP_GE_OQ));
      number = _mm512_mask_add_epi32(number, up, number, dwords(1));
    }
    return _mm512_add_epi32(number, offset);
  }
};

// The bytes of 64 codes in the order of their numbers; codes[i] holds those of numbers 16 i and on.
inline __m512i joined(const __m512i* codes) {
  // Four bytes of each 16 codes gather in a dword, then the dwords.
  const __m512i in_lane = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m512i dwords = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i three =
      _mm512_ternarylogic_epi32(codes[0], _mm512_slli_epi32(codes[1], 8), _mm512_slli_epi32(codes[2], 16), 0xfe);
  const __m512i four = _mm512_or_si512(three, _mm512_slli_epi32(codes[3], 24));
  return _mm512_permutexvar_epi32(dwords, _mm512_shuffle_epi8(four, in_lane));
}

// 64 codes to where their bits belong.
inline void store_codes(__m512i bytes, int bits, std::uint8_t* to) {
  if (bits == 8) return _mm512_storeu_si512(to, bytes);
  if (bits == 4) {
    const __m512i pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(0x1001));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(pairs));
  }
  alignas(64) std::uint64_t eights[8];
  _mm512_store_si512(eights, bytes);
  const std::uint64_t mask = ((1u << bits) - 1) * 0x0101010101010101u;
  for (int i = 0; i < 8; i++) {
    const std::uint64_t packed = _pext_u64(eights[i], mask);
    std::memcpy(to + i * bits, &packed, static_cast<std::size_t>(bits));
  }
}

}  // namespace
}  // namespace parco::cast::avx512
