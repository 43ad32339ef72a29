#include <immintrin.h>

#include "machine/features.h"
#include "machine/probe.h"

namespace parco {
namespace {

// Sixteen sums, as a 4x4 tile of a matrix product has: eight loads feed sixteen products, so the loads do not limit.
constexpr int rows = 4, columns = 4;
constexpr int step = 64 * (rows + columns);
constexpr int steps = probe_operand_bytes / step;

__m512i load(const std::uint8_t* p) { return _mm512_load_si512(p); }

std::uint64_t low(__m512i v) { return static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm512_castsi512_si128(v))); }

__m512 join(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
__m512i join(__m512i a, __m512i b) { return _mm512_xor_si512(a, b); }

template <typename Sum, typename Operand, typename Load, typename MultiplyAdd>
Sum tile(const void* operands, std::int64_t rounds, Sum zero, const Load& loaded, const MultiplyAdd& multiply_add) {
  Sum sums[rows][columns];  // every loop over it is unrolled, so that it lives in registers
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) sums[r][c] = zero;
  for (std::int64_t round = 0; round < rounds; ++round) {
    const auto* p = static_cast<const std::uint8_t*>(operands);
    for (int i = 0; i < steps; ++i, p += step) {
      Operand b[columns];
#pragma GCC unroll 4
      for (int c = 0; c < columns; ++c) b[c] = loaded(p + 64 * c);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Operand a = loaded(p + 64 * (columns + r));
#pragma GCC unroll 4
        for (int c = 0; c < columns; ++c) multiply_add(sums[r][c], a, b[c]);
      }
    }
  }
  Sum total = zero;
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) total = join(total, sums[r][c]);
  return total;
}

std::uint64_t fp32(const void* operands, std::int64_t rounds) {
  const __m512 total = tile<__m512, __m512>(
      operands, rounds, _mm512_setzero_ps(), [](const std::uint8_t* p) { return _mm512_castsi512_ps(load(p)); },
      [](__m512& sum, __m512 a, __m512 b) { sum = _mm512_fmadd_ps(a, b, sum); });
  return low(_mm512_castps_si512(total));
}

std::uint64_t bf16_instruction(const void* operands, std::int64_t rounds) {
  const __m512 total = tile<__m512, __m512i>(
      operands, rounds, _mm512_setzero_ps(), load,
      [](__m512& sum, __m512i a, __m512i b) { sum = _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); });
  return low(_mm512_castps_si512(total));
}

// For a CPU without AVX512_BF16: the halves of each pair widened to fp32.
std::uint64_t bf16_widened(const void* operands, std::int64_t rounds) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m512 total =
      tile<__m512, __m512i>(operands, rounds, _mm512_setzero_ps(), load, [&](__m512& sum, __m512i a, __m512i b) {
        const auto even = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
        const auto odd = [&](__m512i v) { return _mm512_castsi512_ps(_mm512_and_si512(v, upper)); };
        sum = _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
      });
  return low(_mm512_castps_si512(total));
}

std::uint64_t bf16(const void* operands, std::int64_t rounds) {
  return features().avx512_bf16 ? bf16_instruction(operands, rounds) : bf16_widened(operands, rounds);
}

std::uint64_t int16(const void* operands, std::int64_t rounds) {
  return low(tile<__m512i, __m512i>(
      operands, rounds, _mm512_setzero_si512(), load,
      [](__m512i& sum, __m512i a, __m512i b) { sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)); }));
}

// vpmaddubsw (which saturates its pairs; only its speed is asked here), widened to 32 bits.
std::uint64_t int8(const void* operands, std::int64_t rounds) {
  const __m512i ones = _mm512_set1_epi16(1);
  return low(
      tile<__m512i, __m512i>(operands, rounds, _mm512_setzero_si512(), load, [&](__m512i& sum, __m512i a, __m512i b) {
        sum = _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), ones));
      }));
}

// In assembly: of the intrinsics, whose sum is an argument, GCC 12 makes copies of sums that take the products' place.
std::uint64_t vnni_int16(const void* operands, std::int64_t rounds) {
  return low(
      tile<__m512i, __m512i>(operands, rounds, _mm512_setzero_si512(), load, [](__m512i& sum, __m512i a, __m512i b) {
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      }));
}

std::uint64_t vnni_int8(const void* operands, std::int64_t rounds) {
  return low(
      tile<__m512i, __m512i>(operands, rounds, _mm512_setzero_si512(), load, [](__m512i& sum, __m512i a, __m512i b) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
      }));
}

constexpr std::int64_t products(int per_instruction) {
  return static_cast<std::int64_t>(steps) * rows * columns * per_instruction;
}

}  // namespace

const Products avx512_fp32 = {fp32, products(16)};
const Products avx512_bf16 = {bf16, products(32)};
const Products avx512_int16 = {int16, products(32)};
const Products avx512_int8 = {int8, products(64)};
const Products avx512_vnni_int16 = {vnni_int16, products(32)};
const Products avx512_vnni_int8 = {vnni_int8, products(64)};

std::uint64_t avx512_read(const std::uint8_t* data, std::size_t bytes) {
  __m512i sums[8];
  for (__m512i& s : sums) s = _mm512_setzero_si512();
  for (std::size_t i = 0; i < bytes; i += 512)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = _mm512_xor_si512(sums[j], load(data + i + 64 * j));
  for (int j = 1; j < 8; ++j) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
  return low(sums[0]);
}

}  // namespace parco
