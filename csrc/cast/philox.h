// Random bits as parco.kernels.cast.philox has them, written for the compiler to vectorise. Unnamed: see
// linear/floats.h.
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

}  // namespace
}  // namespace parco::cast
