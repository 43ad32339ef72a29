#include "experts/experts.h"

#include <algorithm>
#include <cstring>

namespace parco::experts {
namespace {

// Rows at a time, so that what they are multiplied to does not grow with a prompt, and enough of them for every block
// to repay reading it.
constexpr std::int64_t most_bytes = 64 << 20, least_rows = 256;

std::size_t bytes_of(std::int64_t numbers, Type type) {
  return static_cast<std::size_t>(numbers) * static_cast<std::size_t>(linear::size_of(type));
}

// One after the other, each at an address that vectors like.
char* take(char*& next, std::size_t bytes) {
  char* found = next;
  next += linear::rounded(bytes);
  return found;
}

// What a slab of rows takes of memory.
struct Sizes {
  std::size_t places, starts, order, gathered, room, results;
  std::size_t total() const {
    return linear::rounded(places) + linear::rounded(starts) + linear::rounded(order) + linear::rounded(gathered) +
           linear::rounded(room) + linear::rounded(results);
  }
};

// Results for a slab of rows, those of one block together: where each lies, and which row and block it is of.
void run_slab(const Experts& experts, const Routes& routes, const char* x, char* y, std::int64_t rows, int threads,
              const Sizes& sizes, char* memory) {
  const std::int64_t pairs = rows * routes.choices, count = static_cast<std::int64_t>(experts.blocks.size());
  const std::size_t row_bytes = bytes_of(experts.columns, experts.type);
  auto* const places = reinterpret_cast<std::int64_t*>(take(memory, sizes.places));
  auto* const starts = reinterpret_cast<std::int64_t*>(take(memory, sizes.starts));
  auto* const order = reinterpret_cast<std::int64_t*>(take(memory, sizes.order));
  char *const gathered = take(memory, sizes.gathered), *const room = take(memory, sizes.room);
  char* const results = take(memory, sizes.results);

  const auto is_block = [&](std::int64_t block) { return block >= 0 && block < count; };
  std::fill_n(starts, count + 1, 0);
  for (std::int64_t i = 0; i < pairs; i++)
    if (is_block(routes.blocks[i])) starts[routes.blocks[i] + 1]++;
  for (std::int64_t block = 0; block < count; block++) starts[block + 1] += starts[block];
  for (std::int64_t i = 0; i < pairs; i++) {
    places[i] = is_block(routes.blocks[i]) ? starts[routes.blocks[i]]++ : -1;
    if (places[i] >= 0) order[places[i]] = i / routes.choices;
  }
  // Now starts[block] is where its results end.
  for (std::int64_t block = 0, first = 0; block < count; first = starts[block++]) {
    const std::int64_t own = starts[block] - first;
    if (own == 0) continue;
    const char* from = x + order[first] * static_cast<std::int64_t>(row_bytes);
    if (own > 1) {
      const bool many = own * experts.columns >= 1 << 18;
#pragma omp parallel for schedule(static) num_threads(threads) if (many && threads > 1)
      for (std::int64_t i = 0; i < own; i++)
        std::memcpy(gathered + static_cast<std::size_t>(i) * row_bytes,
                    x + static_cast<std::size_t>(order[first + i]) * row_bytes, row_bytes);
      from = gathered;
    }
    run(experts.blocks[static_cast<std::size_t>(block)], experts.rowwise, from,
        results + static_cast<std::size_t>(first) * row_bytes, own, room, threads);
  }
  experts.rowwise.mix(
      {results, places, routes.weights, y, rows, routes.choices, experts.columns, experts.type, threads});
}

Sizes sizes_of(const Experts& experts, std::int64_t choices, std::int64_t rows) {
  std::int64_t numbers = 0;
  for (const Block& block : experts.blocks) numbers = std::max(numbers, numbers_of(block));
  // All choices of a row may be one block.
  const std::int64_t pairs = rows * choices;
  const std::size_t of_pairs = static_cast<std::size_t>(pairs) * sizeof(std::int64_t);
  const std::size_t of_rows = bytes_of(pairs * experts.columns, experts.type);
  return {of_pairs, (experts.blocks.size() + 1) * sizeof(std::int64_t),    of_pairs,
          of_rows,  bytes_of(pairs * numbers, experts.type) + room_beside, of_rows};
}

}  // namespace

std::int64_t numbers_of(const Block& block) { return (2 + block.gated) * block.inner(); }

void run(const Block& block, const Rowwise& rowwise, const void* x, void* y, std::int64_t rows, char* room,
         int threads) {
  const Type type = block.down[0].type;
  const std::int64_t inner = block.inner();
  char* const gated = take(room, bytes_of(rows * inner, type));
  const char* const gate = room;
  for (const linear::Chain& chain : block.gate_up) {
    linear::run(chain, x, room, rows, threads);
    room += bytes_of(rows * chain.outputs(), type);
  }
  // The halves of one product's rows, or all rows of one product and all of the other.
  const bool together = block.gate_up.size() == 1;
  const char* const up = block.gated ? gate + bytes_of(together ? inner : rows * inner, type) : nullptr;
  const std::int64_t stride = block.gated && together ? 2 * inner : inner;
  rowwise.gate({gate, up, gated, inner, block.activation, type, threads, rows, stride});
  linear::run(block.down[0], gated, y, rows, threads);
}

void run(const Experts& experts, const Routes& routes, const void* x, void* y, std::int64_t rows, int threads) {
  const Sizes of_one = sizes_of(experts, routes.choices, 1);
  const std::int64_t fit = most_bytes / static_cast<std::int64_t>(std::max<std::size_t>(1, of_one.results));
  const std::int64_t slab = std::clamp<std::int64_t>(rows, 1, std::max(least_rows, fit));
  const std::int64_t slabs = (rows + slab - 1) / slab;
  const Sizes sizes = sizes_of(experts, routes.choices, slab);
  char* memory = static_cast<char*>(linear::scratch(sizes.total(), linear::Caller::experts));
  for (std::int64_t i = 0; i < slabs; i++) {
    const std::int64_t first = rows * i / slabs, count = rows * (i + 1) / slabs - first;
    const std::size_t at = bytes_of(first * experts.columns, experts.type);
    const std::int64_t pair = first * routes.choices;
    run_slab(experts, {routes.blocks + pair, routes.weights + pair, routes.choices}, static_cast<const char*>(x) + at,
             static_cast<char*>(y) + at, count, threads, sizes, memory);
  }
}

Rowwise rowwise_of(const std::string& isa) {
  if (isa == "generic") return {rowwise::gate_generic, rowwise::mix_generic};
  if (isa == "avx2") return {rowwise::gate_avx2, rowwise::mix_avx2};
  return {rowwise::gate_avx512, rowwise::mix_avx512};
}

}  // namespace parco::experts
