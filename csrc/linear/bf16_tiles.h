// Products of bf16 on AMX tiles with sums in fp32: y = x @ W.T, cut so that both operands come from the L2 cache.
//
// A tile product takes 16 rows of 32 columns as they lie in memory (the left operand), and 16 rows more as 16 rows of
// pairs of columns (the right operand). So the left one is read where it is, and only the right one is made, once, and
// kept in the cache while the left one streams past, asked for one band ahead:
//
//   of dense weights    right is x, turned once per call; left are the weights (bf16_dense.h)
//   of stored codes     right are the weights, expanded: there a lane is an output anyway; left is x (bf16_panels.h)
//
// A block is 3 x 2 tiles of sums: 48 rows of the left operand, a band, by 32 of the right one, a pair of tiles. Between
// the steps of its loop along k, other work passes the time of the tile unit: what is asked for ahead, the sums of the
// block before, which are rounded and stored then, and the codes of the next weights.
//
// A sum runs through k in order, 32 columns at a time, wherever it is cut: where it is interrupted it is kept in fp32.
// So the bits of y depend neither on the cut, nor on the rows beside a row, nor on the threads. The processor treats
// subnormal numbers as zero: x, weights and sums below 2^-126 count as 0.
//
// Everything is unnamed: see floats.h.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "linear/avx512.h"
#include "linear/tiles.h"
#include "linear/write.h"

namespace parco::linear {
namespace {

constexpr std::int64_t tile_rows = 16, step_columns = 32, band_tiles = 3;
constexpr std::int64_t tile_size = 1024, pair_size = 2 * tile_size, block_size = band_tiles * pair_size;

inline std::int64_t over(std::int64_t count, std::int64_t by) { return (count + by - 1) / by; }

// The left operand: rows of bf16 numbers, one after the other, at any address.
struct Left {
  const char* data;
  std::int64_t rows, columns;
  std::int64_t row_bytes() const { return columns * 2; }
  std::int64_t tiles() const { return over(rows, tile_rows); }
};

// What is multiplied: tiles of the right operand, `chunk` of them (an even number) at a time, along k in `blocks`.
struct Cut {
  std::int64_t first, last, chunk, steps, blocks;
  bool left_streams;  // the left operand is too large for the cache, and so is asked for ahead

  std::int64_t passes() const { return over(last - first, chunk) * blocks; }
  std::int64_t longest() const { return over(steps, blocks); }
};

// A chunk of the right operand by a block of k.
struct Pass {
  std::int64_t index, first, tiles, step, steps;
  bool opens, closes;  // whether sums begin and end here
  std::int64_t pairs() const { return over(tiles, 2); }
};

inline Pass pass_of(const Cut& cut, std::int64_t index) {
  const std::int64_t block = index % cut.blocks, first = cut.first + index / cut.blocks * cut.chunk;
  const std::int64_t step = cut.steps * block / cut.blocks, end = cut.steps * (block + 1) / cut.blocks;
  return {index, first, std::min(cut.chunk, cut.last - first), step, end - step, block == 0, block == cut.blocks - 1};
}

// Up to 48 rows of the left operand along one block of k. Tiles that the operand does not fill are copies: of the last
// rows, and of the last columns, which have a step of their own.
struct Band {
  std::int64_t first, tiles, steps;  // whole steps
  bool tail;
  const char* at[band_tiles];
  std::int64_t stride[band_tiles];
  const char* tails[band_tiles];
};

// `count` things shared evenly among `turns` turns.
class Shared {
 public:
  Shared() = default;
  Shared(std::int64_t count, std::int64_t turns) : count_(count), turns_(std::max<std::int64_t>(turns, 1)) {}
  template <class Do>
  void turn(const Do& act) {
    for (due_ += count_; due_ >= turns_ && done_ < count_; due_ -= turns_) act(done_++);
  }
  template <class Do>
  void rest(const Do& act) {
    while (done_ < count_) act(done_++);
  }

