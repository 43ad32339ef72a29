// The vector type of AVX-512 for rowwise_engine.h and what is made of it. Unnamed: see linear/floats.h.
#pragma once
#include "cast/philox_avx512.h"
#include "linear/avx512.h"

namespace parco::rowwise {
namespace {

using linear::Type;

struct V512 : linear::avx512::Arithmetic {
  using Random = cast::avx512::Random;

  template <Type type>
  static F rounded(F value) {
    if constexpr (type == Type::bf16) return linear::avx512::widen_bf16(linear::avx512::narrow_bf16(value));
    if constexpr (type == Type::fp16) return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    return value;
  }
};

}  // namespace
}  // namespace parco::rowwise
