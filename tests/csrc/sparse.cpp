// Sparse products on odd shapes at odd addresses in buffers of exactly their size, against sums in double; built with
// sanitizers too. Masks with more bits than numbers are kept must not make a kernel read past them.
#include "sparse/sparse.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "machine/features.h"

using namespace parco::sparse;

namespace {

int failures = 0;
std::mt19937 random_bits(5);

int below(int count) { return static_cast<int>(random_bits() % static_cast<unsigned>(count)); }

// Bytes at an odd address, with nothing behind them.
struct Bytes {
  explicit Bytes(std::int64_t count) : block(static_cast<std::size_t>(count) + 1), data(block.data() + 1) {}
  std::vector<char> block;
  char* data;
};

// Multiples of 1/32 in [-2, 2], which every type holds exactly.
struct Values : Bytes {
  Values(std::int64_t count, Type type) : Bytes(count * parco::linear::size_of(type)), exact(count) {
    for (std::int64_t i = 0; i < count; i++) {
      const int step = below(129) - 64;
      const float value = static_cast<float>(step) / 32;
      exact[i] = value;
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const std::uint32_t half = step ? (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13 : 0;
      const std::uint16_t narrow = static_cast<std::uint16_t>(type == Type::bf16 ? bits >> 16 : half);
      type == Type::fp32 ? std::memcpy(data + 4 * i, &value, 4) : std::memcpy(data + 2 * i, &narrow, 2);
    }
  }
  std::vector<double> exact;
};

// Integers in `bits` bits under a scale for each group of `group` kept numbers of a row, 2^-5 or 2^-4.
struct Codes {
  Codes(std::int64_t rows, std::int64_t kept, int bits, std::int64_t group)
      : codes(rows * ((kept * bits + 7) / 8)), scales(rows * ((kept + group - 1) / group) * 4), exact(rows * kept) {
    const std::int64_t row_bytes = (kept * bits + 7) / 8, groups = (kept + group - 1) / group;
    for (int code = 0; code < 1 << bits; code++) numbers[code] = static_cast<float>(code - (1 << (bits - 1)));
    std::fill(codes.data, codes.data + rows * row_bytes, char{0});
    for (std::int64_t i = 0; i < rows * groups; i++) {
      const float scale = below(2) ? 0x1p-5f : 0x1p-4f;
      std::memcpy(scales.data + 4 * i, &scale, 4);
    }
    for (std::int64_t n = 0; n < rows; n++) {
      for (std::int64_t k = 0; k < kept; k++) {
        const int code = below(1 << bits);
        for (int bit = 0; bit < bits; bit++)
          codes.data[n * row_bytes + (k * bits + bit) / 8] |=
              static_cast<char>((code >> bit & 1) << (k * bits + bit) % 8);
        float scale;
        std::memcpy(&scale, scales.data + 4 * (n * groups + k / group), 4);
        exact[n * kept + k] = static_cast<double>(numbers[code]) * static_cast<double>(scale);
      }
    }
    call.codes = reinterpret_cast<const std::uint8_t*>(codes.data), call.scale = scales.data, call.values = numbers;
    call.columns = kept, call.group = group, call.block_rows = 1, call.scale_stride = groups, call.bits = bits;
    call.offset = 1 << (bits - 1), call.pattern = parco::cast::Pattern::integer, call.scale_type = Type::fp32;
  }
  Bytes codes, scales;
  std::vector<double> exact;
  float numbers[256];
  parco::cast::DecodeCall call{};
};

// Masks of `kept` bits in every row, and the columns that they mean.
struct Mask {
  Mask(std::int64_t rows, std::int64_t columns, std::int64_t kept) : bits(rows * ((columns + 7) / 8)) {
    std::fill(bits.data, bits.data + rows * ((columns + 7) / 8), char{0});
    std::vector<std::int64_t> all(static_cast<std::size_t>(columns));
    for (std::int64_t k = 0; k < columns; k++) all[k] = k;
    for (std::int64_t n = 0; n < rows; n++) {
      std::shuffle(all.begin(), all.end(), random_bits);
      std::vector<std::int64_t> own(all.begin(), all.begin() + kept);
      std::sort(own.begin(), own.end());
      for (std::int64_t k : own) {
        bits.data[n * ((columns + 7) / 8) + k / 8] |= static_cast<char>(1 << k % 8);
        at.push_back(k);
      }
    }
  }
  Bytes bits;
  std::vector<std::int64_t> at;
};

// Blocks of every band, and the column of each kept number; columns past the last are none.
struct Blocks {
  Blocks(std::int64_t rows, std::int64_t columns, int block, std::int64_t each, int bytes)
      : indices((rows + block - 1) / block * each * bytes) {
    std::vector<std::int64_t> all(static_cast<std::size_t>((columns + block - 1) / block)), own;
    for (std::int64_t n = 0; n < rows; n++) {
      if (n % block == 0) {
        for (std::size_t j = 0; j < all.size(); j++) all[j] = static_cast<std::int64_t>(j);
        std::shuffle(all.begin(), all.end(), random_bits);
        own.assign(all.begin(), all.begin() + each);
        std::sort(own.begin(), own.end());
        for (std::int64_t j = 0; j < each; j++) {
          const std::int16_t narrow = static_cast<std::int16_t>(own[j]);
          const std::int32_t wide = static_cast<std::int32_t>(own[j]);
          char* to = indices.data + (n / block * each + j) * bytes;
          bytes == 2 ? std::memcpy(to, &narrow, 2) : std::memcpy(to, &wide, 4);
        }
      }
      for (std::int64_t j : own)
        for (int i = 0; i < block; i++) at.push_back(j * block + i);
    }
  }
  Bytes indices;
  std::vector<std::int64_t> at;
};

using Kernel = void (*)(const SparseCall&);

void check(const char* name, Kernel kernel, SparseCall call, const std::vector<double>& numbers,
           const std::vector<std::int64_t>& at) {
  const Values x(call.rows * call.columns, call.x_type), bias(call.outputs, Type::bf16);
  call.x = x.data, call.bias = bias.data, call.bias_type = Type::bf16;
  for (int threads : {1, 3}) {
    Bytes y(call.rows * call.outputs * 4);
    call.y = y.data, call.y_type = Type::fp32, call.threads = threads;
    kernel(call);
    for (std::int64_t i = 0; i < call.rows * call.outputs; i++) {
      const std::int64_t m = i / call.outputs, n = i % call.outputs;
      double sum = bias.exact[n];
      for (std::int64_t k = 0; k < call.kept; k++)
        if (at[n * call.kept + k] < call.columns)
          sum += numbers[n * call.kept + k] * x.exact[m * call.columns + at[n * call.kept + k]];
      float found;
      std::memcpy(&found, y.data + 4 * i, 4);
      if (std::abs(sum - static_cast<double>(found)) <= 1e-3) continue;
      failures++;
      std::printf("%s: rows %ld outputs %ld columns %ld kept %ld block %d: %g is not %g\n", name,
                  static_cast<long>(call.rows), static_cast<long>(call.outputs), static_cast<long>(call.columns),
                  static_cast<long>(call.kept), call.block, static_cast<double>(found), sum);
      break;
    }
  }
}

// The call with its numbers as floats of every type, and as codes.
template <class Check>
void of_every_kind(SparseCall call, const Check& check) {
  for (Type type : {Type::fp32, Type::bf16, Type::fp16}) {
    const Values values(call.outputs * call.kept, type);
    call.values = values.data, call.value_type = type;
    call.x_type = type == Type::bf16 ? Type::fp16 : type == Type::fp16 ? Type::bf16 : Type::fp32;
    check(call, values.exact);
  }
  call.values = nullptr, call.x_type = Type::bf16;
  for (int bits : {8, 4, 3}) {
    for (std::int64_t group : {call.kept, std::int64_t{16}}) {
      const Codes codes(call.outputs, call.kept, bits, std::min(group, call.kept));
      call.codes = codes.call;
      check(call, codes.exact);
    }
  }
}

template <class Check>
void on_every_instruction_set(const SparseCall& call, const Check& check, Kernel generic, Kernel avx2, Kernel avx512,
                              Kernel avx512_vbmi) {
  check("generic", generic, call);
  if (parco::features().avx2) check("avx2", avx2, call);
  if (parco::features().avx512) check("avx512", avx512, call);
  if (parco::features().avx512_vbmi && avx512_vbmi) check("avx512_vbmi", avx512_vbmi, call);
}

void check_masked(std::int64_t rows, std::int64_t outputs, std::int64_t columns, std::int64_t kept) {
  const Mask mask(outputs, columns, kept);
  SparseCall call{};
  call.rows = rows, call.outputs = outputs, call.columns = columns, call.kept = kept;
  call.mask = reinterpret_cast<const std::uint8_t*>(mask.bits.data);
  of_every_kind(call, [&](const SparseCall& made, const std::vector<double>& numbers) {
    on_every_instruction_set(
        made,
        [&](const char* name, Kernel kernel, const SparseCall& own) { check(name, kernel, own, numbers, mask.at); },
        masked_generic, masked_avx2, masked_avx512, masked_avx512_vbmi);
  });
}

void check_blocks(std::int64_t rows, std::int64_t outputs, std::int64_t columns, int block, std::int64_t each) {
  const int bytes = below(2) ? 2 : 4;
  const Blocks blocks(outputs, columns, block, each, bytes);
  SparseCall call{};
  call.rows = rows, call.outputs = outputs, call.columns = columns, call.kept = each * block;
  call.block = block, call.blocks = blocks.indices.data, call.index_bytes = bytes;
  if (first_misplaced(call) != -1) failures++, std::printf("blocks within the matrix are said to be outside\n");
  of_every_kind(call, [&](const SparseCall& made, const std::vector<double>& numbers) {
    on_every_instruction_set(
        made,
        [&](const char* name, Kernel kernel, const SparseCall& own) { check(name, kernel, own, numbers, blocks.at); },
        blocks_generic, blocks_avx2, blocks_avx512, nullptr);
  });
}

// All bits are set, and two numbers kept: results mean nothing, but no byte outside may be read.
void read_full_masks() {
  for (std::int64_t rows : {1, 20}) {
    SparseCall call{};
    call.rows = rows, call.outputs = 5, call.columns = 200, call.kept = 2, call.threads = 1;
    const Values x(rows * 200, Type::fp32);
    Bytes mask(5 * 25), y(rows * 5 * 4);
    std::fill(mask.data, mask.data + 5 * 25, char{-1});
    call.x = x.data, call.y = y.data, call.mask = reinterpret_cast<const std::uint8_t*>(mask.data);
    of_every_kind(call, [&](SparseCall made, const std::vector<double>&) {
      made.x_type = made.y_type = Type::fp32;
      on_every_instruction_set(
          made, [&](const char*, Kernel kernel, const SparseCall& own) { kernel(own); }, masked_generic, masked_avx2,
          masked_avx512, masked_avx512_vbmi);
    });
  }
}

void name_blocks_outside() {
  const std::int16_t indices[6] = {0, 2, 1, 3, 0, -1};
  SparseCall call{};
  call.outputs = 40, call.columns = 60, call.kept = 32, call.block = 16, call.index_bytes = 2, call.blocks = indices;
  if (first_misplaced(call) != 5) failures++, std::printf("a negative block is not found\n");
  call.columns = 48;
  if (first_misplaced(call) != 3) failures++, std::printf("a block past the last is not found\n");
  const std::int16_t twice[6] = {0, 2, 2, 2, 3, 1};
  call.columns = 60, call.blocks = twice;
  if (first_misplaced(call) != 3) failures++, std::printf("a block that comes twice is not found\n");
}

}  // namespace

int main() {
  for (std::int64_t rows : {1, 2, 3, 7, 8, 9, 13, 40}) {
    check_masked(rows, 5, 1, 1);
    check_masked(rows, 1, 64, 64);
    check_masked(rows, 19, 77, 30);
    check_masked(rows, 9, 300, 1 + below(300));
    check_masked(rows, 1 + below(40), 1 + below(700), 1);
    check_blocks(rows, 16, 16, 16, 1);
    check_blocks(rows, 37, 100, 16, 1 + below(7));
    check_blocks(rows, 70, 300, 32, 1 + below(10));
    check_blocks(rows, 100, 600, 64, 1 + below(10));
  }
  check_masked(530, 35, 300, 100);
  check_blocks(530, 35, 300, 32, 4);
  read_full_masks();
  name_blocks_outside();
  std::printf("%d differences\n", failures);
  return failures != 0;
}
