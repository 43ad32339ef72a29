#include <algorithm>

#include "embedding/embedding.h"
#include "linear/float.h"
#include "linear/floats.h"

namespace parco::embedding {

std::int64_t embedding_generic(const linear::CodedCall& matrix, const std::int64_t* indices) {
  const auto index = [&](std::int64_t m) {
    std::int64_t found;
    std::memcpy(&found, indices + m, sizeof(found));
    return found;
  };
  for (std::int64_t m = 0; m < matrix.rows; m++)
    if (index(m) < 0 || index(m) >= matrix.outputs) return m;
  const std::int64_t columns = matrix.columns;
  const int threads = static_cast<int>(std::clamp<std::int64_t>(matrix.rows * columns >> 17, 1, matrix.threads));
  const bool direct = matrix.x_type == linear::Type::fp32 && reinterpret_cast<std::uintptr_t>(matrix.y) % 4 == 0;
  float* held =
      direct ? nullptr : static_cast<float*>(linear::scratch(static_cast<std::size_t>(columns * threads) * 4));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    for (std::int64_t m = matrix.rows * t / threads; m < matrix.rows * (t + 1) / threads; m++) {
      float* row = direct ? static_cast<float*>(matrix.y) + m * columns : held + t * columns;
      linear::expand_row(matrix, index(m), row);
      if (direct) continue;
      for (std::int64_t k = 0; k < columns; k++) linear::store_float(matrix.y, matrix.x_type, m * columns + k, row[k]);
    }
  }
  return -1;
}

}  // namespace parco::embedding
