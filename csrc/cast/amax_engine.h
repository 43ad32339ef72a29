// Greatest magnitudes in plain C++, written for the compiler to vectorise. Unnamed: see cast_engine.h.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cast/cast.h"
#include "linear/floats.h"

namespace parco::cast {
namespace {

using linear::bits_of;
using linear::float_of;
using linear::load_float;
using linear::size_of;

constexpr std::uint32_t infinity = 0x7f800000u;

inline int threads_for(std::int64_t elements, int threads) {
  constexpr std::int64_t worth_a_thread = 1 << 15;
  return static_cast<int>(std::clamp<std::int64_t>(elements / worth_a_thread, 1, threads));
}

// Magnitudes are compared as their patterns: those of NaN are the greatest. `Count` is a number, or a constant for the
// compiler to know the length.
template <class Bits, class Count>
inline Bits greatest_pattern(const char* from, Count count) {
  constexpr Bits magnitude = static_cast<Bits>(~Bits{0}) >> 1;
  Bits most = 0;
#pragma omp simd reduction(max : most)
  for (std::int64_t i = 0; i < count; i++) {
    Bits bits;
    std::memcpy(&bits, from + static_cast<std::int64_t>(sizeof(Bits)) * i, sizeof(Bits));
    most = std::max(most, static_cast<Bits>(bits & magnitude));
  }
  return most;
}

template <class Bits>
inline Bits greatest_of(const char* from, std::int64_t count) {
  if (count == 16) return greatest_pattern<Bits>(from, std::integral_constant<std::int64_t, 16>{});
  if (count == 32) return greatest_pattern<Bits>(from, std::integral_constant<std::int64_t, 32>{});
  return greatest_pattern<Bits>(from, count);
}

inline std::uint32_t group_amax(const void* x, Type type, std::int64_t index, std::int64_t count) {
  const char* from = static_cast<const char*>(x) + index * size_of(type);
  if (type == Type::fp32) return greatest_of<std::uint32_t>(from, count);
  const std::uint16_t most = greatest_of<std::uint16_t>(from, count);  // 16-bit patterns order as their magnitudes too
  return bits_of(load_float(&most, type, 0));
}

// `amax` is group_amax, or what finds the same faster.
template <class Amax>
inline void run_amax(const AmaxCall& call, const Amax& amax) {
  const std::int64_t groups = (call.columns + call.group - 1) / call.group;
  const int threads = threads_for(call.rows * call.columns, call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t n = 0; n < call.rows; n++) {
    for (std::int64_t g = 0; g < groups; g++) {
      const std::int64_t k = g * call.group, count = std::min(call.group, call.columns - k);
      const std::uint32_t most = amax(call.x, call.x_type, n * call.columns + k, count);
      call.amax[n * groups + g] = float_of(most > infinity ? 0x7fc00000u : most);
    }
  }
}

// See cast.h. A row with infinities or NaN is looked at once more, group by group.
template <class Amax>
inline void run_greatest(const AmaxCall& call, const Amax& amax) {
  const int threads = threads_for(call.rows * call.columns, call.threads);
  std::uint32_t greatest = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(max : greatest) if (threads > 1)
  for (std::int64_t n = 0; n < call.rows; n++) {
    const std::uint32_t most = amax(call.x, call.x_type, n * call.columns, call.columns);
    if (most < infinity) {
      greatest = std::max(greatest, most);
      continue;
    }
    for (std::int64_t k = 0; k < call.columns; k += call.group) {
      const std::int64_t count = std::min(call.group, call.columns - k);
      const std::uint32_t of_group = group_amax(call.x, call.x_type, n * call.columns + k, count);
      if (of_group <= infinity) greatest = std::max(greatest, std::min(of_group, infinity - 1));
    }
  }
  *call.amax = float_of(greatest);
}

}  // namespace
}  // namespace parco::cast
