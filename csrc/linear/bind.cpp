// linear_coded and linear_dense of parco._C. Tensors come as addresses; what they must be is checked by
// parco.kernels.linear.
#include "linear/coded_bind.h"
#include "linear/dense.h"
#include "linear/float.h"
#include "linear/int.h"
#include "linear/panels.h"

namespace nb = nanobind;
using namespace parco::linear;

namespace {

CodedCall settle(std::uintptr_t values, std::uintptr_t table, std::int64_t rows, std::int64_t outputs,
                 std::int64_t columns, std::int64_t group, std::int64_t block_rows, std::int64_t scale_stride,
                 float unit, int zero_point, int bits, bool packed, bool int8, int element, int x_type, int scale_type,
                 int bias_type) {
  CodedCall call{};
  call.values = address<const float>(values);
  call.table = address<const std::uint8_t>(table);
  call.rows = rows, call.outputs = outputs, call.columns = columns;
  call.group = group, call.block_rows = block_rows, call.scale_stride = scale_stride;
  call.unit = unit, call.zero_point = zero_point, call.bits = bits, call.packed = packed;
  call.int8 = int8;
  call.element = static_cast<Element>(element);
  call.x_type = static_cast<Type>(x_type);
  call.scale_type = static_cast<Type>(scale_type);
  call.bias_type = static_cast<Type>(bias_type);
  return call;
}

template <void (*kernel)(const CodedCall&)>
void define(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const CodedCall& settled, std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero,
         std::uintptr_t factor, std::uintptr_t bias, std::uintptr_t y, int threads) {
        const CodedCall call = with_tensors(settled, x, codes, scale, zero, factor, bias, y, threads);
        unlocked(call, [&] { kernel(call); });
      },
      nb::arg("settled"), nb::arg("x"), nb::arg("codes"), nb::arg("scale"), nb::arg("zero"), nb::arg("factor"),
      nb::arg("bias"), nb::arg("y"), nb::arg("threads"),
      "y = x @ (number of each code * scale * factor).T + bias. The machine must have the instruction set.");
}

template <void (*kernel)(const DenseCall&)>
void run_dense(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t y, std::int64_t rows,
               std::int64_t outputs, std::int64_t columns, int x_type, int weight_type, int bias_type, int threads) {
  const DenseCall call{address<const void>(x),
                       address<const void>(weight),
                       address<const void>(bias),
                       address<void>(y),
                       rows,
                       outputs,
                       columns,
                       threads,
                       static_cast<Type>(x_type),
                       static_cast<Type>(weight_type),
                       static_cast<Type>(bias_type)};
  unlocked_if(rows * outputs * columns >= worth_unlocking, [&] { kernel(call); });
}

template <void (*kernel)(const DenseCall&)>
void define_dense(nb::module_& module, const char* name) {
  module.def(name, &run_dense<kernel>, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("y"), nb::arg("rows"),
             nb::arg("outputs"), nb::arg("columns"), nb::arg("x_type"), nb::arg("weight_type"), nb::arg("bias_type"),
             nb::arg("threads"),
             "y = x @ weight.T + bias; addresses, 0 for an absent bias. The machine must have the instruction set.");
}

template <void (*function)(const std::uint8_t*, std::uint8_t*, std::int64_t, std::int64_t, int, int)>
void define_layout(nb::module_& module, const char* name, const char* help) {
  module.def(
      name,
      [](std::uintptr_t from, std::uintptr_t to, std::int64_t outputs, std::int64_t columns, int bits, int threads) {
        nb::gil_scoped_release unlocked;
        function(address<const std::uint8_t>(from), address<std::uint8_t>(to), outputs, columns, bits, threads);
      },
      nb::arg("source"), nb::arg("target"), nb::arg("outputs"), nb::arg("columns"), nb::arg("bits"), nb::arg("threads"),
      help);
}

}  // namespace

void bind_linear(nb::module_& module) {
  nb::class_<CodedCall>(module, "CodedCall", "A product with stored codes, but for its tensors; csrc/linear/coded.h.")
      .def(nb::new_(&settle), nb::kw_only(), nb::arg("values"), nb::arg("table"), nb::arg("rows"), nb::arg("outputs"),
           nb::arg("columns"), nb::arg("group"), nb::arg("block_rows"), nb::arg("scale_stride"), nb::arg("unit"),
           nb::arg("zero_point"), nb::arg("bits"), nb::arg("packed"), nb::arg("int8"), nb::arg("element"),
           nb::arg("x_type"), nb::arg("scale_type"), nb::arg("bias_type"));
  define<int_generic>(module, "int_generic");
  define<int_avx2>(module, "int_avx2");
  define<int_avx512>(module, "int_avx512");
  define<int_amx>(module, "int_amx");
  define<int_amx_emulated>(module, "int_amx_emulated");
  define<float_generic>(module, "float_generic");
  define<float_avx2>(module, "float_avx2");
  define<float_avx512>(module, "float_avx512");
  define<float_amx>(module, "float_amx");
  define<float_amx_emulated>(module, "float_amx_emulated");
  define_layout<pack_codes>(module, "pack_codes", "Codes by rows as panels; csrc/linear/coded.h.");
  define_layout<unpack_codes>(module, "unpack_codes", "Panels as codes by rows.");
  define_dense<dense_generic>(module, "linear_dense_generic");
  define_dense<dense_avx2>(module, "linear_dense_avx2");
  define_dense<dense_avx512>(module, "linear_dense_avx512");
  define_dense<dense_amx>(module, "linear_dense_amx");
  define_dense<dense_amx_emulated>(module, "linear_dense_amx_emulated");
}
