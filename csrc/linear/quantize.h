// One row of x as 16-bit words, or bytes, in plain C++. Everything is unnamed (see floats.h).
#pragma once
#include "linear/floats.h"
#include "linear/int.h"

namespace parco::linear {
namespace {

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
constexpr int paired(int i, int unit) { return 2 * (i % (unit / 2)) + i / (unit / 2); }

// Row `row` of x: words[0] (and words[1] when x is fp32), one scale per block and the sums of each block's words.
// A block that holds inf or NaN gets the scale NaN, so the whole row of y becomes NaN.
template <bool Paired>
void quantize_row(const CodedCall& call, const Plan& plan, std::int64_t row, std::int16_t* const* words, float* scales,
                  std::int32_t* const* sums) {
  const int word_count = count_of(digits_of(call));
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

// The scale of a row of int8 from the bit pattern of its largest magnitude; NaN where the row has inf or NaN.
inline float row_scale(std::uint32_t largest) {
  return largest < infinity_bits ? float_of(largest) / 127.0f : float_of(nan_bits);
}

// A value's int8 code. A scale that underflows to 0 makes every number 0, so the codes do too.
inline std::int32_t byte_of(float value, float scale) {
  if (!(scale > 0)) return 0;
  const float scaled = value / scale;  // beyond 127 where the scale is subnormal
  return nearest(scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled);
}

// Row `row` of x as int8, each a word for products of words: their scale, and at blocks that open a sum the sum of its
// bytes.
template <bool Paired>
void quantize_row_to_bytes(const CodedCall& call, const Plan& plan, std::int64_t row, std::int16_t* words, float* scale,
                           std::int32_t* sums) {
  std::uint32_t largest = 0;
  for (std::int64_t k = 0; k < call.columns; k++) {
    const std::uint32_t magnitude = bits_of(load_float(call.x, call.x_type, row * call.columns + k)) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = row_scale(largest);
  std::int32_t open = 0;
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    if (block.opens) sums[open = b] = 0;
    for (int i = 0; i < block.dwords * plan.unit; i++) {
      const int at = Paired ? block.k + i / plan.unit * plan.unit + paired(i % plan.unit, plan.unit) : block.k + i;
      const std::int32_t code =
          i < block.length ? byte_of(load_float(call.x, call.x_type, row * call.columns + block.k + i), *scale) : 0;
      words[at] = static_cast<std::int16_t>(code);
      sums[open] += code;
    }
  }
}

}  // namespace
}  // namespace parco::linear