 private:
  std::int64_t count_ = 0, turns_ = 1, due_ = 0, done_ = 0;
};

// `rows` of `bytes` bytes, `stride` apart, asked for while `turns` turns pass.
class Asked {
 public:
  Asked() = default;
  Asked(const char* from, std::int64_t stride, std::int64_t rows, std::int64_t bytes, std::int64_t turns)
      : at_(from),
        in_row_(over(bytes, 64)),
        jump_(stride - in_row_ * 64),
        row_left_(in_row_),
        left_(rows * in_row_),
        each_(over(left_, std::max<std::int64_t>(turns, 1))) {}
  void turn() {
    const std::int64_t now = std::min(each_, left_);
    left_ -= now;
    for (std::int64_t i = 0; i < now; i++, at_ += 64) {
      __builtin_prefetch(at_, 0, 2);
      if (--row_left_ == 0) at_ += jump_, row_left_ = in_row_;
    }
  }

 private:
  const char* at_ = nullptr;
  std::int64_t in_row_ = 0, jump_ = 0, row_left_ = 0, left_ = 0, each_ = 0;
};

template <class F, int... i>
inline void unroll(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}

// What is done between the steps of the tile products. Side is the operands' own:
//
//   right(pass, pair)           a pair of right tiles along the pass: [step][2] tiles
//   units(pass), fill(pass, u)  the parts in which right(pass, ..) is made, none where it is there already
//   finish(sums, left, right)   a tile of sums [16 rows of the left operand][16 of the right one], from these rows on
template <class T, class Side>
class Between {
 public:
  Between(const Side& side, char* memory) : side_(side), sums_(memory), idle_(memory + block_size) {}
  static constexpr std::size_t memory = block_size + tile_size;

  void step() {
    operand_.turn();
    kept_.turn();
    fill_.turn([&](std::int64_t unit) { side_.fill(next_, unit); });
    finish_.turn([&](std::int64_t tile) { finish(tile); });
    // A tile store costs hundreds of cycles when there was none for some 2,000, so one in between keeps them awake.
    if (++steps_ % 8 == 0) T::template store<6>(idle_, 64);
  }
  // The right operand of `next` while `turns` steps pass.
  void fill_during(const Pass& next, std::int64_t turns) {
    next_ = next;
    fill_ = Shared(side_.units(next), turns);
  }
  void filled() {
    fill_.rest([&](std::int64_t unit) { side_.fill(next_, unit); });
  }
  // What the next band reads, and the sums that the next block begins with or leaves.
  void ask_for_operand(const Asked& operand) { operand_ = operand; }
  void ask_for_sums(const Asked& kept) { kept_ = kept; }
  // Where a block's sums go, [left tile][right tiles], when all before have been finished; and that they are there.
  char* sums() {
    finished();
    return sums_;
  }
  void take(std::int64_t left, std::int64_t right, int left_tiles, int right_tiles) {
    left_row_ = left * tile_rows, right_row_ = right * tile_rows, across_ = right_tiles;
    finish_ = Shared(left_tiles * right_tiles, 4 * left_tiles * right_tiles);
  }
  void finished() {
    finish_.rest([&](std::int64_t tile) { finish(tile); });
  }

 private:
  void finish(std::int64_t tile) {
    side_.finish(reinterpret_cast<const float*>(sums_ + tile * tile_size), left_row_ + tile / across_ * tile_rows,
                 right_row_ + tile % across_ * tile_rows);
  }

