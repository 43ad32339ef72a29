// The tile instructions of the processor. Written as volatile assembly: GCC's tile configuration intrinsic declares
// only 8 of the 64 bytes as read, so the optimiser may drop the rest, and tiles are state that it must not move work
// across.
#pragma once
#include "linear/tiles.h"

namespace parco::linear {
namespace {

struct Processor {
  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  static void release() { asm volatile("tilerelease"); }
  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
  }
  template <int tile>
  static void store(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
  }
  // sum += signed bytes x unsigned bytes
  template <int sum, int bytes, int codes>
  static void multiply() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(bytes), "i"(codes));
  }
  // fp32 sum += rows of bf16 x pairs of rows of bf16, interleaved
  template <int sum, int left, int right>
  static void multiply_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
  }
};

}  // namespace
}  // namespace parco::linear
