// Kernels called from several threads at once, on the same weights: their results are those of one thread alone. Built
// with ThreadSanitizer by `make prove`; the kernels' own threads are left out there, because libgomp is not built for
// it.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cast/cast.h"
#include "linear/dense.h"
#include "linear/float.h"
#include "linear/int.h"
#include "machine/features.h"
#include "sparse/sparse.h"

using namespace parco::linear;

int main() {
  constexpr std::int64_t rows = 21, outputs = 67, columns = 320;
  std::mt19937 random_bits(23);
  std::vector<float> x(rows * columns), values(256), scale(outputs * 10);
  std::vector<std::uint8_t> codes(outputs * columns);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random_bits() % 2001) - 1000) / 500;
  for (float& value : scale) value = static_cast<float>(random_bits() % 100 + 1) / 1000;
  for (int code = 0; code < 256; code++) values[code] = static_cast<float>(code - 128);
  for (std::uint8_t& code : codes) code = static_cast<std::uint8_t>(random_bits() % 120);

  CodedCall call{};
  call.x = x.data(), call.codes = codes.data(), call.values = values.data(), call.scale = scale.data();
  call.outputs = outputs, call.columns = columns, call.group = 32, call.block_rows = 1, call.scale_stride = 10;
  call.unit = 1.0f, call.zero_point = 128, call.bits = 8, call.threads = 1, call.element = Element::e4m3;

  std::vector<void (*)(const CodedCall&)> kernels{int_generic, float_generic};
  if (parco::features().avx2) kernels.insert(kernels.end(), {int_avx2, float_avx2});
  if (parco::features().avx512) kernels.insert(kernels.end(), {int_avx512, float_avx512});
  if (parco::features().avx512_vbmi)
    kernels.insert(kernels.end(), {int_avx512_vbmi, float_avx512_vbmi, int_amx_emulated});
  // bf16 x, and panels: any codes are some.
  std::vector<std::uint16_t> halves(outputs * columns);
  for (std::size_t i = 0; i < halves.size(); i++) {
    std::uint32_t bits;
    std::memcpy(&bits, &x[i % x.size()], 4);
    halves[i] = static_cast<std::uint16_t>(bits >> 16);
  }
  constexpr std::int64_t all_panels = (outputs + 15) / 16 * 16;
  codes.resize(all_panels * columns, 56), scale.resize(all_panels * 10, 0.5f);
  call.codes = codes.data(), call.scale = scale.data();
  const auto tiles = [&](std::vector<float>& found) {
    std::vector<std::uint16_t> y(rows * outputs);
    CodedCall own = call;
    own.x = halves.data(), own.x_type = own.y_type = Type::bf16, own.packed = true, own.rows = rows;
    own.y = y.data();
    float_amx_emulated(own);
    found.insert(found.end(), y.begin(), y.end());
    dense_amx_emulated(
        {halves.data(), halves.data(), nullptr, y.data(), rows, rows, columns, 1, Type::bf16, Type::bf16, Type::bf16});
    found.insert(found.end(), y.begin(), y.end());
  };

  // Numbers of which every other one is kept, by a mask and by blocks.
  const std::vector<std::uint8_t> mask(outputs * columns / 8, 0x55);
  std::vector<std::int16_t> blocks;
  for (std::int64_t band = 0; band < (outputs + 31) / 32; band++)
    for (std::int16_t column = 0; column < columns / 32; column += 2) blocks.push_back(column);
  using Sparse = void (*)(const parco::sparse::SparseCall&);
  std::vector<Sparse> masked{parco::sparse::masked_avx2}, in_blocks{parco::sparse::blocks_avx2};
  if (!parco::features().avx2) masked.clear(), in_blocks.clear();
  if (parco::features().avx512)
    masked.push_back(parco::sparse::masked_avx512), in_blocks.push_back(parco::sparse::blocks_avx512);
  if (parco::features().avx512_vbmi) masked.push_back(parco::sparse::masked_avx512_vbmi);
  const auto zeros = [&](const std::vector<Sparse>& own, int block, std::vector<float>& found) {
    for (const auto kernel : own) {
      for (std::int64_t height : {std::int64_t{1}, std::int64_t{5}, rows}) {
        std::vector<float> y(height * outputs);
        parco::sparse::SparseCall sparse{};
        sparse.x = x.data(), sparse.y = y.data(), sparse.rows = height, sparse.outputs = outputs;
        sparse.columns = columns, sparse.kept = columns / 2, sparse.block = block, sparse.index_bytes = 2;
        sparse.threads = 1, sparse.mask = mask.data(), sparse.blocks = block ? blocks.data() : nullptr;
        sparse.values = halves.data(), sparse.value_type = Type::bf16;
        kernel(sparse);
        found.insert(found.end(), y.begin(), y.end());
      }
    }
  };

  const auto all = [&] {
    std::vector<float> found;
    if (parco::features().avx512_vbmi) tiles(found);
    zeros(masked, 0, found), zeros(in_blocks, 32, found);
    for (const auto kernel : kernels) {
      for (std::int64_t height : {std::int64_t{1}, std::int64_t{5}, rows}) {
        std::vector<float> y(height * outputs);
        CodedCall own = call;
        own.rows = height, own.y = y.data();
        kernel(own);
        found.insert(found.end(), y.begin(), y.end());
      }
    }
    std::vector<float> amax(rows * 10);
    parco::cast::amax_generic({x.data(), amax.data(), rows, columns, 32, 1, Type::fp32});
    found.insert(found.end(), amax.begin(), amax.end());
    return found;
  };

  const std::vector<float> expected = all();
  std::vector<std::vector<float>> results(4);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&result, &all] {
      for (int turn = 0; turn < 5; turn++) result = all();
    });
  }
  for (auto& thread : threads) thread.join();
  int failures = 0;
  for (const auto& result : results)
    failures += result.size() != expected.size() ||
                std::memcmp(result.data(), expected.data(), expected.size() * sizeof(float)) != 0;
  std::printf("%zu kernels on %zu threads, %d differ\n", kernels.size() + masked.size() + in_blocks.size(),
              threads.size(), failures);
  return failures != 0;
}
