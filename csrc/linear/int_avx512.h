// The vector type of AVX-512 with VBMI and VNNI for int_engine.h: 16 outputs to a vector, vpdpwssd for the products.
#pragma once
#include "linear/avx512.h"
#include "linear/int_engine.h"

namespace parco::linear {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int lanes = 16, tile_rows = 6, tile_rows_of_two_words = 4;

  static I set(std::int32_t value) { return _mm512_set1_epi32(value); }
  static F set(float value) { return _mm512_set1_ps(value); }
  static I load(const void* from) { return _mm512_load_si512(from); }
  static F load(const float* from) { return _mm512_load_ps(from); }
  static void store(I* to, I value) { _mm512_store_si512(to, value); }
  static I broadcast(const void* from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
  }
  static I dot(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F load_floats(const void* from, Type type, std::int64_t index, int count) {
    return avx512::load_floats(from, type, index, count);
  }
  static void store_floats(void* to, Type type, std::int64_t index, int count, F value) {
    avx512::store_floats(to, type, index, count, value);
  }

  template <bool nibbles>
  static I pairs(I dword, int shift) {
    if constexpr (nibbles) {
      if (shift == 3) return _mm512_srli_epi16(dword, 12);
      return _mm512_and_si512(_mm512_srli_epi16(dword, 4 * shift), _mm512_set1_epi16(15));
    }
    return shift ? _mm512_srli_epi16(dword, 8) : _mm512_and_si512(dword, _mm512_set1_epi16(255));
  }

  // Codes of `bits` bits from rows of weights: 64 bytes of nibbles (up to 4 bits) or of bytes a row, transposed.
  struct Reader {
    int bits;
    std::int64_t row_bytes;
    I bytes, even, odd, mask;  // of the bit stream: which bytes each quadword needs, then where its codes begin in them

    Reader(int code_bits, std::int64_t bytes_per_row) : bits(code_bits), row_bytes(bytes_per_row) {
      alignas(64) std::uint8_t from[64], first[64], second[64];
      const bool nibble = bits <= 4;
      const int per_quadword = nibble ? 16 : 8;
      for (int i = 0; i < 64; i++) {
        const int quadword = i / 8, byte = i % 8;
        from[i] = static_cast<std::uint8_t>((quadword * per_quadword * bits / 8 + byte) & 63);
        first[i] = static_cast<std::uint8_t>((nibble ? 2 * byte * bits : byte * bits) & 63);
        second[i] = static_cast<std::uint8_t>(((2 * byte + 1) * bits - 4) & 63);
      }
      bytes = load(from), even = load(first), odd = load(second);
      mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    }

    I unpack(I stream) const {
      if (bits == 4 || bits == 8) return stream;
      const I quadwords = _mm512_permutexvar_epi8(bytes, stream);
      const I low = _mm512_and_si512(_mm512_multishift_epi64_epi8(even, quadwords), mask);
      if (bits > 4) return low;
      const I high_mask = _mm512_slli_epi16(mask, 4);
      return _mm512_or_si512(low, _mm512_and_si512(_mm512_multishift_epi64_epi8(odd, quadwords), high_mask));
    }

    // `dwords` dwords from dword `first` of 16 rows; `ahead`: also ask for the same bytes of the 16 rows that follow.
    void read(const std::uint8_t* const* rows, std::int32_t first, std::int32_t dwords, I* to, bool ahead) const {
      const int step = 16 * (bits <= 4 ? 8 : 4) * bits / 8;
      const std::int64_t start = static_cast<std::int64_t>(first) * (bits <= 4 ? 8 : 4) * bits / 8;
      for (std::int32_t d = 0; d < dwords; d += 16) {
        const std::int64_t byte = start + d / 16 * step, left = row_bytes - byte;
        const __mmask64 valid = left >= 64 ? ~0ull : (1ull << left) - 1;
        I row[16];
        for (int i = 0; i < 16; i++) {
          const std::uint8_t* from = rows[i] + byte;
          if (ahead) _mm_prefetch(reinterpret_cast<const char*>(from + 16 * row_bytes), _MM_HINT_T0);
          row[i] = unpack(left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(valid, from));
        }
        avx512::transpose(row);
        for (int i = 0; i < 16; i++) store(to + d + i, row[i]);
      }
    }
  };

  // to[g * stride + lane] = scale g of row `lane`.
  static void transpose_scales(const char* const* rows, Type type, std::int32_t groups, float* to, int stride) {
    const int per_load = type == Type::fp32 ? 16 : 32;
    for (std::int32_t g = 0; g < groups; g += per_load) {
      const int count = std::min<std::int32_t>(per_load, groups - g);
      I row[16];
      for (int i = 0; i < 16; i++) {
        if (type == Type::fp32)
          row[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), rows[i] + 4 * g);
        else
          row[i] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), rows[i] + 2 * g);
      }
      avx512::transpose(row);
      for (int i = 0; i < count; i++) {
        const I dword = row[type == Type::fp32 ? i : i / 2];
        F values;
        if (type == Type::fp32)
          values = _mm512_castsi512_ps(dword);
        else if (type == Type::bf16)
          values = _mm512_castsi512_ps(i % 2 ? _mm512_and_si512(dword, set(static_cast<std::int32_t>(0xffff0000u)))
                                             : _mm512_slli_epi32(dword, 16));
        else
          values = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(i % 2 ? _mm512_srli_epi32(dword, 16) : dword));
        _mm512_storeu_ps(to + (g + i) * stride, values);
      }
    }
  }

  static void quantize(const IntCall& call, const Plan& plan, std::int64_t m, std::int16_t* const* words, float* scales,
                       std::int32_t* const* sums) {
    quantize_in_order<true>(call, plan, m, words, scales, sums);
  }

  // The same words, scales and sums as quantize_row<Paired>, 32 values at a time.
  template <bool Paired>
  static void quantize_in_order(const IntCall& call, const Plan& plan, std::int64_t m, std::int16_t* const* words,
                                float* scales, std::int32_t* const* sums) {
    const int word_count = call.x_type == Type::fp32 ? 2 : 1;
    alignas(64) std::int16_t from[32];
    for (int i = 0; i < 32; i++) {
      const int to = Paired ? i / plan.unit * plan.unit + paired(i % plan.unit, plan.unit) : i;
      from[to] = static_cast<std::int16_t>(i);
    }
    const I order = load(from);
    const std::int64_t row = m * call.columns;
    const I magnitude = set(0x7fffffff);
    for (std::int32_t b = 0; b < plan.block_count; b++) {
      const Block& block = plan.blocks[b];
      alignas(64) F values[longest_block / 16];
      const int vectors = (block.length + 15) / 16;
      I largest = set(0);
      for (int i = 0; i < vectors; i++) {
        values[i] = avx512::load_floats(call.x, call.x_type, row + block.k + 16 * i, std::min(16, block.length - 16 * i));
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_castps_si512(values[i]), magnitude));
      }
      if (vectors % 2) values[vectors] = set(0.0f);
      const std::uint32_t most = _mm512_reduce_max_epu32(largest);
      const bool finite = most < infinity_bits;
      const BlockScale scale = block_scale(finite ? most : 0, word_count);
      scales[b] = finite ? scale.scale : float_of(nan_bits);
      const F inverse = set(scale.inverse);
      I high_sum = set(0), low_sum = set(0);
      const I ones = _mm512_set1_epi16(1);
      for (int i = 0; i < vectors; i += 2) {
        I high[2], low[2];
        for (int j = 0; j < 2; j++) {
          const F scaled = finite ? multiply(values[i + j], inverse) : set(0.0f);
          high[j] = _mm512_cvtps_epi32(scaled);
          const F rest = _mm512_sub_ps(scaled, to_float(high[j]));
          low[j] = _mm512_cvtps_epi32(multiply(rest, set(32768.0f)));
        }
        const auto pack = [&](const I* pair) {
          const I joined = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(pair[0])),
                                              _mm512_cvtepi32_epi16(pair[1]), 1);
          return _mm512_permutexvar_epi16(order, joined);
        };
        const I packed = pack(high);
        high_sum = dot(high_sum, packed, ones);
        _mm512_storeu_si512(words[0] + block.k + 16 * i, packed);
        if (word_count == 2) {
          const I low_packed = pack(low);
          low_sum = dot(low_sum, low_packed, ones);
          _mm512_storeu_si512(words[1] + block.k + 16 * i, low_packed);
        }
      }
      sums[0][b] = _mm512_reduce_add_epi32(high_sum);
      if (word_count == 2) sums[1][b] = _mm512_reduce_add_epi32(low_sum);
    }
  }
};

}  // namespace
}  // namespace parco::linear
