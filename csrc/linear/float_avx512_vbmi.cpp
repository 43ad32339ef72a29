// The fp32 product for AVX-512 with VBMI: bytes are looked up in registers.
#include "linear/float_avx512.h"

namespace parco::linear {
namespace {

// Every e3m2 number is one of e5m2.
struct E3m2 {
  static constexpr int bits = 6;
  static constexpr float unit = 1.0f;
  __m512i table, bytes, start;

  explicit E3m2(const CodedCall& call) {
    alignas(64) std::uint8_t of[64], from[64], first[64];
    for (int i = 0; i < 64; i++) {
      std::uint16_t half = to_fp16(call.values[i]);
      of[i] = static_cast<std::uint8_t>(half >> 8);
      from[i] = static_cast<std::uint8_t>((i / 8 * 6 + i % 8) & 63);
      first[i] = static_cast<std::uint8_t>(i % 8 * 6);
    }
    table = _mm512_load_si512(of), bytes = _mm512_load_si512(from), start = _mm512_load_si512(first);
  }
  __m512i codes(__m512i stream) const {
    return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(start, _mm512_permutexvar_epi8(bytes, stream)), table);
  }
  static __m512i halves(__m512i words) { return E5m2::halves(words); }
};

// Panels of codes of 6 and 8 bits whose numbers bf16 holds: a table of its upper bytes and one of its lower.
template <int width>
struct BytePanels {
  static constexpr int bits = width, step = width == 8 ? 4 : 32, halves = 2;
  static constexpr float unit = 1.0f;
  __m512i upper[2], lower[2];

  explicit BytePanels(const CodedCall& call) {
    alignas(64) std::uint8_t high[128], low[128];
    for (int i = 0; i < 128; i++) {
      const std::uint32_t number = bits_of(call.values[i % (1 << width)]);
      high[i] = static_cast<std::uint8_t>(number >> 24), low[i] = static_cast<std::uint8_t>(number >> 16);
    }
    for (int i = 0; i < 2; i++) upper[i] = _mm512_load_si512(high + 64 * i), lower[i] = _mm512_load_si512(low + 64 * i);
  }
  // 6 bits: vector v of a run has even or odd codes of its eights.
  static constexpr int column(int i, int p) {
    return width == 8 ? i + 2 * p : i / 4 * 8 + i / 2 % 2 + 2 * (i % 2 + 2 * p);
  }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
    if constexpr (width == 8) {
      const __m512i codes = _mm512_loadu_si512(at);
      const __m512i high = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);    // sees 7 bits
      widen(_mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8),  // a | (b & c)
            _mm512_permutex2var_epi8(lower[0], codes, lower[1]), 0, use);
      return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      const __m512i first = _mm512_loadu_si512(at + v / 2 * 64), second = _mm512_loadu_si512(at + (4 + v / 4) * 64);
      const __m512i codes = _mm512_ternarylogic_epi32(
          _mm512_and_si512(_mm512_srli_epi32(first, v % 2 * 4), _mm512_set1_epi8(15)),
          v % 4 == 3 ? _mm512_srli_epi32(second, 2) : _mm512_slli_epi32(second, 4 - v % 4 * 2), _mm512_set1_epi8(48),
          0xf8);
      widen(_mm512_permutexvar_epi8(codes, upper[0]), _mm512_permutexvar_epi8(codes, lower[0]), 2 * v, use);
    }
  }
  // The halves of bf16 as floats: codes 0 and 2 of every dword, then 1 and 3.
  template <class Use>
  static void widen(__m512i high, __m512i low, int i, const Use& use) {
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    use(i, 0, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
    use(i, 1, _mm512_castsi512_ps(_mm512_slli_epi32(second, 16)));
    use(i + 1, 0, _mm512_castsi512_ps(_mm512_and_si512(first, odd)));
    use(i + 1, 1, _mm512_castsi512_ps(_mm512_and_si512(second, odd)));
  }
};

}  // namespace

void float_avx512_vbmi(const CodedCall& call) {
  if (call.packed)
    return call.bits == 4   ? run_panels<Float512, NibblePanels>(call)
           : call.bits == 6 ? run_panels<Float512, BytePanels<6>>(call)
                            : run_panels<Float512, BytePanels<8>>(call);
  switch (call.element) {
    case Element::listed:
      return run_rows<Float512, Nibbles>(call);
    case Element::e4m3:
      return run_rows<Float512, Bytes<E4m3>>(call);
    case Element::e5m2:
      return run_rows<Float512, Bytes<E5m2>>(call);
    case Element::e3m2:
      return run_rows<Float512, Bytes<E3m2>>(call);
  }
}

}  // namespace parco::linear
