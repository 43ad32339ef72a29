// The integer product for vector instruction sets. One lane is one output (a row of the weights): `lanes` rows are read
// a vector each and transposed, so that a vector holds the same codes of `lanes` rows, every sum of a block stays in
// its lane and no reduction across lanes is ever needed. A vector of dwords becomes 4 (nibbles) or 2 (bytes) vectors of
// 16-bit pairs by a shift and a mask; the words of x are stored in the order of those pairs.
//
// With few words per column of x (decode), weights go from memory through registers into the products; packed ones need
// no turning, and several panels are read at once, as one stream of memory does not keep the memory busy. With more
// words, 2 * lanes rows are expanded once into a panel that stays in the L2 cache and is multiplied by tiles of x.
//
// Included by one translation unit per instruction set; V is its vector type. Everything is unnamed (see floats.h).
#pragma once
#include "linear/int_decode.h"

namespace parco::linear {
namespace {

// 2 * lanes outputs expanded to 16-bit pairs: [pair of k][2][lanes] dwords.
template <class V, bool nibbles>
void expand(const Job<V>& job, const Outputs<V, 2>& outputs, typename V::I* panel) {
  using I = typename V::I;
  constexpr int shifts = nibbles ? 4 : 2;
  const typename V::Reader reader(job.call, job.plan);
  alignas(64) I codes[piece_dwords];
  for (std::int32_t p = 0; p < job.plan.piece_count; p++) {
    const Piece& piece = job.plan.pieces[p];
    for (int v = 0; v < 2; v++) {
      outputs.read(job.call, reader, v, piece, codes);
      I* to = panel + static_cast<std::int64_t>(piece.dword) * shifts * 2 + v;
      for (std::int32_t d = 0; d < piece.dwords; d++) {
        const I dword = V::load(codes + d);
        for (int s = 0; s < shifts; s++, to += 2) V::store(to, V::template pairs<nibbles>(dword, s, job.call.bits));
      }
    }
  }
}

template <class V, int rows, Digits digits>
void tile(const Job<V>& job, const Outputs<V, 2>& outputs, const typename V::I* panel, std::int64_t m0) {
  using I = typename V::I;
  using F = typename V::F;
  constexpr int words = count_of(digits), all = rows * words;
  const Plan& plan = job.plan;
  const bool grouped = plan.groups > 1;
  ask_for_addend(job.call, job.first + m0, rows, outputs.first, outputs.count);
  F total[rows][2];
  I sum[all][2];
  for (int m = 0; m < rows; m++) total[m][0] = total[m][1] = V::set(0.0f);
  for (auto& of_row : sum) of_row[0] = of_row[1] = V::set(0);
  const std::int16_t* x[all];
  for (int m = 0; m < rows; m++)
    for (int w = 0; w < words; w++) x[m * words + w] = job.x[w] + (m0 + m) * plan.words;
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    for (int m = 0; m < rows && opens<digits>(block); m++)
      for (int w = 0; w < words; w++)
        for (int v = 0; v < 2; v++)
          sum[m * words + w][v] = first_sum(outputs, block, v, job.x_sum[w][(m0 + m) * job.block_stride + b]);
    const std::int32_t pairs = block.dwords * plan.unit / 2;
    const I* weights = panel + static_cast<std::int64_t>(block.k);
    const std::int64_t at = block.k;
    for (std::int32_t i = 0; i < pairs; i++) {
      const I low = V::load(weights + 2 * i), high = V::load(weights + 2 * i + 1);
      for (int r = 0; r < all; r++) {
        const I pair = V::broadcast(x[r] + at + 2 * i);
        sum[r][0] = V::dot(sum[r][0], low, pair);
        sum[r][1] = V::dot(sum[r][1], high, pair);
      }
    }
    if (!closes<digits>(block)) continue;
    const float* scale = outputs.scale + block.group * 2 * V::lanes;
    for (int m = 0; m < rows; m++) {
      for (int v = 0; v < 2; v++) {
        I block_sum[words];
        for (int w = 0; w < words; w++) block_sum[w] = sum[m * words + w][v];
        const F unit = grouped ? V::load(scale + v * V::lanes) : V::set(1.0f);
        total[m][v] = add_scaled<V, digits>(job, m0 + m, b, block_sum, unit, total[m][v]);
      }
    }
  }
  for (int m = 0; m < rows; m++)
    for (int v = 0; v < 2; v++) finish(job, outputs, m0 + m, v, total[m][v]);
}

template <class V, int rows, Digits digits>
void last_tile(const Job<V>& job, const Outputs<V, 2>& outputs, const typename V::I* panel, std::int64_t m0,
               std::int64_t left) {
  if constexpr (rows > 0) {
    if (left == rows) return tile<V, rows, digits>(job, outputs, panel, m0);
    last_tile<V, rows - 1, digits>(job, outputs, panel, m0, left);
  }
}

template <class V, Digits digits>
void tiles(const Job<V>& job, const Outputs<V, 2>& outputs, const typename V::I* panel, std::int64_t first,
           std::int64_t last) {
  constexpr int rows = digits == Digits::two_words ? V::tile_rows_of_two_words : V::tile_rows;
  std::int64_t m = first;
  for (; m + rows <= last; m += rows) tile<V, rows, digits>(job, outputs, panel, m);
  last_tile<V, rows - 1, digits>(job, outputs, panel, m, last - m);
}

constexpr std::int64_t slab_rows = 1024, rows_repaying_expansion = 128;

template <class V>
void run(const CodedCall& call) {
  const Digits digits = digits_of(call);
  const int words = count_of(digits);
  const std::int64_t slab = std::min(call.rows, slab_rows);
  const bool decoding = call.rows * words <= V::decode_words;
  const std::int64_t wide = decoding ? V::lanes : 2 * V::lanes;
  const std::int64_t panels = (call.outputs + wide - 1) / wide;

  const std::size_t plan_size = rounded(plan_bytes(call));
  const std::int64_t blocks = static_cast<std::int64_t>(plan_bytes(call) / (sizeof(Block) + sizeof(Piece)));
  const std::int64_t padded = (call.columns + 31) / 32 * 32 + 32;
  const std::size_t x_size = rounded(static_cast<std::size_t>(slab * padded) * sizeof(std::int16_t));
  const std::size_t block_size = rounded(static_cast<std::size_t>(slab * blocks) * 4);
  const bool straight = decoding && call.packed;
  const std::size_t scale_size = rounded(static_cast<std::size_t>(blocks * wide * (straight ? V::streams(1) : 1)) * 4);
  const std::size_t panel_size = decoding ? 0 : rounded(static_cast<std::size_t>(padded * wide) * 2);
  const std::size_t thread_size = 2 * scale_size + panel_size;
  const std::int64_t bytes = call.outputs * ((call.columns * call.bits + 7) / 8);
  const std::int64_t work = std::max(bytes, bytes * call.rows * words / 4);
  const int threads = static_cast<int>(std::clamp<std::int64_t>(work / worth_a_thread, 1, call.threads));

  char* memory =
      static_cast<char*>(scratch(plan_size + (x_size + block_size) * words + block_size + thread_size * threads));
  Job<V> job{call, make_plan(call, memory, straight), digits, {}, {}, {}, 0, 0, blocks};
  memory += plan_size;
  for (int w = 0; w < words; w++, memory += x_size) job.x[w] = reinterpret_cast<std::int16_t*>(memory);
  for (int w = 0; w < words; w++, memory += block_size) job.x_sum[w] = reinterpret_cast<std::int32_t*>(memory);
  if (words == 1) job.x[1] = job.x[0], job.x_sum[1] = job.x_sum[0];
  job.x_scale = reinterpret_cast<float*>(memory);
  memory += block_size;

  const bool nibbles = job.plan.unit == 8;
  for (job.first = 0; job.first < call.rows; job.first += slab) {
    job.rows = std::min(slab, call.rows - job.first);
    if (decoding)
      for (std::int64_t m = 0; m < job.rows; m++) quantize(job, m);
    // Threads share out the outputs, or, where each still gets rows enough to repay expanding every weight for itself,
    // the rows of x: then none has to wait for the others' words.
    const bool by_rows = !decoding && job.rows >= rows_repaying_expansion * threads;
    const std::int64_t parts =
        decoding || panels >= 4 * threads ? 1 : std::clamp<std::int64_t>(job.rows / 24, 1, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      if (!decoding && !by_rows) {
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < job.rows; m++) quantize(job, m);
      }
#pragma omp for schedule(static) nowait
      for (int t = 0; t < threads; t++) {
        char* own = memory + thread_size * t;
        float* scales = reinterpret_cast<float*>(own);
        std::int32_t* zeros = reinterpret_cast<std::int32_t*>(own + scale_size);
        typename V::I* panel = reinterpret_cast<typename V::I*>(own + 2 * scale_size);
        const auto multiply = [&](std::int64_t output, std::int64_t from, std::int64_t to) {
          Outputs<V, 2> outputs;
          outputs.gather(call, job.plan, output, scales, zeros);
          nibbles ? expand<V, true>(job, outputs, panel) : expand<V, false>(job, outputs, panel);
          if (digits == Digits::byte) return tiles<V, Digits::byte>(job, outputs, panel, from, to);
          words == 1 ? tiles<V, Digits::word>(job, outputs, panel, from, to)
                     : tiles<V, Digits::two_words>(job, outputs, panel, from, to);
        };
        if (straight) {
          decode_packed(job, panels * t / threads, panels * (t + 1) / threads, scales, zeros);
          continue;
        }
        if (by_rows) {
          const std::int64_t from = job.rows * t / threads, to = job.rows * (t + 1) / threads;
          for (std::int64_t m = from; m < to; m++) quantize(job, m);
          for (std::int64_t output = 0; output < call.outputs; output += wide) multiply(output, from, to);
          continue;
        }
        const std::int64_t tasks = panels * parts;
        for (std::int64_t task = tasks * t / threads; task < tasks * (t + 1) / threads; task++) {
          const std::int64_t output = task / parts * wide, part = task % parts;
          if (decoding)
            nibbles ? decode_any<V, true>(job, output, scales, zeros)
                    : decode_any<V, false>(job, output, scales, zeros);
          else
            multiply(output, job.rows * part / parts, job.rows * (part + 1) / parts);
        }
      }
    }
  }
}

}  // namespace
}  // namespace parco::linear
