// The fp32 product for AVX-512: 16 numbers to a vector.
#include "linear/avx512.h"
#include "linear/float_engine.h"

namespace parco::linear {
namespace {

inline __mmask64 bytes_mask(std::int64_t left) { return left >= 64 ? ~0ull : (1ull << left) - 1; }

struct Float512 {
  using F = __m512;
  static constexpr int lanes = 16, tile_sums = 24, stream_outputs = 4;

  static F set(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_load_ps(from); }
  static void store(float* to, F value) { _mm512_store_ps(to, value); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float total(F value) { return _mm512_reduce_add_ps(value); }

  // Scales of `codes` codes in a row, lane i that of the i-th sixteenth of them.
  struct Spread {
    __m512i lane;
    int shift;
    bool one;
    Spread(int group_shift, std::int64_t codes) : shift(group_shift), one(codes >> shift <= 1) {
      alignas(64) std::int32_t index[16];
      for (int i = 0; i < 16; i++) index[i] = static_cast<std::int32_t>(codes / 16 * i >> shift);
      lane = _mm512_load_si512(index);
    }
    F load(const float* scales, std::int64_t k) const {
      scales += k >> shift;
      return one ? _mm512_set1_ps(*scales) : _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scales));
    }
  };

  static void load_scales(const void* scale, Type type, std::int64_t at, std::int64_t groups, float factor, float* to) {
    const char* from = static_cast<const char*>(scale) + at * size_of(type);
    for (std::int64_t g = 0; g < groups; g += 16, from += 16 * size_of(type)) {
      const __mmask16 mask = static_cast<__mmask16>(bytes_mask(std::min<std::int64_t>(16, groups - g)));
      const __m512i bits = type == Type::fp32   ? _mm512_maskz_loadu_epi32(mask, from)
                           : size_of(type) == 2 ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from))
                                                : _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
      _mm512_mask_storeu_ps(to + g, mask, multiply(avx512::widen(bits, type), set(factor)));
    }
  }

  // Rows [m, m + count) of x, turned: [columns][vectors * 16].
  static void turn(const CodedCall& call, std::int64_t m, std::int64_t count, int vectors, float* to) {
    for (int v = 0; v < vectors; v++) {
      for (std::int64_t k = 0; k < call.columns; k += 16) {
        const int width = static_cast<int>(std::min<std::int64_t>(16, call.columns - k));
        alignas(64) __m512i turned[16];
        avx512::transpose(
            [&](int i) {
              if (v * 16 + i >= count) return _mm512_setzero_si512();
              const std::int64_t at = (m + v * 16 + i) * call.columns + k;
              return _mm512_castps_si512(avx512::load_floats(call.x, call.x_type, at, width));
            },
            turned);
        for (int i = 0; i < width; i++) _mm512_store_si512(to + ((k + i) * vectors + v) * 16, turned[i]);
      }
    }
  }

  // y from sums [outputs][stride], of rows of x from `first` on and outputs from n on.
  static void store_sums(const CodedCall& call, std::int64_t first, std::int64_t rows, std::int64_t n,
                         std::int64_t outputs, const float* sums, std::int64_t stride) {
    for (std::int64_t o = 0; o < outputs; o += 16) {
      const int width = static_cast<int>(std::min<std::int64_t>(16, outputs - o));
      const F bias = call.bias ? avx512::load_floats(call.bias, call.bias_type, n + o, width) : set(0.0f);
      for (std::int64_t m = 0; m < rows; m += 16) {
        alignas(64) __m512i turned[16];
        avx512::transpose(
            [&](int i) { return _mm512_load_si512(sums + std::min<std::int64_t>(o + i, outputs - 1) * stride + m); },
            turned);
        for (std::int64_t i = 0; i < std::min<std::int64_t>(16, rows - m); i++)
          avx512::store_floats(call.y, call.x_type, (first + m + i) * call.outputs + n + o, width,
                               add(_mm512_castsi512_ps(turned[i]), bias));
      }
    }
  }
};

// Codes of 4 bits, looked up. Lane i of vector j holds code 8 i + j: a shift puts it where the table looks.
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

}  // namespace

void float_avx512(const CodedCall& call) {
  switch (call.element) {
    case Element::listed:
      return run_float<Float512, Nibbles>(call);
    case Element::e4m3:
      return run_float<Float512, Bytes<E4m3>>(call);
    case Element::e5m2:
      return run_float<Float512, Bytes<E5m2>>(call);
    case Element::e3m2:
      return run_float<Float512, Bytes<E3m2>>(call);
  }
}

}  // namespace parco::linear
