// The vector type of AVX-512 with VBMI and VNNI for int_engine.h: vpdpbusd and vpdpwssd for the products.
#pragma once
#include "linear/bytes_avx512.h"
#include "linear/int_avx512.h"

namespace parco::linear {
namespace {

struct Bytes512 : Int512 {
  static constexpr int tile_rows = 6, tile_rows_of_two_words = 4;
  static constexpr int x_bytes(Digits digits) { return digits == Digits::byte ? 1 : 2; }  // of a value

  static I dot(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static I dot_bytes(I sum, I a, I b) { return _mm512_dpbusd_epi32(sum, a, b); }
  // One block of `all` rows of words against its dwords of codes. Bytes of codes meet bytes of words, and high sums
  // weigh 256: half the unpacking of 16-bit products.
  template <bool nibbles, int all, Digits digits>
  static void block_sums(const I* codes, std::int32_t dwords, int bits, const char* const* x, I* sum) {
    if (digits == Digits::byte) return sums_of_bytes<nibbles, all>(codes, dwords, bits, x, sum);
    if (dwords == 4) return sums_of<nibbles, all, 4>(codes, dwords, bits, x, sum);
    if (dwords == 32) return sums_of<nibbles, all, 32>(codes, dwords, bits, x, sum);
    sums_of<nibbles, all, 0>(codes, dwords, bits, x, sum);
  }
  template <bool nibbles, int all, int fixed>
  static void sums_of(const I* codes, std::int32_t dwords, [[maybe_unused]] int bits, const char* const* x, I* sum) {
    I high[all][2], low[all][2];
    for (int r = 0; r < all; r++) high[r][0] = high[r][1] = low[r][1] = set(0), low[r][0] = sum[r];
    // Two chains of sums hide the latency of long blocks; short ones overlap with the next block instead.
    constexpr int other = fixed == 4 || all > 3 ? 0 : 1;
    [[maybe_unused]] const I mask = byte_mask(bits);
    const std::int32_t count = fixed ? fixed : dwords;
#pragma GCC unroll 4
    for (std::int32_t d = 0; d < count; d++) {
      const I dword = load(codes + d);
      if constexpr (nibbles) {
        const I even = _mm512_and_si512(dword, mask), odd = _mm512_and_si512(_mm512_srli_epi16(dword, 4), mask);
        for (int r = 0; r < all; r++) {
          high[r][0] = _mm512_dpbusd_epi32(high[r][0], even, broadcast(x[r] + 16 * d));
          low[r][0] = _mm512_dpbusd_epi32(low[r][0], even, broadcast(x[r] + 16 * d + 4));
          high[r][other] = _mm512_dpbusd_epi32(high[r][other], odd, broadcast(x[r] + 16 * d + 8));
          low[r][other] = _mm512_dpbusd_epi32(low[r][other], odd, broadcast(x[r] + 16 * d + 12));
        }
      } else {
        for (int r = 0; r < all; r++) {
          high[r][d & other] = _mm512_dpbusd_epi32(high[r][d & other], dword, broadcast(x[r] + 8 * d));
          low[r][d & other] = _mm512_dpbusd_epi32(low[r][d & other], dword, broadcast(x[r] + 8 * d + 4));
        }
      }
    }
    for (int r = 0; r < all; r++) {
      if constexpr (!other)
        sum[r] = add(_mm512_slli_epi32(high[r][0], 8), low[r][0]);
      else
        sum[r] = add(_mm512_slli_epi32(add(high[r][0], high[r][1]), 8), add(low[r][0], low[r][1]));
    }
  }

  template <bool nibbles, int all>
  static void sums_of_bytes(const I* codes, std::int32_t dwords, int bits, const char* const* x, I* sum) {
    const I mask = byte_mask(bits);
    for (std::int32_t d = 0; d < dwords; d++) {
      const I dword = load(codes + d);
      if constexpr (nibbles) {
        const I even = _mm512_and_si512(dword, mask), odd = _mm512_and_si512(_mm512_srli_epi16(dword, 4), mask);
        for (int r = 0; r < all; r++) {
          sum[r] = _mm512_dpbusd_epi32(sum[r], even, broadcast(x[r] + 8 * d));
          sum[r] = _mm512_dpbusd_epi32(sum[r], odd, broadcast(x[r] + 8 * d + 4));
        }
      } else {
        for (int r = 0; r < all; r++) sum[r] = _mm512_dpbusd_epi32(sum[r], dword, broadcast(x[r] + 4 * d));
      }
    }
  }

  // Packed codes: of words sums of high bytes beside those of low ones.
  static constexpr int parts(Digits digits) { return digits == Digits::byte ? 1 : 2; }
  static constexpr int streams(int sums) { return sums <= 4 ? 4 : sums <= 8 ? 2 : 1; }
  struct Lookup {
    I table;
    explicit Lookup(const CodedCall& call) : table(_mm512_setzero_si512()) {
      if (!call.table) return;
      table = call.bits > 4 ? _mm512_loadu_si512(call.table)
                            : _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(call.table)));
    }
  };
  template <int bits, bool mapped, int all, Digits digits>
  static void add_products(const std::uint8_t* at, [[maybe_unused]] const Lookup& lookup, const char* const* x,
                           std::int32_t d, I (*sum)[parts(digits)]) {
    const auto add = [&](int i, I codes) {
      if constexpr (mapped)
        codes = bits > 4 ? _mm512_permutexvar_epi8(codes, lookup.table) : _mm512_shuffle_epi8(lookup.table, codes);
      const std::int64_t offset = x_bytes(digits) * (step_codes(bits) * d + 4 * i);
#pragma GCC unroll 8
      for (int r = 0; r < all; r++) {
        if constexpr (digits == Digits::byte) {
          sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], codes, broadcast(x[r] + offset));
          continue;
        }
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], codes, broadcast(x[r] + offset));
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], codes, broadcast(x[r] + offset + 4));
      }
    };
    each_vector<Bytes512, bits>(at, add, std::make_integer_sequence<int, step_codes(bits) / 4>());
  }
  template <int parts>
  static I whole(const I* sum) {
    if constexpr (parts == 1) return sum[0];
    return add(_mm512_slli_epi32(sum[1], 8), sum[0]);
  }

  template <bool nibbles>
  static I pairs(I dword, int shift, int bits) {
    if constexpr (nibbles) {
      const I mask = _mm512_set1_epi16(static_cast<std::int16_t>((1 << bits) - 1));
      return _mm512_and_si512(_mm512_srli_epi16(dword, 4 * shift), mask);
    }
    return shift ? _mm512_srli_epi16(dword, 8) : _mm512_and_si512(dword, _mm512_set1_epi16(255));
  }

  // Codes of `bits` bits from rows of weights: 64 bytes of nibbles or of bytes a row, transposed. A dword holds `unit`
  // of them: nibbles where the codes are plain and have up to 4 bits.
  struct Reader {
    int bits, unit;
    bool mapped;
    std::int64_t row_bytes;
    I bytes, even, odd;  // of the bit stream: which bytes each quadword needs, then where its codes begin in them
    I mask;              // of a plain code, or the table of mapped ones
    I half[2][2];        // of packed dwords that hold two: where either's even and odd codes begin
    I joined[2];         // what `join` takes

    Reader(const CodedCall& call, const Plan& plan)
        : bits(call.bits), unit(plan.unit), mapped(call.table), row_bytes(plan.row_bytes) {
      for (int i = 0; i < 64 && call.packed; i++) {
        const int start = i / 4 % 2 * 32 + i % 4 * 4;
        for (int h = 0; h < 2; h++) {
          reinterpret_cast<std::uint8_t*>(&half[h][0])[i] = static_cast<std::uint8_t>((start + 16 * h) & 63);
          reinterpret_cast<std::uint8_t*>(&half[h][1])[i] = static_cast<std::uint8_t>((start + 16 * h - 2) & 63);
          const int byte = i / 4 * 4 + 2 * h + i % 4 / 2;
          reinterpret_cast<std::uint8_t*>(&joined[h])[i] = static_cast<std::uint8_t>(byte + i % 2 * 64);
        }
      }
      if (is_stored()) return;
      alignas(64) std::uint8_t from[64], first[64], second[64];
      const bool nibble = unit == 8;
      const int per_quadword = nibble ? 16 : 8;
      for (int i = 0; i < 64; i++) {
        const int quadword = i / 8, byte = i % 8;
        from[i] = static_cast<std::uint8_t>((quadword * per_quadword * bits / 8 + byte) & 63);
        first[i] = static_cast<std::uint8_t>((nibble ? 2 * byte * bits : byte * bits) & 63);
        second[i] = static_cast<std::uint8_t>(((2 * byte + 1) * bits - 4) & 63);
      }
      bytes = load(from), even = load(first), odd = load(second);
      mask = mapped ? _mm512_loadu_si512(call.table) : byte_mask(bits);
    }

    // Whether the codes lie in memory as they are wanted.
    bool is_stored() const { return !mapped && (bits == 4 || bits == 8); }

    // A nibble keeps what follows its code of 2 or 3 bits: whoever uses it masks it anyway.
    I unpack_nibbles(I stream) const {
      const I quadwords = _mm512_permutexvar_epi8(bytes, stream);
      const I low = _mm512_multishift_epi64_epi8(even, quadwords), high = _mm512_multishift_epi64_epi8(odd, quadwords);
      return lower_nibbles(low, high);
    }
    // The lower nibbles of one and the upper ones of the other.
    static I lower_nibbles(I low, I high) {
      return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi8(15), 0xe4);  // low where the mask is set
    }

    I unpack_bytes(I stream) const {
      return _mm512_and_si512(_mm512_multishift_epi64_epi8(even, _mm512_permutexvar_epi8(bytes, stream)), mask);
    }

    // The table is repeated, so what follows a code in its byte needs no masking.
    I map_bytes(I stream) const {
      return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(even, _mm512_permutexvar_epi8(bytes, stream)), mask);
    }

    I unpack(I stream) const {
      if (mapped) return map_bytes(stream);
      if (is_stored()) return stream;
      return unit == 8 ? unpack_nibbles(stream) : unpack_bytes(stream);
    }

    // `dwords` dwords from dword `first` of a panel.
    void read_packed(const std::uint8_t* panel, std::int32_t first, std::int32_t dwords, I* to) const {
      if (step_dwords(bits) > 1) return read_planes<Bytes512>(*this, panel, first, dwords, to);
      const int each = 32 / bits / unit;  // in one of memory
      for (std::int32_t d = 0; d < dwords; d++) {
        const I stored = _mm512_loadu_si512(panel + (first + d) / each * 64);
        if (each == 1) {
          store(to + d, stored);
          continue;
        }
        const I* start = half[(first + d) % 2];
        const I codes = _mm512_multishift_epi64_epi8(start[0], stored);
        if (mapped)
          store(to + d, map(codes));
        else
          store(to + d, lower_nibbles(codes, _mm512_multishift_epi64_epi8(start[1], stored)));
      }
    }

    I map(I codes) const { return _mm512_permutexvar_epi8(codes, mask); }

    // The bytes of two vectors in turn: the lower or the upper two of each dword.
    I join(I even, I odd, int upper) const { return _mm512_permutex2var_epi8(even, joined[upper], odd); }

    // `dwords` dwords from dword `first` of 16 rows. Also asks for the same bytes of the 16 rows that follow.
    void read(const std::uint8_t* const* rows, std::int32_t first, std::int32_t dwords, I* to) const {
      const int step = 16 * unit * bits / 8;
      std::int64_t byte = static_cast<std::int64_t>(first) * unit * bits / 8;
      const std::int64_t next = 16 * row_bytes;
      for (std::int32_t d = 0; d < dwords; d += 16, byte += step) {
        const std::int64_t left = row_bytes - byte;
        const __mmask64 valid = left >= 64 ? ~0ull : (1ull << left) - 1;
        const auto start = [&](int i) {
          const std::uint8_t* from = rows[i] + byte;
          asm("" : "+r"(from));  // or GCC computes the addresses in vectors and takes them out one by one
          _mm_prefetch(reinterpret_cast<const char*>(from + next), _MM_HINT_T0);
          return from;
        };
        if (left < 64)
          avx512::transpose([&](int i) { return unpack(_mm512_maskz_loadu_epi8(valid, rows[i] + byte)); }, to + d);
        else if (mapped)
          avx512::transpose([&](int i) { return map_bytes(_mm512_loadu_si512(start(i))); }, to + d);
        else if (is_stored())
          avx512::transpose([&](int i) { return _mm512_loadu_si512(start(i)); }, to + d);
        else if (unit == 8)
          avx512::transpose([&](int i) { return unpack_nibbles(_mm512_loadu_si512(start(i))); }, to + d);
        else
          avx512::transpose([&](int i) { return unpack_bytes(_mm512_loadu_si512(start(i))); }, to + d);
      }
    }
  };

  static void quantize(const CodedCall& call, const Plan& plan, std::int64_t m, std::int16_t* const* words,
                       float* scales, std::int32_t* const* sums) {
    if (call.int8)
      return avx512::quantize_bytes(call, plan, m, reinterpret_cast<std::int8_t*>(words[0]), scales, sums[0]);
    if (call.rows * (call.x_type == Type::fp32 ? 2 : 1) <= decode_words)
      quantize_to(InBytes(plan.unit), call, plan, m, words, scales, sums);
    else
      quantize_to(InPairs(plan.unit), call, plan, m, words, scales, sums);
  }

  // Stores words as `decode` wants them, split: per dword of codes the high and then the low bytes of every four values
  // that a mask leaves of it.
  struct InBytes {
    I places;  // from 32 high bytes and then 32 low ones
    explicit InBytes(int unit) {
      alignas(64) std::uint8_t from[64];
      for (int i = 0; i < 32; i++) {
        const int shifts = unit / 4, to = i / unit * 2 * unit + i % shifts * 8 + i % unit / shifts;
        from[to] = static_cast<std::uint8_t>(i), from[to + 4] = static_cast<std::uint8_t>(32 + i);
      }
      places = load(from);
    }
    void operator()(I words, std::int16_t* to) const {
      const I high = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(128)), 8);
      const I bytes =
          _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(high)), _mm512_cvtepi16_epi8(words), 1);
      _mm512_storeu_si512(to, _mm512_permutexvar_epi8(places, bytes));
    }
  };
};

}  // namespace
}  // namespace parco::linear
