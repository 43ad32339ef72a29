// The tile instructions written in C++, as the manual defines them, so that what is built on them is tested on machines
// without AMX. Nothing chooses this kernel.
#include "linear/int_tiles.h"

namespace parco::linear {
namespace {

struct Tiles {
  TileConfig config;
  std::uint8_t bytes[8][16][64];
};

thread_local Tiles held;

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
};

}  // namespace

void int_amx_emulated(const CodedCall& call) { run_tiles<Emulation>(call); }

}  // namespace parco::linear
