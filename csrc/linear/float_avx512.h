// How AVX-512 widens codes for the fp32 product: what needs no VBMI. Unnamed: see floats.h.
#pragma once
#include "linear/float_panels.h"
#include "linear/float_rows.h"
#include "linear/float_vector_avx512.h"

namespace parco::linear {
namespace {

// Codes of 4 bits, looked up. By rows, lane i of vector j holds code 8 i + j: a shift puts it where the table looks.
struct Nibbles {
  static constexpr int bits = 4, step = 128, vectors = 8, shared = 8;
  static constexpr float unit = 1.0f;
  __m512 table;

  explicit Nibbles(const CodedCall& call) : table(_mm512_loadu_ps(call.values)) {}
  static int place(int i) { return i % 8 * 16 + i / 8; }
  void load(const std::uint8_t* from, std::int64_t left, __m512* to) const {
    const __m512i codes = left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(bytes_mask(left), from);
    for (int j = 0; j < 8; j++) to[j] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table);
  }
  void natural(const std::uint8_t* from, std::int64_t left, __m512* to) const {
    const __m128i codes =
        _mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes_mask(std::min<std::int64_t>(left, 8))), from);
    const __m128i both = _mm_unpacklo_epi8(codes, _mm_srli_epi16(codes, 4));  // the table takes the low 4 bits
    to[0] = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(both), table);
  }
};

// Codes that are fp16's pattern or become so: a byte each, 64 to a step, the even ones before the odd ones.
template <class Byte>
struct Bytes {
  static constexpr int bits = Byte::bits, step = 64, vectors = 4, shared = 2;
  static constexpr float unit = Byte::unit;
  Byte byte;

  explicit Bytes(const CodedCall& call) : byte(call) {}
  static int place(int i) { return i / 32 * 32 + i % 2 * 16 + i % 32 / 2; }
  void load(const std::uint8_t* from, std::int64_t left, __m512* to) const {
    constexpr std::int64_t bytes = step * bits / 8;
    const __m512i stream =
        left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(bytes_mask(std::min(left, bytes)), from);
    const __m512i codes = byte.codes(stream);
    const __m512i even = byte.halves(_mm512_slli_epi16(codes, 8)), odd = byte.halves(codes);
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(even)), to[1] = _mm512_cvtph_ps(_mm512_castsi512_si256(odd));
    to[2] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(even, 1)),
    to[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(odd, 1));
  }
  void natural(const std::uint8_t* from, std::int64_t left, __m512* to) const {
    const __m512i stream = _mm512_maskz_loadu_epi8(bytes_mask(std::min<std::int64_t>(left, 2 * bits)), from);
    const __m256i codes = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm512_castsi512_si128(byte.codes(stream))), 8);
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(byte.halves(_mm512_castsi256_si512(codes))));
  }
};

// halves(words): fp16 of the upper byte of each word.
struct E5m2 {
  static constexpr int bits = 8;
  static constexpr float unit = 1.0f;
  explicit E5m2(const CodedCall&) {}
  static __m512i codes(__m512i stream) { return stream; }
  static __m512i halves(__m512i words) {
    return _mm512_and_si512(words, _mm512_set1_epi16(static_cast<short>(0xff00)));
  }
};

// Its exponent is 8 too small for fp16. The pattern of NaN has to be put in.
struct E4m3 {
  static constexpr int bits = 8;
  static constexpr float unit = 256.0f;
  explicit E4m3(const CodedCall&) {}
  static __m512i codes(__m512i stream) { return stream; }
  static __m512i halves(__m512i words) {
    const __m512i magnitude = _mm512_and_si512(_mm512_srli_epi16(words, 1), _mm512_set1_epi16(0x3f80));
    const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x3f80));
    const __m512i finite = _mm512_ternarylogic_epi32(magnitude, words, _mm512_set1_epi16(static_cast<short>(0x8000)),
                                                     0xf8);  // a | (b & c)
    return _mm512_mask_mov_epi16(finite, nan, _mm512_set1_epi16(0x7e00));
  }
};

// Panels of codes of 4 bits, looked up.
struct NibblePanels {
  static constexpr int bits = 4, step = 8, halves = 1;
  static constexpr float unit = 1.0f;
  __m512 table;

  explicit NibblePanels(const CodedCall& call) : table(_mm512_loadu_ps(call.values)) {}
  static constexpr int column(int i, int) { return i; }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
    const __m512i codes = _mm512_loadu_si512(at);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) use(j, 0, _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4 * j), table));
  }
};

}  // namespace
}  // namespace parco::linear
