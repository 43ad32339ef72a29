// The fp32 product for AVX-512: 16 numbers to a vector.
#include "linear/float_avx512.h"

#include "linear/deposit.h"

namespace parco::linear {
namespace {

// e5m2 of codes of e3m2 that stand in bytes: magnitudes are looked up.
struct E3m2Bytes {
  __m512i low, high;

  explicit E3m2Bytes(const CodedCall& call) {
    alignas(32) std::uint8_t of[32];
    for (int i = 0; i < 32; i++) of[i] = static_cast<std::uint8_t>(to_fp16(call.values[i]) >> 8);
    low = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(of)));
    high = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(of) + 1));
  }
  // Of bits 0 to 3 of `index`, and bits 0 and 1 of `left`.
  __m512i find(__m512i index, __m512i left) const {
    const __mmask64 upper = _mm512_test_epi8_mask(left, _mm512_set1_epi8(1));
    const __m512i magnitude = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(low, index), upper, high, index);
    return _mm512_ternarylogic_epi32(magnitude, _mm512_slli_epi32(left, 6), _mm512_set1_epi8(-128),
                                     0xf8);  // a | (b & c)
  }
};

struct E3m2 : E3m2Bytes {
  static constexpr int bits = 6;
  static constexpr float unit = 1.0f;
  using E3m2Bytes::E3m2Bytes;

  __m512i codes(__m512i stream) const {
    alignas(64) std::uint8_t held[64];
    _mm512_store_si512(held, stream);
    const __m512i bytes = deposit_eight(held, 6, bytes_of(6));
    return find(_mm512_and_si512(bytes, _mm512_set1_epi8(15)), _mm512_srli_epi32(bytes, 4));
  }
  static __m512i halves(__m512i words) { return E5m2::halves(words); }
};

// Panels of bytes leave it by way of fp16: outputs 0 to 7 in the first vector, the others in the second.
struct InOrder : Float512 {
  static F every_other(F first, F second, int p) {
    const __m512i from = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(first, _mm512_add_epi32(from, _mm512_set1_epi32(p)), second);
  }
  static F doubled(F value, int half) {
    const __m512i from = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return _mm512_permutexvar_ps(_mm512_add_epi32(from, _mm512_set1_epi32(8 * half)), value);
  }
};

template <class Byte>
struct BytePanels {
  static constexpr int bits = 8, step = 4, halves = 2;
  static constexpr float unit = Byte::unit;
  explicit BytePanels(const CodedCall&) {}
  static constexpr int column(int i, int p) { return i + 2 * p; }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
    widen(_mm512_loadu_si512(at), 0, use);
  }
  // Codes 0 and 2 of every dword, then 1 and 3.
  template <class Use>
  static void widen(__m512i codes, int i, const Use& use) {
    const __m512i even = Byte::halves(_mm512_slli_epi16(codes, 8)), odd = Byte::halves(codes);
    use(i, 0, _mm512_cvtph_ps(_mm512_castsi512_si256(even)));
    use(i, 1, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1)));
    use(i + 1, 0, _mm512_cvtph_ps(_mm512_castsi512_si256(odd)));
    use(i + 1, 1, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1)));
  }
};

// Of e3m2 in planes: vector v of a run has even or odd codes of its eights.
struct E3m2Panels : E3m2Bytes {
  static constexpr int bits = 6, step = 32, halves = 2;
  static constexpr float unit = 1.0f;
  using E3m2Bytes::E3m2Bytes;
  static constexpr int column(int i, int p) { return i / 4 * 8 + i / 2 % 2 + 2 * (i % 2 + 2 * p); }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      const __m512i first = _mm512_loadu_si512(at + v / 2 * 64), second = _mm512_loadu_si512(at + (4 + v / 4) * 64);
      const __m512i index = _mm512_and_si512(_mm512_srli_epi32(first, v % 2 * 4), _mm512_set1_epi8(15));
      BytePanels<E5m2>::widen(find(index, _mm512_srli_epi32(second, v % 4 * 2)), 2 * v, use);
    }
  }
};

}  // namespace

void float_avx512(const CodedCall& call) {
  switch (call.element) {
    case Element::listed:
      return call.packed ? run_panels<Float512, NibblePanels>(call) : run_rows<Float512, Nibbles>(call);
    case Element::e4m3:
      return call.packed ? run_panels<InOrder, BytePanels<E4m3>>(call) : run_rows<Float512, Bytes<E4m3>>(call);
    case Element::e5m2:
      return call.packed ? run_panels<InOrder, BytePanels<E5m2>>(call) : run_rows<Float512, Bytes<E5m2>>(call);
    case Element::e3m2:
      return call.packed ? run_panels<InOrder, E3m2Panels>(call) : run_rows<Float512, Bytes<E3m2>>(call);
  }
}

}  // namespace parco::linear
