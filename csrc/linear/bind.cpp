// linear_int and linear_dense of parco._C. Tensors come as addresses; what they must be is checked by parco.kernels.linear.
#include <nanobind/nanobind.h>

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
void run(std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero, std::uintptr_t bias, std::uintptr_t y,
         std::int64_t rows, std::int64_t outputs, std::int64_t columns, std::int64_t group, std::int64_t scale_stride, int bits,
         int x_type, int scale_type, int bias_type, int threads) {
  const IntCall call{address<const void>(x), address<const std::uint8_t>(codes), address<const void>(scale),
                     address<const std::uint8_t>(zero), address<const void>(bias), address<void>(y), rows, outputs, columns, group,
                     scale_stride, bits, threads, static_cast<Type>(x_type), static_cast<Type>(scale_type),
                     static_cast<Type>(bias_type)};
  if (rows * outputs * columns < worth_unlocking) return kernel(call);
  nb::gil_scoped_release unlocked;
  kernel(call);
}

}  // namespace
}  // namespace parco::linear

void bind_linear(nb::module_& module) {
  using namespace parco::linear;
  module.def("linear_int_generic", &run<int_generic>);
  module.def("linear_int_avx2", &run<int_avx2>);
  module.def("linear_int_avx512", &run<int_avx512>);
}
