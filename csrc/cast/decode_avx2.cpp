#include "cast/decode_engine.h"

namespace parco::cast {

void decode_avx2(const DecodeCall& call) {
  run_decode(call, [&](std::int64_t n) { decode_columns(call, n, 0); });
}

}  // namespace parco::cast
