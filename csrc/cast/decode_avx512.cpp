// Decoding with AVX-512, 64 codes at a time: cut into bytes, looked up in registers (up to 6 bits) or converted,
// scaled. Ends of rows are left to decode_engine.h.
#include "cast/decode_engine.h"
#include "linear/avx512.h"
#include "linear/deposit.h"

namespace parco::cast {
namespace {

using linear::avx512::load_floats;
using linear::avx512::store_floats;
using linear::avx512::widen;

constexpr std::int64_t step = 64;

// What cuts 64 codes of `bits` bits from their bytes.
struct Cut {
  explicit Cut(int bits)
      : bits(bits), bytes(bits == 8 ? ~0ull : (1ull << 8 * bits) - 1), places(linear::bytes_of(bits)) {}

  __m512i codes(const std::uint8_t* from) const {
    if (bits == 8) return _mm512_loadu_si512(from);
    if (bits == 4) {
      const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
      return _mm512_and_si512(_mm512_or_si512(wide, _mm512_slli_epi16(wide, 4)), _mm512_set1_epi8(15));
    }
    alignas(64) std::uint8_t held[64];
    _mm512_store_si512(held, _mm512_maskz_loadu_epi8(bytes, from));
    return linear::deposit_eight(held, bits, places);
  }

  int bits;
  __mmask64 bytes;
  std::uint64_t places;
};

// The numbers of codes.
class Values {
 public:
  explicit Values(const DecodeCall& call) : pattern(call.pattern), bits(call.bits) {
    if (pattern != Pattern::none) return;
    const int count = 1 << bits;
    for (int i = 0; i < 4; i++) {
      alignas(64) float sixteen[16];
      for (int j = 0; j < 16; j++) sixteen[j] = call.values[(16 * i + j) % count];
      table[i] = _mm512_load_ps(sixteen);
    }
  }

  static bool knows(const DecodeCall& call) { return call.pattern != Pattern::none || call.bits <= 6; }

  // `zero` is of integers alone.
  __m512 of(__m512i codes, int zero) const {
    if (pattern == Pattern::integer) return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(zero)));
    if (pattern == Pattern::e4m3) return widen(codes, Type::e4m3);
    if (pattern == Pattern::e5m2) return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_slli_epi32(codes, 8)));
    if (bits <= 4) return _mm512_permutexvar_ps(codes, table[0]);
    const __m512 low = _mm512_permutex2var_ps(table[0], codes, table[1]);
    if (bits == 5) return low;
    const __m512 high = _mm512_permutex2var_ps(table[2], codes, table[3]);
    return _mm512_mask_mov_ps(low, _mm512_test_epi32_mask(codes, _mm512_set1_epi32(32)), high);
  }

 private:
  Pattern pattern;
  int bits;
  __m512 table[4];
};

class Rows {
 public:
  explicit Rows(const DecodeCall& call)
      : call(call), cut(call.bits), values(call), y_size(linear::size_of(call.y_type)) {}

  void decode(std::int64_t n) const {
    const std::int64_t whole = call.columns / step * step, at = n / call.block_rows * call.scale_stride;
    const std::uint8_t* from = call.codes + n * ((call.columns * call.bits + 7) / 8);
    char* to = static_cast<char*>(call.y) + n * call.columns * y_size;
    std::int64_t next = 0;  // where the scale is another
    __m512 scale = _mm512_set1_ps(1.0f);
    int zero = call.offset;
    for (std::int64_t k = 0; k < whole; k += step, from += step * call.bits / 8) {
      const __m512i codes = cut.codes(from);
      const __m128i quarters[4] = {_mm512_castsi512_si128(codes), _mm512_extracti32x4_epi32(codes, 1),
                                   _mm512_extracti32x4_epi32(codes, 2), _mm512_extracti32x4_epi32(codes, 3)};
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        const std::int64_t i = k + 16 * v;
        if (call.group == 1) {
          scale = load_floats(call.scale, call.scale_type, at + i, 16);
        } else if (i >= next) {
          const std::int64_t group = i / call.group;
          next = (group + 1) * call.group;
          scale = _mm512_set1_ps(scale_of(call, at + group));
          if (call.zero) zero = call.zero[at + group];
        }
        const __m512 number = values.of(_mm512_cvtepu8_epi32(quarters[v]), zero);
        store_floats(to, call.y_type, i, 16, call.scale ? _mm512_mul_ps(number, scale) : number);
      }
    }
    if (whole < call.columns) decode_columns(call, n, whole);
  }

 private:
  const DecodeCall& call;
  const Cut cut;
  const Values values;
  const int y_size;
};

}  // namespace

void decode_avx512(const DecodeCall& call) {
  // Scales by column are read as vectors, which those of one byte and zeros are not.
  const bool by_column = call.group == 1 && call.scale && call.scale_type <= Type::fp16 && !call.zero && !call.factor;
  const bool by_vector = call.group % 16 == 0 || call.group >= call.columns || by_column;
  const bool in_vectors = call.columns >= step && by_vector && Values::knows(call);
  if (!in_vectors) return run_decode(call, [&](std::int64_t n) { decode_columns(call, n, 0); });
  const Rows rows(call);
  run_decode(call, [&](std::int64_t n) { rows.decode(n); });
}

}  // namespace parco::cast
