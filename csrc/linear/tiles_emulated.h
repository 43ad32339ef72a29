// The tile instructions written in C++, as the manual defines them, so that what is built on them is tested on machines
// without AMX. Nothing chooses kernels that use them.
#pragma once
#include <cmath>
#include <cstring>

#include "linear/floats.h"
#include "linear/tiles.h"

namespace parco::linear {
namespace {

struct Registers {
  TileConfig config;
  std::uint8_t bytes[8][16][64];
};

thread_local Registers held;

struct Emulation {
  static void configure(const TileConfig& config) {
    held.config = config;
    std::memset(held.bytes, 0, sizeof(held.bytes));
  }
  static void release() { held.config = {}; }
  template <int tile>
  static void zero() {
    std::memset(held.bytes[tile], 0, sizeof(held.bytes[tile]));
  }
  template <int tile>
  static void load(const void* from, std::int64_t stride) {
    zero<tile>();
    for (int r = 0; r < held.config.rows[tile]; r++)
      std::memcpy(held.bytes[tile][r], static_cast<const char*>(from) + r * stride, held.config.row_bytes[tile]);
  }
  template <int tile>
  static void store(void* to, std::int64_t stride) {
    for (int r = 0; r < held.config.rows[tile]; r++)
      std::memcpy(static_cast<char*>(to) + r * stride, held.bytes[tile][r], held.config.row_bytes[tile]);
  }
  template <int sum, int bytes, int codes>
  static void multiply() {
    for (int m = 0; m < held.config.rows[sum]; m++) {
      for (int n = 0; n < held.config.row_bytes[sum] / 4; n++) {
        std::int32_t total;
        std::memcpy(&total, held.bytes[sum][m] + 4 * n, 4);
        for (int k = 0; k < held.config.row_bytes[bytes]; k++)
          total += static_cast<std::int8_t>(held.bytes[bytes][m][k]) * held.bytes[codes][k / 4][4 * n + k % 4];
        std::memcpy(held.bytes[sum][m] + 4 * n, &total, 4);
      }
    }
  }
  // Even and odd columns are summed apart by fused multiply-adds, both sums added, and that to the tile. What is
  // subnormal counts as zero, on the way in and out; the processor also flushes what becomes so in between.
  template <int sum, int left, int right>
  static void multiply_bf16() {
    float b[16][2][16];
    const int pairs = held.config.row_bytes[left] / 4, columns = held.config.row_bytes[sum] / 4;
    for (int k = 0; k < pairs; k++)
      for (int n = 0; n < columns; n++)
        for (int h = 0; h < 2; h++) b[k][h][n] = flushed(load_float(held.bytes[right][k], Type::bf16, 2 * n + h));
    for (int m = 0; m < held.config.rows[sum]; m++) {
      float part[2][16] = {}, total[16];
      for (int k = 0; k < pairs; k++) {
        for (int h = 0; h < 2; h++) {
          const float a = flushed(load_float(held.bytes[left][m], Type::bf16, 2 * k + h));
          for (int n = 0; n < columns; n++) part[h][n] = std::fma(a, b[k][h][n], part[h][n]);
        }
      }
      std::memcpy(total, held.bytes[sum][m], sizeof(total));
      for (int n = 0; n < columns; n++) total[n] = flushed(total[n] + flushed(part[0][n] + part[1][n]));
      std::memcpy(held.bytes[sum][m], total, sizeof(total));
    }
  }

 private:
  static float flushed(float value) {
    const std::uint32_t bits = bits_of(value);
    return bits & 0x7f800000 ? value : float_of(bits & 0x80000000);
  }
};

}  // namespace
}  // namespace parco::linear
