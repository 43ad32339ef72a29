// Random bits as parco.kernels.cast.philox has them, in plain C++ and in vectors W, and what dropout makes of them.
// Unnamed: see linear/floats.h.
#pragma once
#include <cstdint>

namespace parco::cast {
namespace {

// Philox4x32-10 of elements [k, k + count) of a row; both are multiples of 4.
template <int count>
void draw(std::uint64_t seed, std::int64_t row, std::int64_t k, std::uint32_t* random) {
  constexpr int quads = count / 4;
  std::uint32_t word[4][quads];
  for (int q = 0; q < quads; q++) {
    word[0][q] = static_cast<std::uint32_t>(row);
    word[1][q] = static_cast<std::uint32_t>(k / 4 + q);
    word[2][q] = static_cast<std::uint32_t>(row >> 32);
    word[3][q] = 0;
  }
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    for (int q = 0; q < quads; q++) {
      const std::uint64_t product0 = static_cast<std::uint64_t>(word[0][q]) * 0xD2511F53u;
      const std::uint64_t product1 = static_cast<std::uint64_t>(word[2][q]) * 0xCD9E8D57u;
      const std::uint32_t old1 = word[1][q], old3 = word[3][q];
      word[0][q] = static_cast<std::uint32_t>(product1 >> 32) ^ old1 ^ key0;
      word[1][q] = static_cast<std::uint32_t>(product1);
      word[2][q] = static_cast<std::uint32_t>(product0 >> 32) ^ old3 ^ key1;
      word[3][q] = static_cast<std::uint32_t>(product0);
    }
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  for (int q = 0; q < quads; q++)
    for (int w = 0; w < 4; w++) random[4 * q + w] = word[w][q];
}

// Of the elements of one row.
class PlainRandom {
 public:
  PlainRandom(std::uint64_t seed, std::int64_t row) : seed_(seed), row_(row) {}
  template <int count>
  void draw(std::int64_t k, std::uint32_t* to) const {
    cast::draw<count>(seed_, row_, k, to);
  }

 private:
  std::uint64_t seed_;
  std::int64_t row_;
};

// Of one row too, in vectors W. Of the counter (row, k / 4, row >> 32, 0) only the second word differs along a row, so
// the first rounds are in part the same for all.
template <class W>
class VectorRandom {
 public:
  VectorRandom(std::uint64_t seed, std::int64_t row) {
    std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
    for (auto& of_round : keys) {
      of_round[0] = key[0], of_round[1] = key[1];
      key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    const std::uint64_t product0 = (row & 0xffffffff) * multiplier0;
    const std::uint64_t product1 = (static_cast<std::uint64_t>(row) >> 32) * multiplier1;
    first0 = (product1 >> 32) ^ keys[0][0];
    const std::uint64_t word2 = (product0 >> 32 ^ keys[0][1]) * multiplier1;
    second2 = (product0 & 0xffffffff) ^ keys[1][1];
    const std::uint64_t word0 = (word2 >> 32 ^ (product1 & 0xffffffff) ^ keys[1][0]) * multiplier0;
    third0 = (word2 & 0xffffffff) ^ keys[2][0];
    third2 = (word0 >> 32) ^ keys[2][1];
    third3 = word0 & 0xffffffff;
  }

  // Of elements [k, k + count), k being a multiple of 4; `to` is aligned as vectors are.
  template <int count>
  void draw(std::int64_t k, std::uint32_t* to) const {
    static_assert(count % (4 * W::lanes) == 0, "a whole number of vectors");
#pragma GCC unroll 4
    for (int i = 0; i < count; i += 4 * W::lanes) draw_vector(static_cast<std::uint64_t>(k + i) / 4, to + i);
  }

 private:
  static constexpr std::uint64_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
  std::uint64_t keys[10][2], first0, second2, third0, third2, third3;

  void draw_vector(std::uint64_t quad, std::uint32_t* to) const {
    using I = typename W::I;
    const I by0 = W::set(multiplier0), by1 = W::set(multiplier1);
    I product0 = W::multiply(W::differ(W::count_from(quad), W::set(first0)), by0);
    I word2 = W::differ(W::high(product0), W::set(second2));
    I product1 = W::multiply(word2, by1);
    I word0 = W::differ(W::high(product1), W::set(third0)), word1 = product1, word3 = W::set(third3);
    word2 = W::differ(product0, W::set(third2));
    for (int round = 3; round < 10; round++) {
      product0 = W::multiply(word0, by0), product1 = W::multiply(word2, by1);
      word0 = W::differ(W::high(product1), word1, W::set(keys[round][0]));
      word2 = W::differ(W::high(product0), word3, W::set(keys[round][1]));
      word1 = product1, word3 = product0;
    }
    W::store(word0, word1, word2, word3, to);
  }
};

// What dropout multiplies numbers by: 0 where their random bits are below p * 2^32, else 1 / (1 - p); p is below 1.
class DropoutFactors {
 public:
  explicit DropoutFactors(double p)
      : least_(static_cast<std::uint32_t>(p * 4294967296.0)), kept_(static_cast<float>(1 / (1 - p))) {}
  template <int count>
  void of(const std::uint32_t* bits, float* to) const {
    for (int k = 0; k < count; k++) to[k] = bits[k] < least_ ? 0.0f : kept_;
  }

 private:
  std::uint32_t least_;
  float kept_;
};

}  // namespace
}  // namespace parco::cast
