#include "experts/mixture.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "linear/floats.h"

namespace parco::experts {
namespace {

using Share = std::pair<float, std::int64_t>;

// The greatest first, as torch.topk chooses: by the same algorithms of the standard library, so that of equal shares,
// which logits of 16 bits often have, the same are taken.
void choose(std::vector<Share>& shares, std::int64_t choices) {
  const auto greater = [](const Share& a, const Share& b) {
    return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
  };
  const auto end = shares.begin() + choices;
  if (choices * 64 <= static_cast<std::int64_t>(shares.size())) {
    std::partial_sort(shares.begin(), end, shares.end(), greater);
    return;
  }
  std::nth_element(shares.begin(), end - 1, shares.end(), greater);
  std::sort(shares.begin(), end - 1, greater);
}

}  // namespace

void run(const Mixture& mixture, const void* x, void* y, int threads) {
  const std::size_t count = mixture.blocks.size();
  const Type type = mixture.router.type;
  std::vector<char> logits(count * sizeof(float));
  const auto load = [&](std::size_t i) {
    return linear::load_float(logits.data(), type, static_cast<std::int64_t>(i));
  };
  linear::run(mixture.router, x, logits.data(), 1, threads);
  float most = load(0), total = 0, chosen = 0;
  for (std::size_t i = 1; i < count; i++) most = std::max(most, load(i));
  std::vector<Share> shares(count);
  for (std::size_t i = 0; i < count; i++) {
    shares[i] = {std::exp(load(i) - most), static_cast<std::int64_t>(i)};
    total += shares[i].first;
  }
  for (Share& share : shares) share.first /= total;
  choose(shares, mixture.choices);
  shares.resize(static_cast<std::size_t>(mixture.choices));
  for (const Share& share : shares) chosen += share.first;

  std::vector<const Block*> blocks;
  for (const Block& block : mixture.blocks) blocks.push_back(&block);
  std::vector<std::int64_t> numbers;
  std::vector<float> weights;
  for (const Share& share : shares) {
    numbers.push_back(share.second);
    weights.push_back(mixture.normalized ? share.first / chosen : share.first);
  }
  if (mixture.shared) {
    float weight = 1;
    if (mixture.shared_gate) {
      linear::run(*mixture.shared_gate, x, logits.data(), 1, threads);
      weight = 1 / (1 + std::exp(-load(0)));
    }
    blocks.push_back(&*mixture.shared);
    numbers.push_back(static_cast<std::int64_t>(count));
    weights.push_back(weight);
  }
  run(blocks, {numbers.data(), weights.data(), static_cast<std::int64_t>(numbers.size())}, x, y, 1, threads);
}

}  // namespace parco::experts
