#include "cast/fingerprint.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace parco::cast {
namespace {

constexpr std::uint64_t first = 0x9E3779B185EBCA87u, second = 0xC2B2AE3D27D4EB4Fu;
constexpr std::int64_t chunk = 1 << 20;
constexpr int lanes = 4;

std::uint64_t mixed(std::uint64_t sum, std::uint64_t word) {
  sum += word * second;
  return (sum << 31 | sum >> 33) * first;
}

std::uint64_t word_at(const std::uint8_t* bytes, std::int64_t count) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, static_cast<std::size_t>(std::min<std::int64_t>(count, 8)));
  return word;
}

std::uint64_t of_chunk(const std::uint8_t* bytes, std::int64_t count) {
  std::uint64_t sums[lanes] = {first + second, second, 0, ~first};
  std::int64_t i = 0;
  for (; i + 8 * lanes <= count; i += 8 * lanes)
    for (int lane = 0; lane < lanes; lane++) sums[lane] = mixed(sums[lane], word_at(bytes + i + 8 * lane, 8));
  std::uint64_t found = static_cast<std::uint64_t>(count);
  for (const std::uint64_t sum : sums) found = mixed(found, sum);
  for (; i < count; i += 8) found = mixed(found, word_at(bytes + i, count - i));
  return found;
}

}  // namespace

std::uint64_t fingerprint(const std::uint8_t* bytes, std::int64_t count, int threads) {
  const std::int64_t chunks = (count + chunk - 1) / chunk;
  std::vector<std::uint64_t> found(static_cast<std::size_t>(chunks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (std::int64_t i = 0; i < chunks; i++)
    found[static_cast<std::size_t>(i)] = of_chunk(bytes + i * chunk, std::min(chunk, count - i * chunk));
  std::uint64_t whole = static_cast<std::uint64_t>(count);
  for (const std::uint64_t each : found) whole = mixed(whole, each);
  return whole ^ whole >> 29;
}

}  // namespace parco::cast
