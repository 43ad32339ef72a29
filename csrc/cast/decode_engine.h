// Decoding in plain C++: eight codes at a time are cut from their bytes and looked up. Unnamed: see cast_engine.h.
#pragma once
#include "cast/amax_engine.h"
#include "cast/decode.h"

namespace parco::cast {
namespace {

inline float scale_of(const DecodeCall& call, std::int64_t at) {
  if (!call.scale) return 1.0f;
  const float scale = load_float(call.scale, call.scale_type, at);
  return call.factor ? scale * load_float(call.factor, Type::fp32, 0) : scale;
}

// Columns [first, columns) of row n; `first` is a multiple of 8.
inline void decode_columns(const DecodeCall& call, std::int64_t n, std::int64_t first) {
  const std::int64_t row_bytes = (call.columns * call.bits + 7) / 8, end = call.columns;
  const std::uint8_t* row = call.codes + n * row_bytes;
  const std::uint64_t mask = (1u << call.bits) - 1;
  const std::int64_t at = n / call.block_rows * call.scale_stride;
  std::int64_t group = -1;
  float scale = 1.0f;
  int zero = 0;
  for (std::int64_t k = first; k < end; k += 8) {
    const std::int64_t byte = k * call.bits / 8;
    std::uint64_t window = 0;
    std::memcpy(&window, row + byte, static_cast<std::size_t>(std::min<std::int64_t>(call.bits, row_bytes - byte)));
    for (int i = 0; i < std::min<std::int64_t>(8, end - k); i++) {
      if ((k + i) / call.group != group) {
        group = (k + i) / call.group;
        scale = scale_of(call, at + group);
        if (call.zero) zero = call.zero[at + group];
      }
      const std::uint64_t code = window >> i * call.bits & mask;
      const float number = call.zero ? static_cast<float>(static_cast<int>(code) - zero) : call.values[code];
      linear::store_float(call.y, call.y_type, n * call.columns + k + i, call.scale ? number * scale : number);
    }
  }
}

// `row(n)` decodes row n.
template <class Row>
inline void run_decode(const DecodeCall& call, const Row& row) {
  const int threads = threads_for(call.rows * call.columns, call.threads);
  if (threads == 1) {  // without a team of one, which costs as much as decoding a row
    for (std::int64_t n = 0; n < call.rows; n++) row(n);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (std::int64_t n = 0; n < call.rows; n++) row(n);
}

}  // namespace
}  // namespace parco::cast
