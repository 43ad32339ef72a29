#include <algorithm>
#include <cstdlib>
#include <new>

#include "linear/int.h"

namespace parco::linear {
namespace {

struct Aligned {
  void* memory = nullptr;
  std::size_t bytes = 0;
  ~Aligned() { std::free(memory); }
};

}  // namespace

void* scratch(std::size_t bytes, Caller caller) {
  thread_local Aligned held_by[4];
  Aligned& held = held_by[static_cast<int>(caller)];
  if (bytes > held.bytes) {
    std::free(held.memory);
    held = {};
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    held.memory = std::aligned_alloc(64, rounded);
    if (!held.memory) throw std::bad_alloc();
    held.bytes = rounded;
  }
  return held.memory;
}

static std::int64_t most_blocks(const CodedCall& call) {
  const std::int64_t group = std::max<std::int64_t>(1, std::min(call.group, call.columns));
  const std::int64_t in_group = (group + longest_block - 1) / longest_block;
  return (call.columns + group - 1) / group * in_group;
}

std::size_t plan_bytes(const CodedCall& call) {
  return static_cast<std::size_t>(most_blocks(call)) * (sizeof(Block) + sizeof(Piece));
}

Plan make_plan(const CodedCall& call, void* memory, bool straight) {
  Block* blocks = static_cast<Block*>(memory);
  Piece* pieces = reinterpret_cast<Piece*>(blocks + most_blocks(call));
  Plan plan{};
  plan.blocks = blocks;
  plan.pieces = pieces;
  plan.unit = straight ? 32 / low_bits(call.bits) : call.bits <= 4 && !call.table ? 8 : 4;
  plan.row_bytes = (call.columns * call.bits + 7) / 8;
  plan.words = (call.columns + 31) / 32 * 32 + 32;
  for (std::int64_t start = 0; start < call.columns; start += call.group) {
    const std::int64_t end = std::min(start + call.group, call.columns);
    for (std::int64_t k = start; k < end; k += longest_block) {
      Block& block = blocks[plan.block_count++];
      block.k = static_cast<std::int32_t>(k);
      block.length = static_cast<std::int32_t>(std::min<std::int64_t>(longest_block, end - k));
      block.group = plan.groups;
      block.dword = block.k / plan.unit;
      block.dwords = (block.length + plan.unit - 1) / plan.unit;
      block.opens = !call.int8 || (k - start) % longest_sum == 0;
      block.closes = !call.int8 || k + longest_block >= end || (k - start + longest_block) % longest_sum == 0;
    }
    plan.groups++;
  }
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    Piece* piece = plan.piece_count ? pieces + plan.piece_count - 1 : nullptr;
    if (!piece || piece->dwords + blocks[b].dwords > piece_dwords) {
      piece = pieces + plan.piece_count++;
      *piece = {b, b, blocks[b].dword, 0};
    }
    piece->last = b + 1;
    piece->dwords += blocks[b].dwords;
  }
  return plan;
}

}  // namespace parco::linear
