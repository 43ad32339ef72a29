// How tensors come from Python: as addresses, 0 for an absent one. What they must be is checked by
// parco.kernels.linear.
#pragma once
#include <nanobind/nanobind.h>

#include "linear/coded.h"

namespace parco::linear {

// Multiply-adds from which a call lets the interpreter go: for smaller ones letting go and taking it again costs as
// much.
constexpr std::int64_t worth_unlocking = 1 << 18;

template <class T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

// What Python settles once of calls of a kind, with the tensors of one of them.
inline CodedCall with_tensors(const CodedCall& settled, std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scale,
                              std::uintptr_t zero, std::uintptr_t factor, std::uintptr_t bias, std::uintptr_t addend,
                              std::uintptr_t y, int threads) {
  static constexpr float one = 1.0f;
  CodedCall call = settled;
  call.x = address<const void>(x);
  call.codes = address<const std::uint8_t>(codes);
  call.scale = scale ? address<const void>(scale) : &one;
  call.zero = address<const std::uint8_t>(zero);
  call.factor = address<const float>(factor);
  call.bias = address<const void>(bias);
  call.after.addend = address<const void>(addend);
  call.y = address<void>(y);
  call.threads = threads;
  return call;
}

template <class Run>
auto unlocked_if(bool worth, const Run& run) {
  if (!worth) return run();
  nanobind::gil_scoped_release released;
  return run();
}

template <class Run>
auto unlocked(const CodedCall& call, const Run& run) {
  return unlocked_if(call.rows * call.outputs * call.columns >= worth_unlocking, run);
}

}  // namespace parco::linear
