// The vector type of AVX-512 with VBMI and VNNI for int_engine.h: 16 outputs to a vector, vpdpwssd for the products.
#pragma once
#include "linear/avx512.h"
#include "linear/bytes_avx512.h"
#include "linear/int_engine.h"

namespace parco::linear {
namespace {

struct Avx512 : avx512::Arithmetic {
  using Arithmetic::add, Arithmetic::load, Arithmetic::multiply, Arithmetic::set, Arithmetic::store;
  using I = __m512i;
  static constexpr int tile_rows = 6, tile_rows_of_two_words = 4;
  static constexpr int decode_words =
      8;  // per column of x, up to which weights go straight from memory into the products
  static constexpr int x_bytes(Digits digits) { return digits == Digits::byte ? 1 : 2; }  // of a value

  static I set(std::int32_t value) { return _mm512_set1_epi32(value); }
  static I load(const void* from) { return _mm512_load_si512(from); }
  static void store(void* to, I value) { _mm512_store_si512(to, value); }
  static I broadcast(const void* from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
  }
  static I dot(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
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
    each_vector<Avx512, bits>(at, add, std::make_integer_sequence<int, step_codes(bits) / 4>());
  }

  // Vector i of a step of packed memory: 4 codes a row, as bytes.
  template <int bits, int i>
  static I packed_bytes(const std::uint8_t* at) {
    constexpr int low = low_bits(bits), left = bits - low, in_byte = 8 / low;
    const I first = moved<-i % in_byte * low>(_mm512_loadu_si512(at + i / in_byte * 64));
    if constexpr (bits == 8) return first;
    if constexpr (left == 0) return _mm512_and_si512(first, byte_mask(bits));
    const I second = moved<low - i * left % 8>(_mm512_loadu_si512(at + (low + i * left / 8) * 64));
    // The first where its bits are, else the second.
    return _mm512_and_si512(_mm512_ternarylogic_epi32(first, second, byte_mask(low), 0xe4), byte_mask(bits));
  }
  // Up by `shift` bits, or down.
  template <int shift>
  static I moved(I vector) {
    if constexpr (shift > 0) return _mm512_slli_epi16(vector, shift);
    if constexpr (shift < 0) return _mm512_srli_epi16(vector, -shift);
    return vector;
  }
  template <int parts>
  static I whole(const I* sum) {
    if constexpr (parts == 1) return sum[0];
    return add(_mm512_slli_epi32(sum[1], 8), sum[0]);
  }
  static F load_scales(const CodedCall& call, std::int64_t at, float factor) {
    return avx512::load_scales(call.scale, call.scale_type, at, factor);
  }
  static I load_zeros(const void* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }

  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static I byte_mask(int bits) { return _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)); }

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
      if (step_dwords(bits) > 1) return read_planes<Avx512>(*this, panel, first, dwords, to);
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

  // to[g * stride + lane] = factor * scale g of row `lane`.
  static void transpose_scales(const char* const* rows, Type type, std::int32_t groups, float factor, float* to,
                               int stride) {
    const int size = size_of(type), per_dword = 4 / size, per_load = 16 * per_dword;
    for (std::int32_t g = 0; g < groups; g += per_load) {
      const int count = std::min<std::int32_t>(per_load, groups - g);
      const __mmask64 bytes_mask = count == per_load ? ~0ull : (1ull << count * size) - 1;
      alignas(64) I row[16];
      avx512::transpose([&](int i) { return _mm512_maskz_loadu_epi8(bytes_mask, rows[i] + size * g); }, row);
      for (int i = 0; i < count; i++) {
        const I bits = _mm512_srl_epi32(row[i / per_dword], _mm_cvtsi32_si128(i % per_dword * size * 8));
        _mm512_storeu_ps(to + (g + i) * stride, multiply(avx512::widen(bits, type), set(factor)));
      }
    }
  }

  static void quantize(const CodedCall& call, const Plan& plan, std::int64_t m, std::int16_t* const* words,
                       float* scales, std::int32_t* const* sums) {
    if (call.int8)
      return avx512::quantize_bytes(call, plan, m, reinterpret_cast<std::int8_t*>(words[0]), scales, sums[0]);
    if (call.rows * (call.x_type == Type::fp32 ? 2 : 1) <= decode_words)
      quantize_to<Order::bytes>(call, plan, m, words, scales, sums);
    else
      quantize_to<Order::pairs>(call, plan, m, words, scales, sums);
  }

  // What 64 bytes of a quantized row hold: 32 words as they come, or in the pairs that `tile` wants, or split into high
  // and low bytes for `decode`: per dword of codes the high and then the low bytes of every four values that a mask
  // leaves of it.
  enum class Order { natural, pairs, bytes };

