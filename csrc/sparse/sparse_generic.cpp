// Sparse products in plain C++, for few rows of x; more are multiplied by the same, a few at a time.
#include "linear/generic.h"
#include "sparse/blocks_engine.h"
#include "sparse/masked_engine.h"

namespace parco::sparse {
namespace {

// Eight lanes; the compiler may use what vectors the target always has.
struct Sparse8 {
  struct F {
    float lane[8];
  };
  static constexpr int lanes = 8, streams_of_four = 1;

  static F set(float value) {
    F all;
    for (float& lane : all.lane) lane = value;
    return all;
  }
  static F load(const float* from) {
    F all;
    std::memcpy(all.lane, from, sizeof(all.lane));
    return all;
  }
  // Product and sum rounded apart: a fused one is a library call here.
  static F fma(F a, F b, F c) {
    for (int i = 0; i < lanes; i++) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float total(F value) {
    const float* of = value.lane;
    return ((of[0] + of[4]) + (of[2] + of[6])) + ((of[1] + of[5]) + (of[3] + of[7]));
  }

  template <Kept how>
  static float number(const char* from, int i, int offset) {
    if constexpr (how == Kept::byte) return static_cast<float>(static_cast<std::uint8_t>(from[i]) - offset);
    return linear::load_float(from, static_cast<Type>(how), i);
  }
  template <Kept how>
  static F kept(const char* from, std::int64_t left, int offset) {
    F all = set(0.0f);
    const int count = static_cast<int>(std::min<std::int64_t>(lanes, left / size_of(how)));
    for (int i = 0; i < count; i++) all.lane[i] = number<how>(from, i, offset);
    return all;
  }

  template <Kept how>
  struct Expand {
    static constexpr Kept kept = how;
    static constexpr int step = lanes, vectors = 1;
    int offset;

    explicit Expand(int offset) : offset(offset) {}
    static int place(int i) { return i; }
    void expand(const char* from, std::int64_t left, std::uint64_t bits, F* to) const {
      int next = 0;
      for (int i = 0; i < lanes; i++) {
        const bool there = bits >> i & 1 && (next + 1) * size_of(how) <= left;
        to->lane[i] = there ? number<how>(from, next++, offset) : 0.0f;
      }
    }
  };
};

}  // namespace

void masked_generic(const SparseCall& call) {
  const Source source(call, cast::decode_generic);
  with_kept(source.kept, [&](auto kept) { stream_masked<FloatProduct<Sparse8, kept()>>(call, source); });
}

void blocks_generic(const SparseCall& call) {
  const Source source(call, cast::decode_generic);
  with_kept(source.kept, [&](auto kept) { stream_blocks<Sparse8, kept()>(call, source); });
}

}  // namespace parco::sparse
