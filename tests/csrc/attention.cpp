// Attention and its derivative of every instruction set on sizes that no tile divides, at odd addresses in buffers of
// exactly their size, against the same in double; built with sanitizers too.
#include "attention/attention.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "cast/philox.h"
#include "machine/features.h"
#include "values.h"

using namespace parco::attention;

namespace {

constexpr float unit = 0x1p-6f;

void expect(const char* name, const char* what, Values& y, const std::vector<double>& wanted, Type type, double slack) {
  checks++;
  for (std::size_t i = 0; i < wanted.size(); i++) {
    const double bound = std::abs(wanted[i]) * (type == Type::fp32 ? 0 : 0x1p-8) + slack;
    if (std::abs(y.get(static_cast<std::int64_t>(i)) - wanted[i]) <= bound) continue;
    std::printf("%s, %s, type %d: number %zu of %zu is %g, not %g\n", name, what, static_cast<int>(type), i,
                wanted.size(), y.get(static_cast<std::int64_t>(i)), wanted[i]);
    failures++;
    return;
  }
}

struct Sizes {
  std::int64_t batch, key_heads, group, queries, count, width;
  bool causal;
  bool masked = false;
  double p = 0;
};

void attentions(const char* name, void (*forward)(const Forward&), void (*backward)(const Backward&), Type type,
                const Sizes& s) {
  const std::int64_t heads = s.key_heads * s.group, of_y = heads * s.width, of_keys = s.key_heads * s.width;
  Values q(s.batch * s.queries * of_y, type, unit), grad(s.batch * s.queries * of_y, type, unit),
      y(q.exact.size(), type, unit);
  Values keys(s.batch * s.count * of_keys, type, unit), values(s.batch * s.count * of_keys, type, unit);
  Values grad_q(q.exact.size(), type, unit), grad_keys(keys.exact.size(), type, unit),
      grad_values(keys.exact.size(), type, unit);
  std::vector<float> logs(s.batch * heads * s.queries);
  // Everything lies as [batch, token, head, width].
  const auto strided = [&](Values& x, std::int64_t tokens, std::int64_t of_token) {
    return Heads{x.data(), {tokens * of_token, s.width, of_token}};
  };
  const float scale = 0.3f;
  // One for each query, the same for all heads: examples of 50 keys and a few hidden ones, and every fifth query blind.
  std::vector<std::uint8_t> mask(s.masked ? static_cast<std::size_t>(s.batch * s.queries * s.count) : 0);
  const auto visible = [&](std::int64_t b, std::int64_t t, std::int64_t k) {
    const std::int64_t at = t + s.count - s.queries;
    return !s.masked || (at / 50 == k / 50 && (b + t + 3 * k) % 4 != 0 && t % 5 != 2);
  };
  for (std::size_t i = 0; i < mask.size(); i++) {
    const auto at = static_cast<std::int64_t>(i);
    mask[i] = visible(at / s.count / s.queries, at / s.count % s.queries, at % s.count);
  }
  const Forward call{strided(q, s.queries, of_y),
                     strided(keys, s.count, of_keys),
                     strided(values, s.count, of_keys),
                     y.data(),
                     logs.data(),
                     s.batch,
                     heads,
                     s.key_heads,
                     s.queries,
                     s.count,
                     s.width,
                     scale,
                     s.causal,
                     type,
                     3,
                     s.masked ? mask.data() : nullptr,
                     {s.queries * s.count, 0, s.count},
                     s.p,
                     99};
  forward(call);
  backward({call, strided(grad, s.queries, of_y), grad_q.data(), grad_keys.data(), grad_values.data()});

  std::vector<double> of_q(q.exact.size()), of_k(keys.exact.size()), of_v(keys.exact.size()), wanted(q.exact.size());
  for (std::int64_t b = 0; b < s.batch; b++)
    for (std::int64_t head = 0; head < heads; head++)
      for (std::int64_t t = 0; t < s.queries; t++) {
        const std::int64_t row = (b * s.queries + t) * of_y + head * s.width, seen = call.seen(t);
        const auto key = [&](std::int64_t k) { return (b * s.count + k) * of_keys + head / s.group * s.width; };
        std::vector<double> power(seen), grad_power(seen);
        double sum = 0, common = 0;  // grad . y, of the rounded y that backward reads
        for (std::int64_t k = 0; k < seen; k++) {
          if (!visible(b, t, k)) continue;
          for (std::int64_t i = 0; i < s.width; i++) {
            power[k] += q.exact[row + i] * keys.exact[key(k) + i] * static_cast<double>(scale);
            grad_power[k] += grad.exact[row + i] * values.exact[key(k) + i];
          }
          sum += power[k] = std::exp(power[k]);
        }
        std::vector<double> kept(seen, 1);
        std::vector<std::uint32_t> drawn((seen + 3) / 4 * 4);
        for (std::int64_t k = 0; k < seen && s.p > 0; k += 4)
          parco::cast::draw<4>(99, (b * heads + head) * s.queries + t, k, drawn.data() + k);
        for (std::int64_t k = 0; k < seen && s.p > 0; k++)
          kept[k] = drawn[k] < static_cast<std::uint32_t>(s.p * 0x1p32) ? 0 : 1 / (1 - s.p);
        for (std::int64_t k = 0; k < seen && sum > 0; k++) power[k] /= sum;
        for (std::int64_t i = 0; i < s.width; i++) common += grad.exact[row + i] * y.get(row + i);
        for (std::int64_t k = 0; k < seen; k++)
          for (std::int64_t i = 0; i < s.width; i++) {
            const double of_score = power[k] * (kept[k] * grad_power[k] - common) * static_cast<double>(scale);
            wanted[row + i] += power[k] * kept[k] * values.exact[key(k) + i];
            of_v[key(k) + i] += power[k] * kept[k] * grad.exact[row + i];
            of_q[row + i] += of_score * keys.exact[key(k) + i];
            of_k[key(k) + i] += of_score * q.exact[row + i];
          }
      }
  expect(name, "y", y, wanted, type, 1e-5);
  expect(name, "gradient of q", grad_q, of_q, type, 1e-4);
  expect(name, "gradient of keys", grad_keys, of_k, type, 1e-4);
  expect(name, "gradient of values", grad_values, of_v, type, 1e-4);
}

}  // namespace

int main() {
  const std::vector<Sizes> sizes{{1, 1, 1, 1, 1, 1, true},
                                 {2, 1, 3, 5, 9, 7, true},
                                 {1, 2, 1, 64, 64, 16, true},
                                 {1, 1, 2, 67, 129, 33, true},
                                 {1, 1, 1, 70, 3, 64, false},
                                 {40, 2, 1, 3, 3, 20, false},
                                 {1, 1, 1, 130, 130, 80, true},
                                 {1, 2, 2, 200, 200, 8, true},
                                 {1, 1, 1, 1, 53000, 64, true},
                                 {2, 1, 2, 200, 200, 16, true, true},
                                 {3, 2, 1, 70, 130, 5, false, true, 0.3},
                                 {1, 1, 2, 130, 130, 16, true, false, 0.1}};
  for (Type type : {Type::fp32, Type::bf16})
    for (const Sizes& each : sizes) {
      if (type != Type::fp32 && each.count > 1000) continue;  // it is long
      attentions("attention generic", attention_generic, attention_grad_generic, type, each);
      if (parco::features().avx2) attentions("attention avx2", attention_avx2, attention_grad_avx2, type, each);
      if (parco::features().avx512) attentions("attention avx512", attention_avx512, attention_grad_avx512, type, each);
    }
  std::printf("%d checks, %d differences\n", checks, failures);
  return failures != 0;
}
