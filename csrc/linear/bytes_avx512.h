// One row of x as int8 for AVX-512: the same codes, scale and sums as quantize_row_to_bytes, 64 values at a time.
// Unnamed: see floats.h.
#pragma once
#include "linear/int_avx512.h"

namespace parco::linear::avx512 {
namespace {

// The scale of a row of int8.
inline float scale_of_row(const CodedCall& call, std::int64_t row) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < call.columns; k += 16) {
    const int count = static_cast<int>(std::min<std::int64_t>(16, call.columns - k));
    const __m512 values = load_floats(call.x, call.x_type, row * call.columns + k, count);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(values), magnitude));
  }
  return row_scale(_mm512_reduce_max_epu32(largest));
}

// A row of x as int8 codes under its scale.
class RowCodes {
 public:
  RowCodes(const CodedCall& call, std::int64_t row, float scale)
      : call(call), first(row * call.columns), zero(!(scale > 0)), divisor(_mm512_set1_ps(scale)) {}

  // Of the 16 columns from k on, in dwords; from `end` on they are zero.
  __m512i at(std::int64_t k, std::int64_t end) const {
    const int count = static_cast<int>(std::clamp<std::int64_t>(end - k, 0, 16));
    if (zero || count == 0) return _mm512_setzero_si512();
    const __m512 most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
    const __m512 scaled = _mm512_div_ps(load_floats(call.x, call.x_type, first + k, count), divisor);
    return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(scaled, least), most));
  }

 private:
  const CodedCall& call;
  const std::int64_t first;
  const bool zero;
  const __m512 divisor;
};

// What takes the bytes of 64 codes to where a dword of `unit` codes wants them, which it yields four at a time: every
// (unit / 4)th.
inline __m512i byte_order(int unit) {
  alignas(16) std::uint8_t from[16];
  for (int i = 0; i < 16; i++) from[i] = static_cast<std::uint8_t>(i / unit * unit + i % 4 * (unit / 4) + i % unit / 4);
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}

// Of the bytes of a row, at each block that opens a sum, the sum of those that belong to it.
inline void sum_bytes(const Plan& plan, const std::int8_t* bytes, std::int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1), pairs_of_ones = _mm512_set1_epi16(1);
  for (std::int32_t b = 0; b < plan.block_count;) {
    const std::int32_t open = b;
    std::int64_t k = plan.blocks[b].k;
    while (!plan.blocks[b].closes) b++;
    // What follows the last column is zero, and a block before the last ends with its dwords.
    const std::int64_t end = plan.blocks[b].k + plan.blocks[b].dwords * plan.unit;
    __m512i sum = _mm512_setzero_si512();
    for (; k < end; k += 64) {
      const __mmask64 mask = end - k >= 64 ? ~0ull : (1ull << (end - k)) - 1;
      const __m512i pairs = _mm512_maddubs_epi16(ones, _mm512_maskz_loadu_epi8(mask, bytes + k));
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, pairs_of_ones));
    }
    sums[open] = _mm512_reduce_add_epi32(sum);
    b++;
  }
}

// Row `row` of x, whose codes of 4 bits stand for table[code] - zero_point, as those bytes; their scale is 1. `to` has
// room for whole 64s.
inline void take_codes(const CodedCall& call, const Plan& plan, std::int64_t row, std::int8_t* to, float* scale,
                       std::int32_t* sums) {
  const __m512i zero_point = _mm512_set1_epi8(static_cast<char>(call.zero_point)), low = _mm512_set1_epi8(15);
  const __m512i table = _mm512_sub_epi8(_mm512_loadu_si512(call.table), zero_point);
  const std::int64_t bytes = (call.columns + 1) / 2;
  const std::uint8_t* codes = static_cast<const std::uint8_t*>(call.x) + row * bytes;
  *scale = 1.0f;
  for (std::int64_t k = 0; k < call.columns; k += 64) {
    const std::int64_t left = std::min<std::int64_t>(bytes - k / 2, 32);
    const __m256i pairs = _mm256_maskz_loadu_epi8(static_cast<__mmask32>((1ull << left) - 1), codes + k / 2);
    const __m512i wide = _mm512_cvtepu8_epi16(pairs);
    const __m512i code = _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), low);
    const std::int64_t count = std::min<std::int64_t>(call.columns - k, 64);
    const __mmask64 mask = count == 64 ? ~0ull : (1ull << count) - 1;
    _mm512_storeu_si512(to + k, _mm512_maskz_shuffle_epi8(mask, table, code));
  }
  sum_bytes(plan, to, sums);
}

// `to` has room for whole 64s.
inline void quantize_bytes(const CodedCall& call, const Plan& plan, std::int64_t row, std::int8_t* to, float* scale,
                           std::int32_t* sums) {
  const __m512i order = byte_order(plan.unit);
  *scale = scale_of_row(call, row);
  const RowCodes of_row(call, row, *scale);
  const auto codes = [&](std::int64_t k) { return _mm512_cvtepi32_epi8(of_row.at(k, call.columns)); };
  for (std::int64_t k = 0; k < call.columns; k += 64) {
    __m512i bytes = _mm512_castsi128_si512(codes(k));
    bytes = _mm512_inserti32x4(bytes, codes(k + 16), 1);
    bytes = _mm512_inserti32x4(bytes, codes(k + 32), 2);
    bytes = _mm512_inserti32x4(bytes, codes(k + 48), 3);
    _mm512_storeu_si512(to + k, _mm512_shuffle_epi8(bytes, order));
  }
  sum_bytes(plan, to, sums);
}

}  // namespace
}  // namespace parco::linear::avx512
