// Plain C++: what the compiler makes of a dot product for the x86-64 baseline.
#include <cstring>

#include "machine/probe.h"

namespace parco {
namespace {

constexpr int lanes = 32;  // independent sums, enough to hide the latency of an addition

template <typename Stored, typename Sum, typename Widen>
std::uint64_t dot(const void* operands, std::int64_t rounds, const Widen& widen) {
  constexpr int count = probe_operand_bytes / sizeof(Stored) / 2;
  const auto* a = static_cast<const Stored*>(operands);
  const Stored* b = a + count;
  Sum sums[lanes] = {};
  for (std::int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < count; i += lanes)
      for (int j = 0; j < lanes; ++j) sums[j] += widen(a[i + j]) * widen(b[i + j]);
  Sum total = 0;
  for (const Sum s : sums) total += s;
  std::uint64_t bits = 0;
  std::memcpy(&bits, &total, sizeof(Sum));
  return bits;
}

std::uint64_t fp32(const void* operands, std::int64_t rounds) {
  return dot<float, float>(operands, rounds, [](float x) { return x; });
}

std::uint64_t bf16(const void* operands, std::int64_t rounds) {
  return dot<std::uint16_t, float>(operands, rounds, [](std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  });
}

// Unsigned sums: they wrap around, which is defined, and only their speed matters.
std::uint64_t int16(const void* operands, std::int64_t rounds) {
  return dot<std::int16_t, std::uint32_t>(operands, rounds,
                                          [](std::int16_t x) { return static_cast<std::uint32_t>(x); });
}

std::uint64_t int8(const void* operands, std::int64_t rounds) {
  return dot<std::int8_t, std::uint32_t>(operands, rounds, [](std::int8_t x) { return static_cast<std::uint32_t>(x); });
}

}  // namespace

const Products generic_fp32 = {fp32, probe_operand_bytes / 8};
const Products generic_bf16 = {bf16, probe_operand_bytes / 4};
const Products generic_int16 = {int16, probe_operand_bytes / 4};
const Products generic_int8 = {int8, probe_operand_bytes / 2};

std::uint64_t generic_read(const std::uint8_t* data, std::size_t bytes) {
  std::uint64_t sums[16] = {};
  for (std::size_t i = 0; i < bytes; i += sizeof sums) {
    std::uint64_t words[16];
    std::memcpy(words, data + i, sizeof words);
    for (int j = 0; j < 16; ++j) sums[j] ^= words[j];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t s : sums) total ^= s;
  return total;
}

}  // namespace parco
