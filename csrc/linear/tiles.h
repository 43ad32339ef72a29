// What kernels on AMX tiles share. T supplies the tile instructions: the processor's (tiles_amx.h), or the same written
// in C++ (tiles_emulated.h), through which they are tested on machines without AMX. Everything is unnamed: see
// floats.h.
#pragma once
#include <cstdint>

namespace parco::linear {
namespace {

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};

}  // namespace
}  // namespace parco::linear
