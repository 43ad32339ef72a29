// Norms, gates and rotations of every instruction set on lengths that no vector divides, at odd addresses in buffers of
// exactly their size, against the same in double; built with sanitizers too.
#include "rowwise/rowwise.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cast/philox.h"
#include "machine/features.h"
#include "values.h"

using namespace parco::rowwise;

namespace {

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
      const Cut cut{0.75f, 1.5f, 1.0f};
      kernel({gate.data(), up.data(), y.data(), count, static_cast<Activation>(activation), type, 3, 1, 0, &cut});
      for (std::int64_t i = 0; i < count; i++)
        wanted[i] = activated(static_cast<Activation>(activation), 1.5 * std::min(gate.exact[i], 0.75)) / 1.5 *
                    (std::clamp(up.exact[i], -0.75, 0.75) + 1);
      expect(name, y, wanted, type, 1e-5);
    }
    // The halves of rows, as one product gives them.
    for (std::int64_t count : {1, 19, 1001}) {
      const std::int64_t rows = 77, size = type == Type::fp32 ? 4 : 2;
      Values both(rows * 2 * count, type), y(rows * count, type);
      kernel({both.data(), both.data() + count * size, y.data(), count, static_cast<Activation>(activation), type, 3,
              rows, 2 * count});
      std::vector<double> wanted(rows * count);
      for (std::int64_t m = 0; m < rows; m++)
        for (std::int64_t k = 0; k < count; k++)
          wanted[m * count + k] = activated(static_cast<Activation>(activation), both.exact[2 * m * count + k]) *
                                  both.exact[(2 * m + 1) * count + k];
      expect(name, y, wanted, type, 1e-5);
    }
  }
}

void norm_grads(const char* name, void (*kernel)(const NormGrad&), Type type) {
  for (std::int64_t columns : {1, 7, 16, 37}) {
    for (const bool centered : {false, true}) {
      const std::int64_t rows = 130;
      Values x(rows * columns, type), weight(columns, type), grad(rows * columns, type), grad_x(rows * columns, type);
      std::vector<float> grad_weight(columns), grad_bias(columns);
      const Norm norm{x.data(), weight.data(), nullptr, rows, columns, 1e-3f, 0.5f, false, type, 3, centered};
      kernel({norm, grad.data(), grad_x.data(), grad_weight.data(), grad_bias.data()});
      std::vector<double> wanted(rows * columns), of_weight(columns), of_bias(columns);
      const double width = static_cast<double>(columns);
      for (std::int64_t m = 0; m < rows; m++) {
        const double *row = x.exact.data() + m * columns, *g = grad.exact.data() + m * columns;
        double mean = 0, square = 0, along = 0, inner = 0;
        for (std::int64_t k = 0; k < columns; k++) mean += centered ? row[k] / width : 0;
        for (std::int64_t k = 0; k < columns; k++) square += (row[k] - mean) * (row[k] - mean) / width;
        const double scale = 1 / std::sqrt(square + 1e-3);
        for (std::int64_t k = 0; k < columns; k++) {
          const double own = g[k] * (weight.exact[k] + 0.5), normalized = (row[k] - mean) * scale;
          along += own * normalized / width, inner += centered ? own / width : 0;
          of_weight[k] += g[k] * normalized, of_bias[k] += g[k];
        }
        for (std::int64_t k = 0; k < columns; k++)
          wanted[m * columns + k] = scale * (g[k] * (weight.exact[k] + 0.5) - inner - (row[k] - mean) * scale * along);
      }
      expect(name, grad_x, wanted, type, 5e-3);
      for (std::int64_t k = 0; k < columns; k++) {
        checks++;
        if (std::abs(static_cast<double>(grad_weight[k]) - of_weight[k]) <= 2e-3 &&
            std::abs(static_cast<double>(grad_bias[k]) - of_bias[k]) <= 2e-3)
          continue;
        std::printf("%s: sums of column %d are %g and %g, not %g and %g\n", name, static_cast<int>(k),
                    static_cast<double>(grad_weight[k]), static_cast<double>(grad_bias[k]), of_weight[k], of_bias[k]);
        failures++;
      }
    }
  }
}

