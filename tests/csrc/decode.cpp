// A decoder's layer for one token on every instruction set, of odd sizes, in buffers of exactly their size and at odd
// addresses, against the same in double; built with sanitizers too.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

#include "decode/layer.h"
#include "machine/features.h"

using namespace parco::decode;
using parco::rowwise::Activation;

namespace {

int failures = 0, checks = 0;
std::mt19937 random_bits(31);

// fp32 numbers behind a byte, so that no address is a multiple of anything.
struct Values {
  explicit Values(std::size_t count) : count(count), block(count * 4 + 1) {
    for (std::size_t i = 0; i < count; i++)
      set(i, static_cast<float>(static_cast<int>(random_bits() % 255) - 127) / 256);
  }
  void* data() { return block.data() + 1; }
  void set(std::size_t i, float value) { std::memcpy(block.data() + 1 + 4 * i, &value, 4); }
  double get(std::size_t i) const {
    float value;
    std::memcpy(&value, block.data() + 1 + 4 * i, 4);
    return static_cast<double>(value);
  }
  std::size_t count;
  std::vector<char> block;
};

using Numbers = std::vector<double>;

Numbers times(const Values& matrix, const Numbers& x) {
  Numbers y(matrix.count / x.size());
  for (std::size_t n = 0; n < y.size(); n++)
    for (std::size_t k = 0; k < x.size(); k++) y[n] += matrix.get(n * x.size() + k) * x[k];
  return y;
}

// An RMS norm, or a layer norm with its weights as its bias too.
Numbers normalized(const Values& weight, Numbers x, bool centered) {
  const double count = static_cast<double>(x.size());
  double mean = 0, sum = 0;
  if (centered)
    for (double value : x) mean += value / count;
  for (double& value : x) value -= mean, sum += value * value;
  for (std::size_t k = 0; k < x.size(); k++)
    x[k] = x[k] * weight.get(k) / std::sqrt(sum / count + 1e-3) + (centered ? weight.get(k) : 0);
  return x;
}

using parco::linear::Chain;

parco::linear::Product factor(const std::string& isa, Values& matrix, std::int64_t columns) {
  parco::linear::Product made{};
  if (!choose("dense-linear-" + isa, made)) failures++;
  made.outputs = static_cast<std::int64_t>(matrix.count) / columns, made.columns = columns;
  made.dense = {nullptr, matrix.data(), nullptr,    nullptr,   1, made.outputs, columns,
                1,       Type::fp32,    Type::fp32, Type::fp32};
  return made;
}

Chain product(const std::string& isa, Values& matrix, std::int64_t columns) {
  return {{{factor(isa, matrix, columns)}}, Type::fp32};
}

// A feed-forward block.
struct Fed {
  Fed(std::int64_t columns, std::int64_t inner)
      : gate(static_cast<std::size_t>(inner * columns)),
        up(gate.count),
        down(gate.count),
        columns(columns),
        inner(inner) {}
  parco::experts::Block block(const std::string& isa, bool gated) {
    parco::experts::Block made{{product(isa, gate, columns)},
                               product(isa, down, inner),
                               gated,
                               Activation::relu,
                               parco::rowwise::operations_of(isa)};
    if (gated) made.gate_up.push_back(product(isa, up, columns));
    return made;
  }
  Numbers run(const Numbers& x, bool gated) const {
    const Numbers gates = times(gate, x), ups = times(up, x);
    Numbers between(gates.size());
    for (std::size_t i = 0; i < between.size(); i++) between[i] = gates[i] > 0 ? gates[i] * (gated ? ups[i] : 1) : 0;
    return times(down, between);
  }
  Values gate, up, down;
  std::int64_t columns, inner;
};

struct Kind {
  bool joined, interleaved, gated, centered, parallel;
  int norms;
  int experts = 0;          // of which two are chosen, and one more for all tokens where `shared`
  bool normalized = false;  // the weights of the two
  bool shared = false, gate = false;
};

void layers(const std::string& isa, const Kind& kind) {
  const std::size_t columns = 37, heads = 6, shared = kind.interleaved ? 6 : 3, head = 10, inner = 21, known = 5;
  const std::size_t room = 7;
  Values before(columns), between(columns), after[] = {Values(columns), Values(columns)};
  Values x(columns), y(columns), cos(head), sin(head);
  Values q(heads * head * columns), k(shared * head * columns), v(shared * head * columns);
  Values all(q.count + k.count + v.count), out(columns * heads * head);
  std::vector<Fed> fed;
  for (int i = 0; i < kind.experts + (kind.experts == 0 || kind.shared); i++) fed.emplace_back(columns, inner + i % 2);
  Values logits(static_cast<std::size_t>(kind.experts) * columns), shared_gate(columns);
  std::size_t at = 0;
  const std::size_t parts = kind.interleaved ? heads : 1;
  for (std::size_t part = 0; part < parts; part++)
    for (const Values* each : {&q, &k, &v})
      for (std::size_t i = part * each->count / parts; i < (part + 1) * each->count / parts; i++)
        all.set(at++, static_cast<float>(each->get(i)));
  Values keys(shared * room * head), values(shared * room * head);
  const Values old_keys = keys, old_values = values;

  Layer layer{};
  layer.columns = columns, layer.heads = heads, layer.key_heads = shared, layer.head = layer.turning = head;
  layer.scale = 0.3f, layer.type = Type::fp32, layer.rowwise = parco::rowwise::operations_of(isa);
  const auto scaling = [&](Values& weight) {
    return Scaling{weight.data(), kind.centered ? weight.data() : nullptr, 1e-3f, 0, false, kind.centered};
  };
  layer.parallel = kind.parallel, layer.interleaved = kind.interleaved;
  layer.before = scaling(before);
  if (kind.norms > 1) layer.between = {scaling(between)};
  if (kind.norms > 2) layer.after = {scaling(after[0]), scaling(after[1])};
  if (kind.joined)
    layer.qkv = {product(isa, all, columns)};
  else
    layer.qkv = {product(isa, q, columns), product(isa, k, columns), product(isa, v, columns)};
  layer.out = {product(isa, out, heads * head)};
  // A correction of low rank, and another of three factors.
  Values left(columns * 5), right(5 * heads * head), up_to(columns * 3), middle(3 * 4), last_factor(4 * heads * head);
  layer.out[0].terms.push_back({factor(isa, left, 5), factor(isa, right, heads * head)});
  layer.out[0].terms.push_back({factor(isa, up_to, 3), factor(isa, middle, 4), factor(isa, last_factor, heads * head)});
  if (kind.experts) {
    layer.mixture = parco::experts::Mixture{{}, product(isa, logits, columns), 2, kind.normalized, {}, {}};
    for (int i = 0; i < kind.experts; i++) layer.mixture->blocks.push_back(fed[i].block(isa, kind.gated));
    if (kind.shared) layer.mixture->shared = fed.back().block(isa, kind.gated);
    if (kind.gate) layer.mixture->shared_gate = product(isa, shared_gate, columns);
  } else {
    layer.block = fed[0].block(isa, kind.gated);
  }
  run(layer,
      {x.data(), cos.data(), sin.data(), y.data(), keys.data(), values.data(), known, room * head, room * head, 2});

  Numbers h(columns), found(heads * head);
  for (std::size_t i = 0; i < columns; i++) h[i] = x.get(i);
  const Numbers normed = normalized(before, h, kind.centered), q1 = times(q, normed), k1 = times(k, normed),
                v1 = times(v, normed);
  const auto turned = [&](const Numbers& of, std::size_t first, std::size_t i) {
    const double other = i < head / 2 ? -of[first + i + head / 2] : of[first + i - head / 2];
    return of[first + i] * cos.get(i) + other * sin.get(i);
  };
  const auto cached = [&](const Values& old, std::size_t of, std::size_t t, std::size_t i) {
    return old.get((of * room + t) * head + i);
  };
  for (std::size_t n = 0; n < heads; n++) {
    const std::size_t of = n / (heads / shared);
    Numbers power(known + 1);
    double sum = 0;
    for (std::size_t t = 0; t <= known; t++) {
      for (std::size_t i = 0; i < head; i++)
        power[t] += turned(q1, n * head, i) * (t < known ? cached(old_keys, of, t, i) : turned(k1, of * head, i)) * 0.3;
      sum += power[t] = std::exp(power[t]);
    }
    for (std::size_t t = 0; t <= known; t++)
      for (std::size_t i = 0; i < head; i++)
        found[n * head + i] += power[t] / sum * (t < known ? cached(old_values, of, t, i) : v1[of * head + i]);
  }
  const Numbers first = h, corrected = times(left, times(right, found));
  const Numbers again = times(up_to, times(middle, times(last_factor, found)));
  Numbers attended = times(out, found);
  for (std::size_t i = 0; i < columns; i++) attended[i] += corrected[i] + again[i];
  if (kind.norms > 2) attended = normalized(after[0], attended, kind.centered);
  for (std::size_t i = 0; i < columns; i++) h[i] += attended[i];
  const Numbers second = kind.norms > 1 ? normalized(between, kind.parallel ? first : h, kind.centered) : normed;
  Numbers last(columns);
  const auto add = [&](const Fed& of, double weight) {
    const Numbers result = of.run(second, kind.gated);
    for (std::size_t i = 0; i < columns; i++) last[i] += weight * result[i];
  };
  if (kind.experts) {
    Numbers shares = times(logits, second);
    double sum = 0;
    for (double& share : shares) sum += share = std::exp(share);
    const auto best = std::max_element(shares.begin(), shares.end());
    const std::size_t one = static_cast<std::size_t>(best - shares.begin());
    std::size_t two = one == 0;
    for (std::size_t i = 0; i < shares.size(); i++)
      if (i != one && shares[i] > shares[two]) two = i;
    const double all_of_it = kind.normalized ? shares[one] + shares[two] : sum;
    add(fed[one], shares[one] / all_of_it);
    add(fed[two], shares[two] / all_of_it);
    if (kind.shared) add(fed.back(), kind.gate ? 1 / (1 + std::exp(-times(shared_gate, second)[0])) : 1);
  } else {
    add(fed[0], 1);
  }
  if (kind.norms > 2) last = normalized(after[1], last, kind.centered);

  const auto expect = [&](const char* what, double mine, double wanted) {
    checks++;
    if (std::abs(mine - wanted) <= 2e-5 * (1 + std::abs(wanted))) return;
    std::printf("%s, %s: %g, not %g\n", isa.c_str(), what, mine, wanted);
    failures++;
  };
  for (std::size_t i = 0; i < columns; i++) expect("result", y.get(i), h[i] + last[i]);
  for (std::size_t of = 0; of < shared; of++)
    for (std::size_t t = 0; t < room; t++)
      for (std::size_t i = 0; i < head; i++) {
        const std::size_t place = (of * room + t) * head + i;
        expect("key", keys.get(place), t == known ? turned(k1, of * head, i) : old_keys.get(place));
        expect("value", values.get(place), t == known ? v1[of * head + i] : old_values.get(place));
      }
}

}  // namespace

int main() {
  const Kind kinds[] = {{false, false, true, false, false, 2},
                        {true, false, true, false, false, 4},
                        {true, true, false, true, true, 2},
                        {false, false, false, true, true, 1},
                        {true, false, false, true, false, 2},
                        {true, false, true, false, false, 2, 4, true},
                        {true, false, true, false, false, 4, 5, false, true, true},
                        {true, false, true, false, true, 2, 2, true, true, false}};
  for (const Kind& kind : kinds) {
    layers("generic", kind);
    if (parco::features().avx2) layers("avx2", kind);
    if (parco::features().avx512) layers("avx512", kind);
  }
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
