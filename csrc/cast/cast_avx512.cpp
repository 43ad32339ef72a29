// The casts with AVX-512. A row is walked in spans of 16 groups (or parts of one long group): greatest magnitudes, the
// scales of all 16 at once, then codes, 64 at a time, while the span is in the L1 cache. What does not fit (spans with
// infinities or NaN, ends of rows, other elements and groups) is left to cast_engine.h.
#include "cast/avx512_scales.h"
#include "cast/tile_engine.h"

namespace parco::cast {
namespace {

using avx512::Scales;
using avx512::Under;
using linear::size_of;

constexpr std::int64_t step = 64;         // codes that are joined and stored together
constexpr std::int64_t long_span = 2048;  // numbers of a long group at a time

bool has_short_groups(const CastCall& call) {
  return call.group == 16 || call.group == 32 || call.group == 64 || call.group == 128;
}

bool fits(const CastCall& call) {
  return call.columns >= step && (has_short_groups(call) || call.group % long_span == 0 || call.group >= call.columns);
}

template <class Element, Rounding rounding>
class Rows {
 public:
  explicit Rows(const CastCall& call) : call(call), element(call), x_size(size_of(call.x_type)) {}

  void cast(std::int64_t first, std::int64_t last) const {
    for (std::int64_t n = first; n < last; n++) {
      if (has_short_groups(call))
        short_groups(n);
      else
        long_groups(n);
    }
  }

 private:
  const CastCall& call;
  const Element element;
  const int x_size;

  const char* x_at(std::int64_t n, std::int64_t k) const {
    return static_cast<const char*>(call.x) + (n * call.x_stride + k) * x_size;
  }

  // Where the scale of row n and group g is.
  std::int64_t scale_at(std::int64_t n, std::int64_t g) const { return n / call.block_rows * call.scale_stride + g; }

  Under under(__m512i most, int count, const Scales& scales) const {
    if (call.rescaling == Rescaling::none) return Under::none;
    if (call.rescaling == Rescaling::multiply) return Under::product;
    const bool exact = rounding != Rounding::stochastic && avx512::quotients_are_exact(most, count, scales);
    return exact ? Under::quotient : Under::division;
  }

  void short_groups(std::int64_t n) const {
    const std::int64_t unit = std::max(call.group, step), whole = call.columns / unit * unit;
    for (std::int64_t k = 0; k < whole; k += avx512::together * call.group) {
      const std::int64_t end = std::min(whole, k + avx512::together * call.group);
      const int count = static_cast<int>((end - k) / call.group);
      __m512i most;
      avx512::with_type(call.x_type, [&](auto type) {
        most = avx512::greatest_of_groups<decltype(type)::value>(x_at(n, k), call.group, count);
      });
      span(n, k, end, most, count);
    }
    if (whole < call.columns) plainly(n, whole, call.columns);
  }

  void long_groups(std::int64_t n) const {
    const std::int64_t group = std::min(call.group, call.columns);
    for (std::int64_t k = 0; k < call.columns; k += group) {
      const std::int64_t end = std::min(call.columns, k + group), whole = end / step * step;
      if (whole <= k) return plainly(n, k, end);
      const __m512i most = avx512::dwords(avx512::row_amax(call.x, call.x_type, n * call.x_stride + k, end - k));
      span(n, k, whole, most, 1);
      if (whole < end) cast_columns<rounding>(call, n, whole, end);
    }
  }

  void plainly(std::int64_t n, std::int64_t k, std::int64_t end) const {
    if (call.rule != Rule::given) find_scales(call, n, k / call.group, (end + call.group - 1) / call.group);
    cast_columns<rounding>(call, n, k, end);
  }

  // Columns [k, end) of row n: whole steps of `count` groups with these greatest magnitudes.
  void span(std::int64_t n, std::int64_t k, std::int64_t end, __m512i most, int count) const {
    Scales scales;
    const std::int64_t at = scale_at(n, k / call.group);
    const bool is_finite = call.rule == Rule::given ? avx512::read_scales(call, most, count, at, &scales)
                                                    : avx512::find_scales(call, most, count, at, &scales);
    if (!is_finite) return plainly(n, k, end);
    const Under how = under(most, count, scales);
    const int shift = count == 1 ? 62 : __builtin_ctzll(static_cast<unsigned long long>(call.group));
    const avx512::Random random(call.seed, call.first_row + n);
    std::uint8_t* to = call.codes + n * call.code_stride + k * call.bits / 8;
    alignas(64) float x[long_span];
    for (std::int64_t start = k; start < end; start += long_span) {
      const std::int64_t numbers = std::min(end - start, long_span);
      avx512::scale_numbers(x_at(n, start), call.x_type, how, numbers, shift, scales, x);
      for (std::int64_t j = 0; j < numbers; j += step, to += step * element.bits / 8) {
        __m512i drawn[4] = {}, codes[4];
        if constexpr (rounding == Rounding::stochastic)
          random.draw<step>(call.first_column + start + j, reinterpret_cast<std::uint32_t*>(drawn));
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
          codes[v] = element.template codes<rounding>(_mm512_load_ps(x + j + 16 * v), drawn[v]);
        avx512::store_codes(avx512::joined(codes), element.bits, to);
      }
    }
  }
};

template <Rounding rounding>
void cast_rows_avx512(const CastCall& call, std::int64_t first, std::int64_t last) {
  if (!fits(call)) return cast_rows<rounding>(call, first, last);
  if (avx512::E4m3::is_of(call)) return Rows<avx512::E4m3, rounding>(call).cast(first, last);
  if (avx512::E5m2::is_of(call)) return Rows<avx512::E5m2, rounding>(call).cast(first, last);
  if (avx512::E3m2::is_of(call)) return Rows<avx512::E3m2, rounding>(call).cast(first, last);
  if (avx512::E2m3::is_of(call)) return Rows<avx512::E2m3, rounding>(call).cast(first, last);
  if (avx512::E2m1::is_of(call)) return Rows<avx512::E2m1, rounding>(call).cast(first, last);
  if (avx512::Integer::is_of(call)) return Rows<avx512::Integer, rounding>(call).cast(first, last);
  cast_rows<rounding>(call, first, last);
}

}  // namespace

void cast_avx512(const CastCall& call) {
  share_rows(call, [&](auto rounding, std::int64_t first, std::int64_t last) {
    cast_rows_avx512<decltype(rounding)::value>(call, first, last);
  });
}

void tiles_avx512(const TilesCall& call) {
  const auto turn = [](const float* from, std::int64_t length, float* to) {
    alignas(64) __m512i columns[tile_width];
    for (std::int64_t i = 0; i < length; i += tile_width) {
      linear::avx512::transpose([&](int r) { return _mm512_load_si512(from + (i + r) * tile_width); }, columns);
      for (std::int64_t c = 0; c < tile_width; c++) _mm512_store_si512(to + c * tile_length + i, columns[c]);
    }
  };
  run_tiles(
      call,
      [](const CastCall& part, auto rounding) { cast_rows_avx512<decltype(rounding)::value>(part, 0, part.rows); },
      turn);
}

void amax_avx512(const AmaxCall& call) { run_amax(call, avx512::row_amax); }
void greatest_avx512(const AmaxCall& call) { run_greatest(call, avx512::row_amax); }

}  // namespace parco::cast
