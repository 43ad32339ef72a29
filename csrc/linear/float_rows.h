// The fp32 product over codes by rows for vector instruction sets; see float.h. Included by one translation unit per
// instruction set, everything is unnamed (see floats.h). V is its vector type, E how codes of an element become floats:
//
//   E::step      codes that `load` turns into E::vectors vectors, in the order in which E::place puts x
//   E::shared    neighbouring vectors of these that one vector of scales belongs to
//   E::unit      a factor of every weight that is left to the sums
//   natural      16 codes as they come
//
// Both read no byte past `left`, and give any finite numbers for codes past it.
#pragma once
#include "linear/float_tiles.h"

namespace parco::linear {
namespace {

constexpr std::int64_t scale_slack = 16;  // floats that a vector of scales may be read past its row

template <class V, class E>
struct FloatJob {
  const CodedCall& call;
  const E element;
  const float* x;       // [rows][padded] in the order of E
  std::int64_t padded;  // columns, rounded up to whole steps
  std::int64_t groups, row_bytes;
};

// One row of the matrix's scales in fp32, without E::unit.
template <class V>
void load_scales(const CodedCall& call, std::int64_t groups, std::int64_t n, float* to) {
  V::load_scales(call.scale, call.scale_type, n / call.block_rows * call.scale_stride, groups, call.scale_factor(), to);
}

// Groups are a power of two, or as long as a row: k >> shift is the group of column k.
inline int group_shift(const CodedCall& call) {
  return call.group >= call.columns ? 62 : __builtin_ctzll(static_cast<unsigned long long>(call.group));
}

// `outputs` rows of weights from n on against `columns` rows of x from m on. `scales` holds a row of them per output.
template <class V, class E, bool grouped, int outputs, int columns>
void stream(const FloatJob<V, E>& job, const float* scales, std::int64_t scale_stride, std::int64_t n, std::int64_t m) {
  using F = typename V::F;
  constexpr std::int64_t step_bytes = E::step * E::bits / 8, shared_codes = E::step * E::shared / E::vectors;
  const CodedCall& call = job.call;
  const std::uint8_t* codes[outputs];
  for (int r = 0; r < outputs; r++) codes[r] = call.codes + std::min(n + r, call.outputs - 1) * job.row_bytes;
  F total[outputs][columns];
#pragma GCC unroll 4
  for (int r = 0; r < outputs; r++)
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) total[r][c] = V::set(0.0f);
  const typename V::Spread spread(group_shift(call), shared_codes);
  const std::int64_t next = outputs * job.row_bytes;
  for (std::int64_t k = 0, byte = 0; k < call.columns; k += E::step, byte += step_bytes) {
    const float* x = job.x + m * job.padded + k;
    // Unrolled by order: what GCC leaves as a loop keeps its sums in memory.
#pragma GCC unroll 4
    for (int r = 0; r < outputs; r++) {
      F weight[E::vectors];
      __builtin_prefetch(codes[r] + byte + next);
      job.element.load(codes[r] + byte, job.row_bytes - byte, weight);
#pragma GCC unroll 2
      for (int s = 0; s < E::vectors / E::shared; s++) {
        [[maybe_unused]] F scale;
        if constexpr (grouped) scale = spread.load(scales + r * scale_stride, k + s * shared_codes);
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
          F sum = grouped ? V::set(0.0f) : total[r][c];
#pragma GCC unroll 8
          for (int v = s * E::shared; v < (s + 1) * E::shared; v++)
            sum = V::fma(weight[v], V::load(x + c * job.padded + v * V::lanes), sum);
          if constexpr (grouped) {
            sum = V::fma(scaled<V, E>(sum), scale, total[r][c]);
          }
          total[r][c] = sum;
        }
      }
    }
  }
  alignas(64) float sums[columns][V::lanes] = {};
#pragma GCC unroll 4
  for (int r = 0; r < outputs; r++) {
    if (n + r >= call.outputs) break;
    const float bias = call.bias ? load_float(call.bias, call.bias_type, n + r) : 0.0f;
#pragma GCC unroll 4
    for (int c = 0; c < columns; c++) {
      float sum = V::total(total[r][c]);
      if (!grouped) sum = sum * E::unit * scales[r * scale_stride];
      sums[c][r] = sum + bias;
    }
  }
  const int count = static_cast<int>(std::min<std::int64_t>(outputs, call.outputs - n));
  for (int c = 0; c < columns; c++) write_all<V>(call, (m + c) * call.outputs + n, count, sums[c]);
}

