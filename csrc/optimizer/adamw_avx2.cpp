#include "cast/philox_avx2.h"
#include "linear/avx2.h"
#include "optimizer/adamw_engine.h"

namespace parco::optimizer {
namespace {

struct V256 : linear::avx2::Arithmetic {
  using I = __m256i;
  using Random = cast::avx2::Random;

  template <Type type>
  static F load(const void* from, std::int64_t index, int count) {
    return linear::avx2::load_floats(from, type, index, count);
  }
  template <Type type>
  static void store(void* to, std::int64_t index, int count, F value) {
    if (type == Type::bf16 && count == lanes) {
      const I pattern = bits(value), odd = both(right<16>(pattern), whole(1));
      const I nearest = right<16>(add_whole(add_whole(pattern, whole(0x7fff)), odd));
      const F quiet = floats(either(right<16>(pattern), whole(0x40)));
      return store_halves(to, index, count, bits(_mm256_blendv_ps(floats(nearest), quiet, is_nan(value))));
    }
    linear::avx2::store_floats(to, type, index, count, value);
  }
  static void store_drawn(void* to, std::int64_t index, int count, F value, const std::uint32_t* random) {
    const I pattern = bits(value), draws = _mm256_loadu_si256(reinterpret_cast<const I*>(random));
    const I drawn = add_whole(pattern, both(draws, whole(0xffff)));
    const I quiet = either(pattern, both(bits(is_nan(value)), whole(1u << 22)));
    const I is_finite = _mm256_cmpgt_epi32(whole(infinity), both(pattern, whole(infinity)));
    store_halves(to, index, count, right<16>(_mm256_blendv_epi8(quiet, drawn, is_finite)));
  }

  static F root(F a) { return _mm256_sqrt_ps(a); }
  static I bits(F a) { return _mm256_castps_si256(a); }
  static F floats(I a) { return _mm256_castsi256_ps(a); }
  static I whole(std::uint32_t a) { return _mm256_set1_epi32(static_cast<std::int32_t>(a)); }
  static F from_whole(I a) { return _mm256_cvtepi32_ps(a); }
  static I to_whole(F a) { return _mm256_cvtps_epi32(a); }
  static I add_whole(I a, I b) { return _mm256_add_epi32(a, b); }
  static I subtract_whole(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I multiply_whole(I a, I b) { return _mm256_mullo_epi16(a, b); }  // of products below 2^16
  static I max_whole(I a, I b) { return _mm256_max_epi32(a, b); }
  static I both(I a, I b) { return _mm256_and_si256(a, b); }
  static I either(I a, I b) { return _mm256_or_si256(a, b); }
  template <int count>
  static I left(I a) {
    return _mm256_slli_epi32(a, count);
  }
  template <int count>
  static I right(I a) {
    return _mm256_srli_epi32(a, count);
  }
  static std::uint32_t greatest(I a) {
    alignas(32) std::uint32_t found[lanes];
    _mm256_store_si256(reinterpret_cast<I*>(found), a);
    std::uint32_t most = 0;
    for (std::uint32_t one : found) most = std::max(most, one);
    return most;
  }
  static I load_codes(const std::uint8_t* from, int count) {
    std::uint8_t part[lanes] = {};
    if (count < lanes)
      from = static_cast<const std::uint8_t*>(std::memcpy(part, from, static_cast<std::size_t>(count)));
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  static void store_codes(std::uint8_t* to, int count, I codes) {
    const __m128i halves = narrowed(codes), bytes = _mm_packus_epi16(halves, halves);
    if (count == lanes) return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
    std::uint8_t part[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(part), bytes);
    std::memcpy(to, part, static_cast<std::size_t>(count));
  }

 private:
  static F is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  // 8 numbers below 2^16.
  static __m128i narrowed(I a) { return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
  static void store_halves(void* to, std::int64_t index, int count, I halves) {
    char* place = static_cast<char*>(to) + 2 * index;
    if (count == lanes) return _mm_storeu_si128(reinterpret_cast<__m128i*>(place), narrowed(halves));
    std::uint16_t part[lanes];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(part), narrowed(halves));
    std::memcpy(place, part, 2 * static_cast<std::size_t>(count));
  }
};

}  // namespace

void adamw_avx2(const Adamw& call) { run_adamw<V256>(call); }

}  // namespace parco::optimizer
