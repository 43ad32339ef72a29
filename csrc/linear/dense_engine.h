// The dense product for vector instruction sets; see dense.h. Included by one translation unit per instruction set, V
// is its vector type, V::Written the arithmetic of results; everything is unnamed (see floats.h).
#pragma once
#include <algorithm>

#include "linear/dense.h"
#include "linear/floats.h"
#include "linear/write.h"

namespace parco::linear {
namespace {

// x in fp32 in the order in which a vector of weights widens, `step` values at a time, zero past the end of a row.
template <class V>
void widen_x(const DenseCall& call, std::int64_t padded, float* to) {
  constexpr int lanes = V::lanes, step = 2 * lanes;
  for (std::int64_t m = 0; m < call.rows; m++) {
    for (std::int64_t k = 0; k < padded; k++) {
      const std::int64_t i = k % step;
      const std::int64_t at = call.weight_type == Type::bf16 ? k - i + i % 2 * lanes + i / 2 : k;
      to[m * padded + at] = k < call.columns ? load_float(call.x, call.x_type, m * call.columns + k) : 0.0f;
    }
  }
}

// `rows` outputs from row n on against `columns` rows of x from m on.
template <class V, Type type, int rows, int columns>
void dense_block(const DenseCall& call, const float* x, std::int64_t padded, std::int64_t n, std::int64_t m) {
  using F = typename V::F;
  constexpr int step = 2 * V::lanes;
  const char* weights[rows];
  for (int r = 0; r < rows; r++)
    weights[r] =
        static_cast<const char*>(call.weight) + std::min(n + r, call.outputs - 1) * call.columns * size_of(type);
  F sum[rows][columns][2];
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < columns; c++) sum[r][c][0] = sum[r][c][1] = V::set(0.0f);
  const auto add = [&](const char* from, int r, std::int64_t k) {
    F weight[2];
    V::template widen<type>(from, weight);
    for (int c = 0; c < columns; c++)
      for (int h = 0; h < 2; h++)
        sum[r][c][h] = V::fma(weight[h], V::load(x + (m + c) * padded + k + h * V::lanes), sum[r][c][h]);
  };
  const std::int64_t whole = call.columns / step * step;
  for (std::int64_t k = 0; k < whole; k += step)
    for (int r = 0; r < rows; r++) add(weights[r] + k * size_of(type), r, k);
  if (whole < call.columns) {
    for (int r = 0; r < rows; r++) {
      alignas(64) char last[step * size_of(type)] = {};
      std::memcpy(last, weights[r] + whole * size_of(type),
                  static_cast<std::size_t>((call.columns - whole) * size_of(type)));
      add(last, r, whole);
    }
  }
  const int count = static_cast<int>(std::min<std::int64_t>(rows, call.outputs - n));
  alignas(64) float sums[columns][std::max(rows, V::lanes)] = {};
  for (int r = 0; r < count; r++) {
    const float bias = call.bias ? load_float(call.bias, call.bias_type, n + r) : 0.0f;
    for (int c = 0; c < columns; c++) sums[c][r] = V::total(V::add(sum[r][c][0], sum[r][c][1])) + bias;
  }
  for (int c = 0; c < columns; c++) write_all<typename V::Written>(call, (m + c) * call.outputs + n, count, sums[c]);
}

template <class V, Type type>
void dense_rows(const DenseCall& call, const float* x, std::int64_t padded, std::int64_t first, std::int64_t last) {
  constexpr int wide = V::dense_sums / 2;  // outputs at once for one row of x
  for (std::int64_t n = first; n < last; n += wide) {
    for (std::int64_t m = 0; m < call.rows;) {
      const std::int64_t left = call.rows - m;
      // Weights of `wide` outputs stay in the cache while the next rows of x pass over them.
      if (left >= 4) {
        for (int r = 0; r < wide && n + r < last; r += wide / 4)
          dense_block<V, type, wide / 4, 4>(call, x, padded, n + r, m);
        m += 4;
      } else if (left >= 2) {
        for (int r = 0; r < wide && n + r < last; r += wide / 2)
          dense_block<V, type, wide / 2, 2>(call, x, padded, n + r, m);
        m += 2;
      } else {
        dense_block<V, type, wide, 1>(call, x, padded, n, m);
        m += 1;
      }
    }
  }
}

template <class V>
void run_dense(const DenseCall& call) {
  constexpr std::int64_t step = 2 * V::lanes, wide = V::dense_sums / 2;
  const std::int64_t padded = (call.columns + step - 1) / step * step, blocks = (call.outputs + wide - 1) / wide;
  float* x = static_cast<float*>(scratch(static_cast<std::size_t>(call.rows * padded) * sizeof(float)));
  widen_x<V>(call, padded, x);
  const std::int64_t bytes = call.outputs * call.columns * size_of(call.weight_type);
  const int threads = static_cast<int>(std::clamp<std::int64_t>(bytes / worth_a_thread, 1, call.threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    // Whole blocks of outputs, so that no two threads write the same ones.
    const std::int64_t first = blocks * t / threads * wide,
                       last = std::min(call.outputs, blocks * (t + 1) / threads * wide);
    if (call.weight_type == Type::bf16)
      dense_rows<V, Type::bf16>(call, x, padded, first, last);
    else if (call.weight_type == Type::fp16)
      dense_rows<V, Type::fp16>(call, x, padded, first, last);
    else
      dense_rows<V, Type::fp32>(call, x, padded, first, last);
  }
}

}  // namespace
}  // namespace parco::linear
