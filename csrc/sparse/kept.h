// Rows of kept numbers as kernels read them: where they lie, or decoded to where a kernel reads them. Included by one
// translation unit per instruction set, everything is unnamed (see linear/floats.h).
#pragma once
#include <algorithm>
#include <type_traits>

#include "linear/floats.h"
#include "sparse/sparse.h"

namespace parco::sparse {
namespace {

// How a kept number lies in memory: as a float, or as an integer's code in a byte.
enum class Kept : int { fp32 = 0, bf16 = 1, fp16 = 2, byte = 3 };

constexpr int size_of(Kept kept) { return kept == Kept::fp32 ? 4 : kept == Kept::byte ? 1 : 2; }

// f with the way in which numbers are kept as a constant.
template <class F>
void with_kept(Kept kept, const F& f) {
  switch (kept) {
    case Kept::fp32:
      return f(std::integral_constant<Kept, Kept::fp32>());
    case Kept::bf16:
      return f(std::integral_constant<Kept, Kept::bf16>());
    case Kept::fp16:
      return f(std::integral_constant<Kept, Kept::fp16>());
    case Kept::byte:
      return f(std::integral_constant<Kept, Kept::byte>());
  }
}

// Kept numbers from `from` to `last`; no byte from `end` on may be read.
struct Row {
  const char *from, *last, *end;
};

// Codes that a scale of their row multiplies at the end are read as they are, or as bytes where two lie in one, if
// `bytes` says so; others are decoded to fp32, a row at a time.
class Source {
 public:
  Source(const SparseCall& call, void (*decode)(const cast::DecodeCall&), bool bytes = true)
      : call(call), decode(decode) {
    const cast::DecodeCall& codes = call.codes;
    const bool integers = bytes && !call.values && codes.pattern == cast::Pattern::integer && !codes.zero &&
                          !codes.factor && codes.group >= call.kept && (codes.bits == 8 || codes.bits == 4);
    kept = call.values ? static_cast<Kept>(call.value_type) : integers ? Kept::byte : Kept::fp32;
    direct = call.values || (integers && codes.bits == 8);
    offset = integers ? codes.offset : 0;
  }

  // Memory for a row that is not direct.
  std::size_t row_bytes() const { return direct ? 0 : linear::rounded(static_cast<std::size_t>(call.kept + 1) * 4); }

  // Row n, in `own` unless it is direct.
  Row row(std::int64_t n, char* own) const {
    const std::int64_t bytes = call.kept * size_of(kept);
    if (direct) {
      const char* all = static_cast<const char*>(call.values ? call.values : call.codes.codes);
      return {all + n * bytes, all + (n + 1) * bytes, all + call.outputs * bytes};
    }
    kept == Kept::byte ? split(n, own) : decode_row(n, own);
    return {own, own + bytes, own + bytes};
  }

  // What the numbers of row n, as they are read, are still to be multiplied by.
  float scale(std::int64_t n) const {
    if (kept != Kept::byte || !call.codes.scale) return 1.0f;
    return linear::load_float(call.codes.scale, call.codes.scale_type,
                              n / call.codes.block_rows * call.codes.scale_stride);
  }

  Kept kept;
  bool direct;
  int offset;  // of codes in bytes

 private:
  void split(std::int64_t n, char* own) const {
    const std::int64_t bytes = (call.kept + 1) / 2;
    const std::uint8_t* from = call.codes.codes + n * bytes;
    for (std::int64_t i = 0; i < bytes; i++)
      own[2 * i] = static_cast<char>(from[i] & 15), own[2 * i + 1] = static_cast<char>(from[i] >> 4);
  }

  void decode_row(std::int64_t n, char* own) const {
    cast::DecodeCall one = call.codes;
    const std::int64_t at = n / one.block_rows * one.scale_stride;
    one.codes += n * ((call.kept * one.bits + 7) / 8);
    if (one.scale) one.scale = static_cast<const char*>(one.scale) + at * linear::size_of(one.scale_type);
    if (one.zero) one.zero += at;
    one.y = own, one.y_type = Type::fp32;
    one.rows = one.block_rows = one.threads = 1;
    decode(one);
  }

  const SparseCall& call;
  void (*decode)(const cast::DecodeCall&);
};

// x in fp32, each row `padded` numbers and zero past its columns.
inline void widen_x(const SparseCall& call, std::int64_t padded, float* to) {
  for (std::int64_t m = 0; m < call.rows; m++) {
    for (std::int64_t k = 0; k < call.columns; k++)
      to[m * padded + k] = linear::load_float(call.x, call.x_type, m * call.columns + k);
    std::fill(to + m * padded + call.columns, to + (m + 1) * padded, 0.0f);
  }
}

inline int threads_for(const SparseCall& call, std::int64_t per_number) {
  return static_cast<int>(
      std::clamp<std::int64_t>(call.outputs * call.kept * per_number / linear::worth_a_thread, 1, call.threads));
}

constexpr std::int64_t read_ahead = 1024;  // bytes of each stream

// Rows [first, last) of W in as many streams as `streams`, each contiguous: use(rows) with `streams` of them, then one
// by one as use_one(row).
template <int streams, class Use, class UseOne>
void in_streams(std::int64_t first, std::int64_t last, const Use& use, const UseOne& use_one) {
  const std::int64_t length = (last - first) / streams;
  for (std::int64_t i = 0; i < length; i++) {
    std::int64_t rows[streams];
    for (int s = 0; s < streams; s++) rows[s] = first + s * length + i;
    use(rows);
  }
  for (std::int64_t i = first + streams * length; i < last; i++) use_one(&i);
}

}  // namespace
}  // namespace parco::sparse
