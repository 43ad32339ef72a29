// 64 bits that tell the bytes of a tensor from others.
#pragma once
#include <cstdint>

namespace parco::cast {

// Chunks of a megabyte are mixed as XXH3 does (github.com/Cyan4973/xxHash), with other constants, and their results in
// their order: the same for any number of threads.
std::uint64_t fingerprint(const std::uint8_t* bytes, std::int64_t count, int threads);

}  // namespace parco::cast
