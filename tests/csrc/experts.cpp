// Feed-forward blocks that rows are routed to, on every instruction set, of odd sizes, in buffers of exactly their size
// and at odd addresses, against the same in double; built with sanitizers too.
#include "experts/experts.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "machine/features.h"
#include "values.h"

using namespace parco::experts;
using parco::linear::Chain;

namespace {

Chain product(const std::string& isa, Values& matrix, std::int64_t columns, Type type) {
  parco::linear::Product made{};
  if (!choose("dense-linear-" + isa, made)) failures++;
  const std::int64_t outputs = static_cast<std::int64_t>(matrix.exact.size()) / columns;
  made.outputs = outputs, made.columns = columns;
  made.dense = {nullptr, matrix.data(), nullptr, nullptr, 1, outputs, columns, 1, type, type, type};
  return {{{made}}, type};
}

// One block's matrices; `apart`, gate and up are two products.
struct Matrices {
  Matrices(std::int64_t columns, std::int64_t inner, Type type)
      : gate(inner * columns, type, 0x1p-7f),
        up(inner * columns, type, 0x1p-7f),
        both(2 * inner * columns, type, 0x1p-7f),
        down(columns * inner, type, 0x1p-7f),
        columns(columns),
        inner(inner) {}

  Block block(const std::string& isa, Type type, bool gated, bool apart) {
    Block made{{},
               product(isa, down, inner, type),
               gated,
               parco::rowwise::Activation::relu,
               parco::rowwise::operations_of(isa)};
    if (!gated) made.gate_up = {product(isa, gate, columns, type)};
    if (gated && apart) made.gate_up = {product(isa, gate, columns, type), product(isa, up, columns, type)};
    if (gated && !apart) made.gate_up = {product(isa, both, columns, type)};
    return made;
  }

  // What the block gives for a row of x, and how large its terms are.
  void run(const double* x, bool gated, bool apart, double weight, double* y, double* size) const {
    const double* of_gate = apart || !gated ? gate.exact.data() : both.exact.data();
    const double* of_up = apart || !gated ? up.exact.data() : both.exact.data() + inner * columns;
    for (std::int64_t n = 0; n < inner; n++) {
      double g = 0, u = gated ? 0 : 1;
      for (std::int64_t k = 0; k < columns; k++) {
        g += of_gate[n * columns + k] * x[k];
        if (gated) u += of_up[n * columns + k] * x[k];
      }
      const double between = std::max(g, 0.0) * u;
      for (std::int64_t k = 0; k < columns; k++) {
        y[k] += weight * down.exact[k * inner + n] * between;
        size[k] += std::abs(weight * down.exact[k * inner + n] * between);
      }
    }
  }

  Values gate, up, both, down;
  std::int64_t columns, inner;
};

struct Kind {
  bool gated, apart;
};

void mixtures(const std::string& isa, Type type, const Kind& kind, std::int64_t columns, std::int64_t inner,
              std::int64_t rows, std::int64_t choices, int threads) {
  const std::int64_t count = 5;
  std::vector<Matrices> matrices;
  for (std::int64_t i = 0; i < count; i++) matrices.emplace_back(columns, inner + i % 2, type);
  std::vector<Block> made;
  for (Matrices& each : matrices) made.push_back(each.block(isa, type, kind.gated, kind.apart));
  std::vector<const Block*> held;
  for (const Block& each : made) held.push_back(&each);
  held[3] = nullptr;  // which adds nothing
  Values x(rows * columns, type), y(rows * columns, type);
  std::vector<std::int64_t> blocks(rows * choices);
  std::vector<float> weights(rows * choices);
  for (std::int64_t i = 0; i < rows * choices; i++) {
    blocks[i] = static_cast<std::int64_t>(random_bits() % (count + 2)) - 1;  // also below and behind them
    weights[i] = static_cast<float>(random_bits() % 64) / 64;
  }
  run(held, {blocks.data(), weights.data(), choices}, x.data(), y.data(), rows, threads);
  checks++;
  std::vector<double> wanted(columns), size(columns);
  for (std::int64_t m = 0; m < rows; m++) {
    std::fill(wanted.begin(), wanted.end(), 0);
    std::fill(size.begin(), size.end(), 0);
    for (std::int64_t c = 0; c < choices; c++) {
      const std::int64_t block = blocks[m * choices + c];
      if (block >= 0 && block < count && held[block])
        matrices[block].run(x.exact.data() + m * columns, kind.gated, kind.apart,
                            static_cast<double>(weights[m * choices + c]), wanted.data(), size.data());
    }
    for (std::int64_t k = 0; k < columns; k++) {
      const double bound = size[k] * (type == Type::fp32 ? 1e-5 : 0x1p-6) + 1e-6;
      const double found = y.get(m * columns + k);
      if (std::abs(found - wanted[k]) <= bound) continue;
      std::printf("%s, type %d, %d rows: row %d, column %d is %g, not %g\n", isa.c_str(), static_cast<int>(type),
                  static_cast<int>(rows), static_cast<int>(m), static_cast<int>(k), found, wanted[k]);
      failures++;
      return;
    }
  }
}

void all(const std::string& isa) {
  for (const Type type : {Type::fp32, Type::bf16})
    for (const Kind& kind : {Kind{true, false}, Kind{true, true}, Kind{false, false}})
      for (const std::int64_t rows : {0, 1, 2, 9, 70}) mixtures(isa, type, kind, 37, 21, rows, 3, 2);
}

}  // namespace

int main() {
  all("generic");
  std::string best = "generic";
  if (parco::features().avx2) all(best = "avx2");
  if (parco::features().avx512) all(best = "avx512");
  // More rows than are multiplied at a time.
  mixtures(best, Type::fp32, {true, false}, 16384, 1, 600, 2, 2);
  mixtures(best, Type::fp32, {true, false}, 8, 6000, 900, 3, 2);
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
