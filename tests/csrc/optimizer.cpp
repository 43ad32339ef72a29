// AdamW of every instruction set against the generic one, bit for bit, in one thread and in three, on lengths that no
// vector divides, at odd addresses in buffers of exactly their size; built with sanitizers too.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "machine/features.h"
#include "optimizer/adamw.h"

using namespace parco::optimizer;
using parco::linear::size_of;

namespace {

int failures = 0, checks = 0;
std::mt19937 random_bits(31);

// Numbers at an odd address: mostly of ordinary size, some of any bits at all; no sign where `positive`.
std::vector<char> numbers(std::int64_t count, Type type, bool positive = false) {
  std::vector<char> block(static_cast<std::size_t>(count * size_of(type)) + 1);
  for (std::int64_t i = 0; i < count; i++) {
    std::uint32_t bits = random_bits();
    if (random_bits() % 16) bits = (bits & 0x807fffff) | (115 + random_bits() % 12) << 23;
    if (positive) bits &= 0x7fffffff;
    const std::uint16_t half = static_cast<std::uint16_t>(type == Type::bf16 ? bits >> 16 : 0x2c00 + (bits & 0x8fff));
    const void* from = type == Type::fp32 ? static_cast<const void*>(&bits) : &half;
    std::memcpy(block.data() + 1 + size_of(type) * i, from, static_cast<std::size_t>(size_of(type)));
  }
  return block;
}

std::vector<char> codes(std::int64_t count) {
  std::vector<char> block(static_cast<std::size_t>(count) + 1);
  for (char& code : block) code = static_cast<char>(random_bits());
  return block;
}

struct Tensors {
  Type type, grad_type;
  bool coded;
  std::int64_t rows, columns;
  std::vector<char> values, grad, first, second, first_scale, second_scale;

  Tensors(Type type, Type grad_type, bool coded, std::int64_t rows, std::int64_t columns)
      : type(type), grad_type(grad_type), coded(coded), rows(rows), columns(columns) {
    const std::int64_t count = rows * columns, scales = rows * ((columns + block - 1) / block);
    values = numbers(count, type), grad = numbers(count, grad_type);
    first = coded ? codes(count) : numbers(count, Type::fp32);
    second = coded ? codes(count) : numbers(count, Type::fp32, true);
    first_scale = numbers(scales, Type::fp32, true), second_scale = numbers(scales, Type::fp32, true);
  }
  Parameter parameter(std::int64_t first_span) {
    const std::int64_t in_row = (columns + block - 1) / block;
    void *scale = coded ? first_scale.data() + 1 : nullptr, *other = coded ? second_scale.data() + 1 : nullptr;
    return {values.data() + 1,
            grad.data() + 1,
            first.data() + 1,
            second.data() + 1,
            scale,
            other,
            rows,
            columns,
            7 + first_span,
            5,
            type,
            grad_type,
            -0.01f,
            0.25f,
            first_span,
            coded ? rows * in_row : (rows * columns + block - 1) / block};
  }
};

bool is_nan(const std::vector<char>& block, std::size_t i, int size) {
  std::uint32_t bits = 0;
  std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, block.data() + 1 + i * static_cast<std::size_t>(size),
              static_cast<std::size_t>(size));
  return (bits & 0x7fffffff) > 0x7f800000;
}

// The sign of a NaN is nobody's.
void expect(const char* name, const char* what, const std::vector<char>& found, const std::vector<char>& wanted,
            int size) {
  checks++;
  for (std::size_t i = 0; i < (found.size() - 1) / static_cast<std::size_t>(size); i++) {
    const std::size_t at = 1 + i * static_cast<std::size_t>(size);
    if (std::memcmp(found.data() + at, wanted.data() + at, static_cast<std::size_t>(size)) == 0) continue;
    if (size > 1 && is_nan(found, i, size) && is_nan(wanted, i, size)) continue;
    std::printf("%s: number %zu of %s differs\n", name, i, what);
    failures++;
    return;
  }
}

void run(void (*kernel)(const Adamw&), std::vector<Tensors>& tensors, bool stochastic, int threads) {
  std::vector<Parameter> parameters;
  std::int64_t spans = 0;
  for (Tensors& each : tensors) {
    parameters.push_back(each.parameter(spans));
    spans += parameters.back().spans;
  }
  kernel({parameters.data(), static_cast<std::int64_t>(parameters.size()), spans, 0.5f, 0.999f, 0.1f, 0.99f, 0.01f,
          1e-8f, 0x123456789abcdefull, stochastic, threads});
}

}  // namespace

int main() {
  struct Named {
    const char* name;
    void (*kernel)(const Adamw&);
  };
  std::vector<Named> kernels{{"generic", adamw_generic}};
  if (parco::features().avx2) kernels.push_back({"avx2", adamw_avx2});
  if (parco::features().avx512) kernels.push_back({"avx512", adamw_avx512});
  const std::int64_t shapes[][2] = {{1, 1}, {3, 5}, {1, 256}, {2, 257}, {0, 9}, {300, 301}, {5, 700}};
  for (const Type type : {Type::fp32, Type::bf16}) {
    for (const Type grad_type : {Type::fp32, Type::bf16, Type::fp16}) {
      for (const bool stochastic : {false, true}) {
        std::vector<Tensors> start;
        for (const auto& shape : shapes)
          for (const bool coded : {false, true}) start.emplace_back(type, grad_type, coded, shape[0], shape[1]);
        std::vector<Tensors> wanted = start;
        run(adamw_generic, wanted, stochastic, 1);
        for (const Named& each : kernels) {
          for (const int threads : {1, 3}) {
            std::vector<Tensors> found = start;
            run(each.kernel, found, stochastic, threads);
            for (std::size_t i = 0; i < found.size(); i++) {
              const int size = found[i].coded ? 1 : 4;
              expect(each.name, "the values", found[i].values, wanted[i].values, size_of(type));
              expect(each.name, "the first moment", found[i].first, wanted[i].first, size);
              expect(each.name, "the second moment", found[i].second, wanted[i].second, size);
              expect(each.name, "the first's scales", found[i].first_scale, wanted[i].first_scale, 4);
              expect(each.name, "the second's scales", found[i].second_scale, wanted[i].second_scale, 4);
            }
          }
        }
      }
    }
  }
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
