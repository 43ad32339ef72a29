// linear_int and linear_dense of parco._C. Tensors come as addresses; what they must be is checked by
// parco.kernels.linear.
#include <nanobind/nanobind.h>

#include "linear/dense.h"
#include "linear/int.h"

namespace nb = nanobind;

namespace parco::linear {
namespace {

// Smaller calls keep the interpreter lock: letting go and taking it again costs as much as they do.
constexpr std::int64_t worth_unlocking = 1 << 18;

template <class T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

template <void (*kernel)(const IntCall&)>
void run(std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t bias,
         std::uintptr_t y, std::int64_t rows, std::int64_t outputs, std::int64_t columns, std::int64_t group,
         std::int64_t scale_stride, int bits, int x_type, int scale_type, int bias_type, int threads) {
  const IntCall call{address<const void>(x),
                     address<const std::uint8_t>(codes),
                     address<const void>(scale),
                     address<const std::uint8_t>(zero),
                     address<const void>(bias),
                     address<void>(y),
                     rows,
                     outputs,
                     columns,
                     group,
                     scale_stride,
                     bits,
                     threads,
                     static_cast<Type>(x_type),
                     static_cast<Type>(scale_type),
                     static_cast<Type>(bias_type)};
  if (rows * outputs * columns < worth_unlocking) return kernel(call);
  nb::gil_scoped_release unlocked;
  kernel(call);
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
  if (rows * outputs * columns < worth_unlocking) return kernel(call);
  nb::gil_scoped_release unlocked;
  kernel(call);
}

}  // namespace
}  // namespace parco::linear

namespace {

template <void (*kernel)(const parco::linear::IntCall&)>
void define(nb::module_& module, const char* name) {
  module.def(name, &parco::linear::run<kernel>, nb::arg("x"), nb::arg("codes"), nb::arg("scale"), nb::arg("zero"),
             nb::arg("bias"), nb::arg("y"), nb::arg("rows"), nb::arg("outputs"), nb::arg("columns"), nb::arg("group"),
             nb::arg("scale_stride"), nb::arg("bits"), nb::arg("x_type"), nb::arg("scale_type"), nb::arg("bias_type"),
             nb::arg("threads"),
             "y = x @ ((u - z) * scale).T + bias; addresses, 0 for an absent zero or bias. The machine must have the "
             "instruction set.");
}

template <void (*kernel)(const parco::linear::DenseCall&)>
void define_dense(nb::module_& module, const char* name) {
  module.def(name, &parco::linear::run_dense<kernel>, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("y"),
             nb::arg("rows"), nb::arg("outputs"), nb::arg("columns"), nb::arg("x_type"), nb::arg("weight_type"),
             nb::arg("bias_type"), nb::arg("threads"),
             "y = x @ weight.T + bias; addresses, 0 for an absent bias. The machine must have the instruction set.");
}

}  // namespace

void bind_linear(nb::module_& module) {
  using namespace parco::linear;
  define<int_generic>(module, "linear_int_generic");
  define<int_avx2>(module, "linear_int_avx2");
  define<int_avx512>(module, "linear_int_avx512");
  define<int_amx>(module, "linear_int_amx");
  define<int_amx_emulated>(module, "linear_int_amx_emulated");
  define_dense<dense_generic>(module, "linear_dense_generic");
  define_dense<dense_avx2>(module, "linear_dense_avx2");
  define_dense<dense_avx512>(module, "linear_dense_avx512");
}
