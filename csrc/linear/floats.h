// Floats in memory, in plain C++. Included by one translation unit per instruction set, so everything here is unnamed:
// a shared inline function would be kept once by the linker, perhaps in the version that this machine cannot run.
#pragma once
#include <cstring>
#include <limits>

#include "linear/coded.h"

namespace parco::linear {
namespace {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float from_fp16(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Without an fp32 subnormal on the way, which a thread may be set to flush.
  if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

inline std::uint16_t to_fp16(float value) {
  const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<std::uint16_t>(sign | 0x7c00);  // rounds past 65504
  if (magnitude <
      0x38800000)  // below 2^-14: adding 0.5 leaves the value rounded to a multiple of 2^-24 in the low bits
    return static_cast<std::uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000));
  return static_cast<std::uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

inline std::uint16_t to_bf16(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct ByteFloats {
  float of[256];
};

constexpr float power_of_two(int exponent) {
  float power = 1;
  for (; exponent > 0; exponent--) power *= 2;
  for (; exponent < 0; exponent++) power /= 2;
  return power;
}

constexpr ByteFloats byte_floats(Type type) {
  ByteFloats floats{};
  for (int code = 0; code < 256; code++) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if (code == 255 || (type == Type::e4m3 && code == 127))
      floats.of[code] = std::numeric_limits<float>::quiet_NaN();
    else if (type == Type::e8m0)
      floats.of[code] = power_of_two(code - 127);
    else
      floats.of[code] = static_cast<float>(code & 128 ? -1 : 1) *
                        static_cast<float>(exponent ? 8 + mantissa : mantissa) *
                        power_of_two((exponent ? exponent : 1) - 10);
  }
  return floats;
}

constexpr ByteFloats e8m0_floats = byte_floats(Type::e8m0), e4m3_floats = byte_floats(Type::e4m3);

inline float load_float(const void* from, Type type, std::int64_t index) {
  const char* bytes = static_cast<const char*>(from);
  if (type >= Type::e8m0) {
    const std::uint8_t code = static_cast<std::uint8_t>(bytes[index]);
    return type == Type::e8m0 ? e8m0_floats.of[code] : e4m3_floats.of[code];
  }
  if (type == Type::fp32) {
    float value;
    std::memcpy(&value, bytes + 4 * index, 4);
    return value;
  }
  std::uint16_t half;
  std::memcpy(&half, bytes + 2 * index, 2);
  return type == Type::bf16 ? float_of(static_cast<std::uint32_t>(half) << 16) : from_fp16(half);
}

inline void store_float(void* to, Type type, std::int64_t index, float value) {
  char* bytes = static_cast<char*>(to);
  if (type == Type::fp32) {
    std::memcpy(bytes + 4 * index, &value, 4);
    return;
  }
  const std::uint16_t half = type == Type::bf16 ? to_bf16(value) : to_fp16(value);
  std::memcpy(bytes + 2 * index, &half, 2);
}

}  // namespace
}  // namespace parco::linear
