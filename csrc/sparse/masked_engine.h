// The product with masked rows; see sparse.h. Included by one translation unit per instruction set, everything is
// unnamed (see linear/floats.h). V is its vector type; V::Expand<kept> turns kept numbers into vectors with zeros
// between:
//
//   step, vectors  columns at a time, and the vectors that they fill
//   place(i)       where x of column i of a step goes
//   expand         a step's vectors from the numbers that the bits of its mask ask for
//
// V::kept<kept> is a vector of kept numbers as they come, V::expand(bits, numbers) the same with zeros between.
#pragma once
#include "linear/float_tiles.h"
#include "sparse/kept.h"

namespace parco::sparse {
namespace {

constexpr std::int64_t word = 64;  // bits of a mask at a time

// Bits [k, k + 64) of a row's mask.
inline std::uint64_t whole_word(const std::uint8_t* row, std::int64_t k) {
  std::uint64_t bits;
  std::memcpy(&bits, row + k / 8, 8);
  return bits;
}

// The same, none from `columns` on. A call that a loop over whole words has to be spared: vectors do not outlive it.
inline std::uint64_t mask_word(const std::uint8_t* row, std::int64_t k, std::int64_t columns) {
  if (k + word <= columns) return whole_word(row, k);
  std::uint64_t bits = 0;
  std::memcpy(&bits, row + k / 8, static_cast<std::size_t>((columns - k + 7) / 8));
  return bits & ((1ull << (columns - k)) - 1);
}

inline int count_of(std::uint64_t bits) { return __builtin_popcountll(bits); }

// x in fp32, in the order of E, and the products with it.
template <class V, Kept how>
class FloatProduct {
  using F = typename V::F;
  using E = typename V::template Expand<how>;

 public:
  static constexpr int streams_of_four = V::streams_of_four;

  static std::int64_t padded_of(const SparseCall& call) { return (call.columns + word - 1) / word * word; }
  static std::size_t bytes(const SparseCall& call) {
    return static_cast<std::size_t>(call.rows * padded_of(call)) * sizeof(float);
  }

  FloatProduct(const SparseCall& call, const Source& source, char* memory)
      : call(call), element(source.offset), x(reinterpret_cast<float*>(memory)), padded(padded_of(call)) {
    widen_x(call, padded, x);
    float natural[E::step];
    for (std::int64_t k = 0; k < call.rows * padded; k += E::step) {
      std::memcpy(natural, x + k, sizeof(natural));
      for (int i = 0; i < E::step; i++) x[k + E::place(i)] = natural[i];
    }
  }

  // `streams` rows of W against `columns` rows of x from m on: sums [streams][columns].
  template <int streams, int columns>
  void multiply(const Row* rows, const std::uint8_t* const* masks, std::int64_t m, float* sums) const {
    const char* from[streams];
    F sum[streams][columns];
    for (int s = 0; s < streams; s++) {
      from[s] = rows[s].from;
      for (int c = 0; c < columns; c++) sum[s][c] = V::set(0.0f);
    }
    const auto add = [&](int s, std::int64_t k, std::uint64_t bits) __attribute__((always_inline)) {
      __builtin_prefetch(from[s] + read_ahead);
      __builtin_prefetch(masks[s] + k / 8 + read_ahead);
#pragma GCC unroll 8
      for (int i = 0; i < word / E::step; i++) {
        const std::uint64_t own = E::step == word ? bits : bits >> i * E::step & ((1ull << E::step % word) - 1);
        F numbers[E::vectors];
        element.expand(from[s], rows[s].end - from[s], own, numbers);
        from[s] = std::min(from[s] + count_of(own) * size_of(how), rows[s].last);
        const float* at = x + m * padded + k + i * E::step;
        for (int c = 0; c < columns; c++)
#pragma GCC unroll 4
          for (int v = 0; v < E::vectors; v++)
            sum[s][c] = V::fma(numbers[v], V::load(at + c * padded + v * V::lanes), sum[s][c]);
      }
    };
    const std::int64_t whole = call.columns / word * word;
    for (std::int64_t k = 0; k < whole; k += word)
#pragma GCC unroll 4
      for (int s = 0; s < streams; s++) add(s, k, whole_word(masks[s], k));
    if (whole < call.columns)
      for (int s = 0; s < streams; s++) add(s, whole, mask_word(masks[s], whole, call.columns));
    for (int s = 0; s < streams; s++)
      for (int c = 0; c < columns; c++) sums[s * columns + c] = V::total(sum[s][c]);
  }

