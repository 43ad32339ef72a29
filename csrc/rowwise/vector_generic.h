// One number to a vector, for rowwise_engine.h and what is made of it. Unnamed: see linear/floats.h.
#pragma once
#include "cast/philox.h"
#include "linear/generic.h"

namespace parco::rowwise {
namespace {

using linear::Type;

struct V1 : linear::generic::Arithmetic {
  using Random = cast::PlainRandom;

  template <Type type>
  static F rounded(F value) {
    char held[4];
    linear::store_float(held, type, 0, value);
    return linear::load_float(held, type, 0);
  }
};

}  // namespace
}  // namespace parco::rowwise