  struct alignas(64) Places {
    std::uint8_t byte[64];
  };
  static constexpr Places places_of(Order order, int unit) {
    Places places{};
    for (int i = 0; i < 32; i++) {
      const int to = order == Order::pairs ? i / unit * unit + paired(i % unit, unit) : i;
      places.byte[2 * to] = static_cast<std::uint8_t>(2 * i),
                      places.byte[2 * to + 1] = static_cast<std::uint8_t>(2 * i + 1);
    }
    for (int i = 0; i < 32 && order == Order::bytes; i++) {  // from 32 high bytes and then 32 low ones
      const int shifts = unit / 4, to = i / unit * 2 * unit + i % shifts * 8 + i % unit / shifts;
      places.byte[to] = static_cast<std::uint8_t>(i), places.byte[to + 4] = static_cast<std::uint8_t>(32 + i);
    }
    return places;
  }

  // The same words, scales and sums as quantize_row, 32 values at a time.
  template <Order order>
  static void quantize_to(const CodedCall& call, const Plan& plan, std::int64_t m, std::int16_t* const* words,
                          float* scales, std::int32_t* const* sums) {
    if (call.x_type == Type::fp32)
      quantize_words<order, 2>(call, plan, m, words, scales, sums);
    else
      quantize_words<order, 1>(call, plan, m, words, scales, sums);
  }

  template <Order order, int word_count>
  static void quantize_words(const CodedCall& call, const Plan& plan, std::int64_t m, std::int16_t* const* words,
                             float* scales, std::int32_t* const* sums) {
    static constexpr Places of_bytes = places_of(order, 4), of_nibbles = places_of(order, 8),
                            of_pairs = places_of(order, 16);
    const I places = load(plan.unit == 16 ? of_pairs.byte : plan.unit == 8 ? of_nibbles.byte : of_bytes.byte);
    const std::int64_t row = m * call.columns;
    const I magnitude = set(0x7fffffff);
    for (std::int32_t b = 0; b < plan.block_count; b++) {
      const Block& block = plan.blocks[b];
      alignas(64) F values[longest_block / 16];
      const int vectors = (block.length + 15) / 16;
      I largest = set(0);
      for (int i = 0; i < vectors; i++) {
        values[i] =
            avx512::load_floats(call.x, call.x_type, row + block.k + 16 * i, std::min(16, block.length - 16 * i));
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(values[i]), magnitude));
      }
      if (vectors % 2) values[vectors] = set(0.0f);
      const std::uint32_t most = _mm512_reduce_max_epu32(largest);
      const bool finite = most < infinity_bits;
      const BlockScale scale = block_scale(finite ? most : 0, word_count);
      scales[b] = finite ? scale.scale : float_of(nan_bits);
      const F inverse = set(scale.inverse);
      I high_sum = set(0);
      [[maybe_unused]] I low_sum = set(0);
      const I ones = _mm512_set1_epi16(1);
      for (int i = 0; i < vectors; i += 2) {
        I high[2];
        [[maybe_unused]] I low[2];
        for (int j = 0; j < 2; j++) {
          const F scaled = finite ? multiply(values[i + j], inverse) : set(0.0f);
          high[j] = _mm512_cvtps_epi32(scaled);
          if constexpr (word_count == 1) continue;
          const F rest = _mm512_sub_ps(scaled, to_float(high[j]));
          low[j] = _mm512_cvtps_epi32(multiply(rest, set(32768.0f)));
        }
        const auto pack = [&](const I* pair, std::int16_t* to, I& sum) {
          const I joined = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(pair[0])),
                                              _mm512_cvtepi32_epi16(pair[1]), 1);
          sum = dot(sum, joined, ones);
          I packed = joined;
          if constexpr (order == Order::bytes) {
            const I high_bytes = _mm512_srai_epi16(_mm512_add_epi16(joined, _mm512_set1_epi16(128)), 8);
            packed = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(high_bytes)),
                                        _mm512_cvtepi16_epi8(joined), 1);
          }
          _mm512_storeu_si512(to + block.k + 16 * i,
                              order == Order::natural ? packed : _mm512_permutexvar_epi8(places, packed));
        };
        pack(high, words[0], high_sum);
        if constexpr (word_count == 2) pack(low, words[1], low_sum);
      }
      sums[0][b] = _mm512_reduce_add_epi32(high_sum);
      if constexpr (word_count == 2) sums[1][b] = _mm512_reduce_add_epi32(low_sum);
    }
  }
};

}  // namespace
}  // namespace parco::linear
