// The integer product where codes meet x as 16-bit words: on instruction sets that multiply bytes in no exact way. V is
// the vector type (int_engine.h), which derives from Words<V> and adds what its instructions are called; I are its
// vectors. Everything is unnamed (see floats.h).
#pragma once
#include "linear/deposit.h"
#include "linear/int_engine.h"

namespace parco::linear {
namespace {

template <class V>
struct Words {
  static constexpr int x_bytes(Digits) { return 2; }  // of a value; int8 goes as words

  template <bool nibbles, class I>
  static I pairs(I dword, int shift, int) {
    if constexpr (nibbles) {
      if (shift == 3) return V::template moved<-12>(dword);
      const I low = V::set(0x000f000f);
      if (shift == 0) return V::both(dword, low);
      return V::both(shift == 1 ? V::template moved<-4>(dword) : V::template moved<-8>(dword), low);
    }
    return shift ? V::template moved<-8>(dword) : V::both(dword, V::set(0x00ff00ff));
  }

  // One block of `all` rows of words against its dwords of codes.
  template <bool nibbles, int all, Digits, class I>
  static void block_sums(const I* codes, std::int32_t dwords, int bits, const char* const* x, I* sum) {
    constexpr int shifts = nibbles ? 4 : 2;
    I other[all];
    for (int r = 0; r < all; r++) other[r] = V::set(0);
    for (std::int32_t d = 0; d < dwords; d++) {
      const I dword = V::load(codes + d);
      for (int s = 0; s < shifts; s++) {
        const I pair = pairs<nibbles>(dword, s, bits);
        for (int r = 0; r < all; r++) {
          I& to = s & 1 ? other[r] : sum[r];
          to = V::dot(to, pair, V::broadcast(x[r] + 4 * (shifts * d + s)));
        }
      }
    }
    for (int r = 0; r < all; r++) sum[r] = V::add(sum[r], other[r]);
  }

  // Packed codes.
  static constexpr int parts(Digits) { return 1; }
  template <int, class I>
  static I whole(const I* sum) {
    return sum[0];
  }
  template <int bits, bool mapped, int all, Digits, class Lookup, class I>
  static void add_products(const std::uint8_t* at, [[maybe_unused]] const Lookup& lookup, const char* const* x,
                           std::int32_t d, I (*sum)[1]) {
    // Bytes 0 and 2 of a vector are one pair, 1 and 3 the other; so far apart in x as there are vectors in a dword.
    constexpr int low = low_bits(bits), vectors = 8 / low;
    const auto add = [&](int i, I codes) {
      if constexpr (mapped) codes = lookup.template map<(bits > 4)>(codes);
      const I pair[2] = {pairs<false>(codes, 0, bits), pairs<false>(codes, 1, bits)};
      const std::int64_t offset = 2 * step_codes(bits) * d + i / vectors * (64 / low) + i % vectors * 4;
      for (int half = 0; half < 2; half++)
#pragma GCC unroll 8
        for (int r = 0; r < all; r++)
          sum[r][0] = V::dot(sum[r][0], pair[half], V::broadcast(x[r] + offset + 4 * vectors * half));
    };
    each_vector<V, bits>(at, add, std::make_integer_sequence<int, step_codes(bits) / 4>());
  }

  // `dwords` dwords from dword `first` of a panel of codes of 2 bits, or of 4 that are looked up: two of `reader`'s in
  // one of memory.
  template <class Reader, class I>
  static void read_halves(const Reader& reader, const std::uint8_t* panel, std::int32_t first, std::int32_t dwords,
                          I* to) {
    for (std::int32_t d = 0; d < dwords; d++) {
      const I stored = V::load_packed(panel + (first + d) / 2 * panel_rows * 4);
      const I half = (first + d) % 2 ? V::template moved_dwords<-16>(stored) : stored;
      const I bytes = spread<8>(V::both(half, V::set(0xffff)), 0x00ff00ff);
      const I nibbles = spread<4>(bytes, 0x0f0f0f0f);
      V::store(to + d, reader.mapped ? reader.map(nibbles) : spread<2>(nibbles, 0x33333333));
    }
  }

  // The upper half of every field that `mask` is to hold goes `shift` up.
  template <int shift, class I>
  static I spread(I fields, int mask) {
    return V::both(V::either(fields, V::template moved_dwords<shift>(fields)), V::set(mask));
  }
};

}  // namespace
}  // namespace parco::linear
