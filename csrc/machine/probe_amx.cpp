#include <immintrin.h>

#include <cstring>

#include "machine/probe.h"

namespace parco {
namespace {

// A 2x2 tile of tiles: two of A and two of B loaded for four products, all eight registers in use. A tile is 16 rows of
// 64 bytes.
constexpr int tile_bytes = 1024;
constexpr int step = 4 * tile_bytes;
constexpr int steps = probe_operand_bytes / step;

struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64);

// GCC's _tile_loadconfig declares only 8 bytes as read, so the optimiser may drop the rest of the configuration; this
// one declares all.
void configure() {
  const Configuration configuration;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
}

std::uint64_t finish() {
  alignas(64) std::uint8_t sums[4][tile_bytes];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  _tile_release();
  std::uint64_t total = 0;
  for (const auto& sum : sums) {
    std::uint64_t word;
    std::memcpy(&word, sum, 8);
    total ^= word;
  }
  return total;
}

// The tile intrinsics take register numbers as literals, hence a macro: `multiply` is the instruction's intrinsic.
#define PARCO_TILE_LOOP(multiply)                               \
  configure();                                                  \
  _tile_zero(0);                                                \
  _tile_zero(1);                                                \
  _tile_zero(2);                                                \
  _tile_zero(3);                                                \
  for (std::int64_t round = 0; round < rounds; ++round) {       \
    const auto* p = static_cast<const std::uint8_t*>(operands); \
    for (int i = 0; i < steps; ++i, p += step) {                \
      _tile_loadd(4, p, 64);                                    \
      _tile_loadd(5, p + tile_bytes, 64);                       \
      _tile_loadd(6, p + 2 * tile_bytes, 64);                   \
      _tile_loadd(7, p + 3 * tile_bytes, 64);                   \
      multiply(0, 4, 6);                                        \
      multiply(1, 4, 7);                                        \
      multiply(2, 5, 6);                                        \
      multiply(3, 5, 7);                                        \
    }                                                           \
  }                                                             \
  return finish()

std::uint64_t bf16(const void* operands, std::int64_t rounds) { PARCO_TILE_LOOP(_tile_dpbf16ps); }

std::uint64_t int8(const void* operands, std::int64_t rounds) { PARCO_TILE_LOOP(_tile_dpbssd); }

#undef PARCO_TILE_LOOP

}  // namespace

// A product of two tiles: 16 x 16 sums of 32 bf16 or 64 int8 products.
const Products amx_bf16 = {bf16, std::int64_t{steps} * 4 * 16 * 16 * 32};
const Products amx_int8 = {int8, std::int64_t{steps} * 4 * 16 * 16 * 64};

}  // namespace parco
