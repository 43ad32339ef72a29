// Masked products for AVX-512 with VBMI2 and VNNI: kept numbers are spread over the columns as bytes and words.
#include "sparse/sparse_avx512.h"

namespace parco::sparse {
namespace {

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

// x of 16 bits as 16-bit words, 128 columns under a power of two, in two signed bytes: codes meet both, and the sums of
// a block are exact. A block with inf or NaN makes the row's results NaN.
class WordProduct {
  static constexpr std::int64_t block = 2 * word;

  // What stands for a block of a row of x: for each 64 columns their high bytes and their low ones; and, in the lanes
  // that sum up their columns, what codes have too much by their offset.
  struct Block {
    std::int8_t bytes[2][2][word];
    std::int32_t excess[16];
  };

 public:
  static constexpr int streams_of_four = 2;

  static std::int64_t blocks_of(const SparseCall& call) { return (call.columns + block - 1) / block; }
  static std::size_t bytes(const SparseCall& call) {
    return static_cast<std::size_t>(call.rows * blocks_of(call)) * (sizeof(Block) + sizeof(float));
  }

  WordProduct(const SparseCall& call, const Source& source, char* memory)
      : call(call),
        offset(source.offset),
        count(blocks_of(call)),
        x(reinterpret_cast<Block*>(memory)),
        scales(reinterpret_cast<float*>(x + call.rows * count)) {
    for (std::int64_t m = 0; m < call.rows; m++)
      for (std::int64_t b = 0; b < count; b++) scales[m * count + b] = split(m, b * block, x[m * count + b]);
  }

  template <int streams, int columns>
  void multiply(const Row* rows, const std::uint8_t* const* masks, std::int64_t m, float* sums) const {
    const __m512i dropped = _mm512_set1_epi8(static_cast<char>(offset));
    const char* from[streams];
    __m512 total[streams][columns];
    for (int s = 0; s < streams; s++) {
      from[s] = rows[s].from;
      for (int c = 0; c < columns; c++) total[s][c] = _mm512_setzero_ps();
    }
    __m512i high[streams][columns], low[streams][columns];
    const auto begin = [&](const Block* own) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int s = 0; s < streams; s++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++)
          high[s][c] = _mm512_setzero_si512(), low[s][c] = _mm512_load_si512(own[c * count].excess);
    };
    const auto add = [&](const Block* own, int half, int s, std::int64_t k,
                         std::uint64_t bits) __attribute__((always_inline)) {
      __builtin_prefetch(from[s] + read_ahead);
      __builtin_prefetch(masks[s] + k / 8 + read_ahead);
      const __m512i codes = _mm512_mask_expand_epi8(dropped, bits, load_bytes(from[s], rows[s].end - from[s]));
      from[s] = std::min(from[s] + count_of(bits), rows[s].last);
#pragma GCC unroll 4
      for (int c = 0; c < columns; c++) {
        const auto& of_x = own[c * count].bytes[half];
        high[s][c] = _mm512_dpbusd_epi32(high[s][c], codes, _mm512_load_si512(of_x[0]));
        low[s][c] = _mm512_dpbusd_epi32(low[s][c], codes, _mm512_load_si512(of_x[1]));
      }
    };
    const auto end = [&](std::int64_t b) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int s = 0; s < streams; s++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
          const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[s][c], 8), low[s][c]);
          const __m512 scale = _mm512_set1_ps(scales[(m + c) * count + b]);
          total[s][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, total[s][c]);
        }
    };
    const std::int64_t whole = call.columns / block;
    for (std::int64_t b = 0; b < whole; b++) {
      const Block* const own = x + m * count + b;
      begin(own);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const std::int64_t k = b * block + half * word;
#pragma GCC unroll 4
        for (int s = 0; s < streams; s++) add(own, half, s, k, whole_word(masks[s], k));
      }
      end(b);
    }
    if (whole < count) {
      const Block* const own = x + m * count + whole;
      begin(own);
      for (int half = 0; half < 2; half++) {
        const std::int64_t k = whole * block + half * word;
        for (int s = 0; s < streams && k < call.columns; s++)
          add(own, half, s, k, mask_word(masks[s], k, call.columns));
      }
      end(whole);
    }
    for (int s = 0; s < streams; s++)
      for (int c = 0; c < columns; c++) sums[s * columns + c] = _mm512_reduce_add_ps(total[s][c]);
  }

 private:
  // Columns [k, k + block) of row m of x; returns their scale.
  float split(std::int64_t m, std::int64_t k, Block& to) const {
    float values[block] = {};
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < std::min(block, call.columns - k); i++) {
      values[i] = linear::load_float(call.x, call.x_type, m * call.columns + k + i);
      largest = std::max(largest, linear::bits_of(values[i]) & 0x7fffffff);
    }
    to = {};
    if (largest >= linear::infinity_bits) return linear::float_of(linear::nan_bits);
    const linear::BlockScale scale = linear::block_scale(largest, 1);
    for (int i = 0; i < block; i++) {
      const std::int32_t number = linear::nearest(values[i] * scale.inverse), high = (number + 128) >> 8;
      to.bytes[i / word][0][i % word] = static_cast<std::int8_t>(high);
      to.bytes[i / word][1][i % word] = static_cast<std::int8_t>(number - high * 256);
      to.excess[i % word / 4] -= offset * number;
    }
    return scale.scale;
  }

  const SparseCall& call;
  const int offset;
  const std::int64_t count;
  Block* x;
  float* scales;
};

struct Sparse512 : Kept512 {
  template <Kept how>
  using Expand = sparse::Expand<how>;
};

}  // namespace

void masked_avx512_vbmi(const SparseCall& call) {
  const Source source(call, cast::decode_avx512);
  if (call.rows <= streamed_rows && source.kept == Kept::byte && call.x_type != Type::fp32)
    return stream_masked<WordProduct>(call, source);
  with_kept(source.kept, [&](auto kept) {
    call.rows > streamed_rows ? tile_masked<Sparse512, kept()>(call, source)
                              : stream_masked<FloatProduct<Sparse512, kept()>>(call, source);
  });
}

}  // namespace parco::sparse
