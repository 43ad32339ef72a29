// Philox with AVX2. Unnamed: see linear/floats.h.
#pragma once
#include <immintrin.h>

#include "cast/philox.h"

namespace parco::cast::avx2 {
namespace {

// Four words in the low halves of 64-bit lanes, which is all that products read.
struct Words {
  using I = __m256i;
  static constexpr int lanes = 4;

  static I set(std::uint64_t word) { return _mm256_set1_epi64x(static_cast<long long>(word)); }
  static I multiply(I a, I b) { return _mm256_mul_epu32(a, b); }
  static I high(I a) { return _mm256_srli_epi64(a, 32); }
  static I differ(I a, I b) { return _mm256_xor_si256(a, b); }
  static I differ(I a, I b, I c) { return differ(differ(a, b), c); }
  // word, word + 1 ... in the order in which `store` puts them in theirs.
  static I count_from(std::uint64_t word) { return _mm256_add_epi64(set(word), _mm256_setr_epi64x(0, 2, 1, 3)); }
  // The four words of each lane beside each other.
  static void store(I word0, I word1, I word2, I word3, std::uint32_t* to) {
    const I first = _mm256_blend_epi32(word0, _mm256_slli_epi64(word1, 32), 0xaa);
    const I second = _mm256_blend_epi32(word2, _mm256_slli_epi64(word3, 32), 0xaa);
    _mm256_store_si256(reinterpret_cast<I*>(to), _mm256_unpacklo_epi64(first, second));
    _mm256_store_si256(reinterpret_cast<I*>(to + 8), _mm256_unpackhi_epi64(first, second));
  }
};

using Random = VectorRandom<Words>;

}  // namespace
}  // namespace parco::cast::avx2
