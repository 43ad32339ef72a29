// The integer product for AVX-512 without VNNI: vpmaddwd and an addition for the products.
#include "linear/int_avx512.h"

#include "linear/int_bytes_avx512.h"
#include "linear/int_words.h"

namespace parco::linear {
namespace {

struct Words512 : Int512, Words<Words512> {
  static constexpr int tile_rows = 6, tile_rows_of_two_words = 4;

  static I dot(I sum, I a, I b) { return add(sum, _mm512_madd_epi16(a, b)); }
  // Codes in `a` of up to 7 bits: two products with bytes of at most 127 fit in 16.
  static I dot_bytes(I sum, I a, I b) { return add(sum, pair_sums(_mm512_maddubs_epi16(a, b))); }
  static I load_packed(const void* from) { return _mm512_loadu_si512(from); }
  // Up by `shift` bits, or down.
  template <int shift>
  static I moved_dwords(I a) {
    if constexpr (shift > 0)
      return _mm512_slli_epi32(a, shift);
    else
      return _mm512_srli_epi32(a, -shift);
  }

  static constexpr int streams(int sums) { return sums <= 2 ? 4 : sums <= 4 ? 2 : 1; }
  // A table of 64 bytes: of its four parts each looks up the low 4 bits, bits 4 and 5 choose.
  struct Lookup {
    I part[4];
    explicit Lookup(const CodedCall& call) {
      for (int i = 0; i < 4; i++)
        part[i] = call.table ? _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(call.table) + i))
                             : set(0);
    }
    template <bool long_codes>
    I map(I codes) const {
      const I index = both(codes, _mm512_set1_epi8(15));
      I found = _mm512_shuffle_epi8(part[0], index);
      if constexpr (!long_codes) return found;
      const __mmask64 bit4 = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(16));
      const __mmask64 bit5 = _mm512_test_epi8_mask(codes, _mm512_set1_epi8(32));
      found = _mm512_mask_shuffle_epi8(found, bit4, part[1], index);
      found = _mm512_mask_shuffle_epi8(found, bit5, part[2], index);
      return _mm512_mask_shuffle_epi8(found, _kand_mask64(bit4, bit5), part[3], index);
    }
  };

  // Codes of `bits` bits from rows of weights: 64 bytes of nibbles or of bytes a row, transposed. A dword holds `unit`
  // of them: nibbles where the codes are plain and have up to 4 bits.
  struct Reader {
    int bits, unit;
    bool mapped;
    std::int64_t row_bytes;
    std::uint64_t places;
    Lookup lookup;

    Reader(const CodedCall& call, const Plan& plan)
        : bits(call.bits),
          unit(plan.unit),
          mapped(call.table),
          row_bytes(plan.row_bytes),
          places(unit == 8 ? nibbles_of(bits) : bytes_of(bits)),
          lookup(call) {}

    I map(I codes) const { return bits <= 4 ? lookup.map<false>(codes) : lookup.map<true>(codes); }

    // 64 bytes of nibbles or of bytes from where their codes begin, `left` bytes before the row ends.
    I read_row(const std::uint8_t* from, std::int64_t left) const {
      const int step = 2 * unit * bits / 8;  // of eight bytes
      alignas(64) std::uint8_t held[64];
      if (left < 7 * step + 8) {
        const __mmask64 valid = left >= 64 ? ~0ull : left > 0 ? (1ull << left) - 1 : 0;
        store(held, _mm512_maskz_loadu_epi8(valid, from));
        from = held;
      }
      if (mapped && bits == 4) {  // the upper nibble of each byte goes to the byte beside it
        const I words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return map(either(words, _mm512_slli_epi16(words, 4)));
      }
      if (!mapped && (bits == 4 || bits == 8)) return _mm512_loadu_si512(from);
      const I codes = deposit_eight(from, step, places);
      return mapped ? map(codes) : codes;
    }

    // `dwords` dwords from dword `first` of a panel.
    void read_packed(const std::uint8_t* panel, std::int32_t first, std::int32_t dwords, I* to) const {
      if (step_dwords(bits) > 1) return read_planes<Words512>(*this, panel, first, dwords, to);
      if (32 / bits > unit) return read_halves(*this, panel, first, dwords, to);
      for (std::int32_t d = 0; d < dwords; d++) store(to + d, _mm512_loadu_si512(panel + (first + d) * panel_rows * 4));
    }

    // The bytes of two vectors in turn: the lower or the upper two of each dword.
    static I join(I even, I odd, int upper) {
      const __m128i lower = _mm_setr_epi8(0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13, -128);
      const I from = _mm512_add_epi8(_mm512_broadcast_i32x4(lower), _mm512_set1_epi16(static_cast<short>(2 * upper)));
      return either(_mm512_shuffle_epi8(even, from), _mm512_slli_epi16(_mm512_shuffle_epi8(odd, from), 8));
    }

    // `dwords` dwords from dword `first` of 16 rows. Also asks for the same bytes of the 16 rows that follow.
    void read(const std::uint8_t* const* rows, std::int32_t first, std::int32_t dwords, I* to) const {
      for (std::int32_t d = 0; d < dwords; d += 16) {
        const std::int64_t byte = static_cast<std::int64_t>(first + d) * unit * bits / 8;
        avx512::transpose(
            [&](int i) {
              const std::uint8_t* from = rows[i] + byte;
              _mm_prefetch(reinterpret_cast<const char*>(from + 16 * row_bytes), _MM_HINT_T0);
              return read_row(from, row_bytes - byte);
            },
            to + d);
      }
    }
  };

  static void quantize(const CodedCall& call, const Plan& plan, std::int64_t row, std::int16_t* const* words,
                       float* scales, std::int32_t* const* sums) {
    const InPairs store(plan.unit);
    if (call.int8) return quantize_bytes(store, call, plan, row, words[0], scales, sums[0]);
    quantize_to(store, call, plan, row, words, scales, sums);
  }

  // The same words, scale and sums as quantize_row_to_bytes.
  static void quantize_bytes(const InPairs& store, const CodedCall& call, const Plan& plan, std::int64_t row,
                             std::int16_t* words, float* scale, std::int32_t* sums) {
    *scale = avx512::scale_of_row(call, row);
    const avx512::RowCodes codes(call, row, *scale);
    std::int32_t open = 0;
    for (std::int32_t b = 0; b < plan.block_count; b++) {
      const Block& block = plan.blocks[b];
      if (block.opens) sums[open = b] = 0;
      I sum = set(0);
      for (int i = 0; i < block.length; i += 32) {
        const std::int64_t k = block.k + i, end = block.k + block.length;
        const I joined = words_of(codes.at(k, end), codes.at(k + 16, end));
        sum = add(sum, pair_sums(joined));
        store(joined, words + k);
      }
      sums[open] += _mm512_reduce_add_epi32(sum);
    }
  }
};

}  // namespace

void int_avx512(const CodedCall& call) {
  call.int8&& call.rows > Words512::decode_words&& call.bits < 8 ? run_bytes<Words512>(call) : run<Words512>(call);
}

void int_both_avx512(const CodedCall& call) { run_bytes<Words512>(call); }

}  // namespace parco::linear
