// What tests of fp32 and bf16 tensors share: random numbers, and how many checks there were.
#pragma once
#include <cstring>
#include <random>
#include <vector>

#include "linear/coded.h"

namespace {

using parco::linear::Type;

int failures = 0, checks = 0;
std::mt19937 random_bits(29);

// fp32 or bf16 numbers at an odd address: multiples of `unit` in 8 bits, which both hold exactly.
struct Values {
  Values(std::int64_t count, Type type, float unit = 0x1p-4f)
      : size(type == Type::fp32 ? 4 : 2), block(count * size + 1), exact(count) {
    for (std::int64_t i = 0; i < count; i++) {
      const float value = static_cast<float>(static_cast<int>(random_bits() % 255) - 127) * unit;
      exact[i] = static_cast<double>(value);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(data() + size * i, size == 4 ? static_cast<const void*>(&bits) : &half, size);
    }
  }
  char* data() { return block.data() + 1; }
  double get(std::int64_t i) {
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, data() + size * i, size);
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
  }
  std::size_t size;
  std::vector<char> block;
  std::vector<double> exact;
};

}  // namespace
