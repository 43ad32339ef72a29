// The fp32 product over panels (coded.h) for vector instruction sets; see float.h. A lane is an output: what stands at
// the same place of the 16 rows of a panel is read at once, multiplied by one number of x and added to their sums.
// Codes of a byte come in twos, even and odd ones of a dword, so that there neighbouring lanes belong to one output and
// two vectors hold the outputs of one. Included by one translation unit per instruction set, everything is unnamed (see
// floats.h). V is its vector type, E how codes of an element become floats:
//
//   E::step         codes of a row that are read together
//   E::halves       1, or 2 where neighbouring lanes belong to one output
//   E::column(i, p) the code that lane p of an output holds in vector i of a step
//   E::unit         a factor of every weight that is left to the sums
//   panel(at, use)  calls use(i, half, vector) for each
#pragma once
#include "linear/float_tiles.h"

namespace parco::linear {
namespace {

constexpr std::int64_t read_ahead = 1024;  // bytes of each stream

// The scales of `lanes` outputs, one vector for each group.
template <class V>
class LaneScales {
 public:
  LaneScales(const CodedCall& call, std::int64_t groups, float* kept)
      : call_(call), groups_(groups), factor_(call.scale_factor()), kept_(kept) {}
  // Of the outputs from n on; what lies past the last one repeats it.
  void take(std::int64_t n) {
    n_ = n;
    if (call_.packed_scales()) return;
    const std::int64_t last = call_.outputs - 1;
    for (std::int64_t g = 0; g < groups_; g++) {
      const std::int64_t at = call_.scale_index(std::min(n, last), g);
      const bool same = call_.scale_index(std::min(n + V::lanes - 1, last), g) == at;
      const float first = load_float(call_.scale, call_.scale_type, at) * factor_;
      for (int i = 0; i < V::lanes; i++)
        kept_[g * V::lanes + i] =
            same ? first
                 : load_float(call_.scale, call_.scale_type, call_.scale_index(std::min(n + i, last), g)) * factor_;
    }
  }
  typename V::F of(std::int64_t group) const {
    if (call_.packed_scales())
      return V::lane_scales(call_.scale, call_.scale_type, call_.scale_index(n_, group), factor_);
    return V::load(kept_ + group * V::lanes);
  }

