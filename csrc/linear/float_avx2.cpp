// The fp32 product for AVX2: 8 numbers to a vector.
#include "linear/float_panels.h"
#include "linear/float_rows.h"
#include "linear/float_vector_avx2.h"

namespace parco::linear {
namespace {

// `bytes` bytes of a row of which `left` are there.
inline __m128i load_bytes(const std::uint8_t* from, std::int64_t left, std::int64_t bytes) {
  alignas(16) std::uint8_t held[16] = {};
  if (left >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  std::memcpy(held, from, static_cast<std::size_t>(std::min(left, bytes)));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(held));
}

struct Nibbles {
  static constexpr int bits = 4, step = 16, vectors = 2, shared = 2;
  static constexpr float unit = 1.0f;
  __m256 low, high;

  explicit Nibbles(const CodedCall& call) : low(_mm256_loadu_ps(call.values)), high(_mm256_loadu_ps(call.values + 8)) {}
  static int place(int i) { return i; }
  // The low 3 bits look up, bit 3 chooses.
  __m256 find(__m256i codes) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes), _mm256_permutevar8x32_ps(high, codes), upper);
  }
  void natural(const std::uint8_t* from, std::int64_t left, __m256* to) const {
    const __m128i codes = load_bytes(from, left, 8);
    const __m128i both = _mm_unpacklo_epi8(codes, _mm_srli_epi16(codes, 4));
    to[0] = find(_mm256_cvtepu8_epi32(both)), to[1] = find(_mm256_cvtepu8_epi32(_mm_srli_si128(both, 8)));
  }
  void load(const std::uint8_t* from, std::int64_t left, __m256* to) const { natural(from, left, to); }
};

template <class Byte>
struct Bytes {
  static constexpr int bits = Byte::bits, step = 16, vectors = 2, shared = 2;
  static constexpr float unit = Byte::unit;
  Byte byte;

  explicit Bytes(const CodedCall& call) : byte(call) {}
  static int place(int i) { return i; }
  void natural(const std::uint8_t* from, std::int64_t left, __m256* to) const {
    const __m256i halves = byte.halves(byte.codes(load_bytes(from, left, 2 * bits)));
    to[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
    to[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
  void load(const std::uint8_t* from, std::int64_t left, __m256* to) const { natural(from, left, to); }
};

// halves(codes): fp16 of 16 bytes; of_upper: of the upper bytes of 16 words.
struct E5m2 {
  static constexpr int bits = 8;
  static constexpr float unit = 1.0f;
  explicit E5m2(const CodedCall&) {}
  static __m128i codes(__m128i stream) { return stream; }
  static __m256i halves(__m128i codes) { return _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8); }
  static __m256i of_upper(__m256i words) {
    return _mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(0xff00)));
  }
};

struct E4m3 {
  static constexpr int bits = 8;
  static constexpr float unit = 256.0f;
  explicit E4m3(const CodedCall&) {}
  static __m128i codes(__m128i stream) { return stream; }
  static __m256i halves(__m128i codes) { return of_upper(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8)); }
  static __m256i of_upper(__m256i words) {
    const __m256i most = _mm256_set1_epi16(0x3f80);
    const __m256i magnitude = _mm256_and_si256(_mm256_srli_epi16(words, 1), most);
    const __m256i sign = _mm256_and_si256(words, _mm256_set1_epi16(static_cast<short>(0x8000)));
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, most), _mm256_set1_epi16(0x7e00));
    return _mm256_or_si256(_mm256_or_si256(magnitude, sign), nan);
  }
};

struct E3m2 {
  static constexpr int bits = 6;
  static constexpr float unit = 1.0f;
  __m128i low, high;  // e5m2 of the magnitudes

  explicit E3m2(const CodedCall& call) {
    alignas(16) std::uint8_t of[32];
    for (int i = 0; i < 32; i++) of[i] = static_cast<std::uint8_t>(to_fp16(call.values[i]) >> 8);
    low = _mm_load_si128(reinterpret_cast<const __m128i*>(of));
    high = _mm_load_si128(reinterpret_cast<const __m128i*>(of) + 1);
  }
  __m128i codes(__m128i stream) const {
    const std::uint64_t places = 0x3f3f3f3f3f3f3f3fu;
    const std::uint64_t first = static_cast<std::uint64_t>(_mm_cvtsi128_si64(stream));
    const std::uint64_t second = static_cast<std::uint64_t>(_mm_cvtsi128_si64(_mm_srli_si128(stream, 6)));
    const __m128i bytes = _mm_set_epi64x(static_cast<long long>(_pdep_u64(second, places)),
                                         static_cast<long long>(_pdep_u64(first, places)));
    const __m128i index = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m128i magnitude =
        _mm_blendv_epi8(_mm_shuffle_epi8(low, index), _mm_shuffle_epi8(high, index), _mm_slli_epi16(bytes, 3));
    return _mm_or_si128(magnitude, _mm_slli_epi16(_mm_and_si128(bytes, _mm_set1_epi8(32)), 2));
  }
  static __m256i halves(__m128i codes) { return E5m2::halves(codes); }
};

