// The dense product for many rows of x; see dense.h. Included by one translation unit per instruction set, V is its
// vector type, everything is unnamed (see floats.h).
#pragma once
#include "linear/dense.h"
#include "linear/float_tiles.h"

namespace parco::linear {
namespace {

// Columns [k, k + count) of `outputs` rows from n on, turned so that a lane is an output.
template <class V>
struct ExpandDense {
  const DenseCall& call;

  void operator()(std::int64_t n, std::int64_t outputs, std::int64_t k, std::int64_t count, float* panel) const {
    for (std::int64_t o = 0; o < outputs; o += V::lanes)
      V::turn(call.weight, call.weight_type, call.columns, n + o, std::min<std::int64_t>(V::lanes, outputs - o), k,
              count, expanded<V>(panel, o, 0), 2 * V::lanes, V::lanes);
  }
};

template <class V>
void run_dense_tiles(const DenseCall& call) {
  const std::int64_t work = call.outputs * call.columns * size_of(call.weight_type) * call.rows / 4;
  const int threads = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));
  run_tiles<V>(call, threads, 0, [&](float*) { return ExpandDense<V>{call}; });
}

}  // namespace
}  // namespace parco::linear
