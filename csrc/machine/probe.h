// How fast this machine reads, copies and multiplies: what a kernel could reach at best, so that a benchmark's axis can
// end there.
#pragma once

#include <cstddef>
#include <cstdint>

namespace parco {

// One instruction set's inner loop for one element: `run` goes `rounds` times over operands that stay in the L1 cache,
// with several independent sums, and returns something that depends on every product, so that none can be left out.
struct Products {
  std::uint64_t (*run)(const void* operands, std::int64_t rounds);
  std::int64_t multiply_adds_per_round;
};

enum class Isa { generic, avx2, avx512, avx512_vbmi, amx };
enum class Element { fp32, bf16, int16, int8 };

// Constant-initialised, all of them: an initialiser that ran at load would use the instructions of its translation unit
// on machines that lack them.
extern const Products generic_fp32, generic_bf16, generic_int16, generic_int8;
extern const Products avx2_fp32, avx2_bf16, avx2_int16, avx2_int8;
extern const Products avx512_fp32, avx512_bf16, avx512_int16, avx512_int8;
extern const Products avx512_vnni_int16, avx512_vnni_int8;
extern const Products amx_bf16, amx_int8;  // tiles have neither fp32 nor int16 products

using Read = std::uint64_t(const std::uint8_t* data, std::size_t bytes);  // bytes: a multiple of 4096
Read generic_read, avx2_read, avx512_read;

// Operands of a products loop: random values of the element type, this many bytes.
constexpr std::size_t probe_operand_bytes = 16384;

// Medians of `repeats` runs on `threads` threads, over random data. The instruction set must be one that this machine
// can run. `seconds` is the length of one run. Throw std::bad_alloc where memory is short.
double multiply_adds_per_second(Isa isa, Element element, int threads, double seconds, int repeats);
double read_bytes_per_second(Isa isa, std::size_t bytes, int threads, int repeats);
// Reads what is there once, and nothing else: aligned to 64 bytes, whole pages.
void read_once(Isa isa, const std::uint8_t* data, std::size_t bytes, int threads);
double copy_bytes_per_second(std::size_t bytes, int threads, int repeats);

}  // namespace parco
