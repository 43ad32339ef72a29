// One number to a vector.
#include "linear/generic.h"
#include "optimizer/adamw_engine.h"

namespace parco::optimizer {
namespace {

struct V1 : linear::generic::Arithmetic {
  using I = std::uint32_t;
  using Random = cast::PlainRandom;

  static void store_drawn(void* to, std::int64_t index, int, F value, const std::uint32_t* random) {
    const I pattern = bits(value);
    const bool finite = (pattern & infinity) != infinity, nan = (pattern & 0x7fffffffu) > infinity;
    const I drawn = finite ? pattern + (*random & 0xffffu) : pattern | (nan ? 1u << 22 : 0);
    const std::uint16_t half = static_cast<std::uint16_t>(drawn >> 16);
    std::memcpy(static_cast<char*>(to) + 2 * index, &half, 2);
  }

  static F root(F a) { return __builtin_sqrtf(a); }
  static I bits(F a) { return linear::bits_of(a); }
  static F floats(I a) { return linear::float_of(a); }
  static I whole(std::uint32_t a) { return a; }
  static F from_whole(I a) { return static_cast<F>(a); }
  static I to_whole(F a) { return static_cast<I>(std::nearbyint(a)); }
  static I add_whole(I a, I b) { return a + b; }
  static I subtract_whole(I a, I b) { return a - b; }
  static I multiply_whole(I a, I b) { return a * b; }
  static I max_whole(I a, I b) { return static_cast<std::int32_t>(a) > static_cast<std::int32_t>(b) ? a : b; }
  static I both(I a, I b) { return a & b; }
  static I either(I a, I b) { return a | b; }
  template <int count>
  static I left(I a) {
    return a << count;
  }
  template <int count>
  static I right(I a) {
    return a >> count;
  }
  static std::uint32_t greatest(I a) { return a; }
  static I load_codes(const std::uint8_t* from, int) { return *from; }
  static void store_codes(std::uint8_t* to, int, I codes) { *to = static_cast<std::uint8_t>(codes); }
};

}  // namespace

void adamw_generic(const Adamw& call) { run_adamw<V1>(call); }

}  // namespace parco::optimizer
