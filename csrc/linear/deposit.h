// Streams of codes cut into fields by BMI2, eight bytes of fields at a time. Unnamed: see floats.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace parco::linear {
namespace {

// The bits of a quadword that codes of `bits` bits take when they lie as bytes, or as nibbles.
inline std::uint64_t bytes_of(int bits) { return ((1u << bits) - 1) * 0x0101010101010101u; }
inline std::uint64_t nibbles_of(int bits) { return ((1u << bits) - 1) * 0x1111111111111111u; }

// The stream from `from` on, of which 8 bytes are read, put where `places` has bits.
inline long long deposit(const std::uint8_t* from, std::uint64_t places) {
  std::uint64_t window;
  std::memcpy(&window, from, 8);
  return static_cast<long long>(_pdep_u64(window, places));
}

#ifdef __AVX512F__
// Eight times that, a quadword from every `step` bytes.
inline __m512i deposit_eight(const std::uint8_t* from, int step, std::uint64_t places) {
  const auto at = [&](int i) { return deposit(from + step * i, places); };
  return _mm512_set_epi64(at(7), at(6), at(5), at(4), at(3), at(2), at(1), at(0));
}
#endif

}  // namespace
}  // namespace parco::linear
