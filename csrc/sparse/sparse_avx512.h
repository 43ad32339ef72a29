// What the sparse products for AVX-512 share. Unnamed: see linear/floats.h.
#pragma once
#include "linear/float_vector_avx512.h"
#include "linear/quantize.h"
#include "sparse/blocks_engine.h"
#include "sparse/masked_engine.h"

namespace parco::sparse {
namespace {

using linear::bytes_mask;

inline __m512i load_bytes(const char* from, std::int64_t left) {
  return left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(bytes_mask(left), from);
}

struct Kept512 : linear::Float512 {
  static constexpr int streams_of_four = 4;
  template <Kept how>
  static F kept(const char* from, std::int64_t left, int offset) {
    if constexpr (how == Kept::fp32) return _mm512_castsi512_ps(load_bytes(from, left));
    if constexpr (how == Kept::byte) {
      const __m128i codes =
          _mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes_mask(std::min<std::int64_t>(left, 16))), from);
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(offset)));
    }
    const __m256i halves =
        _mm256_maskz_loadu_epi8(static_cast<__mmask32>(bytes_mask(std::min<std::int64_t>(left, 32))), from);
    return how == Kept::bf16 ? linear::avx512::widen_bf16(halves) : _mm512_cvtph_ps(halves);
  }
  static F expand(std::uint64_t bits, F numbers) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), numbers);
  }
};

}  // namespace
}  // namespace parco::sparse
