// The integer product for AVX2: 8 outputs to a vector, vpmaddwd and an addition for the products.
#include <immintrin.h>

#include "linear/int_engine.h"

namespace parco::linear {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int lanes = 8, tile_rows = 3, tile_rows_of_two_words = 2;
  static constexpr int decode_words =
      4;  // per column of x, up to which weights go straight from memory into the products

  static I set(std::int32_t value) { return _mm256_set1_epi32(value); }
  static F set(float value) { return _mm256_set1_ps(value); }
  static I load(const void* from) { return _mm256_load_si256(static_cast<const I*>(from)); }
  static F load(const float* from) { return _mm256_load_ps(from); }
  static void store(I* to, I value) { _mm256_store_si256(to, value); }
  static I broadcast(const void* from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm256_set1_epi32(pair);
  }
  static I dot(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  static F load_floats(const void* from, Type type, std::int64_t index, int count) {
    alignas(32) float values[8] = {};
    for (int i = 0; i < count; i++) values[i] = load_float(from, type, index + i);
    return load(values);
  }
  static void store_floats(void* to, Type type, std::int64_t index, int count, F value) {
    if (type == Type::fp32 && count == 8) {
      _mm256_storeu_ps(reinterpret_cast<float*>(static_cast<char*>(to) + 4 * index), value);
      return;
    }
    alignas(32) float values[8];
    _mm256_store_ps(values, value);
    for (int i = 0; i < count; i++) store_float(to, type, index + i, values[i]);
  }

  template <bool nibbles>
  static I pairs(I dword, int shift, int) {
    if constexpr (nibbles) {
      if (shift == 3) return _mm256_srli_epi16(dword, 12);
      return _mm256_and_si256(_mm256_srli_epi16(dword, 4 * shift), _mm256_set1_epi16(15));
    }
    return shift ? _mm256_srli_epi16(dword, 8) : _mm256_and_si256(dword, _mm256_set1_epi16(255));
  }

  // One block of `all` rows of words against its dwords of codes.
  template <bool nibbles, int all>
  static void block_sums(const I* codes, std::int32_t dwords, int bits, const char* const* x, I* sum) {
    constexpr int shifts = nibbles ? 4 : 2;
    I other[all];
    for (int r = 0; r < all; r++) other[r] = set(0);
    for (std::int32_t d = 0; d < dwords; d++) {
      const I dword = load(codes + d);
      for (int s = 0; s < shifts; s++) {
        const I pair = pairs<nibbles>(dword, s, bits);
        for (int r = 0; r < all; r++) {
          I& to = s & 1 ? other[r] : sum[r];
          to = dot(to, pair, broadcast(x[r] + 4 * (shifts * d + s)));
        }
      }
    }
    for (int r = 0; r < all; r++) sum[r] = add(sum[r], other[r]);
  }

  // Codes of `bits` bits from rows of weights: 32 bytes of nibbles (up to 4 bits) or of bytes a row, transposed.
  struct Reader {
    int bits;
    std::int64_t row_bytes;

    Reader(int code_bits, std::int64_t bytes_per_row) : bits(code_bits), row_bytes(bytes_per_row) {}

    // Every eighth (nibbles) or fourth (bytes) code starts on a byte only for some widths, so codes come out of a
    // 64-bit window.
    I unpack(const std::uint8_t* from, std::int64_t left) const {
      alignas(32) std::uint8_t expanded[32] = {};
      const std::uint64_t mask = (1u << bits) - 1;
      const int per_byte = bits <= 4 ? 2 : 1;
      for (int i = 0; i < 4; i++) {  // 16 or 8 codes: whole bytes of the stream and 8 bytes of the result
        const std::int64_t start = 8 * per_byte * bits / 8 * i;
        if (start >= left) break;
        std::uint64_t window = 0;
        std::memcpy(&window, from + start,
                    static_cast<std::size_t>(std::min<std::int64_t>(8 * per_byte * bits / 8, left - start)));
        for (int byte = 0; byte < 8; byte++) {
          std::uint64_t code = window >> per_byte * byte * bits & mask;
          if (per_byte == 2) code |= (window >> (2 * byte + 1) * bits & mask) << 4;
          expanded[8 * i + byte] = static_cast<std::uint8_t>(code);
        }
      }
      return load(expanded);
    }

    I read_row(const std::uint8_t* from, std::int64_t left) const {
      if (bits != 4 && bits != 8) return unpack(from, left);
      if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const I*>(from));
      alignas(32) std::uint8_t bytes[32] = {};
      if (left > 0) std::memcpy(bytes, from, static_cast<std::size_t>(left));
      return load(bytes);
    }

    // `dwords` dwords from dword `first` of 8 rows. Also asks for the same bytes of the 8 rows that follow.
    void read(const std::uint8_t* const* rows, std::int32_t first, std::int32_t dwords, I* to) const {
      const int unit = bits <= 4 ? 8 : 4, step = 8 * unit * bits / 8;
      const std::int64_t start = static_cast<std::int64_t>(first) * unit * bits / 8;
      for (std::int32_t d = 0; d < dwords; d += 8) {
        const std::int64_t byte = start + d / 8 * step;
        I row[8];
        for (int i = 0; i < 8; i++) {
          const std::uint8_t* from = rows[i] + byte;
          _mm_prefetch(reinterpret_cast<const char*>(from + 8 * row_bytes), _MM_HINT_T0);
          row[i] = read_row(from, row_bytes - byte);
        }
        transpose(row);
        for (int i = 0; i < 8; i++) store(to + d + i, row[i]);
      }
    }
  };

  // 8 rows of 8 dwords become 8 columns.
  static void transpose(I* r) {
    I a[8], b[8];
    for (int i = 0; i < 4; i++) {
      a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
      b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
      b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
      b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
      r[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
      r[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
    }
  }

  // to[g * stride + lane] = scale g of row `lane`.
  static void transpose_scales(const char* const* rows, Type type, std::int32_t groups, float* to, int stride) {
    for (int lane = 0; lane < lanes; lane++)
      for (std::int32_t g = 0; g < groups; g++) to[g * stride + lane] = load_float(rows[lane], type, g);
  }

  static void quantize(const IntCall& call, const Plan& plan, std::int64_t row, std::int16_t* const* words,
                       float* scales, std::int32_t* const* sums) {
    quantize_row<true>(call, plan, row, words, scales, sums);
  }
};

}  // namespace

void int_avx2(const IntCall& call) { run<Avx2>(call); }

}  // namespace parco::linear
