#include "decode/layer.h"

#include <cstring>

namespace parco::decode {
namespace {

// One after the other, each at an address that vectors like.
class Buffers {
 public:
  Buffers(char* memory, std::size_t size) : next_(memory), size_(size) {}
  char* take(std::int64_t numbers) {
    char* found = next_;
    next_ += linear::rounded(static_cast<std::size_t>(numbers) * size_);
    return found;
  }

 private:
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

}  // namespace

void run(const Layer& layer, const Token& token) {
  const std::size_t size = static_cast<std::size_t>(linear::size_of(layer.type));
  const std::int64_t queries = layer.heads * layer.head, all = queries + 2 * layer.key_heads * layer.head;
  const std::int64_t inner = layer.block ? experts::numbers_of(*layer.block) : 0;
  const std::int64_t numbers = 3 * layer.columns + all + 2 * queries + inner;
  const std::size_t bytes = static_cast<std::size_t>(numbers) * size + 7 * 64 + experts::room_beside;
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
  if (layer.mixture)
    experts::run(*layer.mixture, normed, part, threads);
  else
    experts::run(*layer.block, normed, part, 1, buffers.take(inner), threads);
  if (!layer.after.empty()) normalize(layer, layer.after[1], part, part, 1, layer.columns);
  if (layer.parallel) add(h, part, part);
  add(layer.parallel ? token.x : h, part, token.y);
}

}  // namespace parco::decode
