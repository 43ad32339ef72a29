#include "linear/panels.h"

#include <algorithm>
#include <type_traits>

namespace parco::linear {
namespace {

// Where the two parts of each of 32 codes lie in planes: bit b of dword d is 32 d + b.
struct Places {
  int low[32], high[32];
};

constexpr Places places_of(int bits) {
  Places places{};
  const int low = low_bits(bits), left = bits - low, in_byte = 8 / low, in_dword = 32 / low;
  for (int c = 0; c < 32; c++) {
    const int byte = c % in_dword / in_byte, vector = c / in_dword * in_byte + c % in_byte;
    places.low[c] = c * low;
    places.high[c] = 32 * (low + vector * left / 8) + 8 * byte + vector * left % 8;
  }
  return places;
}

// A step of a row (step_codes) as it lies in a panel, and back. The loops are unrolled so that the planes stay in
// registers.
template <int bits>
void cut(const std::uint8_t* row, std::uint32_t* found) {
  if constexpr (step_dwords(bits) == 1) {
    std::memcpy(found, row, 4);
  } else {
    constexpr int low = low_bits(bits);
    constexpr Places places = places_of(bits);
    std::uint32_t planes[bits] = {};
#pragma GCC unroll 4
    for (int start = 0; start < 32; start += 8) {
      std::uint64_t window = 0;
      std::memcpy(&window, row + start * bits / 8, bits);
#pragma GCC unroll 8
      for (int c = start; c < start + 8; c++) {
        const std::uint32_t code = static_cast<std::uint32_t>(window >> (c - start) * bits);
        planes[places.low[c] / 32] |= (code & ((1u << low) - 1)) << places.low[c] % 32;
        planes[places.high[c] / 32] |= (code >> low & ((1u << (bits - low)) - 1)) << places.high[c] % 32;
      }
    }
    std::memcpy(found, planes, sizeof(planes));
  }
}

template <int bits>
void join(const std::uint32_t* found, std::uint8_t* row) {
  if constexpr (step_dwords(bits) == 1) {
    std::memcpy(row, found, 4);
  } else {
    constexpr int low = low_bits(bits);
    constexpr Places places = places_of(bits);
#pragma GCC unroll 4
    for (int start = 0; start < 32; start += 8) {
      std::uint64_t window = 0;
#pragma GCC unroll 8
      for (int c = start; c < start + 8; c++) {
        const std::uint32_t first = found[places.low[c] / 32] >> places.low[c] % 32 & ((1u << low) - 1);
        const std::uint32_t second = found[places.high[c] / 32] >> places.high[c] % 32 & ((1u << (bits - low)) - 1);
        window |= static_cast<std::uint64_t>(first | second << low) << (c - start) * bits;
      }
      std::memcpy(row + start * bits / 8, &window, bits);
    }
  }
}

// f(panel) on several threads.
template <class F>
void each_panel(std::int64_t outputs, std::int64_t bytes, int threads, const F& f) {
  const std::int64_t panels = (outputs + panel_rows - 1) / panel_rows;
  threads = static_cast<int>(std::clamp<std::int64_t>(bytes / worth_a_thread, 1, threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++)
    for (std::int64_t p = panels * t / threads; p < panels * (t + 1) / threads; p++) f(p);
}

template <int bits>
void pack(const std::uint8_t* rows, std::uint8_t* panels, std::int64_t outputs, std::int64_t columns, int threads) {
  constexpr std::int64_t step = step_dwords(bits);
  const std::int64_t dwords = columns * bits / 32;
  each_panel(outputs, outputs * dwords * 4, threads, [&](std::int64_t p) {
    std::uint8_t* panel = panels + p * dwords * panel_rows * 4;
    const std::int64_t count = std::min(panel_rows, outputs - p * panel_rows);
    for (std::int64_t d = 0; d < dwords; d += step) {
      for (std::int64_t r = 0; r < panel_rows; r++) {
        std::uint32_t found[step] = {};
        if (r < count) cut<bits>(rows + ((p * panel_rows + r) * dwords + d) * 4, found);
        for (std::int64_t i = 0; i < step; i++) std::memcpy(panel + ((d + i) * panel_rows + r) * 4, found + i, 4);
      }
    }
  });
}

template <int bits>
void unpack(const std::uint8_t* panels, std::uint8_t* rows, std::int64_t outputs, std::int64_t columns, int threads) {
  constexpr std::int64_t step = step_dwords(bits);
  const std::int64_t dwords = columns * bits / 32;
  each_panel(outputs, outputs * dwords * 4, threads, [&](std::int64_t p) {
    const std::uint8_t* panel = panels + p * dwords * panel_rows * 4;
    for (std::int64_t r = 0; r < std::min(panel_rows, outputs - p * panel_rows); r++) {
      for (std::int64_t d = 0; d < dwords; d += step) {
        std::uint32_t found[step];
        for (std::int64_t i = 0; i < step; i++) std::memcpy(found + i, panel + ((d + i) * panel_rows + r) * 4, 4);
        join<bits>(found, rows + ((p * panel_rows + r) * dwords + d) * 4);
      }
    }
  });
}

// f(bits) with the bits as a constant.
template <class F>
void with_bits(int bits, const F& f) {
  if (bits == 3) return f(std::integral_constant<int, 3>{});
  if (bits == 5) return f(std::integral_constant<int, 5>{});
  if (bits == 6) return f(std::integral_constant<int, 6>{});
  f(std::integral_constant<int, 4>{});  // whole dwords, whatever they hold
}

}  // namespace

void pack_codes(const std::uint8_t* rows, std::uint8_t* panels, std::int64_t outputs, std::int64_t columns, int bits,
                int threads) {
  with_bits(bits, [&](auto width) {
    pack<width()>(rows, panels, outputs, step_dwords(bits) == 1 ? columns * bits / 4 : columns, threads);
  });
}

void unpack_codes(const std::uint8_t* panels, std::uint8_t* rows, std::int64_t outputs, std::int64_t columns, int bits,
                  int threads) {
  with_bits(bits, [&](auto width) {
    unpack<width()>(panels, rows, outputs, step_dwords(bits) == 1 ? columns * bits / 4 : columns, threads);
  });
}

}  // namespace parco::linear
