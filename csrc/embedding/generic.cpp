#include <algorithm>

#include "embedding/embedding.h"
#include "linear/quantize.h"

namespace parco::embedding {
namespace {

using linear::load_float;
using linear::store_float;

// Eight codes fill whole bytes, so a row is read in windows of eight codes.
void expand_row(const EmbeddingCall& call, std::int64_t index, std::int64_t m) {
  const std::int64_t row_bytes = (call.columns * call.bits + 7) / 8, group = std::min(call.group, call.columns),
                     groups = (call.columns + group - 1) / group;
  const std::uint8_t* codes = call.codes + index * row_bytes;
  const std::uint64_t mask = (1u << call.bits) - 1;
  for (std::int64_t g = 0; g < groups; g++) {
    const float scale = load_float(call.scale, call.scale_type, index * call.scale_stride + g);
    const int zero = call.zero ? call.zero[index * groups + g] : 1 << (call.bits - 1);
    const std::int64_t end = std::min(call.columns, (g + 1) * group);
    for (std::int64_t k = g * group; k < end; k += 8) {
      const std::int64_t start = k * call.bits / 8;
      std::uint64_t window = 0;
      std::memcpy(&window, codes + start,
                  static_cast<std::size_t>(std::min<std::int64_t>(call.bits, row_bytes - start)));
      const int count = static_cast<int>(std::min<std::int64_t>(8, end - k));
      float values[8];
      for (int i = 0; i < count; i++)
        values[i] = static_cast<float>(static_cast<int>(window >> i * call.bits & mask) - zero) * scale;
      for (int i = 0; i < count; i++) store_float(call.y, call.y_type, m * call.columns + k + i, values[i]);
    }
  }
}

}  // namespace

std::int64_t embedding_generic(const EmbeddingCall& call) {
  for (std::int64_t m = 0; m < call.rows; m++)
    if (call.indices[m] < 0 || call.indices[m] >= call.table_rows) return m;
  const int threads = static_cast<int>(std::clamp<std::int64_t>(call.rows * call.columns >> 17, 1, call.threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t m = 0; m < call.rows; m++) expand_row(call, call.indices[m], m);
  return -1;
}

}  // namespace parco::embedding
