// The fp32 product for AVX-512: 16 numbers to a vector.
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

void float_avx512(const CodedCall& call) {
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