 private:
  const SparseCall& call;
  const E element;
  float* x;
  std::int64_t padded;
};

template <class Product, int streams, int columns>
void masked_rows(const SparseCall& call, const Source& source, const Product& product, const std::int64_t* n,
                 const Row* rows, std::int64_t m) {
  const std::uint8_t* masks[streams];
  for (int s = 0; s < streams; s++) masks[s] = call.mask + n[s] * ((call.columns + 7) / 8);
  float sums[streams * columns];
  product.template multiply<streams, columns>(rows, masks, m, sums);
  for (int s = 0; s < streams; s++) {
    const float scale = source.scale(n[s]);
    const float bias = call.bias ? linear::load_float(call.bias, call.bias_type, n[s]) : 0.0f;
    for (int c = 0; c < columns; c++)
      linear::store_float(call.y, call.y_type, (m + c) * call.outputs + n[s], sums[s * columns + c] * scale + bias);
  }
}

// Rows n[0 .. streams) of W against all rows of x, which pass over them in the cache.
template <class Product, int streams>
void masked_streams(const SparseCall& call, const Source& source, const Product& product, const std::int64_t* n,
                    char* own) {
  constexpr int at_once = std::min(streams, Product::streams_of_four);
  Row rows[streams];
  for (int s = 0; s < streams; s++) rows[s] = source.row(n[s], own + s * source.row_bytes());
  std::int64_t m = 0;
  for (; m + 4 <= call.rows; m += 4)
    for (int s = 0; s < streams; s += at_once)
      masked_rows<Product, at_once, 4>(call, source, product, n + s, rows + s, m);
  for (; m + 2 <= call.rows; m += 2) masked_rows<Product, streams, 2>(call, source, product, n, rows, m);
  for (; m < call.rows; m++) masked_rows<Product, streams, 1>(call, source, product, n, rows, m);
}

template <class Product>
void stream_masked(const SparseCall& call, const Source& source) {
  constexpr int streams = 4;
  const std::size_t x_bytes = linear::rounded(Product::bytes(call));
  const int threads = threads_for(call, size_of(source.kept));
  char* memory = static_cast<char*>(linear::scratch(x_bytes + streams * source.row_bytes() * threads));
  const Product product(call, source, memory);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    char* own = memory + x_bytes + streams * source.row_bytes() * t;
    in_streams<streams>(
        call.outputs * t / threads, call.outputs * (t + 1) / threads,
        [&](const std::int64_t* n) { masked_streams<Product, streams>(call, source, product, n, own); },
        [&](const std::int64_t* n) { masked_streams<Product, 1>(call, source, product, n, own); });
  }
}

// For linear/float_tiles.h: columns [k, k + count) of `outputs` rows from n on, expanded and turned so that a lane is
// an output. Blocks of columns come in ascending order, so a row's kept numbers are read on from where the last one
// ended.
template <class V, Kept kept>
class ExpandMasked {
 public:
  static constexpr std::int64_t block = linear::float_block;
  static constexpr std::int64_t floats = V::lanes * block;

  ExpandMasked(const SparseCall& call, const Source& source, float* memory, char* own)
      : call(call), source(source), natural(memory), own(own) {}

  void operator()(std::int64_t n, std::int64_t outputs, std::int64_t k, std::int64_t count, float* panel) {
    for (std::int64_t o = 0; o < outputs; o += V::lanes) {
      const std::int64_t rows = std::min<std::int64_t>(V::lanes, outputs - o);
      for (std::int64_t r = 0; r < rows; r++) {
        Row& row = at[o + r];
        if (k == 0) row = source.row(n + o + r, own + (o + r) * source.row_bytes());
        expand_row(n + o + r, row, k, count, natural + r * block);
      }
      V::turn(natural, Type::fp32, block, 0, rows, 0, count, linear::expanded<V>(panel, o, 0), 2 * V::lanes, V::lanes);
    }
  }

 private:
  void expand_row(std::int64_t n, Row& row, std::int64_t k, std::int64_t count, float* to) const {
    const std::uint8_t* mask = call.mask + n * ((call.columns + 7) / 8);
    const typename V::F scale = V::set(source.scale(n));
    for (std::int64_t i = 0; i < count; i += word) {
      const std::uint64_t bits = mask_word(mask, k + i, call.columns);
      for (int v = 0; v < word / V::lanes; v++) {
        const std::uint64_t own = bits >> v * V::lanes & ((1ull << V::lanes) - 1);
        const auto numbers = V::template kept<kept>(row.from, row.end - row.from, source.offset);
        V::store(to + i + v * V::lanes, V::multiply(V::expand(own, numbers), scale));
        row.from = std::min(row.from + count_of(own) * size_of(kept), row.last);
      }
    }
  }

  const SparseCall& call;
  const Source& source;
  float* natural;
  char* own;
  Row at[linear::panel_outputs];
};

template <class V, Kept kept>
void tile_masked(const SparseCall& call, const Source& source) {
  using Expand = ExpandMasked<V, kept>;
  const int threads = threads_for(call, call.rows);
  const std::int64_t own = static_cast<std::int64_t>(source.row_bytes()) / 4 * linear::panel_outputs;
  linear::run_tiles<V>(call, threads, Expand::floats + own, [&](float* memory) {
    return Expand(call, source, memory, reinterpret_cast<char*>(memory + Expand::floats));
  });
}

}  // namespace
}  // namespace parco::sparse
