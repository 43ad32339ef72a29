// The dense product on odd shapes at odd addresses in buffers of exactly their size, against sums in
// double; built with sanitizers too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "linear/dense.h"
#include "machine/features.h"

using namespace parco::linear;

namespace {

int failures = 0;
std::mt19937 random_bits(21);

// bf16 numbers in [-2, 2], stored as `type` holds them exactly.
struct Values {
  Values(std::int64_t count, Type type) : block(count * size_of(type) + 1), data(block.data() + 1), exact(count) {
    for (std::int64_t i = 0; i < count; i++) {
      const int step = static_cast<int>(random_bits() % 129) - 64;
      const float value = static_cast<float>(step) / 32;
      exact[i] = value;
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const std::uint32_t half = step ? (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13 : 0;
      const std::uint16_t narrow = static_cast<std::uint16_t>(type == Type::bf16 ? bits >> 16 : half);
      if (type == Type::fp32)
        std::memcpy(data + 4 * i, &value, 4);
      else
        std::memcpy(data + 2 * i, &narrow, 2);
    }
  }
  std::vector<char> block;
  char* data;
  std::vector<double> exact;
};

float as_float(const void* from, Type type, std::int64_t i) {
  std::uint32_t bits = 0;
  if (type == Type::fp32)
    std::memcpy(&bits, static_cast<const char*>(from) + 4 * i, 4);
  else
    std::memcpy(reinterpret_cast<char*>(&bits) + 2, static_cast<const char*>(from) + 2 * i, 2);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void check(const char* name, void (*kernel)(const DenseCall&), std::int64_t rows, std::int64_t outputs,
           std::int64_t columns, Type x_type, Type weight_type) {
  const Values x(rows * columns, x_type), weight(outputs * columns, weight_type), bias(outputs, Type::bf16);
  for (int threads : {1, 3}) {
    // Sums are multiples of 2^-10 and stay far below 2^14, so in fp32 they are exact, and in bf16 rounded once.
    std::vector<float> y(rows * outputs);
    if (x_type != Type::fp32) y.resize((rows * outputs + 1) / 2);
    kernel(
        {x.data, weight.data, bias.data, y.data(), rows, outputs, columns, threads, x_type, weight_type, Type::bf16});
    // As fp32 whatever x is, with an activation, onto what is there.
    std::vector<float> finished(rows * outputs, 0.75f);
    const Epilogue after{Activation::relu_squared, finished.data(), Type::fp32};
    kernel({x.data, weight.data, bias.data, finished.data(), rows, outputs, columns, threads, x_type, weight_type,
            Type::bf16, Type::fp32, after});
    for (std::int64_t i = 0; i < rows * outputs; i++) {
      double sum = bias.exact[i % outputs];
      for (std::int64_t k = 0; k < columns; k++)
        sum += x.exact[i / outputs * columns + k] * weight.exact[i % outputs * columns + k];
      const double positive = std::max(sum, 0.0), wanted = positive * positive + 0.75;
      const bool holds = std::abs(wanted - static_cast<double>(finished[i])) <= 1e-3 * (1 + 2 * positive);
      const double found = x_type == Type::fp16 ? sum : static_cast<double>(as_float(y.data(), x_type, i));
      if (!holds || std::abs(sum - found) > (x_type == Type::fp32 ? 1e-3 : std::abs(sum) / 256)) {
        failures++;
        std::printf("%s: rows %ld outputs %ld columns %ld types %d %d: %g or %g is not of %g\n", name,
                    static_cast<long>(rows), static_cast<long>(outputs), static_cast<long>(columns),
                    static_cast<int>(x_type), static_cast<int>(weight_type), found, static_cast<double>(finished[i]),
                    sum);
        break;
      }
    }
  }
}

}  // namespace

int main() {
  const Type types[] = {Type::fp32, Type::bf16, Type::fp16};
  for (Type x_type : types) {
    for (Type weight_type : types) {
      for (std::int64_t rows : {1, 2, 3, 7, 8, 9, 37, 530}) {
        for (std::int64_t columns : {1, 31, 64, 77, 300}) {
          check("generic", dense_generic, rows, 19, columns, x_type, weight_type);
          if (parco::features().avx2) check("avx2", dense_avx2, rows, 19, columns, x_type, weight_type);
          if (parco::features().avx512) check("avx512", dense_avx512, rows, 19, columns, x_type, weight_type);
        }
      }
    }
  }
  // Blocks of k, bands and pairs of tiles, whole and begun.
  for (std::int64_t rows : {1, 16, 33, 200, 1030}) {
    for (std::int64_t columns : {32, 77, 4700}) {
      const std::int64_t outputs = columns > 1000 ? 50 : rows == 33 ? 2200 : 130;
      if (rows * columns > 1000000) continue;
      if (parco::features().avx512_vbmi)
        check("amx emulated", dense_amx_emulated, rows, outputs, columns, Type::bf16, Type::bf16);
      if (parco::features().amx) check("amx", dense_amx, rows, outputs, columns, Type::bf16, Type::bf16);
    }
  }
  std::printf("%d differences\n", failures);
  return failures != 0;
}
