// Sparse products for AVX-512: kept numbers are spread over the columns by the expand instructions, those on bytes and
// words of which are VBMI2's.
#include "linear/float_vector_avx512.h"
#include "sparse/blocks_engine.h"
#include "sparse/masked_engine.h"

namespace parco::sparse {
namespace {

using linear::bytes_mask;

inline __m512i load_bytes(const char* from, std::int64_t left) {
  return left >= 64 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(bytes_mask(left), from);
}

template <Kept how>
struct Expand;

// Shifts cut four vectors from bytes: column 4 i + j is in lane i of vector j.
template <>
struct Expand<Kept::byte> {
  static constexpr Kept kept = Kept::byte;
  static constexpr int step = 64, vectors = 4;
  __m512i offset;

  explicit Expand(int offset) : offset(_mm512_set1_epi8(static_cast<char>(offset))) {}
  static int place(int i) { return i % 4 * 16 + i / 4; }
  void expand(const char* from, std::int64_t left, std::uint64_t bits, __m512* to) const {
    const __m512i numbers = _mm512_maskz_expand_epi8(bits, _mm512_sub_epi8(load_bytes(from, left), offset));
    to[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(numbers, 24), 24));
    to[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(numbers, 16), 24));
    to[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(numbers, 8), 24));
    to[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(numbers, 24));
  }
};

// The even columns and the odd ones.
template <>
struct Expand<Kept::bf16> {
  static constexpr Kept kept = Kept::bf16;
  static constexpr int step = 32, vectors = 2;

  explicit Expand(int) {}
  static int place(int i) { return i % 2 * 16 + i / 2; }
  void expand(const char* from, std::int64_t left, std::uint64_t bits, __m512* to) const {
    const __m512i pairs = _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), load_bytes(from, left));
    to[0] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    to[1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<std::int32_t>(0xffff0000u))));
  }
};

template <>
struct Expand<Kept::fp16> {
  static constexpr Kept kept = Kept::fp16;
  static constexpr int step = 32, vectors = 2;

  explicit Expand(int) {}
  static int place(int i) { return i; }
  void expand(const char* from, std::int64_t left, std::uint64_t bits, __m512* to) const {
    const __m512i halves = _mm512_maskz_expand_epi16(static_cast<__mmask32>(bits), load_bytes(from, left));
    to[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    to[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
  }
};

template <>
struct Expand<Kept::fp32> {
  static constexpr Kept kept = Kept::fp32;
  static constexpr int step = 16, vectors = 1;

  explicit Expand(int) {}
  static int place(int i) { return i; }
  void expand(const char* from, std::int64_t left, std::uint64_t bits, __m512* to) const {
    to[0] = _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), _mm512_castsi512_ps(load_bytes(from, left)));
  }
};

struct Sparse512 : linear::Float512 {
  static constexpr int streams_of_four = 4;
  template <Kept how>
  using Expand = sparse::Expand<how>;

  template <Kept how>
  static F kept(const char* from, std::int64_t left, int offset) {
    if constexpr (how == Kept::fp32) return _mm512_castsi512_ps(load_bytes(from, left));
    if constexpr (how == Kept::byte) {
      const __m128i codes =
          _mm_maskz_loadu_epi8(static_cast<__mmask16>(bytes_mask(std::min<std::int64_t>(left, 16))), from);
      return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_cvtepu8_epi32(codes), _mm512_set1_epi32(offset)));
    }
    const __m256i halves =
        _mm256_maskz_loadu_epi8(static_cast<__mmask32>(bytes_mask(std::min<std::int64_t>(left, 32))), from);
    return how == Kept::bf16 ? linear::avx512::widen_bf16(halves) : _mm512_cvtph_ps(halves);
  }
  static F expand(std::uint64_t bits, F numbers) {
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(bits), numbers);
  }
};

}  // namespace

void masked_avx512(const SparseCall& call) {
  const Source source(call, cast::decode_avx512);
  with_kept(source.kept, [&](auto kept) {
    call.rows > streamed_rows ? tile_masked<Sparse512, kept()>(call, source)
                              : stream_masked<Sparse512, kept()>(call, source);
  });
}

void blocks_avx512(const SparseCall& call) {
  if (call.rows > streamed_rows) {
    const Source source(call, cast::decode_avx512, false);
    return call.block == 16 ? tile_blocks<Sparse512, 1>(call, source) : tile_blocks<Sparse512, 2>(call, source);
  }
  const Source source(call, cast::decode_avx512);
  with_kept(source.kept, [&](auto kept) { stream_blocks<Sparse512, kept()>(call, source); });
}

}  // namespace parco::sparse