 private:
  const CodedCall& call_;
  std::int64_t groups_, n_ = 0;
  float factor_;
  float* kept_;
};

// Where the step of column k begins in them.
template <class E>
std::int64_t step_start(std::int64_t k) {
  return k / E::step * (E::step * E::bits / 8) * panel_rows;
}

template <class V, class E>
struct PanelJob {
  const CodedCall& call;
  const E element;
  const float* x;  // [rows][columns] in the order in which vectors come
  std::int64_t groups;
};

// `strips` times `lanes` outputs, from first[strip] on, against `columns` rows of x from m on.
template <class V, class E, bool grouped, int strips, int columns>
void panel_sums(const PanelJob<V, E>& job, const std::int64_t* first, std::int64_t m, LaneScales<V>* scales) {
  using F = typename V::F;
  const CodedCall& call = job.call;
  const std::uint8_t* codes[strips];
  F total[strips][columns][E::halves];
  for (int s = 0; s < strips; s++) {
    codes[s] = call.packed_codes(first[s]);
    for (int c = 0; c < columns; c++)
      for (int h = 0; h < E::halves; h++) total[s][c][h] = V::set(0.0f);
  }
  const float* rows[columns];
  for (int c = 0; c < columns; c++) rows[c] = job.x + (m + c) * call.columns;
  for (std::int64_t g = 0; g < job.groups; g++) {
    F sum[strips][columns][E::halves];
#pragma GCC unroll 4
    for (int s = 0; s < strips; s++)
#pragma GCC unroll 4
      for (int c = 0; c < columns; c++)
#pragma GCC unroll 2
        for (int h = 0; h < E::halves; h++) sum[s][c][h] = V::set(0.0f);
    const std::int64_t end = std::min((g + 1) * call.group, call.columns);
    for (std::int64_t k = g * call.group; k < end; k += E::step) {
#pragma GCC unroll 4
      for (int s = 0; s < strips; s++) {
        const std::uint8_t* at = codes[s] + step_start<E>(k);
        for (int i = 0; i < E::step * E::bits / 32; i++) __builtin_prefetch(at + i * panel_rows * 4 + read_ahead);
        job.element.panel(at, [&](int i, int half, F weight) {
#pragma GCC unroll 4
          for (int c = 0; c < columns; c++)
            sum[s][c][half] =
                V::fma(weight, V::template spread<E::halves>(rows[c] + k + i * E::halves), sum[s][c][half]);
        });
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < strips; s++) {
      const F scale = grouped ? scales[s].of(g) : V::set(1.0f);
#pragma GCC unroll 2
      for (int h = 0; h < E::halves; h++) {
        const F lanes = grouped && E::halves == 2 ? V::doubled(scale, h) : scale;
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
          const F found = scaled<V, E>(sum[s][c][h]);
          total[s][c][h] = grouped ? V::fma(found, lanes, total[s][c][h]) : found;
        }
      }
    }
  }
  for (int s = 0; s < strips; s++) {
    const int width = static_cast<int>(std::min<std::int64_t>(V::lanes, call.outputs - first[s]));
    const F bias = call.bias ? V::load_floats(call.bias, call.bias_type, first[s], width) : V::set(0.0f);
    for (int c = 0; c < columns; c++) {
      F y = total[s][c][0];
      if constexpr (E::halves == 2)
        y = V::add(V::every_other(total[s][c][0], total[s][c][1], 0),
                   V::every_other(total[s][c][0], total[s][c][1], 1));
      if (!grouped) y = V::multiply(y, scales[s].of(0));
      write<V>(call, (m + c) * call.outputs + first[s], width, V::add(y, bias));
    }
  }
}

// All rows of x, up to `columns` at a time: what a strip reads again is in the cache.
template <class V, class E, bool grouped, int strips, int columns>
void panel_rows_of(const PanelJob<V, E>& job, const std::int64_t* first, std::int64_t m, LaneScales<V>* scales) {
  for (; m + columns <= job.call.rows; m += columns) panel_sums<V, E, grouped, strips, columns>(job, first, m, scales);
  if constexpr (columns > 1) panel_rows_of<V, E, grouped, strips, columns / 2>(job, first, m, scales);
}

// Strips [first, last), in as many streams as keep the memory busy.
template <class V, class E, bool grouped, int streams, int columns>
void decode_strips(const PanelJob<V, E>& job, std::int64_t first, std::int64_t last, float* kept) {
  const std::int64_t length = (last - first) / streams;
  LaneScales<V> scales[] = {{job.call, job.groups, kept},
                            {job.call, job.groups, kept + job.groups * V::lanes},
                            {job.call, job.groups, kept + job.groups * V::lanes * 2},
                            {job.call, job.groups, kept + job.groups * V::lanes * 3}};
  for (std::int64_t i = 0; i < length; i++) {
    std::int64_t outputs[streams];
    for (int s = 0; s < streams; s++) scales[s].take(outputs[s] = (first + s * length + i) * V::lanes);
    panel_rows_of<V, E, grouped, streams, columns>(job, outputs, 0, scales);
  }
  for (std::int64_t i = first + streams * length; i < last; i++) {
    const std::int64_t output = i * V::lanes;
    scales[0].take(output);
    panel_rows_of<V, E, grouped, 1, columns>(job, &output, 0, scales);
  }
}

template <class V, class E>
void decode_panels(const PanelJob<V, E>& job, std::int64_t first, std::int64_t last, float* kept) {
  constexpr int one = V::panel_streams, two = one / 2;
  const bool grouped = job.groups > 1;
  if (job.call.rows == 1)
    grouped ? decode_strips<V, E, true, one, 1>(job, first, last, kept)
            : decode_strips<V, E, false, one, 1>(job, first, last, kept);
  else if (job.call.rows < 4)
    grouped ? decode_strips<V, E, true, two, 2>(job, first, last, kept)
            : decode_strips<V, E, false, two, 2>(job, first, last, kept);
  else
    grouped ? decode_strips<V, E, true, 1, 4>(job, first, last, kept)
            : decode_strips<V, E, false, 1, 4>(job, first, last, kept);
}

// Columns [k, k + count) of `outputs` rows from n on.
template <class V, class E>
struct ExpandPanels {
  const CodedCall& call;
  const E& element;
  LaneScales<V> scales;

