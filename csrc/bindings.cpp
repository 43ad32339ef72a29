// The Python module parco._C: every csrc/<operation>/bind.cpp adds its functions. Tensors come in as plain addresses
// (tensor.data_ptr()), so the module does not link against PyTorch and one build serves many torch versions.
#include <nanobind/nanobind.h>

#define PARCO_OPERATION(name) void bind_##name(nanobind::module_& module);
#include "operations.inc"
#undef PARCO_OPERATION

NB_MODULE(_C, module) {
  nanobind::set_leak_warnings(false);  // settled calls are kept for as long as the interpreter runs
#define PARCO_OPERATION(name) bind_##name(module);
#include "operations.inc"
#undef PARCO_OPERATION
}