  const Side& side_;
  char* sums_;
  char* idle_;
  Shared fill_, finish_;
  Asked operand_, kept_;
  Pass next_{};
  std::int64_t left_row_ = 0, right_row_ = 0, steps_ = 0;
  int across_ = 1;
};

// One step: tile i * r + j of the sums is that of left tile i and right tile j. Of 3 x 2 tiles two are left for
// operands, and the right ones are read twice: they lie together, and the rows of a left tile, a power of two apart,
// may share a set of the L1 cache.
template <class T, int l, int r>
inline void multiply_step(const char* const* left, const std::int64_t* stride, std::int64_t offset, const char* right) {
  const auto row = [&](int i) { return left[i] + offset; };
  if constexpr (l * r > 4) {
    T::template load<7>(row(0), stride[0]);
    T::template load<6>(right, 64);
    T::template multiply_bf16<0, 7, 6>();
    T::template load<6>(right + tile_size, 64);
    T::template multiply_bf16<1, 7, 6>();
    T::template load<7>(row(1), stride[1]);
    T::template multiply_bf16<3, 7, 6>();
    T::template load<6>(right, 64);
    T::template multiply_bf16<2, 7, 6>();
    T::template load<7>(row(2), stride[2]);
    T::template multiply_bf16<4, 7, 6>();
    T::template load<6>(right + tile_size, 64);
    T::template multiply_bf16<5, 7, 6>();
  } else {
    T::template load<6>(right, 64);
    if constexpr (r == 2) T::template load<7>(right + tile_size, 64);
    T::template load<4>(row(0), stride[0]);
    T::template multiply_bf16<0, 4, 6>();
    if constexpr (r == 2) T::template multiply_bf16<1, 4, 7>();
    if constexpr (l >= 2) {
      T::template load<5>(row(1), stride[1]);
      T::template multiply_bf16<r, 5, 6>();
      if constexpr (r == 2) T::template multiply_bf16<r + 1, 5, 7>();
    }
    if constexpr (l == 3) {
      T::template load<4>(row(2), stride[2]);
      T::template multiply_bf16<2 * r, 4, 6>();
    }
  }
}

template <class T, class Side, int l, int r>
void multiply_block(const Band& band, const char* right, const char* from, char* to, Between<T, Side>& between) {
  static constexpr std::int64_t packed[] = {64, 64, 64};
  const auto sums = std::make_integer_sequence<int, l * r>();
  unroll(
      [&](auto tile) {
        if (from)
          T::template load<decltype(tile)::value>(from + tile * tile_size, 64);
        else
          T::template zero<decltype(tile)::value>();
      },
      sums);
  for (std::int64_t s = 0; s < band.steps; s++) {
    multiply_step<T, l, r>(band.at, band.stride, s * 64, right + s * pair_size);
    between.step();
  }
  if (band.tail) multiply_step<T, l, r>(band.tails, packed, 0, right + band.steps * pair_size);
  if (!to) to = between.sums();
  unroll([&](auto tile) { T::template store<decltype(tile)::value>(to + tile * tile_size, 64); }, sums);
}

// One thread's share of a product: all of `left` by the tiles of `cut`.
template <class T, class Side>
class Share {
 public:
  Share(const Side& side, const Left& left, const Cut& cut, char* memory)
      : side_(side), left_(left), cut_(cut), bands_(over(left.tiles(), band_tiles)), between_(side, memory) {
    tails_ = memory + Between<T, Side>::memory;
    edge_ = tails_ + band_tiles * tile_size;
    sums_ = edge_ + edge_size(cut);
    if (left.rows % tile_rows) std::memset(edge_, 0, edge_size(cut));
  }
  static std::size_t memory(std::int64_t left_tiles, const Cut& cut) {
    const std::int64_t kept = cut.blocks > 1 ? over(left_tiles, band_tiles) * over(cut.chunk, 2) : 0;
    return Between<T, Side>::memory + edge_size(cut) +
           static_cast<std::size_t>(band_tiles * tile_size + (kept + 1) * block_size);
  }

  void run() {
    const std::int64_t passes = cut_.passes();
    between_.fill_during(pass_of(cut_, 0), 1);
    for (std::int64_t p = 0; p < passes; p++) {
      const Pass pass = pass_of(cut_, p), next = p + 1 < passes ? pass_of(cut_, p + 1) : Pass{};
      between_.filled();
      between_.fill_during(next, bands_ * pass.pairs() * pass.steps);
      for (std::int64_t b = 0; b < bands_; b++) {
        const Band band = cut_band(pass, b);
        if (cut_.left_streams) {
          const bool same = b + 1 < bands_;
          ask_for(same ? pass : next, same ? b + 1 : 0, pass.pairs() * band.steps);
        }
        for (std::int64_t pair = 0; pair < pass.pairs(); pair++) {
          char* kept = sums_ + (b * over(cut_.chunk, 2) + pair) * block_size;
          if (cut_.blocks > 1) between_.ask_for_sums(Asked(kept + block_size, 0, 1, block_size, band.steps));
          multiply(pass, band, pair, kept);
        }
      }
    }
    between_.finished();
  }

