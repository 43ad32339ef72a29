// Philox with AVX-512. Unnamed: see linear/floats.h.
#pragma once
#include <immintrin.h>

#include "cast/philox.h"

namespace parco::cast::avx512 {
namespace {

// Eight words in the low halves of 64-bit lanes, which is all that products read.
struct Words {
  using I = __m512i;
  static constexpr int lanes = 8;

  static I set(std::uint64_t word) { return _mm512_set1_epi64(static_cast<std::int64_t>(word)); }
  static I multiply(I a, I b) { return _mm512_mul_epu32(a, b); }
  static I high(I a) { return _mm512_srli_epi64(a, 32); }
  static I differ(I a, I b) { return _mm512_xor_si512(a, b); }
  static I differ(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
  // word, word + 1 ... in the order in which `store` puts them in theirs.
  static I count_from(std::uint64_t word) {
    return _mm512_add_epi64(set(word), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
  }
  // The four words of each lane beside each other.
  static void store(I word0, I word1, I word2, I word3, std::uint32_t* to) {
    const I first = _mm512_mask_shuffle_epi32(word0, 0xaaaa, word1, _MM_PERM_CCAA);
    const I second = _mm512_mask_shuffle_epi32(word2, 0xaaaa, word3, _MM_PERM_CCAA);
    _mm512_store_si512(to, _mm512_unpacklo_epi64(first, second));
    _mm512_store_si512(to + 16, _mm512_unpackhi_epi64(first, second));
  }
};

using Random = VectorRandom<Words>;

}  // namespace
}  // namespace parco::cast::avx512
