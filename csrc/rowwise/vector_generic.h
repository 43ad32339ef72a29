// One number to a vector, for rowwise_engine.h and what is made of it. Unnamed: see linear/floats.h.
#pragma once
#include "linear/generic.h"

namespace parco::rowwise {
namespace {

using linear::Type;

struct V1 : linear::generic::Arithmetic {
  using Arithmetic::load, Arithmetic::store;
  template <Type type>
  static F load(const void* from, std::int64_t index, int) {
    return linear::load_float(from, type, index);
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int, F value) {
    linear::store_float(to, type, index, value);
  }
  template <Type type>
  static F rounded(F value) {
    char held[4];
    linear::store_float(held, type, 0, value);
    return linear::load_float(held, type, 0);
  }
};

}  // namespace
}  // namespace parco::rowwise