void gate_grads(const char* name, void (*kernel)(const GateGrad&), Type type) {
  for (int number = 0; number < 5; number++) {
    const Activation activation = static_cast<Activation>(number);
    for (std::int64_t count : {1, 15, 1001, 70001}) {
      Values gate(count, type), up(count, type), grad(count, type), of_gate(count, type), of_up(count, type);
      kernel(
          {{gate.data(), up.data(), nullptr, count, activation, type, 3}, grad.data(), of_gate.data(), of_up.data()});
      std::vector<double> wanted_gate(count), wanted_up(count);
      for (std::int64_t i = 0; i < count; i++) {
        const double x = gate.exact[i], step = 1e-5;
        const double slope = (activated(activation, x + step) - activated(activation, x - step)) / (2 * step);
        wanted_gate[i] = grad.exact[i] * up.exact[i] * (x == 0 && number == 3 ? 0 : slope);
        wanted_up[i] = grad.exact[i] * activated(activation, x);
      }
      expect(name, of_gate, wanted_gate, type, 1e-3);
      expect(name, of_up, wanted_up, type, 1e-5);
    }
  }
}

void cross_entropies(const char* name, void (*kernel)(const CrossEntropy&), Type type) {
  for (std::int64_t columns : {1, 7, 16, 37, 5001}) {
    for (const float softcap : {0.0f, 3.0f}) {
      const std::int64_t rows = 4, labels[] = {columns - 1, -1, columns / 2, columns};
      const float smoothing = 0.125f, factors[] = {1.0f, 1.0f, 0.5f, 1.0f};
      Values logits(rows * columns, type);
      std::vector<float> losses(rows);
      kernel({logits.data(), labels, factors, losses.data(), rows, columns, softcap, smoothing, true, type, type, 3});
      std::vector<double> wanted(rows * columns);
      for (const std::int64_t m : {0, 2}) {
        std::vector<double> z(columns);
        double sum = 0, mean = 0;
        for (std::int64_t k = 0; k < columns; k++) {
          const double raw = logits.exact[m * columns + k];
          z[k] = softcap == 0 ? raw : static_cast<double>(softcap) * std::tanh(raw / static_cast<double>(softcap));
          sum += std::exp(z[k]), mean += z[k] / static_cast<double>(columns);
        }
        const double spread = static_cast<double>(smoothing), kept = 1 - spread;
        const double loss = std::log(sum) - kept * z[labels[m]] - spread * mean;
        checks++;
        if (std::abs(static_cast<double>(losses[m]) - loss) > 1e-4) {
          std::printf("%s: the loss of row %d is %g, not %g\n", name, static_cast<int>(m),
                      static_cast<double>(losses[m]), loss);
          failures++;
        }
        for (std::int64_t k = 0; k < columns; k++) {
          const double part = softcap == 0 ? 0 : z[k] / static_cast<double>(softcap);
          const double target = spread / static_cast<double>(columns) + (k == labels[m] ? kept : 0);
          wanted[m * columns + k] =
              static_cast<double>(factors[m]) * (std::exp(z[k]) / sum - target) * (1 - part * part);
        }
      }
      expect(name, logits, wanted, type, 1e-5);
    }
  }
}

