#include "cast/philox_avx512.h"
#include "linear/avx512.h"
#include "optimizer/adamw_engine.h"

namespace parco::optimizer {
namespace {

struct V512 : linear::avx512::Arithmetic {
  using I = __m512i;
  using Random = cast::avx512::Random;

  static void store_drawn(void* to, std::int64_t index, int count, F value, const std::uint32_t* random) {
    const I pattern = bits(value);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __mmask16 is_finite = _mm512_cmplt_epi32_mask(both(pattern, whole(infinity)), whole(infinity));
    const I quiet = _mm512_mask_or_epi32(pattern, is_nan, pattern, whole(1u << 22));
    const I drawn = _mm512_mask_add_epi32(quiet, is_finite, pattern, both(_mm512_loadu_si512(random), whole(0xffff)));
    _mm256_mask_storeu_epi16(static_cast<char*>(to) + 2 * index, mask(count), _mm512_cvtepi32_epi16(right<16>(drawn)));
  }

  static F root(F a) { return _mm512_sqrt_ps(a); }
  static I bits(F a) { return _mm512_castps_si512(a); }
  static F floats(I a) { return _mm512_castsi512_ps(a); }
  static I whole(std::uint32_t a) { return _mm512_set1_epi32(static_cast<std::int32_t>(a)); }
  static F from_whole(I a) { return _mm512_cvtepi32_ps(a); }
  static I to_whole(F a) { return _mm512_cvtps_epi32(a); }
  static I add_whole(I a, I b) { return _mm512_add_epi32(a, b); }
  static I subtract_whole(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I multiply_whole(I a, I b) { return _mm512_mullo_epi16(a, b); }  // of products below 2^16
  static I max_whole(I a, I b) { return _mm512_max_epi32(a, b); }
  static I both(I a, I b) { return _mm512_and_si512(a, b); }
  static I either(I a, I b) { return _mm512_or_si512(a, b); }
  template <int count>
  static I left(I a) {
    return _mm512_slli_epi32(a, count);
  }
  template <int count>
  static I right(I a) {
    return _mm512_srli_epi32(a, count);
  }
  static std::uint32_t greatest(I a) { return static_cast<std::uint32_t>(_mm512_reduce_max_epi32(a)); }
  static I load_codes(const std::uint8_t* from, int count) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask(count), from));
  }
  static void store_codes(std::uint8_t* to, int count, I codes) {
    _mm512_mask_cvtepi32_storeu_epi8(to, mask(count), codes);
  }

 private:
  static __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
};

}  // namespace

void adamw_avx512(const Adamw& call) { run_adamw<V512>(call); }

}  // namespace parco::optimizer