 private:
  // The last rows, apart by more than a power of two; those that are not there are zero.
  static std::size_t edge_size(const Cut& cut) {
    return static_cast<std::size_t>((cut.longest() + 1) * 64 * tile_rows);
  }
  std::int64_t first_tile(std::int64_t band) const { return left_.tiles() * band / bands_; }

  void ask_for(const Pass& pass, std::int64_t b, std::int64_t turns) {
    const std::int64_t first = first_tile(b) * tile_rows, last = std::min(first_tile(b + 1) * tile_rows, left_.rows);
    const std::int64_t bytes = std::min(pass.steps * 64, left_.row_bytes() - pass.step * 64);
    between_.ask_for_operand(
        Asked(left_.data + first * left_.row_bytes() + pass.step * 64, left_.row_bytes(), last - first, bytes, turns));
  }

  Band cut_band(const Pass& pass, std::int64_t b) {
    Band band{};
    band.first = first_tile(b), band.tiles = first_tile(b + 1) - band.first;
    const std::int64_t columns = std::min(left_.columns - pass.step * step_columns, pass.steps * step_columns);
    band.steps = columns / step_columns, band.tail = columns % step_columns != 0;
    const std::size_t whole = static_cast<std::size_t>(band.steps * 64),
                      rest = static_cast<std::size_t>(columns * 2) - whole;
    for (std::int64_t i = 0; i < band.tiles; i++) {
      const std::int64_t row = (band.first + i) * tile_rows, rows = std::min(tile_rows, left_.rows - row);
      const char* from = left_.data + row * left_.row_bytes() + pass.step * 64;
      band.at[i] = from, band.stride[i] = left_.row_bytes();
      if (rows < tile_rows) {
        band.at[i] = edge_, band.stride[i] = (cut_.longest() + 1) * 64;
        for (std::int64_t r = 0; r < rows; r++)
          std::memcpy(edge_ + r * band.stride[i], from + r * left_.row_bytes(), whole);
      }
      if (!band.tail) continue;
      char* tail = tails_ + i * tile_size;
      band.tails[i] = tail;
      std::memset(tail, 0, tile_size);
      for (std::int64_t r = 0; r < rows; r++) std::memcpy(tail + r * 64, from + r * left_.row_bytes() + whole, rest);
    }
    return band;
  }

  void multiply(const Pass& pass, const Band& band, std::int64_t pair, char* kept) {
    const bool both = 2 * pair + 1 < pass.tiles;
    if (band.tiles == 3) return both ? block<3, 2>(pass, band, pair, kept) : block<3, 1>(pass, band, pair, kept);
    if (band.tiles == 2) return both ? block<2, 2>(pass, band, pair, kept) : block<2, 1>(pass, band, pair, kept);
    both ? block<1, 2>(pass, band, pair, kept) : block<1, 1>(pass, band, pair, kept);
  }

  template <int l, int r>
  void block(const Pass& pass, const Band& band, std::int64_t pair, char* kept) {
    multiply_block<T, Side, l, r>(band, side_.right(pass, pair), pass.opens ? nullptr : kept,
                                  pass.closes ? nullptr : kept, between_);
    if (pass.closes) between_.take(band.first, pass.first + 2 * pair, l, r);
  }

  const Side& side_;
  const Left left_;
  const Cut cut_;
  std::int64_t bands_;
  Between<T, Side> between_;
  char* tails_;
  char* edge_;
  char* sums_;
};

inline TileConfig whole_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.row_bytes[t] = 64, config.rows[t] = tile_rows;
  return config;
}

// `count` (at most 16) sums of row m of y from output n on, finished: the scale that they have as a whole, bias, and
// what every product ends with.
template <class Call>
inline void store_sums(const Call& call, std::int64_t m, std::int64_t n, int count, __m512 sum, __m512 scale,
                       __m512 bias) {
  write<avx512::Arithmetic>(call, m * call.outputs + n, count, _mm512_add_ps(_mm512_mul_ps(sum, scale), bias));
}

template <class Call>
inline __m512 bias_of(const Call& call, std::int64_t n, int count) {
  return call.bias ? avx512::load_floats(call.bias, call.bias_type, n, count) : _mm512_setzero_ps();
}

}  // namespace
}  // namespace parco::linear
