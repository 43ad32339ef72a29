// What a query sees of the keys besides what `causal` says: a mask, tile by tile, and dropout. Included by
// attention_engine.h; everything is unnamed (see linear/floats.h).
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "attention/attention.h"
#include "cast/philox.h"
#include "rowwise/rowwise_engine.h"

namespace parco::attention {
namespace {

constexpr std::int64_t tile = 64;  // of queries, and of keys

inline std::int64_t tiles_of(std::int64_t count) { return (count + tile - 1) / tile; }

enum class Shown : std::uint8_t { none, some, all };

// How much of each tile of keys a mask shows to each tile of queries, once for the sequences and heads that share it.
class Shows {
 public:
  explicit Shows(const Forward& call)
      : call_(call),
        heads_(call.mask_stride[1] ? call.heads : 1),
        queries_(tiles_of(call.queries)),
        keys_(tiles_of(call.count)) {
    if (!call.mask) return;
    const std::int64_t rows = (call.mask_stride[0] ? call.batch : 1) * heads_ * queries_;
    found_.resize(static_cast<std::size_t>(rows * keys_));
    const int threads = rowwise::useful_threads(rows * tile * call.count, call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t row = 0; row < rows; row++)
      for (std::int64_t key = 0; key < keys_; key++) {
        const std::int64_t b = row / queries_ / heads_, head = row / queries_ % heads_;
        found_[static_cast<std::size_t>(row * keys_ + key)] = look(b, head, row % queries_ * tile, key * tile);
      }
  }

  // Of the tile of queries from `t` on and that of keys from `key` on.
  Shown of(std::int64_t b, std::int64_t head, std::int64_t t, std::int64_t key) const {
    if (!call_.mask) return Shown::all;
    const std::int64_t owner = (call_.mask_stride[0] ? b : 0) * heads_ + (heads_ > 1 ? head : 0);
    return found_[static_cast<std::size_t>((owner * queries_ + t / tile) * keys_ + key / tile)];
  }

 private:
  Shown look(std::int64_t b, std::int64_t head, std::int64_t t, std::int64_t key) const {
    const std::int64_t rows = std::min(tile, call_.queries - t), count = std::min(tile, call_.count - key);
    std::uint8_t any = 0, all = 1;
    for (std::int64_t r = 0; r < rows; r++) {
      const std::uint8_t* row = call_.marks(b, head, t + r) + key;
      for (std::int64_t k = 0; k < count; k++) any |= row[k], all &= row[k];
    }
    return all ? Shown::all : any ? Shown::some : Shown::none;
  }

  const Forward& call_;
  std::int64_t heads_, queries_, keys_;
  std::vector<Shown> found_;
};

// A tile's rows of a mask that shows some of it.
class Marks {
 public:
  Marks(const Forward& call, Shown shown, std::int64_t b, std::int64_t head, std::int64_t t, std::int64_t key)
      : stride_(call.mask_stride[2]), count_(std::min(tile, call.count - key)) {
    if (shown == Shown::some) first_ = call.marks(b, head, t) + key;
  }

  // 1 for the keys that query r of the tile sees and 0 for the others, whose scores become -inf; null where it sees
  // all.
  const float* hide(std::int64_t r, float* scores) {
    if (!first_) return nullptr;
    for (std::int64_t k = 0; k < count_; k++) {
      const bool seen = first_[r * stride_ + k];
      row_[k] = seen ? 1.0f : 0.0f;
      scores[k] = seen ? scores[k] : -std::numeric_limits<float>::infinity();
    }
    return row_;
  }

 private:
  const std::uint8_t* first_ = nullptr;
  std::int64_t stride_, count_;
  alignas(64) float row_[tile] = {};
};

// What dropout multiplies a softmax's numbers by.
template <class Random>
class Factors {
 public:
  explicit Factors(const Forward& call) : call_(call), factors_(call.p) {}

  // Of the query in row `row` for the keys of a tile; null without dropout.
  const float* of_row(std::int64_t row, std::int64_t key) {
    if (call_.p <= 0) return nullptr;
    Random(call_.seed, row).template draw<tile>(key, bits_);
    factors_.template of<tile>(bits_, row_);
    return row_;
  }

 private:
  const Forward& call_;
  cast::DropoutFactors factors_;
  alignas(64) std::uint32_t bits_[tile];
  alignas(64) float row_[tile];
};

}  // namespace
}  // namespace parco::attention
