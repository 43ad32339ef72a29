#include "cast/digits.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace parco::cast {
namespace {

constexpr int in_byte = 5, radix = 3, width = 2 * in_byte;

struct Tables {
  std::uint16_t bits[256];
  std::uint8_t digits[1 << width];
};

constexpr Tables make_tables() {
  Tables tables{};
  for (int byte = 0; byte < 256; byte++)
    for (int i = 0, left = byte % 243; i < in_byte; i++, left /= radix)
      tables.bits[byte] = static_cast<std::uint16_t>(tables.bits[byte] | left % radix << 2 * i);
  for (int field = 0; field < 1 << width; field++)
    for (int i = in_byte - 1; i >= 0; i--)
      tables.digits[field] =
          static_cast<std::uint8_t>(tables.digits[field] * radix + std::min(field >> 2 * i & 3, radix - 1));
  return tables;
}

constexpr Tables tables = make_tables();

// f(row) on several threads.
template <class F>
void each_row(std::int64_t rows, std::int64_t columns, int threads, const F& f) {
  constexpr std::int64_t worth_a_thread = 1 << 16;
  threads = static_cast<int>(std::clamp<std::int64_t>(rows * columns / worth_a_thread, 1, threads));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t n = 0; n < rows; n++) f(n);
}

// f(digits, bits, bytes of either) for each 20 codes of a row: 4 bytes and 5, fewer at its end.
template <class F>
void each_group(std::int64_t columns, const F& f) {
  const std::int64_t digits = (columns + 4) / 5, bits = (columns + 3) / 4;
  constexpr std::integral_constant<int, 4> four;
  constexpr std::integral_constant<int, 5> five;
  std::int64_t group = 0;
  for (; group < columns / 20; group++) f(4 * group, 5 * group, four, five);
  if (columns % 20) f(4 * group, 5 * group, digits - 4 * group, bits - 5 * group);
}

}  // namespace

void digits_to_bits(const std::uint8_t* digits, std::uint8_t* bits, std::int64_t rows, std::int64_t columns,
                    int threads) {
  const std::int64_t from = (columns + 4) / 5, to = (columns + 3) / 4;
  each_row(rows, columns, threads, [&](std::int64_t n) {
    each_group(columns, [&](std::int64_t first, std::int64_t target, auto count, auto size) {
      std::uint64_t word = 0;
      for (int i = 0; i < count; i++)
        word |= static_cast<std::uint64_t>(tables.bits[digits[n * from + first + i]]) << i * width;
      std::memcpy(bits + n * to + target, &word, static_cast<std::size_t>(size));
    });
    if (columns % 4) bits[(n + 1) * to - 1] &= static_cast<std::uint8_t>((1 << columns % 4 * 2) - 1);
  });
}

void bits_to_digits(const std::uint8_t* bits, std::uint8_t* digits, std::int64_t rows, std::int64_t columns,
                    int threads) {
  const std::int64_t from = (columns + 3) / 4, to = (columns + 4) / 5;
  each_row(rows, columns, threads, [&](std::int64_t n) {
    each_group(columns, [&](std::int64_t target, std::int64_t first, auto count, auto size) {
      std::uint64_t word = 0;
      for (int i = 0; i < size; i++)  // a copy into the word would be waited for
        word |= static_cast<std::uint64_t>(bits[n * from + first + i]) << 8 * i;
      for (int i = 0; i < count; i++)
        digits[n * to + target + i] = tables.digits[word >> i * width & ((1 << width) - 1)];
    });
  });
}

}  // namespace parco::cast
