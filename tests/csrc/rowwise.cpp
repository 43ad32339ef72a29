// Norms, gates and rotations of every instruction set on lengths that no vector divides, at odd addresses in buffers of
// exactly their size, against the same in double; built with sanitizers too.
#include "rowwise/rowwise.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "machine/features.h"

using namespace parco::rowwise;

namespace {

int failures = 0, checks = 0;
std::mt19937 random_bits(29);

// fp32 or bf16 numbers of 8 bits, which both hold exactly.
struct Values {
  Values(std::int64_t count, Type type) : size(type == Type::fp32 ? 4 : 2), block(count * size + 1), exact(count) {
    for (std::int64_t i = 0; i < count; i++) {
      const float value = static_cast<float>(static_cast<int>(random_bits() % 255) - 127) / 16;
      exact[i] = static_cast<double>(value);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(data() + size * i, size == 4 ? static_cast<const void*>(&bits) : &half, size);
    }
  }
  char* data() { return block.data() + 1; }
  double get(std::int64_t i) {
    std::uint32_t bits = 0;
    std::memcpy(reinterpret_cast<char*>(&bits) + 4 - size, data() + size * i, size);
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
  }
  std::size_t size;
  std::vector<char> block;
  std::vector<double> exact;
};

void expect(const char* what, Values& y, const std::vector<double>& wanted, Type type, double slack) {
  checks++;
  for (std::size_t i = 0; i < wanted.size(); i++) {
    const double bound = std::abs(wanted[i]) * (slack + (type == Type::fp32 ? 0 : 0x1p-8)) + slack;
    if (std::abs(y.get(static_cast<std::int64_t>(i)) - wanted[i]) <= bound) continue;
    std::printf("%s, type %d: number %zu of %zu is %g, not %g\n", what, static_cast<int>(type), i, wanted.size(),
                y.get(static_cast<std::int64_t>(i)), wanted[i]);
    failures++;
    return;
  }
}

void norms(const char* name, void (*kernel)(const Norm&), Type type) {
  for (std::int64_t columns : {1, 7, 16, 37, 300}) {
    const std::int64_t rows = 5;
    Values x(rows * columns, type), weight(columns, type), y(rows * columns, type);
    kernel({x.data(), weight.data(), y.data(), rows, columns, 1e-3f, 1.0f, false, type, 2});
    std::vector<double> wanted(rows * columns);
    for (std::int64_t m = 0; m < rows; m++) {
      double sum = 0;
      for (std::int64_t k = 0; k < columns; k++) sum += x.exact[m * columns + k] * x.exact[m * columns + k];
      for (std::int64_t k = 0; k < columns; k++)
        wanted[m * columns + k] =
            x.exact[m * columns + k] / std::sqrt(sum / static_cast<double>(columns) + 1e-3) * (weight.exact[k] + 1);
    }
    expect(name, y, wanted, type, 1e-5);

    Values bias(columns, type);
    for (const bool biased : {false, true}) {
      kernel({x.data(), weight.data(), y.data(), rows, columns, 1e-3f, 0.0f, false, type, 2, true,
              biased ? bias.data() : nullptr});
      for (std::int64_t m = 0; m < rows; m++) {
        const double* row = x.exact.data() + m * columns;
        double mean = 0, square = 0;
        for (std::int64_t k = 0; k < columns; k++) mean += row[k] / static_cast<double>(columns);
        for (std::int64_t k = 0; k < columns; k++) square += (row[k] - mean) * (row[k] - mean);
        const double scale = 1 / std::sqrt(square / static_cast<double>(columns) + 1e-3);
        for (std::int64_t k = 0; k < columns; k++)
          wanted[m * columns + k] = (row[k] - mean) * scale * weight.exact[k] + (biased ? bias.exact[k] : 0);
      }
      expect(name, y, wanted, type, 1e-5);
    }
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::gelu:
      return x * (1 + std::erf(x * std::sqrt(0.5))) / 2;
    case Activation::gelu_tanh:
      return x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x))) / 2;
    case Activation::relu:
      return x > 0 ? x : 0;
    default:
      return x > 0 ? x * x : 0;
  }
}

void gates(const char* name, void (*kernel)(const Gate&), Type type) {
  for (int activation = 0; activation < 5; activation++) {
    for (std::int64_t count : {1, 15, 64, 1001, 70001}) {
      Values gate(count, type), up(count, type), y(count, type);
      std::vector<double> wanted(count);
      kernel({gate.data(), nullptr, y.data(), count, static_cast<Activation>(activation), type, 3});
      for (std::int64_t i = 0; i < count; i++)
        wanted[i] = activated(static_cast<Activation>(activation), gate.exact[i]);
      expect(name, y, wanted, type, 1e-5);
      kernel({gate.data(), up.data(), y.data(), count, static_cast<Activation>(activation), type, 3});
      for (std::int64_t i = 0; i < count; i++)
        wanted[i] = activated(static_cast<Activation>(activation), gate.exact[i]) * up.exact[i];
      expect(name, y, wanted, type, 1e-5);
    }
  }
}

