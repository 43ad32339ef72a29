// y = x @ ((u - z) * scale).T + bias, over codes of 2 to 8 bits that stand for small integers u, computed in integers.
// A plain integer is its own u; fp4, fp6 and ternary are multiples of one power of two, and a table says which.
//
// x is cut along k into blocks that never straddle a scale of the weights and hold at most 128 values. Each row of a
// block gets a power-of-two scale and one 16-bit word per value (bf16, fp16) or two (fp32). The products of words and
// codes are summed exactly in int32; a block's sum is then turned into fp32 and added to the row's fp32 accumulator by
// one fma, in ascending k. Nothing depends on the order inside a block, so every instruction set, batch size and thread
// count gives the same bits.
//
// Where the call says int8, a value of x becomes one signed byte under the scale of its row: the codes of the format
// int8:row. That scale multiplies a row's sum once, at its end, so blocks of one group are summed on in int32 (up to
// 2^16 columns) and only the groups in fp32: less than half the instructions.
#pragma once
#include "linear/coded.h"

namespace parco::linear {

void int_generic(const CodedCall& call);
void int_avx2(const CodedCall& call);
void int_avx512(const CodedCall& call);
void int_avx512_vbmi(const CodedCall& call);
void int_amx(const CodedCall& call);
// x of 4-bit codes (CodedCall::x_scale).
void int_both_avx512(const CodedCall& call);
void int_both_avx512_vbmi(const CodedCall& call);
// int_amx with the tile instructions written out in C++: for tests on machines without them.
void int_amx_emulated(const CodedCall& call);

// The blocks of k and how they lie in memory. A "dword" is what one 32-bit lane holds at a time: 8 codes of up to 4
// bits as nibbles, or 4 wider ones as bytes, or, where they go from packed memory straight into products, as many as
// there are. `pieces` are runs of whole blocks of at most 32 dwords, the unit in which weights are read.
struct Block {
  std::int32_t k, length, group, dword, dwords;
  bool opens, closes;  // whether an int32 sum begins and ends here
};
struct Piece {
  std::int32_t first, last, dword, dwords;
};
struct Plan {
  const Block* blocks;
  const Piece* pieces;
  std::int32_t block_count, piece_count, unit, groups;
  std::int64_t row_bytes;  // of the codes
  std::int64_t words;      // of one quantized row, with the slack that whole-vector stores need
};

constexpr std::int32_t longest_block = 128;
constexpr std::int32_t piece_dwords = 32;
constexpr std::int32_t longest_sum = 1 << 16;  // of bytes: 255 * 127 * 2^16 < 2^31

// What a value of x becomes: a 16-bit word, two of them, or a signed byte.
enum class Digits { word, two_words, byte };

constexpr int count_of(Digits digits) { return digits == Digits::two_words ? 2 : 1; }

inline Digits digits_of(const CodedCall& call) {
  return call.int8 ? Digits::byte : call.x_type == Type::fp32 ? Digits::two_words : Digits::word;
}

std::size_t plan_bytes(const CodedCall& call);
Plan make_plan(const CodedCall& call, void* memory, bool straight = false);

}  // namespace parco::linear
