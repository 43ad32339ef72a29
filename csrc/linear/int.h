// y = x @ ((u - z) * scale).T + bias, over integer codes of 2 to 8 bits, computed in integers.
//
// x is cut along k into blocks that never straddle a scale of the weights and hold at most 128 values. Each row of a
// block gets a power-of-two scale and one 16-bit word per value (bf16, fp16) or two (fp32). The products of words and
// codes are summed exactly in int32; a block's sum is then turned into fp32 and added to the row's fp32 accumulator by
// one fma, in ascending k. Nothing depends on the order inside a block, so every instruction set, batch size and thread
// count gives the same bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace parco::linear {

enum class Type : int { fp32 = 0, bf16 = 1, fp16 = 2 };

inline constexpr int size_of(Type type) { return type == Type::fp32 ? 4 : 2; }

// Every pointer may have any alignment. Rows are contiguous, one after the other.
struct IntCall {
  const void* x;  // [rows, columns] of x_type
  const std::uint8_t*
      codes;          // [outputs, ceil(columns * bits / 8)], each row an LSB-first bit stream of unsigned codes u
  const void* scale;  // [outputs, groups] of scale_type, or one value for all when scale_stride is 0
  const std::uint8_t* zero;  // [outputs, groups], or null: z = 2^(bits - 1)
  const void* bias;          // [outputs] of bias_type, or null
  void* y;                   // [rows, outputs] of x_type
  std::int64_t rows, outputs, columns, group, scale_stride;
  int bits, threads;
  Type x_type, scale_type, bias_type;
};

void int_generic(const IntCall& call);
void int_avx2(const IntCall& call);
void int_avx512(const IntCall& call);
void int_amx(const IntCall& call);
// int_amx with the tile instructions written out in C++: for tests on machines without them.
void int_amx_emulated(const IntCall& call);

// The blocks of k and how they lie in memory. A "dword" is what one 32-bit lane holds at a time: 8 codes of up to 4
// bits as nibbles, or 4 wider ones as bytes; `pieces` are runs of whole blocks of at most 32 dwords, the unit in which
// weights are read.
struct Block {
  std::int32_t k, length, group, dword, dwords;
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

// Memory of the calling thread that only grows and is reused by its next call; aligned to 64 bytes. Throws
// std::bad_alloc.
void* scratch(std::size_t bytes);
std::size_t plan_bytes(const IntCall& call);
Plan make_plan(const IntCall& call, void* memory);

}  // namespace parco::linear
