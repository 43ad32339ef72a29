// Codes by rows into panels and back; coded.h says how either lies in memory.
#pragma once
#include "linear/coded.h"

namespace parco::linear {

// `rows` [outputs][columns * bits / 8] to `panels` [ceil(outputs / 16)][columns * bits / 32][16] dwords, zero past the
// last row. `columns` fill whole steps (step_codes).
void pack_codes(const std::uint8_t* rows, std::uint8_t* panels, std::int64_t outputs, std::int64_t columns, int bits,
                int threads);
void unpack_codes(const std::uint8_t* panels, std::uint8_t* rows, std::int64_t outputs, std::int64_t columns, int bits,
                  int threads);

}  // namespace parco::linear
