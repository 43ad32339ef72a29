// Sparse products for AVX-512: kept numbers are spread over the columns as floats.
#include "sparse/sparse_avx512.h"

namespace parco::sparse {
namespace {

template <Kept how>
struct ExpandFloats {
  static constexpr Kept kept = how;
  static constexpr int step = 16, vectors = 1;
  int offset;

  explicit ExpandFloats(int offset) : offset(offset) {}
  static int place(int i) { return i; }
  void expand(const char* from, std::int64_t left, std::uint64_t bits, __m512* to) const {
    to[0] = Kept512::expand(bits, Kept512::kept<how>(from, left, offset));
  }
};

struct Sparse512 : Kept512 {
  template <Kept how>
  using Expand = ExpandFloats<how>;
};

}  // namespace

void masked_avx512(const SparseCall& call) {
  const Source source(call, cast::decode_avx512);
  with_kept(source.kept, [&](auto kept) {
    call.rows > streamed_rows ? tile_masked<Sparse512, kept()>(call, source)
                              : stream_masked<FloatProduct<Sparse512, kept()>>(call, source);
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
