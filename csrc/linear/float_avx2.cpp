// The fp32 product for AVX2: 8 numbers to a vector.
#include <immintrin.h>

#include "linear/float_engine.h"

namespace parco::linear {
namespace {

struct Float256 {
  using F = __m256;
  static constexpr int lanes = 8, tile_sums = 12, stream_outputs = 2;

  static F set(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_load_ps(from); }
  static void store(float* to, F value) { _mm256_store_ps(to, value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float total(F value) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }

  struct Spread {
    int shift;
    Spread(int group_shift, std::int64_t) : shift(group_shift) {}
    F load(const float* scales, std::int64_t k) const { return set(scales[k >> shift]); }
  };

  static void load_scales(const void* scale, Type type, std::int64_t at, std::int64_t groups, float factor, float* to) {
    for (std::int64_t g = 0; g < groups; g++) to[g] = load_float(scale, type, at + g) * factor;
  }

  // Rows [m, m + count) of x, turned: [columns][vectors * 8].
  static void turn(const CodedCall& call, std::int64_t m, std::int64_t count, int vectors, float* to) {
    const int wide = vectors * lanes;
    for (int i = 0; i < wide; i++)
      for (std::int64_t k = 0; k < call.columns; k++)
        to[k * wide + i] = i < count ? load_float(call.x, call.x_type, (m + i) * call.columns + k) : 0.0f;
  }

  // y from sums [outputs][stride], of rows of x from `first` on and outputs from n on.
  static void store_sums(const CodedCall& call, std::int64_t first, std::int64_t rows, std::int64_t n,
                         std::int64_t outputs, const float* sums, std::int64_t stride) {
    for (std::int64_t o = 0; o < outputs; o++) {
      const float bias = call.bias ? load_float(call.bias, call.bias_type, n + o) : 0.0f;
      for (std::int64_t m = 0; m < rows; m++)
        store_float(call.y, call.x_type, (first + m) * call.outputs + n + o, sums[o * stride + m] + bias);
    }
  }
};

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

// halves(codes): fp16 of 16 bytes.
struct E5m2 {
  static constexpr int bits = 8;
  static constexpr float unit = 1.0f;
  explicit E5m2(const CodedCall&) {}
  static __m128i codes(__m128i stream) { return stream; }
  static __m256i halves(__m128i codes) { return _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8); }
};

struct E4m3 {
  static constexpr int bits = 8;
  static constexpr float unit = 256.0f;
  explicit E4m3(const CodedCall&) {}
  static __m128i codes(__m128i stream) { return stream; }
  static __m256i halves(__m128i codes) {
    const __m256i words = _mm256_cvtepu8_epi16(codes), most = _mm256_set1_epi16(0x3f80);
    const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(words, 7), most);
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(words, 8), _mm256_set1_epi16(static_cast<short>(0x8000)));
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

}  // namespace

void float_avx2(const CodedCall& call) {
  switch (call.element) {
    case Element::listed:
      return run_float<Float256, Nibbles>(call);
    case Element::e4m3:
      return run_float<Float256, Bytes<E4m3>>(call);
    case Element::e5m2:
      return run_float<Float256, Bytes<E5m2>>(call);
    case Element::e3m2:
      return run_float<Float256, Bytes<E3m2>>(call);
  }
}

}  // namespace parco::linear
