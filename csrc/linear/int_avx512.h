// What the integer products for AVX-512 share: 16 outputs to a vector. Unnamed: see floats.h.
#pragma once
#include "linear/avx512.h"
#include "linear/int_engine.h"

namespace parco::linear {
namespace {

struct Int512 : avx512::Arithmetic {
  using Arithmetic::add, Arithmetic::load, Arithmetic::multiply, Arithmetic::set, Arithmetic::store;
  using I = __m512i;
  static constexpr int decode_words =
      8;  // per column of x, up to which weights go straight from memory into the products

  static I set(std::int32_t value) { return _mm512_set1_epi32(value); }
  static I load(const void* from) { return _mm512_load_si512(from); }
  static void store(void* to, I value) { _mm512_store_si512(to, value); }
  static I broadcast(const void* from) {
    std::int32_t pair;
    std::memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
  }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static I multiply(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static I byte_mask(int bits) { return _mm512_set1_epi8(static_cast<char>((1 << bits) - 1)); }

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
  static F load_scales(const CodedCall& call, std::int64_t at, float factor) {
    return avx512::load_scales(call.scale, call.scale_type, at, factor);
  }
  static I load_zeros(const void* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  }

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

  // One word (of fp32 two) for every value of row m, 32 at a time: the same words, scales and sums as quantize_row.
  // `store(words, to)` puts them where they belong.
  template <class Store>
  static void quantize_to(const Store& store, const CodedCall& call, const Plan& plan, std::int64_t m,
                          std::int16_t* const* words, float* scales, std::int32_t* const* sums) {
    if (call.x_type == Type::fp32)
      quantize_words<2>(store, call, plan, m, words, scales, sums);
    else
      quantize_words<1>(store, call, plan, m, words, scales, sums);
  }

  template <int word_count, class Store>
  static void quantize_words(const Store& store, const CodedCall& call, const Plan& plan, std::int64_t m,
                             std::int16_t* const* words, float* scales, std::int32_t* const* sums) {
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
          const I joined = words_of(pair[0], pair[1]);
          sum = add(sum, pair_sums(joined));
          store(joined, to + block.k + 16 * i);
        };
        pack(high, words[0], high_sum);
        if constexpr (word_count == 2) pack(low, words[1], low_sum);
      }
      sums[0][b] = _mm512_reduce_add_epi32(high_sum);
      if constexpr (word_count == 2) sums[1][b] = _mm512_reduce_add_epi32(low_sum);
    }
  }

  // The low words of the dwords of both, and the sums of neighbouring words.
  static I words_of(I first, I second) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(first)), _mm512_cvtepi32_epi16(second), 1);
  }
  static I pair_sums(I words) { return _mm512_madd_epi16(words, _mm512_set1_epi16(1)); }

  // Stores words in the pairs that products of words want.
  struct InPairs {
    I places;
    explicit InPairs(int unit) {
      alignas(64) std::int16_t from[32];
      for (int i = 0; i < 32; i++) from[i / unit * unit + paired(i % unit, unit)] = static_cast<std::int16_t>(i);
      places = load(from);
    }
    void operator()(I words, std::int16_t* to) const {
      _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, words));
    }
  };
};

}  // namespace
}  // namespace parco::linear