template <class V, class E, bool grouped>
void stream_rows(const FloatJob<V, E>& job, float* scales, std::int64_t first, std::int64_t last) {
  constexpr int wide = 4;  // outputs at once
  const std::int64_t stride = job.groups + scale_slack;
  for (std::int64_t n = first; n < last; n += wide) {
    for (std::int64_t r = 0; r < std::min<std::int64_t>(wide, last - n); r++)
      load_scales<V>(job.call, job.groups, n + r, scales + r * stride);
    std::int64_t m = 0;
    for (; m + 4 <= job.call.rows; m += 4)
      for (int r = 0; r < wide && n + r < last; r += V::stream_outputs)
        stream<V, E, grouped, V::stream_outputs, 4>(job, scales + r * stride, stride, n + r, m);
    for (; m + 2 <= job.call.rows; m += 2) stream<V, E, grouped, wide, 2>(job, scales, stride, n, m);
    if (m < job.call.rows) stream<V, E, grouped, wide, 1>(job, scales, stride, n, m);
  }
}

// Columns [k, k + count) of `outputs` rows from n on, turned so that a lane is an output.
template <class V, class E>
struct ExpandRows {
  const CodedCall& call;
  const E& element;
  std::int64_t groups, row_bytes;
  float* scales;  // [panel_outputs][groups + scale_slack]

  void operator()(std::int64_t n, std::int64_t outputs, std::int64_t k, std::int64_t count, float* panel) const {
    constexpr int vectors = 16 / V::lanes;
    const int shift = group_shift(call);
    const std::int64_t stride = groups + scale_slack;
    for (std::int64_t o = 0; k == 0 && o < outputs; o++) load_scales<V>(call, groups, n + o, scales + o * stride);
    for (std::int64_t o = 0; o < outputs; o += V::lanes) {
      for (std::int64_t i = 0; i < count; i += 16) {
        alignas(64) float found[V::lanes][16] = {};
        for (std::int64_t r = 0; r < std::min<std::int64_t>(V::lanes, outputs - o); r++) {
          typename V::F weight[vectors];
          const std::int64_t byte = (k + i) * E::bits / 8;
          element.natural(call.codes + (n + o + r) * row_bytes + byte, row_bytes - byte, weight);
          const typename V::F scale = V::set(scales[(o + r) * stride + ((k + i) >> shift)]);
          for (int v = 0; v < vectors; v++)
            V::store(found[r] + v * V::lanes, V::multiply(scaled<V, E>(weight[v]), scale));
        }
        V::turn(found, Type::fp32, 16, 0, V::lanes, 0, 16, expanded<V>(panel, o, i), 2 * V::lanes, V::lanes);
      }
    }
  }
};

// x in fp32 in the order of E, zero past the end of a row.
template <class V, class E>
void order_x(const CodedCall& call, std::int64_t padded, float* to) {
  for (std::int64_t m = 0; m < call.rows; m++) {
    float* row = to + m * padded;
    for (std::int64_t k = 0; k < padded; k++)
      row[k - k % E::step + E::place(static_cast<int>(k % E::step))] =
          k < call.columns ? load_float(call.x, call.x_type, m * call.columns + k) : 0.0f;
  }
}

template <class V, class E>
void run_rows(const CodedCall& call) {
  const std::int64_t groups = (call.columns + call.group - 1) / call.group;
  const std::int64_t row_bytes = (call.columns * E::bits + 7) / 8, bytes = call.outputs * row_bytes;
  const std::int64_t padded = (call.columns + E::step - 1) / E::step * E::step;
  const std::int64_t work = std::max(bytes, bytes * call.rows / 4);
  const int threads = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));
  const E element(call);
  if (call.rows > streamed_rows)
    return run_tiles<V>(call, threads, panel_outputs * (groups + scale_slack),
                        [&](float* scales) { return ExpandRows<V, E>{call, element, groups, row_bytes, scales}; });
  const std::size_t x_size = rounded(static_cast<std::size_t>(call.rows * padded) * 4);
  const std::size_t scale_size = rounded(static_cast<std::size_t>(groups + scale_slack) * 4 * 4);
  char* memory = static_cast<char*>(scratch(x_size + scale_size * threads));
  float* x = reinterpret_cast<float*>(memory);
  order_x<V, E>(call, padded, x);
  const FloatJob<V, E> job{call, element, x, padded, groups, row_bytes};
  const std::int64_t blocks = (call.outputs + 3) / 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    float* scales = reinterpret_cast<float*>(memory + x_size + scale_size * t);
    // What is read past a row of scales belongs to codes that are not there: x is zero, and so must be no NaN here.
    std::memset(static_cast<void*>(scales), 0, scale_size);
    const std::int64_t first = blocks * t / threads * 4, last = std::min(call.outputs, blocks * (t + 1) / threads * 4);
    groups > 1 ? stream_rows<V, E, true>(job, scales, first, last) : stream_rows<V, E, false>(job, scales, first, last);
  }
}

}  // namespace
}  // namespace parco::linear
