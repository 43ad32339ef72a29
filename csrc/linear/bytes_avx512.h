// One row of x as int8 for AVX-512: the same codes, scale and sums as quantize_row_to_bytes, 64 values at a time.
// Unnamed: see floats.h.
#pragma once
#include <algorithm>

#include "linear/avx512.h"
#include "linear/quantize.h"

namespace parco::linear::avx512 {
namespace {

// Where byte i of 64 comes from when the codes of a dword of `unit` leave it four at a time: every (unit / 4)th.
struct alignas(64) ByteOrder {
  std::uint8_t from[64];
};
constexpr ByteOrder byte_order(int unit) {
  ByteOrder order{};
  for (int i = 0; i < 64; i++)
    order.from[i] = static_cast<std::uint8_t>(i / unit * unit + i % 4 * (unit / 4) + i % unit / 4);
  return order;
}

inline float largest_of_row(const CodedCall& call, std::int64_t row) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < call.columns; k += 16) {
    const int count = static_cast<int>(std::min<std::int64_t>(16, call.columns - k));
    const __m512 values = load_floats(call.x, call.x_type, row * call.columns + k, count);
    largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(values), magnitude));
  }
  return row_scale(_mm512_reduce_max_epu32(largest));
}

// Of the bytes of a row, at each block that opens a sum, the sum of those that belong to it.
inline void sum_bytes(const Plan& plan, const std::int8_t* bytes, std::int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (std::int32_t b = 0; b < plan.block_count;) {
    const std::int32_t open = b;
    std::int64_t k = plan.blocks[b].k;
    while (!plan.blocks[b].closes) b++;
    // What follows the last column is zero, and a block before the last ends with its dwords.
    const std::int64_t end = plan.blocks[b].k + plan.blocks[b].dwords * plan.unit;
    __m512i sum = _mm512_setzero_si512();
    for (; k < end; k += 64) {
      const __mmask64 mask = end - k >= 64 ? ~0ull : (1ull << (end - k)) - 1;
      sum = _mm512_dpbusd_epi32(sum, ones, _mm512_maskz_loadu_epi8(mask, bytes + k));
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
  static constexpr ByteOrder four = byte_order(4), eight = byte_order(8), sixteen = byte_order(16);
  const __m512i order = _mm512_load_si512((plan.unit == 16 ? sixteen : plan.unit == 8 ? eight : four).from);
  *scale = largest_of_row(call, row);
  const bool zero = !(*scale > 0);
  const __m512 divisor = _mm512_set1_ps(*scale), most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-127.0f);
  const auto codes = [&](std::int64_t k) {
    const int count = static_cast<int>(std::clamp<std::int64_t>(call.columns - k, 0, 16));
    if (zero || count == 0) return _mm_setzero_si128();
    const __m512 values = load_floats(call.x, call.x_type, row * call.columns + k, count);
    const __m512 scaled = _mm512_min_ps(_mm512_max_ps(_mm512_div_ps(values, divisor), least), most);
    return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled));
  };
  for (std::int64_t k = 0; k < call.columns; k += 64) {
    __m512i bytes = _mm512_castsi128_si512(codes(k));
    bytes = _mm512_inserti32x4(bytes, codes(k + 16), 1);
    bytes = _mm512_inserti32x4(bytes, codes(k + 32), 2);
    bytes = _mm512_inserti32x4(bytes, codes(k + 48), 3);
    _mm512_storeu_si512(to + k, _mm512_permutexvar_epi8(order, bytes));
  }
  sum_bytes(plan, to, sums);
}

}  // namespace
}  // namespace parco::linear::avx512
