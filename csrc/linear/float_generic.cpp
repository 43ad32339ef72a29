// The fp32 product in plain C++, for every format: a row of weights at a time.
#include <algorithm>

#include "linear/float.h"
#include "linear/generic.h"
#include "linear/write.h"

namespace parco::linear {

// Eight codes fill whole bytes, so a row is read in windows of eight codes.
void expand_row(const CodedCall& call, std::int64_t n, float* to) {
  const std::int64_t row_bytes = (call.columns * call.bits + 7) / 8;
  const std::uint8_t* row = call.codes + n * row_bytes;
  const std::uint64_t mask = (1u << call.bits) - 1;
  const float factor = call.scale_factor();
  for (std::int64_t start = 0, group = 0; start < call.columns; start += call.group, group++) {
    const std::int64_t at = call.scale_index(n, group);
    const float scale = load_float(call.scale, call.scale_type, at) * factor;
    const int zero = call.zero ? call.zero[at] : 0;
    const std::int64_t end = std::min(start + call.group, call.columns);
    for (std::int64_t k = start; k < end; k += 8) {
      const std::int64_t byte = k * call.bits / 8;
      std::uint64_t window = 0;
      if (!call.packed)
        std::memcpy(&window, row + byte, static_cast<std::size_t>(std::min<std::int64_t>(call.bits, row_bytes - byte)));
      for (int i = 0; i < std::min<std::int64_t>(8, end - k); i++) {
        const std::uint64_t code = call.packed ? call.packed_code(n, k + i) : window >> i * call.bits & mask;
        to[k + i] = (call.zero ? static_cast<float>(static_cast<int>(code) - zero) : call.values[code]) * scale;
      }
    }
  }
}

void float_generic(const CodedCall& call) {
  constexpr std::int64_t parts = 16, slab_rows = 512;  // partial sums along k; rows of x at a time
  const std::int64_t padded = (call.columns + parts - 1) / parts * parts, slab = std::min(call.rows, slab_rows);
  const std::size_t row_size = rounded(static_cast<std::size_t>(padded) * sizeof(float));
  const std::int64_t work = call.outputs * call.columns * std::max<std::int64_t>(1, call.rows / 4);
  const int threads = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));
  char* memory = static_cast<char*>(scratch(row_size * (slab + threads)));
  for (std::int64_t first = 0; first < call.rows; first += slab) {
    const std::int64_t rows = std::min(slab, call.rows - first);
    for (std::int64_t m = 0; m < rows; m++) {
      float* x = reinterpret_cast<float*>(memory + row_size * m);
      for (std::int64_t k = 0; k < padded; k++)
        x[k] = k < call.columns ? load_float(call.x, call.x_type, (first + m) * call.columns + k) : 0.0f;
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; t++) {
      float* weight = reinterpret_cast<float*>(memory + row_size * (slab + t));
      std::fill(weight, weight + padded, 0.0f);
      for (std::int64_t n = call.outputs * t / threads; n < call.outputs * (t + 1) / threads; n++) {
        expand_row(call, n, weight);
        const float bias = call.bias ? load_float(call.bias, call.bias_type, n) : 0.0f;
        for (std::int64_t m = 0; m < rows; m++) {
          const float* x = reinterpret_cast<const float*>(memory + row_size * m);
          float sums[parts] = {}, sum = 0.0f;
          for (std::int64_t k = 0; k < padded; k += parts)
            for (int i = 0; i < parts; i++) sums[i] += x[k + i] * weight[k + i];
          for (float part : sums) sum += part;
          write<generic::Arithmetic>(call, (first + m) * call.outputs + n, 1, sum + bias);
        }
      }
    }
  }
}

}  // namespace parco::linear
