// One product with a matrix of stored codes: y = x @ (value of each code * scale).T + bias.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace parco::linear {

// How a number lies in memory. The last two only hold scales.
enum class Type : int { fp32 = 0, bf16 = 1, fp16 = 2, e8m0 = 3, e4m3 = 4 };

inline constexpr int size_of(Type type) { return type == Type::fp32 ? 4 : type < Type::e8m0 ? 2 : 1; }

// How a code becomes a float without looking it up: `listed` codes are looked up.
enum class Element : int { listed = 0, e4m3 = 1, e5m2 = 2, e3m2 = 3 };

enum class Activation : int { none = -1, silu = 0, gelu = 1, gelu_tanh = 2, relu = 3, relu_squared = 4 };

// What becomes of a product, bias included, before its one rounding: y = activation(product) + addend.
struct Epilogue {
  Activation activation = Activation::none;
  const void* addend = nullptr;  // [rows, outputs] of addend_type, or null; it may be y itself
  Type addend_type = Type::fp32;

  bool any() const { return addend || activation != Activation::none; }
};

// Rows of weights in one panel.
constexpr std::int64_t panel_rows = 16;

// Bits of the first plane of packed codes.
constexpr int low_bits(int bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }
// Codes of one row that lie together, and the dwords that hold them.
constexpr int step_codes(int bits) { return low_bits(bits) == bits ? 32 / bits : 32; }
constexpr int step_dwords(int bits) { return low_bits(bits) == bits ? 1 : bits; }

// Every pointer may have any alignment. Rows are contiguous, one after the other.
//
// Codes that are `packed` lie in panels instead, of 16 rows and whole dwords of their streams: dword d of row r of a
// panel is its dword 16 d + r. So do the scales and zeros of a panel, [group][row], where every row has its own and
// more than one of them. The last panel is whole; what it holds past the last row may be anything finite.
//
// The stream of a row is as it was for codes of 2, 4 and 8 bits. 32 codes of 3, 5 or 6 bits become planes: first the
// low 2 bits (of 3) or 4 bits of all in a stream, then what is left of them, so that one shift brings 4 codes to their
// place: byte t of vector i (even and odd codes of a dword of 8; every fourth of a dword of 16) has its field at bit 8
// t + i * left % 8 of dword i * left / 8.
struct CodedCall {
  const void* x;              // [rows, columns] of x_type
  const std::uint8_t* codes;  // [outputs, ceil(columns * bits / 8)], each row an LSB-first bit stream
  const float* values;        // [2^bits]: the number that a code stands for, but for `zero`
  const std::uint8_t* table;  // [64], or null: (table[code] - zero_point) * unit is that number, up to 6 bits, repeated
  const void* scale;          // scales[n / block_rows * scale_stride + k / group] of scale_type
  const std::uint8_t* zero;   // the same, subtracted from codes that are numbers themselves; null: zero_point
  const float* factor;        // a factor of every scale, or null
  const void* bias;           // [outputs] of bias_type, or null
  void* y;                    // [rows, outputs] of y_type
  std::int64_t rows, outputs, columns, group, block_rows, scale_stride;
  float unit;
  int zero_point, bits, threads;
  bool packed;
  bool int8;  // x is quantized to int8 per row, in the integer products
  Element element;
  Type x_type, scale_type, bias_type;
  Type y_type = x_type;
  Epilogue after{};
  // [rows, groups], or null. Under these x holds codes of 4 bits of the same table, [rows, ceil(columns / 2)], and no
  // numbers: products of bytes.
  const float* x_scale = nullptr;

  float scale_factor() const {
    float found = 1.0f;
    if (factor) std::memcpy(&found, factor, sizeof(found));
    return found;
  }
  bool packed_scales() const { return packed && block_rows == 1 && scale_stride > 1; }
  // Where the scale of row n and group g is.
  std::int64_t scale_index(std::int64_t n, std::int64_t g) const {
    if (packed_scales()) return (n / panel_rows * scale_stride + g) * panel_rows + n % panel_rows;
    return n / block_rows * scale_stride + g;
  }
  // Where the packed codes of row n, and of those after it, begin.
  const std::uint8_t* packed_codes(std::int64_t n) const {
    return codes + (n / panel_rows * (columns * bits / 32) * panel_rows + n % panel_rows) * 4;
  }
  // Code k of row n of packed codes.
  std::uint32_t packed_code(std::int64_t n, std::int64_t k) const {
    const std::int64_t first = n / panel_rows * (columns * bits / 32);
    const auto bits_at = [&](std::int64_t dword, std::int64_t bit, int width) {
      std::uint32_t value;
      std::memcpy(&value, codes + ((first + dword) * panel_rows + n % panel_rows) * 4, 4);
      return value >> bit & ((1u << width) - 1);
    };
    const int low = low_bits(bits), left = bits - low;
    if (!left) return bits_at(k * bits / 32, k * bits % 32, bits);
    const std::int64_t run = k / 32 * bits, c = k % 32, in_byte = 8 / low, in_dword = 32 / low;
    const std::int64_t byte = c % in_dword / in_byte, vector = c / in_dword * in_byte + c % in_byte;
    const std::int64_t high = run + low + vector * left / 8;
    return bits_at(run + c * low / 32, c * low % 32, low) | bits_at(high, 8 * byte + vector * left % 8, left) << low;
  }
};

// Those that call one another, from the innermost out: each has memory of its own.
enum class Caller : int { kernel, chain, layer, experts };

// Memory of the calling thread that only grows and is reused by the caller's next call; aligned to 64 bytes. Throws
// std::bad_alloc.
void* scratch(std::size_t bytes, Caller caller = Caller::kernel);

inline std::size_t rounded(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// What one thread costs to wake is paid back by about this many bytes of weights read, or products of as many codes
// times 4 rows.
constexpr std::int64_t worth_a_thread = 96 * 1024;

}  // namespace parco::linear