inline __m256i load_panel(const std::uint8_t* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }

// Halves of panels of codes of 4 bits, looked up.
struct NibblePanels : Nibbles {
  static constexpr int step = 8, halves = 1;
  using Nibbles::Nibbles;
  static constexpr int column(int i, int) { return i; }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
    const __m256i codes = load_panel(at);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) use(j, 0, find(_mm256_srli_epi32(codes, 4 * j)));
  }
};

// The same of bytes.
template <class Byte>
struct BytePanels {
  static constexpr int bits = 8, step = 4, halves = 2;
  static constexpr float unit = Byte::unit;
  explicit BytePanels(const CodedCall&) {}
  static constexpr int column(int i, int p) { return i + 2 * p; }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
    widen(load_panel(at), 0, use);
  }
  // Codes 0 and 2 of every dword, then 1 and 3.
  template <class Use>
  static void widen(__m256i codes, int i, const Use& use) {
    const __m256i even = Byte::of_upper(_mm256_slli_epi16(codes, 8)), odd = Byte::of_upper(codes);
    use(i, 0, _mm256_cvtph_ps(_mm256_castsi256_si128(even))),
        use(i, 1, _mm256_cvtph_ps(_mm256_extracti128_si256(even, 1)));
    use(i + 1, 0, _mm256_cvtph_ps(_mm256_castsi256_si128(odd))),
        use(i + 1, 1, _mm256_cvtph_ps(_mm256_extracti128_si256(odd, 1)));
  }
};

// Of e3m2 in planes: vector v of a run has even or odd codes of its eights, which become those of e5m2.
struct E3m2Panels {
  static constexpr int bits = 6, step = 32, halves = 2;
  static constexpr float unit = 1.0f;
  __m256i low, high;  // e5m2 of the magnitudes

  explicit E3m2Panels(const CodedCall& call) {
    const E3m2 tables(call);
    low = _mm256_broadcastsi128_si256(tables.low), high = _mm256_broadcastsi128_si256(tables.high);
  }
  static constexpr int column(int i, int p) { return i / 4 * 8 + i / 2 % 2 + 2 * (i % 2 + 2 * p); }
  template <class Use>
  void panel(const std::uint8_t* at, const Use& use) const {
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) {
      const __m256i index =
          _mm256_and_si256(_mm256_srli_epi32(load_panel(at + v / 2 * 64), v % 2 * 4), _mm256_set1_epi8(15));
      const __m256i left = _mm256_srli_epi32(load_panel(at + (4 + v / 4) * 64), v % 4 * 2);  // in bits 0 and 1
      const __m256i magnitude = _mm256_blendv_epi8(_mm256_shuffle_epi8(low, index), _mm256_shuffle_epi8(high, index),
                                                   _mm256_slli_epi32(left, 7));
      const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(left, 6), _mm256_set1_epi8(-128));
      BytePanels<E5m2>::widen(_mm256_or_si256(magnitude, sign), 2 * v, use);
    }
  }
};

}  // namespace

void float_avx2(const CodedCall& call) {
  if (call.packed) {
    if (call.element == Element::e4m3) return run_panels<Float256, BytePanels<E4m3>>(call);
    if (call.element == Element::e5m2) return run_panels<Float256, BytePanels<E5m2>>(call);
    if (call.element == Element::e3m2) return run_panels<Float256, E3m2Panels>(call);
    return run_panels<Float256, NibblePanels>(call);
  }
  switch (call.element) {
    case Element::listed:
      return run_rows<Float256, Nibbles>(call);
    case Element::e4m3:
      return run_rows<Float256, Bytes<E4m3>>(call);
    case Element::e5m2:
      return run_rows<Float256, Bytes<E5m2>>(call);
    case Element::e3m2:
      return run_rows<Float256, Bytes<E3m2>>(call);
  }
}

}  // namespace parco::linear
