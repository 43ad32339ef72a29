// Dropout, for vector instruction sets (see rowwise_engine.h).
#pragma once
#include "cast/philox.h"
#include "rowwise/rowwise_engine.h"

namespace parco::rowwise {
namespace {

constexpr std::int64_t drawn_together = 64;

// Of all rows' blocks of `drawn_together` numbers one after the other, those of [first, last).
template <class V, Type type>
void drop_blocks(const Dropout& call, std::int64_t first, std::int64_t last) {
  using F = typename V::F;
  const std::int64_t in_row = (call.columns + drawn_together - 1) / drawn_together;
  const cast::DropoutFactors factors(call.p);
  alignas(64) std::uint32_t bits[drawn_together];
  alignas(64) float kept[drawn_together];
  for (std::int64_t block = first; block < last;) {
    const std::int64_t row = block / in_row, end = std::min(last, (row + 1) * in_row);
    const typename V::Random random(call.seed, row);
    for (; block < end; block++) {
      const std::int64_t k = (block - row * in_row) * drawn_together, at = row * call.columns + k;
      random.template draw<drawn_together>(k, bits);
      factors.of<drawn_together>(bits, kept);
      each_vector<V>(std::min(drawn_together, call.columns - k), [&](std::int64_t j, int count) {
        const F factor = V::load(kept + j), zero = V::set(0.0f);
        const F value = V::multiply(V::template load<type>(call.x, at + j, count), factor);
        V::template store<type>(call.y, at + j, count, V::where_greater(factor, zero, value, zero));
      });
    }
  }
}

template <class V>
void dropout(const Dropout& call) {
  const std::int64_t blocks = call.rows * ((call.columns + drawn_together - 1) / drawn_together);
  const int threads = useful_threads(call.rows * call.columns, call.threads);
  with_type(call.type, [&](auto type) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) drop_blocks<V, type()>(call, blocks * t / threads, blocks * (t + 1) / threads);
  });
}

}  // namespace
}  // namespace parco::rowwise
