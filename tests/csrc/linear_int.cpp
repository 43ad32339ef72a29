// Every instruction set of the integer product against the generic one, bit for bit, on shapes that no vector divides;
// built with sanitizers too. Inputs lie at odd addresses in buffers of exactly their size, so that a read past an end
// is seen.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "linear/int.h"
#include "machine/features.h"

using namespace parco::linear;

namespace {

struct Kernel {
  const char* name;
  void (*run)(const IntCall&);
};

// Bytes at an address that is odd when `odd`; freed as one block, so the sanitizer knows both ends.
struct Bytes {
  explicit Bytes(std::size_t count, bool odd = true) : block(count + odd), data(block.data() + odd) {}
  std::vector<char> block;
  char* data;
};

struct Shape {
  std::int64_t rows, outputs, columns, group;
};

int failures = 0;
std::mt19937 random_bits(20);

void fill(char* data, std::size_t count) {
  for (std::size_t i = 0; i < count; i++) data[i] = static_cast<char>(random_bits());
}

std::uint16_t half(float value, Type type) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (type == Type::bf16) return static_cast<std::uint16_t>(bits >> 16);
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (((bits & 0x7fffffff) - 0x38000000) >> 13));
}

void fill_floats(char* data, std::int64_t count, Type type) {
  std::uniform_real_distribution<float> magnitude(0.01f, 2.0f);
  for (std::int64_t i = 0; i < count; i++) {
    const float value = random_bits() & 1 ? magnitude(random_bits) : -magnitude(random_bits);
    const std::uint16_t narrow = half(value, type);
    if (type == Type::fp32)
      std::memcpy(data + 4 * i, &value, 4);
    else
      std::memcpy(data + 2 * i, &narrow, 2);
  }
}

void check(const std::vector<Kernel>& kernels, Shape shape, int bits, Type x_type, Type scale_type, bool asymmetric,
           bool one_scale) {
  const std::int64_t groups = (shape.columns + shape.group - 1) / shape.group;
  const std::int64_t row_bytes = (shape.columns * bits + 7) / 8;
  Bytes x(shape.rows * shape.columns * size_of(x_type)), codes(shape.outputs * row_bytes);
  Bytes scale((one_scale ? 1 : shape.outputs * groups) * size_of(scale_type)), zero(shape.outputs * groups);
  Bytes bias(shape.outputs * size_of(x_type));
  fill_floats(x.data, shape.rows * shape.columns, x_type);
  fill(codes.data, shape.outputs * row_bytes);
  fill_floats(scale.data, one_scale ? 1 : shape.outputs * groups, scale_type);
  for (std::int64_t i = 0; i < shape.outputs * groups; i++)
    zero.data[i] = static_cast<char>(random_bits() & ((1 << bits) - 1));
  fill_floats(bias.data, shape.outputs, x_type);
  const auto run = [&](const Kernel& kernel, int threads) {
    Bytes y(shape.rows * shape.outputs * size_of(x_type));
    fill(y.data, shape.rows * shape.outputs * size_of(x_type));
    kernel.run({x.data, reinterpret_cast<const std::uint8_t*>(codes.data), scale.data,
                asymmetric ? reinterpret_cast<const std::uint8_t*>(zero.data) : nullptr,
                shape.rows % 2 ? bias.data : nullptr, y.data, shape.rows, shape.outputs, shape.columns, shape.group,
                one_scale ? 0 : groups, bits, threads, x_type, scale_type, x_type});
    return std::string(y.data, shape.rows * shape.outputs * size_of(x_type));
  };
  const std::string expected = run(kernels[0], 1);
  for (const Kernel& kernel : kernels) {
    for (int threads : {1, 2, 3}) {
      if (run(kernel, threads) == expected) continue;
      failures++;
      std::printf(
          "%s differs from %s: rows %ld outputs %ld columns %ld group %ld bits %d x_type %d scale_type %d zero %d "
          "threads %d\n",
          kernel.name, kernels[0].name, static_cast<long>(shape.rows), static_cast<long>(shape.outputs),
          static_cast<long>(shape.columns), static_cast<long>(shape.group), bits, static_cast<int>(x_type),
          static_cast<int>(scale_type), asymmetric, threads);
    }
  }
}

}  // namespace

int main() {
  std::vector<Kernel> kernels{{"generic", int_generic}};
  if (parco::features().avx2) kernels.push_back({"avx2", int_avx2});
  if (parco::features().avx512) {
    kernels.push_back({"avx512", int_avx512});
    kernels.push_back({"amx_emulated", int_amx_emulated});
  }
  if (parco::features().amx) kernels.push_back({"amx", int_amx});
  const Type types[] = {Type::fp32, Type::bf16, Type::fp16};
  int checks = 0;
  for (int bits = 2; bits <= 8; bits++) {
    for (Shape shape : {Shape{1, 37, 96, 32}, Shape{3, 16, 200, 48}, Shape{5, 33, 131, 131}, Shape{19, 65, 353, 32},
                        Shape{2, 7, 517, 160}, Shape{4, 50, 1, 1}, Shape{33, 34, 256, 128}, Shape{18, 5, 97, 16},
                        Shape{389, 70, 64, 32}, Shape{7, 35, 160, 32}, Shape{8, 18, 256, 128}}) {
      for (Type x_type : types) {
        const Type scale_type = types[checks % 3];
        const bool asymmetric = checks % 2;
        check(kernels, shape, bits, x_type, scale_type, asymmetric,
              shape.group >= shape.columns && checks % 5 == 0 && !asymmetric);
        checks++;
      }
    }
  }
  std::printf("%d shapes, %zu kernels, %d differences\n", checks, kernels.size(), failures);
  return failures != 0;
}
