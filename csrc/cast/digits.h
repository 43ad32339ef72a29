// Rows of ternary codes as digits of base 3, five to a byte, the first counting 1, and as the bits that kernels read.
#pragma once
#include <cstdint>

namespace parco::cast {

// `digits` [rows, ceil(columns / 5)] to `bits` [rows, ceil(columns / 4)], zero past the last column, and back. A byte
// of 243 or more is read as 243 less; a code of 3 is written as 2.
void digits_to_bits(const std::uint8_t* digits, std::uint8_t* bits, std::int64_t rows, std::int64_t columns,
                    int threads);
void bits_to_digits(const std::uint8_t* bits, std::uint8_t* digits, std::int64_t rows, std::int64_t columns,
                    int threads);

}  // namespace parco::cast
