#include "decode/layer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "linear/floats.h"

namespace parco::decode {
namespace {

// One after the other, each at an address that vectors like.
class Buffers {
 public:
  Buffers(char* memory, std::size_t size) : next_(memory), size_(size) {}
  // Numbers of the type of x.
  char* take(std::int64_t numbers) { return take_bytes(static_cast<std::size_t>(numbers) * size_); }
  template <class T>
  T* take_as(std::int64_t numbers) {
    return reinterpret_cast<T*>(take_bytes(static_cast<std::size_t>(numbers) * sizeof(T)));
  }

 private:
  char* take_bytes(std::size_t bytes) {
    char* found = next_;
    next_ += linear::rounded(bytes);
    return found;
  }

  char* next_;
  std::size_t size_;
};

void multiply(const std::vector<linear::Chain>& chains, const void* x, char* y, std::size_t size, int threads) {
  for (const linear::Chain& chain : chains) {
    linear::run(chain, x, y, 1, threads);
    y += static_cast<std::size_t>(chain.outputs()) * size;
  }
}

void normalize(const Layer& layer, const Scaling& how, const void* x, void* y, std::int64_t rows,
               std::int64_t columns) {
  layer.rowwise.norm(
      {x, how.weight, y, rows, columns, how.epsilon, how.offset, how.rounded, layer.type, 1, how.centered, how.bias});
}

// The heads' queries and keys turned, keys and values behind the known ones, and what the heads have looked up.
void attention(const Layer& layer, const Token& token, char* qkv, char* turned, char* found) {
  const std::size_t size = static_cast<std::size_t>(linear::size_of(layer.type));
  const std::int64_t width = layer.head, apart = layer.interleaved ? 3 * width : width;
  const std::int64_t first_key = layer.interleaved ? width : layer.heads * width;
  char* const k = qkv + static_cast<std::size_t>(first_key) * size;
  const char* const v = k + static_cast<std::size_t>(layer.interleaved ? width : layer.key_heads * width) * size;
  if (!layer.of_heads.empty()) {
    normalize(layer, layer.of_heads[0], qkv, qkv, layer.heads, width);
    normalize(layer, layer.of_heads[1], k, k, layer.key_heads, width);
  }
  const auto place = [&](void* of, std::int64_t stride, std::int64_t head) {
    return static_cast<char*>(of) + static_cast<std::size_t>(head * stride + token.known * width) * size;
  };
  const auto heads = [&](const void* x, void* y, std::int64_t count, std::int64_t stride) {
    return rowwise::Heads{x, y, count, {0, apart, 0}, {0, stride, 0}};
  };
  layer.rowwise.rotate({{heads(qkv, turned, layer.heads, width),
                         heads(k, place(token.keys, token.key_stride, 0), layer.key_heads, token.key_stride)},
                        token.cos,
                        token.sin,
                        1,
                        1,
                        layer.turning,
                        width - layer.turning,
                        {0, 0},
                        layer.type,
                        1});
  const std::size_t head_bytes = static_cast<std::size_t>(width) * size;
  for (std::int64_t h = 0; h < layer.key_heads; h++)
    std::memcpy(place(token.values, token.value_stride, h), v + static_cast<std::size_t>(h * apart) * size, head_bytes);
  layer.rowwise.attend({turned,
                        token.keys,
                        token.values,
                        found,
                        1,
                        layer.heads,
                        layer.key_heads,
                        token.known + 1,
                        width,
                        {0, width},
                        {0, token.key_stride, width},
                        {0, token.value_stride, width},
                        layer.scale,
                        layer.type,
                        token.threads,
                        layer.softcap});
}

// Which blocks a token takes and with which weights, written where there is room for all of them. How many there are.
std::int64_t route(const Layer& layer, const void* x, char* logits, float* shares, std::int64_t* blocks, float* weights,
                   int threads) {
  const Router& router = layer.router;
  const std::int64_t all = router.logits[0].outputs();
  const auto load = [&](std::int64_t i) { return linear::load_float(logits, layer.type, i); };
  linear::run(router.logits[0], x, logits, 1, threads);
  float most = load(0), total = 0, chosen = 0;
  for (std::int64_t i = 1; i < all; i++) most = std::max(most, load(i));
  for (std::int64_t i = 0; i < all; i++) total += shares[i] = std::exp(load(i) - most);
  for (std::int64_t c = 0; c < router.choices; c++) {
    std::int64_t best = 0;
    for (std::int64_t i = 1; i < all; i++)
      if (shares[i] > shares[best]) best = i;
    blocks[c] = best;
    chosen += weights[c] = shares[best];
    shares[best] = -1;
  }
  for (std::int64_t c = 0; c < router.choices; c++) weights[c] /= router.normalized ? chosen : total;
  if (static_cast<std::int64_t>(layer.blocks.blocks.size()) == all) return router.choices;
  blocks[router.choices] = all, weights[router.choices] = 1;
  if (!router.gate.empty()) {
    linear::run(router.gate[0], x, logits, 1, threads);
    weights[router.choices] = 1 / (1 + std::exp(-load(0)));
  }
  return router.choices + 1;
}

}  // namespace

void run(const Layer& layer, const Token& token) {
  const std::size_t size = static_cast<std::size_t>(linear::size_of(layer.type));
  const std::int64_t queries = layer.heads * layer.head, all = queries + 2 * layer.key_heads * layer.head;
  const std::vector<experts::Block>& blocks = layer.blocks.blocks;
  const bool routed = !layer.router.logits.empty();
  const std::int64_t inner = routed ? 0 : experts::numbers_of(blocks[0]);
  const std::int64_t routes = routed ? static_cast<std::int64_t>(blocks.size()) : 0;
  const std::int64_t numbers = 3 * layer.columns + all + 2 * queries + inner + routes;
  const std::size_t bytes =
      static_cast<std::size_t>(numbers) * size + static_cast<std::size_t>(routes) * 16 + 10 * 64 + experts::room_beside;
  Buffers buffers(static_cast<char*>(linear::scratch(bytes, linear::Caller::layer)), size);
  char *const normed = buffers.take(layer.columns), *const part = buffers.take(layer.columns);
  char *const h = buffers.take(layer.columns), *const qkv = buffers.take(all);
  char *const turned = buffers.take(queries), *const found = buffers.take(queries);
  const int threads = token.threads;

  const auto add = [&](const void* a, const void* b, void* y) {
    layer.rowwise.add({a, b, y, layer.columns, layer.type});
  };

  normalize(layer, layer.before, token.x, normed, 1, layer.columns);
  multiply(layer.qkv, normed, qkv, size, threads);
  attention(layer, token, qkv, turned, found);
  multiply(layer.out, found, h, size, threads);
  if (!layer.after.empty()) normalize(layer, layer.after[0], h, h, 1, layer.columns);
  if (!layer.parallel) add(token.x, h, h);

  if (!layer.between.empty())
    normalize(layer, layer.between[0], layer.parallel ? token.x : h, normed, 1, layer.columns);
  if (routed) {
    char* const logits = buffers.take(routes);
    float *const shares = buffers.take_as<float>(routes), *const weights = buffers.take_as<float>(routes);
    std::int64_t* const chosen = buffers.take_as<std::int64_t>(routes);
    const std::int64_t choices = route(layer, normed, logits, shares, chosen, weights, threads);
    experts::run(layer.blocks, {chosen, weights, choices}, normed, part, 1, threads);
  } else {
    experts::run(blocks[0], layer.blocks.rowwise, normed, part, 1, buffers.take(inner), threads);
  }
  if (!layer.after.empty()) normalize(layer, layer.after[1], part, part, 1, layer.columns);
  if (layer.parallel) add(h, part, part);
  add(layer.parallel ? token.x : h, part, token.y);
}

Rowwise rowwise_of(const std::string& isa) {
  using namespace rowwise;
  if (isa == "generic") return {norm_generic, rotate_generic, attend_generic, add_generic};
  if (isa == "avx2") return {norm_avx2, rotate_avx2, attend_avx2, add_avx2};
  return {norm_avx512, rotate_avx512, attend_avx512, add_avx512};
}

}  // namespace parco::decode
