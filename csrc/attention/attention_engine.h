// attention.h for vector instruction sets, in tiles of 64 queries by 64 keys (FlashAttention-2, arXiv 2307.08691).
// Included by one translation unit per instruction set; V is its vector type. Everything is unnamed (see
// linear/floats.h).
//
// Each task widens its operands to fp32 once. Products read rows of their second operand, so keys and values also lie
// turned, a tile of 64 keys at a time. Sums run in an order that depends on nothing but the sizes.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "attention/attention.h"
#include "attention/multiply.h"
#include "attention/shown.h"
#include "rowwise/rowwise_engine.h"

namespace parco::attention {
namespace {

// What a thread computes with, all of it fp32: rows of `width` numbers, rounded up to whole vectors. Pieces are rows of
// all keys, rows of a tile of queries, and scores of a tile; each is a multiple of 64 numbers.
struct Space {
  std::int64_t width, keys;  // keys rounded up to whole tiles
  float* next;

  template <class V>
  static Space of(const Forward& call, void* memory) {
    return {(call.width + V::lanes - 1) / V::lanes * V::lanes, tiles_of(call.count) * tile,
            static_cast<float*>(memory)};
  }
  // Bytes of so many pieces.
  std::size_t bytes(std::int64_t of_keys, std::int64_t of_tiles, std::int64_t of_scores) const {
    return static_cast<std::size_t>((of_keys * keys + of_tiles * tile) * width + of_scores * tile * tile) *
           sizeof(float);
  }
  float* take(std::int64_t numbers) {
    float* found = next;
    next += numbers;
    return found;
  }
  float* of_keys() { return take(keys * width); }
  float* of_tile() { return take(tile * width); }
  float* scores() { return take(tile * tile); }
};

// Scratch, or where it is large memory of this call alone, since scratch is kept. That comes in large pages where the
// system has them: 4 KB at a time cost a tenth of a derivative's time.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : own_(nullptr) {
    if (bytes > kept) {
      const std::size_t rounded = (bytes + page - 1) / page * page;
      own_ = std::aligned_alloc(page, rounded);
      if (!own_) throw std::bad_alloc();
      madvise(own_, rounded, MADV_HUGEPAGE);
    }
    at_ = static_cast<char*>(own_ ? own_ : linear::scratch(bytes));
  }
  ~Memory() { std::free(own_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  char* at(std::size_t byte) const { return at_ + byte; }

 private:
  static constexpr std::size_t kept = std::size_t{64} << 20, page = std::size_t{2} << 20;
  void* own_;
  char* at_;
};

// `tokens` rows of a head from number `first` on, times `factor`; zeros behind their width.
template <class V, Type type>
void widen(const Heads& heads, std::int64_t first, std::int64_t tokens, std::int64_t width, std::int64_t padded,
           float factor, float* to) {
  for (std::int64_t t = 0; t < tokens; t++)
    for (std::int64_t k = 0; k < padded; k += V::lanes) {
      const int some = static_cast<int>(std::min<std::int64_t>(V::lanes, width - k));
      const typename V::F value = V::template load<type>(heads.at, first + t * heads.stride[2] + k, some);
      V::store(to + t * padded + k, V::multiply(value, V::set(factor)));
    }
}

// `tokens` rows of `width` numbers as tiles [token / 64][number][token % 64], zeros behind the last token.
inline void turn(const float* rows, std::int64_t tokens, std::int64_t width, float* to) {
  for (std::int64_t first = 0; first < tokens; first += tile, to += tile * width) {
    const std::int64_t some = std::min(tile, tokens - first);
    if (some < tile) std::fill_n(to, tile * width, 0.0f);
    for (std::int64_t t = 0; t < some; t++)
      for (std::int64_t k = 0; k < width; k++) to[k * tile + t] = rows[(first + t) * width + k];
  }
}

// A row of scores as exp(score - greatest), those from `seen` on and those that `marks` has a 0 for as 0; f(k, each
// vector of them).
template <class V, class F>
void soften(float* scores, float greatest, std::int64_t seen, const float* marks, const F& f) {
  for (std::int64_t k = 0; k < tile; k += V::lanes) {
    typename V::F power = V::set(0.0f);
    if (k < seen) power = linear::exponential<V>(V::subtract(V::load(scores + k), V::set(greatest)));
    if (marks) power = V::multiply(power, V::load(marks + k));
    V::store(scores + k, power);
    if (k < seen && seen < k + V::lanes) {
      std::fill(scores + seen, scores + k + V::lanes, 0.0f);
      power = V::load(scores + k);
    }
    f(k, power);
  }
}

// The greatest of `greatest` and a row's first `seen` scores.
template <class V>
float greatest_of(const float* scores, std::int64_t seen, float greatest) {
  std::int64_t k = 0;
  typename V::F found = V::set(greatest);
  for (; k + V::lanes <= std::min(seen, tile); k += V::lanes) found = V::max(found, V::load(scores + k));
  alignas(64) float lanes[V::lanes];
  V::store(lanes, found);
  for (const float one : lanes) greatest = std::max(greatest, one);
  for (; k < std::min(seen, tile); k++) greatest = std::max(greatest, scores[k]);
  return greatest;
}

// Queries of a tile from `t` on, against all keys that they see.
template <class V, Type type>
void attend_tile(const Forward& call, const Shows& shows, Space space, std::int64_t b, std::int64_t head,
                 std::int64_t t, const float* turned_keys, const float* values) {
  using F = typename V::F;
  const std::int64_t rows = std::min(tile, call.queries - t), width = space.width;
  float *queries = space.of_tile(), *sums = space.of_tile(), *scores = space.scores();
  widen<V, type>(call.q, call.q.index(b, head, t), rows, call.width, width, call.scale, queries);
  std::fill_n(sums, rows * width, 0.0f);
  float greatest[tile], total[tile] = {};
  std::fill_n(greatest, tile, -std::numeric_limits<float>::infinity());
  const std::int64_t first_row = (b * call.heads + head) * call.queries + t;
  Factors<typename V::Random> factors(call);
  const std::int64_t last = call.seen(t + rows - 1);
  for (std::int64_t key = 0; key < last; key += tile) {
    const Shown shown = shows.of(b, head, t, key);
    if (shown == Shown::none) continue;
    Marks marks(call, shown, b, head, t, key);
    multiply<V>({queries, width, 1, turned_keys + key * width, tile, scores, tile, width, false}, rows, tile);
    // Scores are scale * q . key here, of queries that were widened with the scale.
    for (std::int64_t r = 0; r < rows; r++) {
      float* row = scores + r * tile;
      const float* of_row = marks.hide(r, row);
      const std::int64_t seen = call.seen(t + r) - key;
      const float before = greatest[r];
      greatest[r] = greatest_of<V>(row, seen, before);
      if (greatest[r] == -std::numeric_limits<float>::infinity()) {  // every score so far, or it is no number
        for (std::int64_t k = 0; k < std::min(seen, tile); k++)
          if (std::isnan(row[k])) total[r] = row[k];
        std::fill_n(row, tile, 0.0f);
        continue;
      }
      F powers = V::set(0.0f);
      const float* times = factors.of_row(first_row + r, key);
      soften<V>(row, greatest[r], seen, of_row, [&](std::int64_t k, F power) {
        powers = V::add(powers, power);
        if (times) V::store(row + k, V::multiply(power, V::load(times + k)));
      });
      const float sum = V::total(powers);
      if (before == greatest[r]) {
        total[r] += sum;
        continue;
      }
      const float less = std::exp(before - greatest[r]);  // 0 of the first that is seen
      total[r] = total[r] * less + sum;
      for (std::int64_t k = 0; k < width; k += V::lanes)
        V::store(sums + r * width + k, V::multiply(V::load(sums + r * width + k), V::set(less)));
    }
    const std::int64_t some = std::min(tile, last - key);
    multiply<V>({scores, tile, 1, values + key * width, width, sums, width, some, true}, rows, width);
  }
  for (std::int64_t r = 0; r < rows; r++) {
    const bool blind = call.mask && total[r] == 0.0f;
    const F share = V::set(blind ? 0.0f : 1.0f / total[r]);
    const std::int64_t y = ((b * call.queries + t + r) * call.heads + head) * call.width;
    rowwise::each_vector<V>(call.width, [&](std::int64_t k, int some) {
      V::template store<type>(call.y, y + k, some, V::multiply(V::load(sums + r * width + k), share));
    });
    call.logs[first_row + r] = blind ? std::numeric_limits<float>::infinity() : greatest[r] + std::log(total[r]);
  }
}

template <class V, Type type>
void run_forward(const Forward& call) {
  const std::int64_t group = call.heads / call.key_heads, of_queries = tiles_of(call.queries);
  const std::int64_t heads = call.batch * call.key_heads;
  const int useful = rowwise::useful_threads(call.batch * call.heads * call.queries * call.count, call.threads);
  // A head's tiles are dealt out in turn, since later queries see more.
  const std::int64_t parts = std::clamp<std::int64_t>(4 * useful / heads, 1, of_queries), tasks = heads * parts;
  const int threads = static_cast<int>(std::min<std::int64_t>(useful, tasks));
  const Space sizes = Space::of<V>(call, nullptr);
  const std::size_t size = sizes.bytes(2, 2, 1);  // what this loop and attend_tile take
  const Memory memory(size * static_cast<std::size_t>(threads));
  const Shows shows(call);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int thread = 0; thread < threads; thread++)
    for (std::int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
      Space space = Space::of<V>(call, memory.at(size * static_cast<std::size_t>(thread)));
      const std::int64_t b = task / parts / call.key_heads, shared = task / parts % call.key_heads;
      float *keys = space.of_keys(), *values = space.of_keys();
      widen<V, type>(call.keys, call.keys.index(b, shared, 0), call.count, call.width, space.width, 1.0f, values);
      turn(values, call.count, space.width, keys);
      widen<V, type>(call.values, call.values.index(b, shared, 0), call.count, call.width, space.width, 1.0f, values);
      for (std::int64_t head = shared * group; head < (shared + 1) * group; head++)
        for (std::int64_t t = task % parts; t < of_queries; t += parts)
          attend_tile<V, type>(call, shows, space, b, head, t * tile, keys, values);
    }
}

// What the derivative of one head holds of its keys and values.
struct Keys {
  const float *rows, *turned, *turned_values;  // [keys, width], and in tiles of 64 keys twice
  float *grad, *grad_values;                   // [keys, width]
};

// Queries of a tile from `t` on: their gradients, and their parts of those of keys and values.
template <class V, Type type>
void differentiate_tile(const Backward& call, const Shows& shows, Space space, std::int64_t b, std::int64_t head,
                        std::int64_t t, const Keys& keys) {
  using F = typename V::F;
  const Forward& forward = call.forward;
  const std::int64_t rows = std::min(tile, forward.queries - t), width = space.width;
  float *queries = space.of_tile(), *grad = space.of_tile(), *grad_queries = space.of_tile();
  float *scores = space.scores(), *grad_scores = space.scores();
  widen<V, type>(forward.q, forward.q.index(b, head, t), rows, forward.width, width, forward.scale, queries);
  widen<V, type>(call.grad, call.grad.index(b, head, t), rows, forward.width, width, 1.0f, grad);
  std::fill_n(grad_queries, rows * width, 0.0f);
  const std::int64_t first_y = ((b * forward.queries + t) * forward.heads + head) * forward.width;
  const std::int64_t of_token = forward.heads * forward.width;
  float common[tile];  // what the gradients of a softmax's scores have in common: grad . y
  for (std::int64_t r = 0; r < rows; r++) {
    F sum = V::set(0.0f);
    rowwise::each_vector<V>(forward.width, [&](std::int64_t k, int some) {
      sum = V::fma(V::load(grad + r * width + k), V::template load<type>(forward.y, first_y + r * of_token + k, some),
                   sum);
    });
    common[r] = V::total(sum);
  }
  const std::int64_t first_row = (b * forward.heads + head) * forward.queries + t;
  const float* logs = forward.logs + first_row;
  Factors<typename V::Random> factors(forward);
  const std::int64_t last = forward.seen(t + rows - 1);
  for (std::int64_t key = 0; key < last; key += tile) {
    const std::int64_t some = std::min(tile, last - key), at = key * width;
    const Shown shown = shows.of(b, head, t, key);
    if (shown == Shown::none) continue;
    Marks marks(forward, shown, b, head, t, key);
    multiply<V>({queries, width, 1, keys.turned + at, tile, scores, tile, width, false}, rows, tile);
    multiply<V>({grad, width, 1, keys.turned_values + at, tile, grad_scores, tile, width, false}, rows, tile);
    for (std::int64_t r = 0; r < rows; r++) {
      float *row = scores + r * tile, *grad_row = grad_scores + r * tile;
      const F same = V::set(common[r]);
      const float* of_row = marks.hide(r, row);
      const float* times = factors.of_row(first_row + r, key);
      soften<V>(row, logs[r], forward.seen(t + r) - key, of_row, [&](std::int64_t k, F share) {
        F grad_share = V::load(grad_row + k);
        if (times) {
          grad_share = V::multiply(grad_share, V::load(times + k));
          V::store(row + k, V::multiply(share, V::load(times + k)));
        }
        V::store(grad_row + k, V::multiply(share, V::subtract(grad_share, same)));
      });
    }
    multiply<V>({scores, 1, tile, grad, width, keys.grad_values + at, width, rows, true}, some, width);
    multiply<V>({grad_scores, 1, tile, queries, width, keys.grad + at, width, rows, true}, some, width);
    multiply<V>({grad_scores, tile, 1, keys.rows + at, width, grad_queries, width, some, true}, rows, width);
  }
  for (std::int64_t r = 0; r < rows; r++)
    rowwise::each_vector<V>(forward.width, [&](std::int64_t k, int some) {
      const F value = V::multiply(V::load(grad_queries + r * width + k), V::set(forward.scale));
      V::template store<type>(call.grad_q, first_y + r * of_token + k, some, value);
    });
}

constexpr std::int64_t enough_tasks = 64, least_tasks = 16;
constexpr std::int64_t most_sums = std::int64_t{8} << 20;  // numbers, of more tasks than the least

// `row` as that of `token` in the gradient of a head of keys or values.
template <class V, Type type>
void narrow(const Forward& call, std::int64_t b, std::int64_t head, std::int64_t token, const float* row, void* to) {
  const std::int64_t y = ((b * call.count + token) * call.key_heads + head) * call.width;
  rowwise::each_vector<V>(
      call.width, [&](std::int64_t k, int some) { V::template store<type>(to, y + k, some, V::load(row + k)); });
}

// The tiles of queries that share a head of keys, every `step`-th from tile `first` on, with their parts of the
// gradients of its keys and values in `grad_keys` and `grad_values`.
template <class V, Type type>
void differentiate_head(const Backward& call, const Shows& shows, Space space, std::int64_t b, std::int64_t shared,
                        std::int64_t first, std::int64_t step, float* grad_keys, float* grad_values) {
  const Forward& forward = call.forward;
  const std::int64_t group = forward.heads / forward.key_heads, of_queries = tiles_of(forward.queries);
  float *rows = space.of_keys(), *turned = space.of_keys(), *turned_values = space.of_keys();
  const auto widened = [&](const Heads& from) {
    widen<V, type>(from, from.index(b, shared, 0), forward.count, forward.width, space.width, 1.0f, rows);
  };
  widened(forward.values);
  turn(rows, forward.count, space.width, turned_values);
  widened(forward.keys);
  turn(rows, forward.count, space.width, turned);
  std::fill_n(grad_keys, forward.count * space.width, 0.0f);
  std::fill_n(grad_values, forward.count * space.width, 0.0f);
  const Keys keys{rows, turned, turned_values, grad_keys, grad_values};
  for (std::int64_t each = first; each < group * of_queries; each += step)
    differentiate_tile<V, type>(call, shows, space, b, shared * group + each / of_queries, each % of_queries * tile,
                                keys);
}

// What shares a head of keys is dealt out to `parts` tasks, as many as give enough of them, whatever the threads. Each
// of several has sums of its own, which are added up in their order afterwards; large ones take longer than they bring.
template <class V, Type type>
void run_backward(const Backward& call) {
  const Forward& forward = call.forward;
  const std::int64_t heads = forward.batch * forward.key_heads, group = forward.heads / forward.key_heads;
  const Space sizes = Space::of<V>(forward, nullptr);
  const std::int64_t of_keys = sizes.keys * sizes.width;
  const std::int64_t affordable = std::max(most_sums / (2 * heads * of_keys), least_tasks / heads);
  const std::int64_t most = std::min({enough_tasks / heads, affordable, group * tiles_of(forward.queries)});
  const std::int64_t parts = std::max<std::int64_t>(1, most), tasks = heads * parts;
  const int useful =
      rowwise::useful_threads(2 * forward.batch * forward.heads * forward.queries * forward.count, forward.threads);
  const int threads = static_cast<int>(std::min<std::int64_t>(useful, tasks));
  // What differentiate_head and _tile take, and a task's only sums.
  const std::size_t size = sizes.bytes(parts > 1 ? 3 : 5, 3, 2);
  const std::size_t sums = parts > 1 ? sizes.bytes(2 * tasks, 0, 0) : 0;
  const Memory memory(sums + size * static_cast<std::size_t>(threads));
  const Shows shows(forward);
  float* shared_sums = reinterpret_cast<float*>(memory.at(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int thread = 0; thread < threads; thread++)
      for (std::int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; task++) {
        Space space = Space::of<V>(forward, memory.at(sums + size * static_cast<std::size_t>(thread)));
        const std::int64_t b = task / parts / forward.key_heads, shared = task / parts % forward.key_heads;
        float* grad_keys = parts > 1 ? shared_sums + 2 * task * of_keys : space.of_keys();
        float* grad_values = parts > 1 ? grad_keys + of_keys : space.of_keys();
        differentiate_head<V, type>(call, shows, space, b, shared, task % parts, parts, grad_keys, grad_values);
        for (std::int64_t t = 0; t < forward.count && parts == 1; t++) {
          narrow<V, type>(forward, b, shared, t, grad_keys + t * sizes.width, call.grad_keys);
          narrow<V, type>(forward, b, shared, t, grad_values + t * sizes.width, call.grad_values);
        }
      }
    if (parts > 1) {
#pragma omp for schedule(static)
      for (std::int64_t row = 0; row < heads * forward.count; row++) {
        const std::int64_t owner = row / forward.count, token = row % forward.count;
        float* first = shared_sums + 2 * owner * parts * of_keys + token * sizes.width;
        for (void* to : {call.grad_keys, call.grad_values}) {
          for (std::int64_t i = 1; i < parts; i++)
            for (std::int64_t k = 0; k < sizes.width; k += V::lanes)
              V::store(first + k, V::add(V::load(first + k), V::load(first + 2 * i * of_keys + k)));
          narrow<V, type>(forward, owner / forward.key_heads, owner % forward.key_heads, token, first, to);
          first += of_keys;
        }
      }
    }
  }
}

template <class V>
void attention(const Forward& call) {
  rowwise::with_type(call.type, [&](auto type) { run_forward<V, type()>(call); });
}

template <class V>
void attention_grad(const Backward& call) {
  rowwise::with_type(call.forward.type, [&](auto type) { run_backward<V, type()>(call); });
}

}  // namespace
}  // namespace parco::attention
