#include <immintrin.h>

#include "machine/probe.h"

namespace parco {
namespace {

// Eight sums, as a 4x2 tile of a matrix product has: six loads feed eight products, so the loads do not limit, and
// sixteen registers hold all.
constexpr int rows = 4, columns = 2;
constexpr int step = 32 * (rows + columns);
constexpr int steps = probe_operand_bytes / step;

__m256i load(const std::uint8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

std::uint64_t low(__m256i v) { return static_cast<std::uint64_t>(_mm256_extract_epi64(v, 0)); }

__m256 join(__m256 a, __m256 b) { return _mm256_add_ps(a, b); }
__m256i join(__m256i a, __m256i b) { return _mm256_xor_si256(a, b); }

template <typename Sum, typename Operand, typename Load, typename MultiplyAdd>
Sum tile(const void* operands, std::int64_t rounds, Sum zero, const Load& loaded, const MultiplyAdd& multiply_add) {
  Sum sums[rows][columns];  // every loop over it is unrolled, so that it lives in registers
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < columns; ++c) sums[r][c] = zero;
  for (std::int64_t round = 0; round < rounds; ++round) {
    const auto* p = static_cast<const std::uint8_t*>(operands);
    for (int i = 0; i < steps; ++i, p += step) {
      Operand b[columns];
#pragma GCC unroll 2
      for (int c = 0; c < columns; ++c) b[c] = loaded(p + 32 * c);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Operand a = loaded(p + 32 * (columns + r));
#pragma GCC unroll 2
        for (int c = 0; c < columns; ++c) sums[r][c] = multiply_add(sums[r][c], a, b[c]);
      }
    }
  }
  Sum total = zero;
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int c = 0; c < columns; ++c) total = join(total, sums[r][c]);
  return total;
}

std::uint64_t fp32(const void* operands, std::int64_t rounds) {
  const __m256 total = tile<__m256, __m256>(
      operands, rounds, _mm256_setzero_ps(), [](const std::uint8_t* p) { return _mm256_castsi256_ps(load(p)); },
      [](__m256 sum, __m256 a, __m256 b) { return _mm256_fmadd_ps(a, b, sum); });
  return low(_mm256_castps_si256(total));
}

// AVX2 has no bf16 product: both halves of each pair are widened to fp32 first, as a kernel has to do.
std::uint64_t bf16(const void* operands, std::int64_t rounds) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  struct Pair {
    __m256 even, odd;
  };
  const __m256 total = tile<__m256, Pair>(
      operands, rounds, _mm256_setzero_ps(),
      [&](const std::uint8_t* p) {
        const __m256i pairs = load(p);
        return Pair{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                    _mm256_castsi256_ps(_mm256_and_si256(pairs, upper))};
      },
      [](__m256 sum, const Pair& a, const Pair& b) {
        return _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, sum));
      });
  return low(_mm256_castps_si256(total));
}

std::uint64_t int16(const void* operands, std::int64_t rounds) {
  return low(tile<__m256i, __m256i>(
      operands, rounds, _mm256_setzero_si256(), load,
      [](__m256i sum, __m256i a, __m256i b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }));
}

// vpmaddubsw (which saturates its pairs; only its speed is asked here), widened to 32 bits.
std::uint64_t int8(const void* operands, std::int64_t rounds) {
  const __m256i ones = _mm256_set1_epi16(1);
  return low(
      tile<__m256i, __m256i>(operands, rounds, _mm256_setzero_si256(), load, [&](__m256i sum, __m256i a, __m256i b) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      }));
}

constexpr std::int64_t products(int per_instruction) {
  return static_cast<std::int64_t>(steps) * rows * columns * per_instruction;
}

}  // namespace

const Products avx2_fp32 = {fp32, products(8)};
const Products avx2_bf16 = {bf16, products(16)};
const Products avx2_int16 = {int16, products(16)};
const Products avx2_int8 = {int8, products(32)};

std::uint64_t avx2_read(const std::uint8_t* data, std::size_t bytes) {
  __m256i sums[8];
  for (__m256i& s : sums) s = _mm256_setzero_si256();
  for (std::size_t i = 0; i < bytes; i += 256)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] = _mm256_xor_si256(sums[j], load(data + i + 32 * j));
  for (int j = 1; j < 8; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
  return low(sums[0]);
}

}  // namespace parco
