// cast, amax, decode, digits and fingerprint of parco._C. Tensors come as addresses, 0 for an absent one; what they
// must be is checked by parco.kernels.cast.
#include "cast/decode.h"
#include "cast/digits.h"
#include "cast/fingerprint.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;
using namespace parco::cast;
using parco::linear::address;

namespace {

// Python makes one of these and hands it to a kernel.
CastCall cast_call(std::uintptr_t x, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t factor,
                   std::uintptr_t entries, std::uintptr_t codes, std::int64_t rows, std::int64_t columns,
                   std::int64_t group, std::int64_t block_rows, std::int64_t scale_stride, std::uint64_t seed, int kind,
                   int rule, int rounding, int rescaling, int bits, int mantissa_bits, int least_exponent, int max_code,
                   int nan_code, int least, int greatest, int offset, float largest, int greatest_exponent, int x_type,
                   int scale_type, int threads) {
  return {address<const void>(x),
          address<void>(scale),
          address<const std::uint8_t>(zero),
          address<const float>(factor),
          address<const float>(entries),
          address<std::uint8_t>(codes),
          rows,
          columns,
          group,
          block_rows,
          scale_stride,
          seed,
          static_cast<Kind>(kind),
          static_cast<Rule>(rule),
          static_cast<Rounding>(rounding),
          static_cast<Rescaling>(rescaling),
          bits,
          mantissa_bits,
          least_exponent,
          max_code,
          nan_code,
          least,
          greatest,
          offset,
          largest,
          greatest_exponent,
          threads,
          static_cast<Type>(x_type),
          static_cast<Type>(scale_type),
          columns,
          (columns * bits + 7) / 8,
          0,
          0};
}

template <void (*kernel)(const CastCall&)>
void define_cast(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const CastCall& call) {
        nb::gil_scoped_release unlocked;
        kernel(call);
      },
      nb::arg("call"), "Numbers into codes; csrc/cast/cast.h.");
}

template <void (*kernel)(const TilesCall&)>
void define_tiles(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const CastCall& rows, const CastCall& columns, int row_size, int column_size, std::uintptr_t signs) {
        nb::gil_scoped_release unlocked;
        kernel({rows, columns, row_size, column_size, address<const float>(signs)});
      },
      nb::arg("rows"), nb::arg("columns"), nb::arg("row_size"), nb::arg("column_size"), nb::arg("signs"),
      "Numbers into codes, by rows and transposed; csrc/cast/cast.h.");
}

template <void (*kernel)(const AmaxCall&)>
void define_amax(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t x, std::uintptr_t amax, std::int64_t rows, std::int64_t columns, std::int64_t group, int x_type,
         int threads) {
        nb::gil_scoped_release unlocked;
        kernel(
            {address<const void>(x), address<float>(amax), rows, columns, group, threads, static_cast<Type>(x_type)});
      },
      nb::arg("x"), nb::arg("amax"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"), nb::arg("x_type"),
      nb::arg("threads"), "Greatest magnitudes; csrc/cast/cast.h.");
}

template <void (*kernel)(const DecodeCall&)>
void define_decode(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t codes, std::uintptr_t values, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t factor,
         std::uintptr_t y, std::int64_t rows, std::int64_t columns, std::int64_t group, std::int64_t block_rows,
         std::int64_t scale_stride, int bits, int offset, int pattern, int y_type, int scale_type, int threads) {
        const DecodeCall call{address<const std::uint8_t>(codes),
                              address<const float>(values),
                              address<const void>(scale),
                              address<const std::uint8_t>(zero),
                              address<const float>(factor),
                              address<void>(y),
                              rows,
                              columns,
                              group,
                              block_rows,
                              scale_stride,
                              bits,
                              offset,
                              threads,
                              static_cast<Pattern>(pattern),
                              static_cast<Type>(y_type),
                              static_cast<Type>(scale_type)};
        nb::gil_scoped_release unlocked;
        kernel(call);
      },
      nb::kw_only(), nb::arg("codes"), nb::arg("values"), nb::arg("scale"), nb::arg("zero"), nb::arg("factor"),
      nb::arg("y"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"), nb::arg("block_rows"),
      nb::arg("scale_stride"), nb::arg("bits"), nb::arg("offset"), nb::arg("pattern"), nb::arg("y_type"),
      nb::arg("scale_type"), nb::arg("threads"), "Codes into numbers; csrc/cast/decode.h.");
}

template <void (*function)(const std::uint8_t*, std::uint8_t*, std::int64_t, std::int64_t, int)>
void define_digits(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t from, std::uintptr_t to, std::int64_t rows, std::int64_t columns, int threads) {
        nb::gil_scoped_release unlocked;
        function(address<const std::uint8_t>(from), address<std::uint8_t>(to), rows, columns, threads);
      },
      nb::arg("source"), nb::arg("target"), nb::arg("rows"), nb::arg("columns"), nb::arg("threads"),
      "Rows of ternary codes; csrc/cast/digits.h.");
}

}  // namespace

void bind_cast(nb::module_& module) {
  nb::class_<CastCall>(module, "CastCall", "One cast; csrc/cast/cast.h.");
  module.def("cast_call", &cast_call, nb::kw_only(), nb::arg("x"), nb::arg("scale"), nb::arg("zero"), nb::arg("factor"),
             nb::arg("entries"), nb::arg("codes"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"),
             nb::arg("block_rows"), nb::arg("scale_stride"), nb::arg("seed"), nb::arg("kind"), nb::arg("rule"),
             nb::arg("rounding"), nb::arg("rescaling"), nb::arg("bits"), nb::arg("mantissa_bits"),
             nb::arg("least_exponent"), nb::arg("max_code"), nb::arg("nan_code"), nb::arg("least"), nb::arg("greatest"),
             nb::arg("offset"), nb::arg("largest"), nb::arg("greatest_exponent"), nb::arg("x_type"),
             nb::arg("scale_type"), nb::arg("threads"), "One cast, of tensors by their addresses.");
  define_cast<cast_generic>(module, "cast_generic");
  define_cast<cast_avx2>(module, "cast_avx2");
  define_cast<cast_avx512>(module, "cast_avx512");
  define_tiles<tiles_generic>(module, "tiles_generic");
  define_tiles<tiles_avx2>(module, "tiles_avx2");
  define_tiles<tiles_avx512>(module, "tiles_avx512");
  define_amax<amax_generic>(module, "amax_generic");
  define_amax<amax_avx2>(module, "amax_avx2");
  define_amax<amax_avx512>(module, "amax_avx512");
  define_amax<greatest_generic>(module, "greatest_generic");
  define_amax<greatest_avx2>(module, "greatest_avx2");
  define_amax<greatest_avx512>(module, "greatest_avx512");
  define_decode<decode_generic>(module, "decode_generic");
  define_decode<decode_avx2>(module, "decode_avx2");
  define_decode<decode_avx512>(module, "decode_avx512");
  module.def(
      "fingerprint",
      [](std::uintptr_t bytes, std::int64_t count, int threads) {
        nb::gil_scoped_release unlocked;
        return fingerprint(address<const std::uint8_t>(bytes), count, threads);
      },
      nb::arg("bytes"), nb::arg("count"), nb::arg("threads"), "64 bits of so many bytes; csrc/cast/fingerprint.h.");
  define_digits<digits_to_bits>(module, "digits_to_bits");
  define_digits<bits_to_digits>(module, "bits_to_digits");
}
