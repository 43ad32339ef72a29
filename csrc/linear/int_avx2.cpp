// The integer product for AVX2: 8 outputs to a vector, vpmaddwd and an addition for the products.
#include "linear/avx2.h"
#include "linear/int_words.h"

namespace parco::linear {
namespace {

struct Words256 : avx2::Arithmetic, Words<Words256> {
  using Arithmetic::add, Arithmetic::load, Arithmetic::multiply, Arithmetic::set, Arithmetic::store;
  using I = __m256i;
  static constexpr int tile_rows = 3, tile_rows_of_two_words = 2;
  static constexpr int decode_words =
      4;  // per column of x, up to which weights go straight from memory into the products

  static I set(std::int32_t value) { return _mm256_set1_epi32(value); }
  static I load(const void* from) { return _mm256_load_si256(static_cast<const I*>(from)); }
  static void store(void* to, I value) { _mm256_store_si256(static_cast<I*>(to), value); }
  static I broadcast(const void* from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm256_set1_epi32(pair);
  }
  static I dot(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static I load_packed(const void* from) { return _mm256_loadu_si256(static_cast<const I*>(from)); }
  // Up by `shift` bits, or down.
  template <int shift>
  static I moved_dwords(I a) {
    if constexpr (shift > 0)
      return _mm256_slli_epi32(a, shift);
    else
      return _mm256_srli_epi32(a, -shift);
  }

  static constexpr int streams(int all) { return all == 1 ? 4 : all == 2 ? 2 : 1; }
  // A table of 64 bytes: of its four parts each looks up the low 4 bits, bits 4 and 5 choose.
  struct Lookup {
    I part[4];
    explicit Lookup(const CodedCall& call) {
      for (int i = 0; i < 4; i++)
        part[i] = call.table
                      ? _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(call.table) + i))
                      : set(0);
    }
    template <bool long_codes>
    I map(I codes) const {
      const I index = _mm256_and_si256(codes, _mm256_set1_epi8(15)), low = _mm256_shuffle_epi8(part[0], index);
      if constexpr (!long_codes) return low;
      const I bit4 = _mm256_slli_epi16(codes, 3), bit5 = _mm256_slli_epi16(codes, 2);
      const I lower = _mm256_blendv_epi8(low, _mm256_shuffle_epi8(part[1], index), bit4);
      const I upper =
          _mm256_blendv_epi8(_mm256_shuffle_epi8(part[2], index), _mm256_shuffle_epi8(part[3], index), bit4);
      return _mm256_blendv_epi8(lower, upper, bit5);
    }
  };
  // Vector i of a step of packed memory: 4 codes a row, as bytes.
  template <int bits, int i>
  static I packed_bytes(const std::uint8_t* at) {
    constexpr int low = low_bits(bits), left = bits - low, in_byte = 8 / low;
    const auto dword = [&](int index) { return _mm256_loadu_si256(reinterpret_cast<const I*>(at + index * 64)); };
    const auto mask = [](int width) { return _mm256_set1_epi8(static_cast<char>((1 << width) - 1)); };
    const I first = moved<-i % in_byte * low>(dword(i / in_byte));
    if constexpr (bits == 8) return first;
    const I kept = _mm256_and_si256(first, mask(low));
    if constexpr (left == 0) return kept;
    const I second = moved<low - i * left % 8>(dword(low + i * left / 8));
    return _mm256_or_si256(kept, _mm256_and_si256(second, _mm256_xor_si256(mask(bits), mask(low))));
  }
  // Up by `shift` bits, or down.
  template <int shift>
  static I moved(I vector) {
    if constexpr (shift > 0) return _mm256_slli_epi16(vector, shift);
    if constexpr (shift < 0) return _mm256_srli_epi16(vector, -shift);
    return vector;
  }
  static F load_scales(const CodedCall& call, std::int64_t at, float factor) {
    return avx2::load_scales(call.scale, call.scale_type, at, factor);
  }
  static I load_zeros(const void* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(from)));
  }

  // Codes of `bits` bits from rows of weights: 32 bytes of nibbles or of bytes a row, transposed. A dword holds `unit`
  // of them: nibbles where the codes are plain and have up to 4 bits.
  struct Reader {
    int bits, unit, per_quadword;
    bool mapped;
    std::int64_t row_bytes;
    std::uint64_t places;
    Lookup lookup;

    Reader(const CodedCall& call, const Plan& plan)
        : bits(call.bits),
          unit(plan.unit),
          per_quadword(2 * unit),
          mapped(call.table),
          row_bytes(plan.row_bytes),
          places(unit == 8 ? nibbles_of(bits) : bytes_of(bits)),
          lookup(call) {}

    I map(I codes) const { return bits <= 4 ? lookup.map<false>(codes) : lookup.map<true>(codes); }

    I unpack(const std::uint8_t* from, std::int64_t left) const {
      alignas(32) std::uint8_t held[32] = {};
      const std::int64_t step = per_quadword * bits / 8;
      if (left < 3 * step + 8) {
        std::memcpy(held, from, static_cast<std::size_t>(std::clamp<std::int64_t>(left, 0, 4 * step)));
        from = held;
      }
      if (mapped && bits == 4) {  // the upper nibble of each byte goes to the byte beside it
        const I words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return map(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)));
      }
      const auto at = [&](int i) { return deposit(from + step * i, places); };
      const I codes = _mm256_set_epi64x(at(3), at(2), at(1), at(0));
      return mapped ? map(codes) : codes;
    }

    I read_row(const std::uint8_t* from, std::int64_t left) const {
      if (mapped || (bits != 4 && bits != 8)) return unpack(from, left);
      if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const I*>(from));
      alignas(32) std::uint8_t bytes[32] = {};
      if (left > 0) std::memcpy(bytes, from, static_cast<std::size_t>(left));
      return load(bytes);
    }

    // `dwords` dwords from dword `first` of half a panel.
    void read_packed(const std::uint8_t* panel, std::int32_t first, std::int32_t dwords, I* to) const {
      if (step_dwords(bits) > 1) return read_planes<Words256>(*this, panel, first, dwords, to);
      if (32 / bits > unit) return read_halves(*this, panel, first, dwords, to);
      for (std::int32_t d = 0; d < dwords; d++) store(to + d, load_packed(panel + (first + d) * panel_rows * 4));
    }

    // The bytes of two vectors in turn: the lower or the upper two of each dword.
    static I join(I even, I odd, int upper) {
      const I from =
          _mm256_add_epi8(_mm256_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128, 0,
                                           -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128),
                          _mm256_set1_epi16(static_cast<short>(2 * upper)));
      return either(_mm256_shuffle_epi8(even, from), _mm256_slli_epi16(_mm256_shuffle_epi8(odd, from), 8));
    }

    // `dwords` dwords from dword `first` of 8 rows. Also asks for the same bytes of the 8 rows that follow.
    void read(const std::uint8_t* const* rows, std::int32_t first, std::int32_t dwords, I* to) const {
      const int step = unit * bits;
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

  // to[g * stride + lane] = factor * scale g of row `lane`.
  static void transpose_scales(const char* const* rows, Type type, std::int32_t groups, float factor, float* to,
                               int stride) {
    for (int lane = 0; lane < lanes; lane++)
      for (std::int32_t g = 0; g < groups; g++) to[g * stride + lane] = load_float(rows[lane], type, g) * factor;
  }

  static void quantize(const CodedCall& call, const Plan& plan, std::int64_t row, std::int16_t* const* words,
                       float* scales, std::int32_t* const* sums) {
    if (call.int8) return quantize_row_to_bytes<true>(call, plan, row, words[0], scales, sums[0]);
    quantize_row<true>(call, plan, row, words, scales, sums);
  }
};

}  // namespace

void int_avx2(const CodedCall& call) { run<Words256>(call); }

}  // namespace parco::linear