void rotations(const char* name, void (*kernel)(const Rotation&), Type type) {
  for (std::int64_t columns : {2, 12, 32, 70}) {
    const std::int64_t batch = 2, tokens = 3, rest = columns % 4, width = columns + rest;
    std::vector<Values> x, y;
    Rotation call{{}, nullptr, nullptr, batch, tokens, columns, rest, {tokens * columns, columns}, type, 2};
    for (std::int64_t heads : {3, 1}) {
      x.emplace_back(batch * heads * tokens * width, type), y.emplace_back(batch * heads * tokens * width, type);
      const std::int64_t of_batch = tokens * heads * width;
      call.of[x.size() - 1] = {
          nullptr, nullptr, heads, {of_batch, width, heads * width}, {of_batch, width, heads * width}};
    }
    for (int i = 0; i < 2; i++) call.of[i].x = x[i].data(), call.of[i].y = y[i].data();
    Values cos(batch * tokens * columns, type), sin(batch * tokens * columns, type);
    call.cos = cos.data(), call.sin = sin.data();
    kernel(call);
    for (int i = 0; i < 2; i++) {
      std::vector<double> wanted(x[i].exact);
      for (std::int64_t place = 0; place < batch * tokens; place++) {
        for (std::int64_t h = 0; h < call.of[i].heads; h++) {
          const std::int64_t at = (place * call.of[i].heads + h) * width, half = columns / 2;
          for (std::int64_t k = 0; k < columns; k++) {
            const double other = k < half ? -x[i].exact[at + k + half] : x[i].exact[at + k - half];
            const std::int64_t angle = place * columns + k;
            wanted[at + k] = x[i].exact[at + k] * cos.exact[angle] + other * sin.exact[angle];
          }
        }
      }
      expect(name, y[i], wanted, type, 1e-5);
    }
  }
}

void attentions(const char* name, void (*kernel)(const Attention&), Type type) {
  for (std::int64_t columns : {1, 12, 64, 70}) {
    for (std::int64_t group : {1, 2, 3, 9}) {
      const std::int64_t batch = 2, key_heads = 2, heads = key_heads * group, count = 5 + columns, room = count + 3;
      Values q(batch * heads * columns, type), y(batch * heads * columns, type);
      Values keys(batch * key_heads * room * columns, type), values(batch * key_heads * room * columns, type);
      const std::int64_t of_head = room * columns, of_batch = key_heads * of_head;
      const float scale = 0.01f;
      kernel({q.data(),
              keys.data(),
              values.data(),
              y.data(),
              batch,
              heads,
              key_heads,
              count,
              columns,
              {heads * columns, columns},
              {of_batch, of_head, columns},
              {of_batch, of_head, columns},
              scale,
              type,
              3});
      std::vector<double> wanted(batch * heads * columns);
      for (std::int64_t head = 0; head < batch * heads; head++) {
        const std::int64_t from = (head / heads * key_heads + head % heads / group) * of_head;
        std::vector<double> power(count);
        double sum = 0;
        for (std::int64_t t = 0; t < count; t++) {
          for (std::int64_t k = 0; k < columns; k++)
            power[t] += q.exact[head * columns + k] * keys.exact[from + t * columns + k] * static_cast<double>(scale);
          sum += power[t] = std::exp(power[t]);
        }
        for (std::int64_t t = 0; t < count; t++)
          for (std::int64_t k = 0; k < columns; k++)
            wanted[head * columns + k] += power[t] / sum * values.exact[from + t * columns + k];
      }
      expect(name, y, wanted, type, 1e-4);
    }
  }
}

void sums(const char* name, void (*kernel)(const Sum&), Type type) {
  for (std::int64_t count : {1, 16, 37}) {
    Values a(count, type), b(count, type), y(count, type);
    kernel({a.data(), b.data(), y.data(), count, type});
    std::vector<double> wanted(count);
    for (std::int64_t i = 0; i < count; i++) wanted[i] = a.exact[i] + b.exact[i];
    expect(name, y, wanted, type, 0);
  }
}

}  // namespace

int main() {
  for (Type type : {Type::fp32, Type::bf16}) {
    norms("norm generic", norm_generic, type);
    gates("gate generic", gate_generic, type);
    rotations("rotate generic", rotate_generic, type);
    attentions("attend generic", attend_generic, type);
    sums("add generic", add_generic, type);
    if (parco::features().avx2) {
      norms("norm avx2", norm_avx2, type);
      gates("gate avx2", gate_avx2, type);
      rotations("rotate avx2", rotate_avx2, type);
      attentions("attend avx2", attend_avx2, type);
      sums("add avx2", add_avx2, type);
    }
    if (parco::features().avx512) {
      norms("norm avx512", norm_avx512, type);
      gates("gate avx512", gate_avx512, type);
      rotations("rotate avx512", rotate_avx512, type);
      attentions("attend avx512", attend_avx512, type);
      sums("add avx512", add_avx512, type);
    }
  }
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
