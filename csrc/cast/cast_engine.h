// The casts in plain C++, written for the compiler to vectorise: arrays of `chunk` numbers go through one simple loop
// after the other. Included by one translation unit per instruction set, everything is unnamed (see linear/floats.h).
#pragma once
#include <cmath>

#include "cast/amax_engine.h"
#include "cast/philox.h"

namespace parco::cast {
namespace {

constexpr int chunk = 256;
constexpr std::uint32_t fraction_mask = (1u << 23) - 1;

// `count` numbers from index `index` in fp32; zeros fill the chunk.
inline void load_chunk(const void* x, Type type, std::int64_t index, int count, float* to) {
  const char* from = static_cast<const char*>(x) + index * size_of(type);
  if (count < chunk) {
    for (int i = 0; i < chunk; i++) to[i] = i < count ? load_float(from, type, i) : 0.0f;
    return;
  }
  if (type == Type::fp32) {
#pragma omp simd
    for (int i = 0; i < chunk; i++) std::memcpy(to + i, from + 4 * i, 4);
  } else if (type == Type::bf16) {
#pragma omp simd
    for (int i = 0; i < chunk; i++) {
      std::uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      to[i] = float_of(static_cast<std::uint32_t>(half) << 16);
    }
  } else {
    for (int i = 0; i < chunk; i++) to[i] = load_float(from, type, i);
  }
}

// What float_code knows of an element.
struct Float {
  int least, mantissa, sign_shift;
  std::uint32_t most, nan, sign_mask;
  bool has_nan;
};

inline Float float_of_element(int bits, int mantissa_bits, int least_exponent, int max_code, int nan_code) {
  const std::uint32_t most = static_cast<std::uint32_t>(max_code);
  const bool has_nan = nan_code >= 0;
  return {least_exponent + 127, mantissa_bits, 32 - bits, most, has_nan ? static_cast<std::uint32_t>(nan_code) : most,
          1u << (bits - 1),     has_nan};
}

// See rounding.py's _float_codes: significand * 2^(exponent - 150) loses `drop` bits and the rest is added to the code
// of its binade's start.
template <Rounding rounding>
inline std::uint32_t float_code(const Float& element, std::uint32_t bits, std::uint32_t random) {
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const int exponent = std::max(static_cast<int>(magnitude >> 23), 1);
  const std::uint32_t significand = magnitude > fraction_mask ? (magnitude & fraction_mask) | (1u << 23) : magnitude;
  const int binade = exponent - element.least;
  const int drop = 23 - element.mantissa - std::min(binade, 0);
  std::uint32_t kept;
  if constexpr (rounding == Rounding::stochastic) {
    // Beyond 32 there are no random bits left to compare with: what lies below them is cut off first.
    const std::uint32_t cut = significand >> std::min(std::max(drop - 32, 0), 31);
    const std::uint32_t mask = drop >= 32 ? ~0u : (1u << (drop & 31)) - 1;
    const std::uint32_t sum = cut + (random & mask);
    const std::uint32_t carry = sum < cut ? 1 : 0;
    kept = drop >= 32 ? carry : sum >> (drop & 31);
  } else {
    const int bounded = std::min(drop, 25);  // from 25 on both give 0
    kept = significand >> bounded;
    if constexpr (rounding == Rounding::nearest)
      kept = (significand + ((1u << (bounded - 1)) - 1) + (kept & 1)) >> bounded;
  }
  const std::uint32_t code =
      std::min(kept + (static_cast<std::uint32_t>(std::max(binade, 0)) << element.mantissa), element.most);
  const bool is_nan = magnitude > 0x7f800000u;
  const std::uint32_t sign = is_nan && !element.has_nan ? 0 : bits >> element.sign_shift & element.sign_mask;
  return (is_nan ? element.nan : code) | sign;
}

template <Rounding rounding>
void float_codes(const CastCall& call, const float* x, const std::uint32_t* random, std::uint8_t* codes) {
  const Float element =
      float_of_element(call.bits, call.mantissa_bits, call.least_exponent, call.max_code, call.nan_code);
  std::uint32_t wide[chunk], pattern[chunk];
  std::memcpy(pattern, x, sizeof(pattern));
  for (int i = 0; i < chunk; i++)
    wide[i] = float_code<rounding>(element, pattern[i], rounding == Rounding::stochastic ? random[i] : 0);
  for (int i = 0; i < chunk; i++) codes[i] = static_cast<std::uint8_t>(wide[i]);
}

// -1 where a < b, else 0, by the sign of the difference: of a comparison the compiler makes a branch.
inline int less(float a, float b) { return static_cast<int>(bits_of(a - b)) >> 31; }

// Whether random < fraction * 2^32, for a fraction in [0, 1]: the upper and the lower 16 bits one after the other,
// exact.
inline int goes_up(float fraction, std::uint32_t random) {
  const float scaled = fraction * 65536.0f;
  const int high = static_cast<int>(scaled);
  const float rest = (scaled - static_cast<float>(high)) * 65536.0f;
  const int floor = static_cast<int>(rest), low = floor - less(static_cast<float>(floor), rest);
  const int upper = static_cast<int>(random >> 16) - high, lower = static_cast<int>(random & 0xffffu) - low;
  return static_cast<int>(static_cast<std::uint32_t>(upper | (lower & ~(-upper | upper))) >> 31);
}

// Codes of one run under one zero. x is bounded first: whatever lies beyond 1024 saturates with any offset.
template <Rounding rounding>
void integer_codes(const CastCall& call, const float* x, const std::uint32_t* random, const int* zero,
                   std::uint8_t* codes) {
  const int low = call.zero ? 0 : call.least + call.offset;
  const int high = call.zero ? (1 << call.bits) - 1 : call.greatest + call.offset;
  int wide[chunk];
  float all[chunk];
  for (int i = 0; i < chunk; i++) {
    const float least = x[i] < -1024.0f ? -1024.0f : x[i], most = least > 1024.0f ? 1024.0f : least;
    all[i] = most == most ? most : 0.0f;
  }
  for (int i = 0; i < chunk; i++) {
    const float bounded = all[i];
    int number;
    if constexpr (rounding == Rounding::nearest) {
      const float shifted = bounded + 0x1.8p23f;  // nearest even, without asking for a rounding mode
      std::uint32_t bits;
      std::memcpy(&bits, &shifted, 4);
      number = static_cast<int>(bits - 0x4b400000u);
    } else if constexpr (rounding == Rounding::zero) {
      number = static_cast<int>(bounded);
    } else {
      const int truncated = static_cast<int>(bounded);
      const int below = truncated + less(bounded, static_cast<float>(truncated));
      number = below + goes_up(bounded - static_cast<float>(below), random[i]);
    }
    wide[i] = std::min(std::max(number + zero[i], low), high);
  }
  for (int i = 0; i < chunk; i++) codes[i] = static_cast<std::uint8_t>(wide[i]);
}

// Of a table of ascending entries.
template <Rounding rounding>
void listed_codes(const CastCall& call, const float* x, const std::uint32_t* random, std::uint8_t* codes) {
  const int count = 1 << call.bits;
  const float* entries = call.entries;
  float bounded[chunk];
  int index[chunk] = {};
  for (int i = 0; i < chunk; i++) {
    const float number = x[i] == x[i] ? x[i] : 0.0f;
    bounded[i] = std::min(std::max(number, entries[0]), entries[count - 1]);
  }
  if constexpr (rounding == Rounding::nearest) {
    for (int b = 0; b + 1 < count; b++) {
      const float bound =
          static_cast<float>((static_cast<double>(entries[b + 1]) + static_cast<double>(entries[b])) / 2);
      for (int i = 0; i < chunk; i++) index[i] += bounded[i] > bound ? 1 : 0;
    }
  } else {
    for (int b = 1; b + 1 < count; b++)
      for (int i = 0; i < chunk; i++) index[i] += bounded[i] > entries[b] ? 1 : 0;
    for (int i = 0; i < chunk; i++) {
      const float below = entries[index[i]], above = entries[index[i] + 1];
      if constexpr (rounding == Rounding::zero)
        index[i] += (bounded[i] < 0 && bounded[i] > below) || bounded[i] == above ? 1 : 0;
      else
        index[i] += goes_up((bounded[i] - below) / (above - below), random[i]);
    }
  }
  for (int i = 0; i < chunk; i++) codes[i] = static_cast<std::uint8_t>(index[i]);
}

// `count` codes of a chunk into the bytes that they fill; those past them are zero.
inline void pack_chunk(const std::uint8_t* codes, int bits, int count, std::uint8_t* to) {
  std::uint8_t last[chunk];
  std::uint8_t* packed = count == chunk ? to : last;
  if (bits == 8) {
#pragma omp simd
    for (int i = 0; i < chunk; i++) packed[i] = codes[i];
  } else if (bits == 4) {
#pragma omp simd
    for (int i = 0; i < chunk / 2; i++) packed[i] = static_cast<std::uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  } else {
    for (int i = 0; i < chunk / 8; i++) {
      std::uint64_t window = 0;
      for (int j = 0; j < 8; j++) window |= static_cast<std::uint64_t>(codes[8 * i + j]) << j * bits;
      for (int j = 0; j < bits; j++) packed[i * bits + j] = static_cast<std::uint8_t>(window >> 8 * j);
    }
  }
  if (count < chunk) std::memcpy(to, packed, static_cast<std::size_t>((count * bits + 7) / 8));
}

// What numbers of a row's group g are multiplied with or divided by.
inline float rescale_by(const CastCall& call, std::int64_t at) {
  const float scale = load_float(call.scale, call.scale_type, at);
  if (call.rescaling == Rescaling::divide) return scale == 0 ? HUGE_VALF : scale;
  if (!call.factor) return 1.0f / scale;
  return scale == 0 ? 0.0f : (1.0f / load_float(call.factor, Type::fp32, 0)) / scale;
}

// Numbers [k, k + count) of row n under their scales, and each one's zero.
inline void rescale(const CastCall& call, std::int64_t n, std::int64_t k, int count, float* x, int* zero) {
  const std::int64_t row = n / call.block_rows * call.scale_stride;
  for (int i = 0; i < count;) {
    const std::int64_t g = (k + i) / call.group;
    const int stop = static_cast<int>(std::min<std::int64_t>(count, (g + 1) * call.group - k));
    if (call.zero) std::fill(zero + i, zero + stop, static_cast<int>(call.zero[row + g]));
    if (call.rescaling == Rescaling::none) {
      i = stop;
      continue;
    }
    const float by = rescale_by(call, row + g);
    // Of a fixed length: one vector operation, where the compiler is told not to unroll it first.
    for (; i + 16 <= stop; i += 16) {
      if (call.rescaling == Rescaling::multiply) {
#pragma omp simd
        for (int j = i; j < i + 16; j++) x[j] *= by;
      } else {
#pragma omp simd
        for (int j = i; j < i + 16; j++) x[j] /= by;
      }
    }
    for (; i < stop; i++) x[i] = call.rescaling == Rescaling::multiply ? x[i] * by : x[i] / by;
  }
}

// The scale of a block whose greatest magnitude has this pattern, to its place.
inline void store_scale(const CastCall& call, std::uint32_t most, std::int64_t at) {
  const bool is_nan = most > 0x7f800000u;
  char* to = static_cast<char*>(call.scale) + at * size_of(call.scale_type);
  if (call.rule == Rule::absmax) {
    const float limit = call.scale_type == Type::fp16   ? 65504.0f
                        : call.scale_type == Type::bf16 ? float_of(0x7f7f0000u)
                                                        : float_of(0x7f7fffffu);
    const float scale = std::min(float_of(std::min(most, 0x7f7fffffu)) / call.largest, limit);
    linear::store_float(to, call.scale_type, 0, is_nan ? float_of(0x7fc00000u) : scale);
    return;
  }
  std::uint32_t code;
  if (call.rule == Rule::e4m3) {
    const Float e4m3 = float_of_element(8, 3, -6, 126, 127);
    const float scale = float_of(most) / call.largest / load_float(call.factor, Type::fp32, 0);
    code = float_code<Rounding::nearest>(e4m3, bits_of(scale), 0);
  } else if (call.rule == Rule::rceil) {
    const float descale = float_of(most) / call.largest;
    const std::uint32_t bits = bits_of(descale);
    code = (bits >> 23) + ((bits & fraction_mask) ? 1 : 0);
    code = descale <= 0x1p-127f ? 0 : std::min(code, 254u);
  } else {
    const std::uint32_t bits = call.rule == Rule::even ? most + (1u << (22 - call.mantissa_bits)) : most;
    const int exponent = static_cast<int>(bits >> 23) + (call.rule == Rule::ceil && (bits & fraction_mask) ? 1 : 0);
    code = static_cast<std::uint32_t>(std::clamp(exponent - call.greatest_exponent, 0, 254));
  }
  if (is_nan) code = call.rule == Rule::e4m3 ? 127 : 255;
  *to = static_cast<char>(code);
}

// The scales of groups [first, last) of row n.
inline void find_scales(const CastCall& call, std::int64_t n, std::int64_t first, std::int64_t last) {
  for (std::int64_t g = first; g < last; g++) {
    const std::int64_t k = g * call.group, count = std::min(call.group, call.columns - k);
    store_scale(call, group_amax(call.x, call.x_type, n * call.x_stride + k, count), n * call.scale_stride + g);
  }
}

// Codes of columns [first, last) of row n under scales that are there; `first` is a multiple of 8, and where `last` is
// not the row ends.
template <Rounding rounding>
void cast_columns(const CastCall& call, std::int64_t n, std::int64_t first, std::int64_t last) {
  alignas(64) float x[chunk];
  alignas(64) std::uint32_t random[chunk];
  alignas(64) std::uint8_t codes[chunk];
  alignas(64) int zero[chunk];
  std::fill(zero, zero + chunk, call.offset);
  for (std::int64_t k = first; k < last; k += chunk) {
    const int count = static_cast<int>(std::min<std::int64_t>(chunk, last - k));
    load_chunk(call.x, call.x_type, n * call.x_stride + k, count, x);
    rescale(call, n, k, count, x, zero);
    if constexpr (rounding == Rounding::stochastic)
      draw<chunk>(call.seed, call.first_row + n, call.first_column + k, random);
    if (call.kind == Kind::floating)
      float_codes<rounding>(call, x, random, codes);
    else if (call.kind == Kind::integer)
      integer_codes<rounding>(call, x, random, zero, codes);
    else
      listed_codes<rounding>(call, x, random, codes);
    for (int i = count; i < chunk; i++) codes[i] = 0;  // unused bits at a row's end are zero
    pack_chunk(codes, call.bits, count, call.codes + n * call.code_stride + k * call.bits / 8);
  }
}

template <Rounding rounding>
void cast_rows(const CastCall& call, std::int64_t first, std::int64_t last) {
  for (std::int64_t n = first; n < last; n++) {
    if (call.rule != Rule::given) find_scales(call, n, 0, (call.columns + call.group - 1) / call.group);
    cast_columns<rounding>(call, n, 0, call.columns);
  }
}

// `rows(rounding, first, last)` casts rows [first, last), the rounding a constant.
template <class Rows>
inline void share_rows(const CastCall& call, const Rows& rows) {
  const int threads = threads_for(call.rows * call.columns, call.threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int t = 0; t < threads; t++) {
    const std::int64_t first = call.rows * t / threads, last = call.rows * (t + 1) / threads;
    if (call.rounding == Rounding::nearest)
      rows(std::integral_constant<Rounding, Rounding::nearest>{}, first, last);
    else if (call.rounding == Rounding::zero)
      rows(std::integral_constant<Rounding, Rounding::zero>{}, first, last);
    else
      rows(std::integral_constant<Rounding, Rounding::stochastic>{}, first, last);
  }
}

inline void run_cast(const CastCall& call) {
  share_rows(call, [&](auto rounding, std::int64_t first, std::int64_t last) {
    cast_rows<decltype(rounding)::value>(call, first, last);
  });
}

}  // namespace
}  // namespace parco::cast