void dropouts(const char* name, void (*kernel)(const Dropout&), Type type) {
  for (std::int64_t columns : {1, 7, 64, 131, 20001}) {
    const std::int64_t rows = 5;
    const std::uint64_t seed = 0x9E3779B97F4A7C15u;
    Values x(rows * columns, type), y(rows * columns, type);
    kernel({x.data(), y.data(), rows, columns, seed, 0.25, type, 3});
    std::vector<double> wanted(rows * columns);
    for (std::int64_t m = 0; m < rows; m++)
      for (std::int64_t k = 0; k < columns; k++) {
        std::uint32_t bits[4];
        parco::cast::draw<4>(seed, m, k / 4 * 4, bits);
        wanted[m * columns + k] = bits[k % 4] < 1u << 30 ? 0 : x.exact[m * columns + k] / 0.75;
      }
    expect(name, y, wanted, type, 1e-6);
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
      const bool sunk = group != 2;
      const std::int64_t batch = 2, key_heads = 2, heads = key_heads * group, count = 5 + columns, room = count + 3;
      Values q(batch * heads * columns, type), y(batch * heads * columns, type);
      Values keys(batch * key_heads * room * columns, type), values(batch * key_heads * room * columns, type);
      Values sinks(heads, type);
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
              3,
              0,
              sunk ? sinks.data() : nullptr});
      std::vector<double> wanted(batch * heads * columns);
      for (std::int64_t head = 0; head < batch * heads; head++) {
        const std::int64_t from = (head / heads * key_heads + head % heads / group) * of_head;
        std::vector<double> power(count);
        double sum = sunk ? std::exp(sinks.exact[head % heads]) : 0;
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

void mixes(const char* name, void (*kernel)(const Mix&), Type type) {
  for (std::int64_t columns : {1, 16, 37, 3001}) {
    const std::int64_t rows = 9, count = 4, all = 6;
    Values x(all * columns, type), y(rows * columns, type);
    std::vector<std::int64_t> places(rows * count);
    std::vector<float> factors(rows * count);
    for (std::int64_t i = 0; i < rows * count; i++) {
      places[i] = static_cast<std::int64_t>(random_bits() % (all + 1)) - 1;
      factors[i] = static_cast<float>(random_bits() % 64) / 64;
    }
    kernel({x.data(), places.data(), factors.data(), y.data(), rows, count, columns, type, 3});
    std::vector<double> wanted(rows * columns);
    for (std::int64_t m = 0; m < rows; m++)
      for (std::int64_t i = m * count; i < (m + 1) * count; i++)
        for (std::int64_t k = 0; k < columns && places[i] >= 0; k++)
          wanted[m * columns + k] += static_cast<double>(factors[i]) * x.exact[places[i] * columns + k];
    expect(name, y, wanted, type, 1e-5);
  }
}

}  // namespace

int main() {
  for (Type type : {Type::fp32, Type::bf16}) {
    norms("norm generic", norm_generic, type);
    gates("gate generic", gate_generic, type);
    norm_grads("norm gradient generic", norm_grad_generic, type);
    gate_grads("gate gradient generic", gate_grad_generic, type);
    cross_entropies("cross entropy generic", cross_entropy_generic, type);
    dropouts("dropout generic", dropout_generic, type);
    rotations("rotate generic", rotate_generic, type);
    attentions("attend generic", attend_generic, type);
    sums("add generic", add_generic, type);
    mixes("mix generic", mix_generic, type);
    if (parco::features().avx2) {
      norms("norm avx2", norm_avx2, type);
      gates("gate avx2", gate_avx2, type);
      norm_grads("norm gradient avx2", norm_grad_avx2, type);
      gate_grads("gate gradient avx2", gate_grad_avx2, type);
      cross_entropies("cross entropy avx2", cross_entropy_avx2, type);
      dropouts("dropout avx2", dropout_avx2, type);
      rotations("rotate avx2", rotate_avx2, type);
      attentions("attend avx2", attend_avx2, type);
      sums("add avx2", add_avx2, type);
      mixes("mix avx2", mix_avx2, type);
    }
    if (parco::features().avx512) {
      norms("norm avx512", norm_avx512, type);
      gates("gate avx512", gate_avx512, type);
      norm_grads("norm gradient avx512", norm_grad_avx512, type);
      gate_grads("gate gradient avx512", gate_grad_avx512, type);
      cross_entropies("cross entropy avx512", cross_entropy_avx512, type);
      dropouts("dropout avx512", dropout_avx512, type);
      rotations("rotate avx512", rotate_avx512, type);
      attentions("attend avx512", attend_avx512, type);
      sums("add avx512", add_avx512, type);
      mixes("mix avx512", mix_avx512, type);
    }
  }
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
