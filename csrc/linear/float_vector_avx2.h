// 8 floats, as the engines of fp32 products want them. Unnamed: see floats.h.
#pragma once
#include <algorithm>

#include "linear/avx2.h"

namespace parco::linear {
namespace {

struct Float256 : avx2::Arithmetic {
  using Written = avx2::Arithmetic;
  static constexpr int tile_rows = 6, stream_outputs = 2, panel_streams = 2, dense_sums = 8;

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

  struct Spread {
    int shift;
    Spread(int group_shift, std::int64_t) : shift(group_shift) {}
    F load(const float* scales, std::int64_t k) const { return set(scales[k >> shift]); }
  };

  static void load_scales(const void* scale, Type type, std::int64_t at, std::int64_t groups, float factor, float* to) {
    for (std::int64_t g = 0; g < groups; g++) to[g] = load_float(scale, type, at + g) * factor;
  }

  // Columns [k, k + columns) of `rows` rows (at most 8) of a matrix from row `row` on, turned: `kept` lanes of each go
  // to to[column * stride], zero past the last row.
  static void turn(const void* matrix, Type type, std::int64_t width, std::int64_t row, std::int64_t rows,
                   std::int64_t k, std::int64_t columns, float* to, std::int64_t stride, int kept) {
    for (std::int64_t start = 0; start < columns; start += lanes) {
      const int count = static_cast<int>(std::min<std::int64_t>(lanes, columns - start));
      F r[lanes], pairs[lanes];
      for (int i = 0; i < lanes; i++)
        r[i] = i < rows ? load_floats(matrix, type, (row + i) * width + k + start, count) : set(0.0f);
      for (int i = 0; i < lanes; i += 2)
        pairs[i] = _mm256_unpacklo_ps(r[i], r[i + 1]), pairs[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
      for (int i = 0; i < lanes; i += 4) {
        r[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44),
        r[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
      }
      for (int i = 0; i < count; i++) {
        const F column =
            i < 4 ? _mm256_permute2f128_ps(r[i], r[i + 4], 0x20) : _mm256_permute2f128_ps(r[i - 4], r[i], 0x31);
        float* out = to + (start + i) * stride;
        if (kept == lanes)
          _mm256_storeu_ps(out, column);
        else
          _mm256_maskstore_ps(
              out, _mm256_cmpgt_epi32(_mm256_set1_epi32(kept), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), column);
      }
    }
  }

  // The scales of half a panel's rows.
  static F lane_scales(const void* scale, Type type, std::int64_t at, float factor) {
    return avx2::load_scales(scale, type, at, factor);
  }

  // One number in every lane, or two in turn.
  template <int numbers>
  static F spread(const float* from) {
    if constexpr (numbers == 1) return set(*from);
    double both;
    std::memcpy(&both, from, 8);
    return _mm256_castpd_ps(_mm256_set1_pd(both));
  }
  // Two vectors have an output in neighbouring lanes, the first four and the others. Lane p of every output, and a
  // number of each in both its lanes.
  static F every_other(F first, F second, int p) {
    const F mixed = p ? _mm256_shuffle_ps(first, second, 0xdd) : _mm256_shuffle_ps(first, second, 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
  }
  static F doubled(F value, int half) {
    const __m256i from = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    return _mm256_permutevar8x32_ps(value, half ? _mm256_add_epi32(from, _mm256_set1_epi32(4)) : from);
  }
};

}  // namespace
}  // namespace parco::linear