  void operator()(std::int64_t n, std::int64_t outputs, std::int64_t k, std::int64_t count, float* panel) {
    using F = typename V::F;
    constexpr int vectors = E::step / E::halves;
    for (std::int64_t o = 0; o < outputs; o += V::lanes) {
      const std::uint8_t* codes = call.packed_codes(n + o);
      scales.take(n + o);
      F scale = V::set(0.0f);
      for (std::int64_t i = k, end = k; i < k + count; i += E::step) {
        if (i >= end) {
          scale = scales.of(i / call.group);
          end = std::min((i / call.group + 1) * call.group, call.columns);
        }
        F weight[vectors][E::halves];
        element.panel(codes + step_start<E>(i), [&](int v, int half, F found) { weight[v][half] = found; });
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
#pragma GCC unroll 2
          for (int p = 0; p < E::halves; p++) {
            const F value = E::halves == 2 ? V::every_other(weight[v][0], weight[v][E::halves - 1], p) : weight[v][0];
            V::store(expanded<V>(panel, o, i - k + E::column(v, p)), V::multiply(scaled<V, E>(value), scale));
          }
      }
    }
  }
};

// Row m of x in fp32, in the order in which vectors come.
template <class V, class E>
void order_row(const CodedCall& call, std::int64_t m, float* to) {
  constexpr int run = std::max<int>(E::step, V::lanes);
  alignas(64) float found[run];
  for (std::int64_t start = 0; start < call.columns; start += run) {
    const int count = static_cast<int>(std::min<std::int64_t>(run, call.columns - start));
    for (int i = 0; i < count; i += V::lanes)
      V::store(found + i,
               V::load_floats(call.x, call.x_type, m * call.columns + start + i, std::min<int>(V::lanes, count - i)));
    for (int k = 0; k < count; k += E::step)
      for (int i = 0; i < E::step; i++) to[start + k + i] = found[k + E::column(i / E::halves, i % E::halves)];
  }
}

template <class V, class E>
void run_panels(const CodedCall& call) {
  const std::int64_t groups = (call.columns + call.group - 1) / call.group;
  const std::int64_t bytes = call.outputs * (call.columns * E::bits / 8), strips_of_scales = 4;
  const std::int64_t work = std::max(bytes, bytes * call.rows / 4);
  const int threads = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));
  const E element(call);
  if (call.rows > streamed_rows)
    return run_tiles<V>(call, threads, groups * V::lanes, [&](float* kept) {
      return ExpandPanels<V, E>{call, element, LaneScales<V>(call, groups, kept)};
    });
  const std::size_t x_size = rounded(static_cast<std::size_t>(call.rows * call.columns) * 4);
  const std::size_t kept_size = static_cast<std::size_t>(groups * V::lanes * strips_of_scales) * 4;
  char* memory = static_cast<char*>(scratch(x_size + kept_size * threads));
  float* x = reinterpret_cast<float*>(memory);
  for (std::int64_t m = 0; m < call.rows; m++) order_row<V, E>(call, m, x + m * call.columns);
  const PanelJob<V, E> job{call, element, x, groups};
  const std::int64_t strips = (call.outputs + V::lanes - 1) / V::lanes;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++)
    decode_panels(job, strips * t / threads, strips * (t + 1) / threads,
                  reinterpret_cast<float*>(memory + x_size + kept_size * t));
}

}  // namespace
}  // namespace parco::linear
