#include "experts/experts.h"

#include <algorithm>
#include <cstring>

namespace parco::experts {
namespace {

using Numbers = std::vector<std::int64_t>;

// What rows are multiplied to, and between products, does not grow with a prompt: so many bytes at a time, but enough
// rows to repay reading a block.
constexpr std::int64_t most_bytes = 64 << 20, piece_bytes = 16 << 20, least_rows = 256;

std::size_t bytes_of(std::int64_t numbers, Type type) {
  return static_cast<std::size_t>(numbers) * static_cast<std::size_t>(linear::size_of(type));
}

// How many parts of nearly one size `rows` are cut into, of about `bytes` where a row takes `of_row`: kernels for few
// rows add in another order than those for many.
std::int64_t parts_of(std::int64_t rows, std::int64_t bytes, std::size_t of_row) {
  const std::int64_t fit = bytes / static_cast<std::int64_t>(std::max<std::size_t>(1, of_row));
  const std::int64_t most = std::max(least_rows, fit);
  return (rows + most - 1) / most;
}

// The rows of x that take one block, one after the other, to the results of them.
void run_own(const Block& block, const char* x, const std::int64_t* rows, std::int64_t count, char* results,
             char* gathered, char* room, int threads) {
  const std::size_t row_bytes = bytes_of(block.columns(), block.type());
  const char* from = x + static_cast<std::size_t>(rows[0]) * row_bytes;
  if (count > 1) {
    const bool many = count * block.columns() >= 1 << 18;
#pragma omp parallel for schedule(static) num_threads(threads) if (many && threads > 1)
    for (std::int64_t i = 0; i < count; i++)
      std::memcpy(gathered + static_cast<std::size_t>(i) * row_bytes, x + static_cast<std::size_t>(rows[i]) * row_bytes,
                  row_bytes);
    from = gathered;
  }
  run(block, from, results, count, room, threads);
}

void run_slab(const std::vector<const Block*>& blocks, const Block& any, const Routes& routes, const char* x, char* y,
              std::int64_t rows, int threads) {
  const std::int64_t pairs = rows * routes.choices, count = static_cast<std::int64_t>(blocks.size());
  const std::size_t row_bytes = bytes_of(any.columns(), any.type());
  const auto block_of = [&](std::int64_t pair) {
    const std::int64_t number = routes.blocks[pair];
    return number >= 0 && number < count && blocks[static_cast<std::size_t>(number)] ? number : -1;
  };
  // Where the results of a block begin, those of one row after those of the other; which row each is of.
  Numbers starts(static_cast<std::size_t>(count) + 1), places(static_cast<std::size_t>(pairs));
  Numbers order(static_cast<std::size_t>(pairs));
  for (std::int64_t i = 0; i < pairs; i++)
    if (block_of(i) >= 0) starts[static_cast<std::size_t>(block_of(i)) + 1]++;
  for (std::size_t block = 0; block < blocks.size(); block++) starts[block + 1] += starts[block];
  Numbers next = starts;
  for (std::int64_t i = 0; i < pairs; i++) {
    const std::int64_t block = block_of(i);
    const std::int64_t place = block < 0 ? -1 : next[static_cast<std::size_t>(block)]++;
    places[static_cast<std::size_t>(i)] = place;
    if (place >= 0) order[static_cast<std::size_t>(place)] = i / routes.choices;
  }

  const auto own_of = [&](std::size_t block) { return starts[block + 1] - starts[block]; };
  const auto bytes_of_row = [&](const Block& block) { return row_bytes + bytes_of(numbers_of(block), block.type()); };
  const auto pieces_of = [&](std::size_t block) {
    return parts_of(own_of(block), piece_bytes, bytes_of_row(*blocks[block]));
  };
  std::size_t gathered_bytes = 0, room_bytes = 0;
  for (std::size_t block = 0; block < blocks.size(); block++) {
    if (own_of(block) == 0) continue;
    const std::int64_t most = (own_of(block) + pieces_of(block) - 1) / pieces_of(block);
    gathered_bytes = std::max(gathered_bytes, static_cast<std::size_t>(most) * row_bytes);
    room_bytes = std::max(room_bytes, bytes_of(most * numbers_of(*blocks[block]), any.type()) + room_beside);
  }
  gathered_bytes = linear::rounded(gathered_bytes), room_bytes = linear::rounded(room_bytes);
  const std::size_t all = gathered_bytes + room_bytes + static_cast<std::size_t>(pairs) * row_bytes;
  char* const gathered = static_cast<char*>(linear::scratch(all, linear::Caller::experts));
  char *const room = gathered + gathered_bytes, *const results = room + room_bytes;
  for (std::size_t block = 0; block < blocks.size(); block++) {
    const std::int64_t own = own_of(block);
    const std::int64_t pieces = own == 0 ? 0 : pieces_of(block);
    for (std::int64_t piece = 0; piece < pieces; piece++) {
      const std::int64_t begin = own * piece / pieces, end = own * (piece + 1) / pieces;
      const std::size_t first = static_cast<std::size_t>(starts[block] + begin);
      run_own(*blocks[block], x, order.data() + first, end - begin, results + first * row_bytes, gathered, room,
              threads);
    }
  }
  any.rowwise.mix(
      {results, places.data(), routes.weights, y, rows, routes.choices, any.columns(), any.type(), threads});
}

}  // namespace

std::int64_t numbers_of(const Block& block) { return (2 + block.gated) * block.inner(); }

void run(const Block& block, const void* x, void* y, std::int64_t rows, char* room, int threads) {
  const Type type = block.type();
  const std::int64_t inner = block.inner();
  char* const gated = room;
  room += linear::rounded(bytes_of(rows * inner, type));
  const char* const gate = room;
  for (const linear::Chain& chain : block.gate_up) {
    linear::run(chain, x, room, rows, threads);
    room += bytes_of(rows * chain.outputs(), type);
  }
  // The halves of one product's rows, or all rows of one product and all of the other.
  const bool together = block.gate_up.size() == 1;
  const char* const up = block.gated ? gate + bytes_of(together ? inner : rows * inner, type) : nullptr;
  const std::int64_t stride = block.gated && together ? 2 * inner : inner;
  const rowwise::Cut* const cut = block.cut ? &*block.cut : nullptr;
  block.rowwise.gate({gate, up, gated, inner, block.activation, type, threads, rows, stride, cut});
  linear::run(block.down, gated, y, rows, threads);
}

void run(const std::vector<const Block*>& blocks, const Routes& routes, const void* x, void* y, std::int64_t rows,
         int threads) {
  const Block& any = **std::find_if(blocks.begin(), blocks.end(), [](const Block* block) { return block; });
  const std::size_t row_bytes = bytes_of(any.columns(), any.type());
  const std::int64_t slabs = parts_of(rows, most_bytes, static_cast<std::size_t>(routes.choices) * row_bytes);
  for (std::int64_t i = 0; i < slabs; i++) {
    const std::int64_t first = rows * i / slabs, count = rows * (i + 1) / slabs - first;
    const std::size_t at = static_cast<std::size_t>(first) * row_bytes;
    const std::int64_t pair = first * routes.choices;
    run_slab(blocks, any, {routes.blocks + pair, routes.weights + pair, routes.choices},
             static_cast<const char*>(x) + at, static_cast<char*>(y) + at, count, threads);
  }
}

}  // namespace parco::experts
