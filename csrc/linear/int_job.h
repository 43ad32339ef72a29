// What the integer products for vector instruction sets share: a call cut into work, and the outputs at hand. V is the
// instruction set's vector type (int_engine.h).
#pragma once
#include <algorithm>
#include <utility>

#include "linear/quantize.h"
#include "linear/write.h"

namespace parco::linear {
namespace {

template <class V>
struct Job {
  const CodedCall& call;
  Plan plan;
  Digits digits;
  std::int16_t* x[2];        // [slab][plan.words] each; of bytes as V takes them
  float* x_scale;            // [slab][blocks]; of bytes the first alone, the row's
  std::int32_t* x_sum[2];    // [slab][blocks]: minus the sum of the words, times the zero when that is the same for all
  std::int64_t first, rows;  // the rows of x at work
  std::int64_t block_stride;
};

// What belongs to `lanes * vectors` outputs: scales and zeros turned so that a group's values of all lanes are
// neighbours.
template <class V, int vectors>
struct Outputs {
  std::int64_t first, count;
  const std::uint8_t* rows[V::lanes * vectors];
  float* scale;        // [groups][vectors][lanes]
  std::int32_t* zero;  // the same, or null when all are equal

  void take(const CodedCall& call, std::int64_t first_output) {
    first = first_output;
    count = std::min<std::int64_t>(V::lanes * vectors, call.outputs - first);
    zero = nullptr;
  }

  // Lanes past the last output repeat it; they are computed and not stored.
  void gather(const CodedCall& call, const Plan& plan, std::int64_t first_output, float* scales, std::int32_t* zeros) {
    constexpr int wide = V::lanes * vectors;
    take(call, first_output);
    const char* scale_rows[wide];
    for (int i = 0; i < wide; i++) {
      const std::int64_t n = first + std::min<std::int64_t>(i, count - 1);
      rows[i] = call.codes + n * plan.row_bytes;
      scale_rows[i] = static_cast<const char*>(call.scale) + call.scale_index(n, 0) * size_of(call.scale_type);
    }
    scale = scales;
    zero = call.zero ? zeros : nullptr;
    const std::int32_t groups = plan.groups;
    const float factor = call.scale_factor() * call.unit;
    for (int v = 0; v < vectors; v++) {
      if (call.packed_scales()) {
        // Vectors past the last panel repeat it.
        const std::int64_t n = std::min(first + v * V::lanes, call.outputs - 1) / V::lanes * V::lanes;
        for (std::int32_t g = 0; g < groups; g++) {
          const std::int64_t at = call.scale_index(n, g);
          V::store(scales + (g * vectors + v) * V::lanes, V::load_scales(call, at, factor));
          if (zero) V::store(zeros + (g * vectors + v) * V::lanes, V::load_zeros(call.zero + at));
        }
        continue;
      }
      V::transpose_scales(scale_rows + v * V::lanes, call.scale_type, groups, factor, scales + v * V::lanes, wide);
    }
    if (!zero || call.packed_scales()) return;
    for (int i = 0; i < wide; i++) {
      const std::int64_t n = first + std::min<std::int64_t>(i, count - 1);
      for (std::int32_t g = 0; g < groups; g++) zeros[g * wide + i] = call.zero[call.scale_index(n, g)];
    }
  }

  // A piece of vector v.
  void read(const CodedCall& call, const typename V::Reader& reader, int v, const Piece& piece,
            typename V::I* to) const {
    if (!call.packed) return reader.read(rows + v * V::lanes, piece.dword, piece.dwords, to);
    const std::int64_t n = std::min(first + v * V::lanes, call.outputs - 1) / V::lanes * V::lanes;
    reader.read_packed(call.packed_codes(n), piece.dword, piece.dwords, to);
  }
};

// Where a block's sum starts: at minus zero times the sum of its words, so that the codes themselves are used as they
// are.
template <class V, int vectors>
inline typename V::I first_sum(const Outputs<V, vectors>& outputs, const Block& block, int v, std::int32_t sum) {
  if (!outputs.zero) return V::set(sum);
  return V::multiply(V::load(outputs.zero + (block.group * vectors + v) * V::lanes), V::set(sum));
}

// One output vector of row m, finished: the scales that it has as a whole, bias, one rounding.
template <class V, int vectors>
inline void finish(const Job<V>& job, const Outputs<V, vectors>& outputs, std::int64_t m, int v, typename V::F sum) {
  const CodedCall& call = job.call;
  const std::int64_t left = outputs.count - v * V::lanes;
  if (left <= 0) return;
  const int count = static_cast<int>(std::min<std::int64_t>(left, V::lanes));
  const std::int64_t n = outputs.first + v * V::lanes;
  if (job.digits == Digits::byte) sum = V::multiply(sum, V::set(job.x_scale[m * job.block_stride]));
  if (job.plan.groups <= 1) sum = V::multiply(sum, V::load(outputs.scale + v * V::lanes));
  if (call.bias) sum = V::add(sum, V::load_floats(call.bias, call.bias_type, n, count));
  write<V>(call, (job.first + m) * call.outputs + n, count, sum);
}

// The block's exact sum(s) as fp32, in units of the block's scale.
template <class V, Digits digits>
inline typename V::F exact(const typename V::I* sums) {
  if constexpr (digits != Digits::two_words) return V::to_float(sums[0]);
  return V::fma(V::to_float(sums[0]), V::set(32768.0f), V::to_float(sums[1]));
}

// That, with its scales, added to `total`. `scale` is the group's, 1 where there is but one.
template <class V, Digits digits>
inline typename V::F add_scaled(const Job<V>& job, std::int64_t m, std::int32_t b, const typename V::I* sums,
                                typename V::F scale, typename V::F total) {
  if constexpr (digits != Digits::byte) scale = V::multiply(V::set(job.x_scale[m * job.block_stride + b]), scale);
  return V::fma(exact<V, digits>(sums), scale, total);
}

// Whether the int32 sums of a product with such digits begin, and end, at this block.
template <Digits digits>
constexpr bool opens(const Block& block) {
  return digits != Digits::byte || block.opens;
}
template <Digits digits>
constexpr bool closes(const Block& block) {
  return digits != Digits::byte || block.closes;
}

template <class V>
void quantize(const Job<V>& job, std::int64_t m) {
  const std::int64_t words = m * job.plan.words, blocks = m * job.block_stride;
  std::int16_t* to[2] = {job.x[0] + words, job.x[1] + words};
  std::int32_t* sums[2] = {job.x_sum[0] + blocks, job.x_sum[1] + blocks};
  V::quantize(job.call, job.plan, job.first + m, to, job.x_scale + blocks, sums);
  const std::int32_t times = job.call.zero ? -1 : -job.call.zero_point;
  for (int w = 0; w < count_of(job.digits); w++)
    for (std::int32_t b = 0; b < job.plan.block_count; b++)
      if (job.plan.blocks[b].opens) sums[w][b] *= times;
}

}  // namespace
}  // namespace parco::linear
