// 16 floats, as the engines of fp32 products want them. Unnamed: see floats.h.
#pragma once
#include <algorithm>

#include "linear/avx512.h"
#include "linear/floats.h"

namespace parco::linear {
namespace {

inline __mmask64 bytes_mask(std::int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

struct Float512 : avx512::Arithmetic {
  using Written = avx512::Arithmetic;
  static constexpr int tile_rows = 12, stream_outputs = 4, panel_streams = 4, dense_sums = 16;

  // Scales of `codes` codes in a row, lane i that of the i-th sixteenth of them.
  struct Spread {
    __m512i lane;
    int shift;
    bool one;
    Spread(int group_shift, std::int64_t codes) : shift(group_shift), one(codes >> shift <= 1) {
      alignas(64) std::int32_t index[16];
      for (int i = 0; i < 16; i++) index[i] = static_cast<std::int32_t>(codes / 16 * i >> shift);
      lane = _mm512_load_si512(index);
    }
    F load(const float* scales, std::int64_t k) const {
      scales += k >> shift;
      return one ? _mm512_set1_ps(*scales) : _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scales));
    }
  };

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

  static void load_scales(const void* scale, Type type, std::int64_t at, std::int64_t groups, float factor, float* to) {
    const char* from = static_cast<const char*>(scale) + at * size_of(type);
    for (std::int64_t g = 0; g < groups; g += 16, from += 16 * size_of(type)) {
      const __mmask16 mask = static_cast<__mmask16>(bytes_mask(std::min<std::int64_t>(16, groups - g)));
      const __m512i bits = type == Type::fp32   ? _mm512_maskz_loadu_epi32(mask, from)
                           : size_of(type) == 2 ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from))
                                                : _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
      _mm512_mask_storeu_ps(to + g, mask, multiply(avx512::widen(bits, type), set(factor)));
    }
  }

  // Columns [k, k + columns) of `rows` rows (at most 16) of a matrix from row `row` on, turned: `kept` lanes of each go
  // to to[column * stride], zero past the last row.
  static void turn(const void* matrix, Type type, std::int64_t width, std::int64_t row, std::int64_t rows,
                   std::int64_t k, std::int64_t columns, float* to, std::int64_t stride, int kept) {
    const __mmask16 mask = static_cast<__mmask16>((1u << kept) - 1);
    for (std::int64_t start = 0; start < columns; start += 16) {
      const int count = static_cast<int>(std::min<std::int64_t>(16, columns - start));
      alignas(64) __m512i turned[16];
      avx512::transpose(
          [&](int i) {
            if (i >= rows) return _mm512_setzero_si512();
            return _mm512_castps_si512(load_floats(matrix, type, (row + i) * width + k + start, count));
          },
          turned);
      for (int i = 0; i < count; i++) _mm512_mask_storeu_epi32(to + (start + i) * stride, mask, turned[i]);
    }
  }

  // The scales of a panel's rows.
  static F lane_scales(const void* scale, Type type, std::int64_t at, float factor) {
    return avx512::load_scales(scale, type, at, factor);
  }

  // One number in every lane, or two in turn.
  template <int numbers>
  static F spread(const float* from) {
    if constexpr (numbers == 1) return set(*from);
    double both;
    std::memcpy(&both, from, 8);
    return _mm512_castpd_ps(_mm512_set1_pd(both));
  }
  // Two vectors have an output in neighbouring lanes: outputs 0, 1, 4, 5, 8 ... in the first and 2, 3, 6, 7 ... in the
  // second. Lane p of every output, and a number of each in both its lanes.
  static F every_other(F first, F second, int p) {
    const __m512i from = _mm512_setr_epi32(0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
    return _mm512_permutex2var_ps(first, _mm512_add_epi32(from, _mm512_set1_epi32(p)), second);
  }
  static F doubled(F value, int half) {
    return half ? _mm512_unpackhi_ps(value, value) : _mm512_unpacklo_ps(value, value);
  }
};

}  // namespace
}  // namespace parco::linear
