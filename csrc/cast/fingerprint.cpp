#include "cast/fingerprint.h"

#include <emmintrin.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

namespace parco::cast {
namespace {

constexpr std::uint64_t first = 0x9E3779B185EBCA87u, second = 0xC2B2AE3D27D4EB4Fu;
constexpr std::int64_t chunk = 1 << 20, stripe = 64, ahead = 2048;
constexpr int vectors = 4, stripes_of_a_block = 16, keys_of_a_block = 2 * (stripes_of_a_block + vectors);

constexpr std::uint64_t mixed(std::uint64_t sum, std::uint64_t word) {
  sum += word * second;
  return (sum << 31 | sum >> 33) * first;
}

constexpr auto make_keys() {
  std::array<std::uint64_t, keys_of_a_block> keys{};
  for (std::size_t i = 0; i < keys.size(); i++) keys[i] = mixed(mixed(first, i + 1), second);
  return keys;
}
constexpr auto keys = make_keys();

std::uint64_t word_at(const std::uint8_t* bytes, std::int64_t count) {
  std::uint64_t word = 0;
  std::memcpy(&word, bytes, static_cast<std::size_t>(std::min<std::int64_t>(count, 8)));
  return word;
}

__m128i load(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

// Sums of words and of the products of their halves, of a stripe under keys of its place in the block.
void add_stripe(const std::uint8_t* bytes, int place, __m128i* sums) {
  for (int v = 0; v < vectors; v++) {
    const __m128i words = load(bytes + 16 * v), keyed = _mm_xor_si128(words, load(keys.data() + 2 * (place + v)));
    const __m128i product = _mm_mul_epu32(keyed, _mm_srli_epi64(keyed, 32));
    sums[v] = _mm_add_epi64(sums[v], _mm_add_epi64(product, _mm_shuffle_epi32(words, 0x4E)));
  }
}

// The sums of a block of stripes, so that another order of blocks has other ones: a product by an odd number of 32
// bits.
void stir(__m128i* sums) {
  const __m128i odd = _mm_set1_epi64x(0x9E3779B1);
  for (int v = 0; v < vectors; v++) {
    const __m128i own = _mm_xor_si128(_mm_xor_si128(sums[v], _mm_srli_epi64(sums[v], 47)), load(keys.data() + 2 * v));
    const __m128i high = _mm_slli_epi64(_mm_mul_epu32(_mm_srli_epi64(own, 32), odd), 32);
    sums[v] = _mm_add_epi64(_mm_mul_epu32(own, odd), high);
  }
}

std::uint64_t of_chunk(const std::uint8_t* bytes, std::int64_t count) {
  __m128i sums[vectors];
  for (int v = 0; v < vectors; v++) sums[v] = load(keys.data() + 2 * v);
  std::int64_t i = 0;
  for (int place = 0; i + stripe <= count; i += stripe) {
    _mm_prefetch(reinterpret_cast<const char*>(bytes + i + ahead), _MM_HINT_T0);
    add_stripe(bytes + i, place, sums);
    if (++place < stripes_of_a_block) continue;
    stir(sums);
    place = 0;
  }
  std::uint64_t words[2 * vectors], found = static_cast<std::uint64_t>(count);
  std::memcpy(words, sums, sizeof(words));
  for (const std::uint64_t word : words) found = mixed(found, word);
  for (; i < count; i += 8) found = mixed(found, word_at(bytes + i, count - i));
  return found;
}

}  // namespace

std::uint64_t fingerprint(const std::uint8_t* bytes, std::int64_t count, int threads) {
  const std::int64_t chunks = (count + chunk - 1) / chunk;
  std::vector<std::uint64_t> found(static_cast<std::size_t>(chunks));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && chunks > 1)
  for (std::int64_t i = 0; i < chunks; i++)
    found[static_cast<std::size_t>(i)] = of_chunk(bytes + i * chunk, std::min(chunk, count - i * chunk));
  std::uint64_t whole = static_cast<std::uint64_t>(count);
  for (const std::uint64_t each : found) whole = mixed(whole, each);
  return whole ^ whole >> 29;
}

}  // namespace parco::cast
