// The integer product for AVX2: 8 outputs to a vector, vpmaddwd and an addition for the products.
#include "linear/avx2.h"
#include "linear/int_engine.h"

namespace parco::linear {
namespace {

struct Avx2 : avx2::Arithmetic {
  using Arithmetic::add, Arithmetic::load, Arithmetic::multiply, Arithmetic::set, Arithmetic::store;
  using I = __m256i;
  static constexpr int tile_rows = 3, tile_rows_of_two_words = 2;
  static constexpr int decode_words =
      4;  // per column of x, up to which weights go straight from memory into the products
  static constexpr int x_bytes(Digits) { return 2; }  // of a value; int8 goes as words

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
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static I multiply(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  template <bool nibbles>
  static I pairs(I dword, int shift, int) {
    if constexpr (nibbles) {
      if (shift == 3) return _mm256_srli_epi16(dword, 12);
      return _mm256_and_si256(_mm256_srli_epi16(dword, 4 * shift), _mm256_set1_epi16(15));
    }
    return shift ? _mm256_srli_epi16(dword, 8) : _mm256_and_si256(dword, _mm256_set1_epi16(255));
  }

  // One block of `all` rows of words against its dwords of codes.
  template <bool nibbles, int all, Digits>
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

  // Packed codes.
  static constexpr int parts(Digits) { return 1; }
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
  template <int bits, bool mapped, int all, Digits>
  static void add_products(const std::uint8_t* at, [[maybe_unused]] const Lookup& lookup, const char* const* x,
                           std::int32_t d, I (*sum)[1]) {
    // Bytes 0 and 2 of a vector are one pair, 1 and 3 the other; so far apart in x as there are vectors in a dword.
    constexpr int low = low_bits(bits), vectors = 8 / low;
    const I byte = _mm256_set1_epi16(255);
    const auto add = [&](int i, I codes) {
      if constexpr (mapped) codes = lookup.template map<(bits > 4)>(codes);
      const I pair[2] = {_mm256_and_si256(codes, byte), _mm256_srli_epi16(codes, 8)};
      const std::int64_t offset = 2 * step_codes(bits) * d + i / vectors * (64 / low) + i % vectors * 4;
      for (int half = 0; half < 2; half++)
        for (int r = 0; r < all; r++)
          sum[r][0] = dot(sum[r][0], pair[half], broadcast(x[r] + offset + 4 * vectors * half));
    };
    each_vector<Avx2, bits>(at, add, std::make_integer_sequence<int, step_codes(bits) / 4>());
  }

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
  template <int>
  static I whole(const I* sum) {
    return sum[0];
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
    std::uint64_t places;  // of a quadword's bits: those that codes take when they lie as nibbles or bytes
    Lookup lookup;

    Reader(const CodedCall& call, const Plan& plan)
        : bits(call.bits),
          unit(plan.unit),
          per_quadword(2 * unit),
          mapped(call.table),
          row_bytes(plan.row_bytes),
          lookup(call) {
      const std::uint64_t code = (1u << bits) - 1;
      places = unit == 8 ? code * 0x1111111111111111u : code * 0x0101010101010101u;
    }

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
      const auto quadword = [&](int i) {
        std::uint64_t window;
        std::memcpy(&window, from + step * i, 8);
        return static_cast<long long>(_pdep_u64(window, places));
      };
      const I codes = _mm256_set_epi64x(quadword(3), quadword(2), quadword(1), quadword(0));
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
      if (step_dwords(bits) > 1) return read_planes<Avx2>(*this, panel, first, dwords, to);
      const int each = 32 / bits / unit;  // in one of memory
      for (std::int32_t d = 0; d < dwords; d++) {
        const I stored = _mm256_loadu_si256(reinterpret_cast<const I*>(panel + (first + d) / each * 64));
        if (each == 1) {
          store(to + d, stored);
          continue;
        }
        const I half = (first + d) % 2 ? _mm256_srli_epi32(stored, 16) : stored;
        const I bytes = spread(_mm256_and_si256(half, _mm256_set1_epi32(0xffff)), 8, 0x00ff00ff);
        const I nibbles = spread(bytes, 4, 0x0f0f0f0f);
        store(to + d, mapped ? map(nibbles) : spread(nibbles, 2, 0x33333333));
      }
    }

    // The bytes of two vectors in turn: the lower or the upper two of each dword.
    static I join(I even, I odd, int upper) {
      const I from =
          _mm256_add_epi8(_mm256_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128, 0,
                                           -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128),
                          _mm256_set1_epi16(static_cast<short>(2 * upper)));
      return either(_mm256_shuffle_epi8(even, from), _mm256_slli_epi16(_mm256_shuffle_epi8(odd, from), 8));
    }

    // The upper half of every field that `mask` is to hold goes `shift` up.
    static I spread(I fields, int shift, int mask) {
      return _mm256_and_si256(_mm256_or_si256(fields, _mm256_slli_epi32(fields, shift)), _mm256_set1_epi32(mask));
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

void int_avx2(const CodedCall& call) { run<Avx2>(call); }

}  // namespace parco::linear
