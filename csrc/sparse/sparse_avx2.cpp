// Sparse products for AVX2: eight columns at a time, to whose places the kept numbers are permuted by a table.
#include "linear/float_vector_avx2.h"
#include "sparse/blocks_engine.h"
#include "sparse/masked_engine.h"

namespace parco::sparse {
namespace {

// For every mask of 8 columns the kept number of each column, counted from the first; 0 where there is none.
struct Places {
  std::uint64_t of[256];
};

constexpr Places make_places() {
  Places places{};
  for (int bits = 0; bits < 256; bits++) {
    std::uint64_t found = 0, next = 0;
    for (int i = 0; i < 8; i++)
      if (bits >> i & 1) found |= next++ << 8 * i;
    places.of[bits] = found;
  }
  return places;
}

constexpr Places places = make_places();

struct Sparse256 : linear::Float256 {
  static constexpr int streams_of_four = 2;

  template <Kept how>
  static F kept(const char* from, std::int64_t left, int offset) {
    constexpr std::int64_t bytes = lanes * size_of(how);
    alignas(32) char some[bytes] = {};
    if (left < bytes) {
      std::memcpy(some, from, static_cast<std::size_t>(left));
      from = some;
    }
    if constexpr (how == Kept::fp32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
    if constexpr (how == Kept::byte) {
      const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
      return _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(offset)));
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return how == Kept::bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))
                             : _mm256_cvtph_ps(halves);
  }
  static F expand(std::uint64_t bits, F numbers) {
    const __m256i own = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i there = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), own), own);
    const __m256i from = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&places.of[bits])));
    return _mm256_and_ps(_mm256_castsi256_ps(there), _mm256_permutevar8x32_ps(numbers, from));
  }

  template <Kept how>
  struct Expand {
    static constexpr Kept kept = how;
    static constexpr int step = lanes, vectors = 1;
    int offset;

    explicit Expand(int offset) : offset(offset) {}
    static int place(int i) { return i; }
    void expand(const char* from, std::int64_t left, std::uint64_t bits, F* to) const {
      to[0] = Sparse256::expand(bits, Sparse256::kept<how>(from, left, offset));
    }
  };
};

}  // namespace

void masked_avx2(const SparseCall& call) {
  const Source source(call, cast::decode_avx2);
  with_kept(source.kept, [&](auto kept) {
    call.rows > streamed_rows ? tile_masked<Sparse256, kept()>(call, source)
                              : stream_masked<FloatProduct<Sparse256, kept()>>(call, source);
  });
}

void blocks_avx2(const SparseCall& call) {
  if (call.rows > streamed_rows) return tile_blocks<Sparse256, 2>(call, Source(call, cast::decode_avx2, false));
  const Source source(call, cast::decode_avx2);
  with_kept(source.kept, [&](auto kept) { stream_blocks<Sparse256, kept()>(call, source); });
}

}  // namespace parco::sparse
