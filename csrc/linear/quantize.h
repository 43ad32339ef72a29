// One row of x as 16-bit words, in plain C++. Included by one translation unit per instruction set, so everything here
// is unnamed: a shared inline function would be kept once by the linker, perhaps in the version that this machine
// cannot run.
#pragma once
#include <cstring>

#include "linear/int.h"

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
  // Normal and subnormal alike: as an fp32 pattern the exponent is 112 too small, which one exact product mends.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
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

inline float load_float(const void* from, Type type, std::int64_t index) {
  const char* bytes = static_cast<const char*>(from);
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

// What a block's words are multiples of, from the largest magnitude's bit pattern: a power of two, so that the division
// is exact.
struct BlockScale {
  float inverse;  // x * inverse is the (high) word before rounding
  float scale;    // one unit of the (low) word
};

// One word: |word| <= 32512, so that it also splits into two signed bytes high * 256 + low. The exponent goes up by one
// where the mantissa is at least 1.984375. Two words: high in units of 2^15, |high| and |low| <= 16384, which is 30
// bits with the sign.
inline BlockScale block_scale(std::uint32_t largest, int words) {
  std::uint32_t exponent = (words == 1 ? largest + 0x20000 : largest) >> 23;
  const std::uint32_t least = words == 1 ? 15 : 29;
  if (exponent < least) exponent = least;
  return {float_of((words == 1 ? 268 - exponent : 267 - exponent) << 23), float_of((exponent - least + 1) << 23)};
}

constexpr std::uint32_t infinity_bits = 0x7f800000;
constexpr std::uint32_t nan_bits = 0x7fc00000;

// Round to nearest even for |value| < 2^22, without asking for a rounding mode.
inline std::int32_t nearest(float value) { return static_cast<std::int32_t>(bits_of(value + 0x1.8p23f) - 0x4b400000u); }

// Where the word of code i of a dword goes: the two words that meet the same shift of the dword are neighbours.
constexpr int paired(int i, int unit) { return unit == 8 ? 2 * (i % 4) + i / 4 : 2 * (i % 2) + i / 2; }

// Row `row` of x: words[0] (and words[1] when x is fp32), one scale per block and the sums of each block's words.
// A block that holds inf or NaN gets the scale NaN, so the whole row of y becomes NaN.
template <bool Paired>
void quantize_row(const IntCall& call, const Plan& plan, std::int64_t row, std::int16_t* const* words, float* scales,
                  std::int32_t* const* sums) {
  const int word_count = call.x_type == Type::fp32 ? 2 : 1;
  float values[longest_block];
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    const int padded = block.dwords * plan.unit;
    std::uint32_t largest = 0;
    for (int i = 0; i < block.length; i++) {
      values[i] = load_float(call.x, call.x_type, row * call.columns + block.k + i);
      const std::uint32_t magnitude = bits_of(values[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    for (int i = block.length; i < padded; i++) values[i] = 0;
    const bool finite = largest < infinity_bits;
    const BlockScale scale = block_scale(finite ? largest : 0, word_count);
    scales[b] = finite ? scale.scale : float_of(nan_bits);
    std::int32_t total[2] = {0, 0};
    for (int i = 0; i < padded; i++) {
      const int at = Paired ? block.k + i / plan.unit * plan.unit + paired(i % plan.unit, plan.unit) : block.k + i;
      const float scaled = finite ? values[i] * scale.inverse : 0.0f;
      const std::int32_t high = nearest(scaled);
      words[0][at] = static_cast<std::int16_t>(high);
      total[0] += high;
      if (word_count == 2) {
        const std::int32_t low = nearest((scaled - static_cast<float>(high)) * 32768.0f);
        words[1][at] = static_cast<std::int16_t>(low);
        total[1] += low;
      }
    }
    for (int w = 0; w < word_count; w++) sums[w][b] = total[w];
  }
}

}  // namespace
}  // namespace parco::linear
