// The integer product in plain C++: the same arithmetic as every other instruction set, and so the same bits.
#include <algorithm>
#include <cmath>

#include "linear/generic.h"
#include "linear/quantize.h"
#include "linear/write.h"

namespace parco::linear {
namespace {

// Row n's codes minus their zero.
void expand_row(const CodedCall& call, const Plan& plan, std::int64_t n, std::int16_t* codes) {
  const std::uint8_t* row = call.codes + n * plan.row_bytes;
  const std::uint32_t mask = (1u << call.bits) - 1;
  for (std::int32_t b = 0; b < plan.block_count; b++) {
    const Block& block = plan.blocks[b];
    const int zero = call.zero ? call.zero[call.scale_index(n, block.group)] : call.zero_point;
    for (std::int64_t k = block.k; k < block.k + block.length; k++) {
      const std::int64_t bit = k * call.bits, byte = bit / 8;
      std::uint32_t code;
      if (call.packed) {
        code = call.packed_code(n, k);
      } else {
        std::uint32_t window = row[byte];
        if (byte + 1 < plan.row_bytes) window |= static_cast<std::uint32_t>(row[byte + 1]) << 8;
        code = window >> bit % 8 & mask;
      }
      codes[k] = static_cast<std::int16_t>((call.table ? call.table[code] : static_cast<int>(code)) - zero);
    }
  }
}

std::int32_t dot(const std::int16_t* a, const std::int16_t* b, std::int32_t length) {
  std::int32_t sum = 0;
  for (std::int32_t i = 0; i < length; i++) sum += static_cast<std::int32_t>(a[i]) * b[i];
  return sum;
}

}  // namespace

void int_generic(const CodedCall& call) {
  const std::size_t plan_size = (plan_bytes(call) + 63) / 64 * 64;
  const int word_count = count_of(digits_of(call));
  const float factor = call.scale_factor() * call.unit;
  const std::int64_t blocks = static_cast<std::int64_t>(plan_bytes(call) / (sizeof(Block) + sizeof(Piece)));
  const std::int64_t padded = (call.columns + 31) / 32 * 32 + 32;
  const std::int64_t slab = std::min<std::int64_t>(call.rows, 1024);
  const std::size_t words_size = static_cast<std::size_t>(slab * padded) * word_count * sizeof(std::int16_t);
  const std::size_t codes_size = static_cast<std::size_t>(padded) * sizeof(std::int16_t);
  const std::size_t scales_size = static_cast<std::size_t>(slab * blocks) * sizeof(float);
  // The sums are not needed here; all rows may write theirs to the same place per thread.
  const std::size_t sums_size = static_cast<std::size_t>(2 * blocks * call.threads) * sizeof(std::int32_t);
  char* memory =
      static_cast<char*>(scratch(plan_size + words_size + codes_size * call.threads + scales_size + sums_size));
  const Plan plan = make_plan(call, memory);
  std::int16_t* words = reinterpret_cast<std::int16_t*>(memory + plan_size);
  std::int16_t* codes = words + slab * padded * word_count;
  float* scales = reinterpret_cast<float*>(codes + padded * call.threads);
  std::int32_t* sums = reinterpret_cast<std::int32_t*>(scales + slab * blocks);

  for (std::int64_t first = 0; first < call.rows; first += slab) {
    const std::int64_t rows = std::min(slab, call.rows - first);
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (int t = 0; t < call.threads; t++) {
      std::int32_t* of_words[2] = {sums + 2 * blocks * t, sums + 2 * blocks * t + blocks};
      for (std::int64_t m = rows * t / call.threads; m < rows * (t + 1) / call.threads; m++) {
        std::int16_t* to[2] = {words + m * padded, words + (slab + m) * padded};
        if (call.int8)
          quantize_row_to_bytes<false>(call, plan, first + m, to[0], scales + m * blocks, of_words[0]);
        else
          quantize_row<false>(call, plan, first + m, to, scales + m * blocks, of_words);
      }
    }
#pragma omp parallel for schedule(static) num_threads(call.threads)
    for (int t = 0; t < call.threads; t++) {
      std::int16_t* row_codes = codes + padded * t;
      for (std::int64_t n = call.outputs * t / call.threads; n < call.outputs * (t + 1) / call.threads; n++) {
        expand_row(call, plan, n, row_codes);
        for (std::int64_t m = 0; m < rows; m++) {
          float sum = 0;
          std::int32_t in_bytes = 0;
          for (std::int32_t b = 0; b < plan.block_count; b++) {
            const Block& block = plan.blocks[b];
            const std::int16_t *high = words + m * padded, *low = words + (slab + m) * padded;
            std::int32_t product = dot(high + block.k, row_codes + block.k, block.length);
            if (call.int8) {
              product += block.opens ? 0 : in_bytes;
              in_bytes = product;
              if (!block.closes) continue;
            }
            float exact = static_cast<float>(product);
            if (word_count == 2)
              exact =
                  std::fma(exact, 32768.0f, static_cast<float>(dot(low + block.k, row_codes + block.k, block.length)));
            float unit = call.int8 ? 1.0f : scales[m * blocks + b];
            if (plan.groups > 1)
              unit *= load_float(call.scale, call.scale_type, call.scale_index(n, block.group)) * factor;
            sum = std::fma(exact, unit, sum);
          }
          if (call.int8) sum *= scales[m * blocks];
          if (plan.groups <= 1) sum *= load_float(call.scale, call.scale_type, call.scale_index(n, 0)) * factor;
          if (call.bias) sum += load_float(call.bias, call.bias_type, n);
          write<generic::Arithmetic>(call, (first + m) * call.outputs + n, 1, sum);
        }
      }
    }
  }
}

}  // namespace parco::linear
