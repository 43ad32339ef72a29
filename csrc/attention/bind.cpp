// attention of parco._C and its derivative. Tensors come in as addresses; what they must be is checked by
// parco.kernels.attention.
#include <nanobind/stl/array.h>

#include "attention/attention.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;
using namespace parco::attention;
using parco::linear::address;

namespace {

using Strides = std::array<std::int64_t, 4>;

Heads heads(std::uintptr_t at, const Strides& strides) {
  return {address<const void>(at), {strides[0], strides[1], strides[2]}};
}

// Sizes are batch, heads of queries, heads of keys, queries, keys, width.
Forward forward(std::uintptr_t q, const Strides& q_stride, std::uintptr_t keys, const Strides& key_stride,
                std::uintptr_t values, const Strides& value_stride, std::uintptr_t y, std::uintptr_t logs,
                const std::array<std::int64_t, 6>& sizes, float scale, bool causal, int type, int threads,
                std::uintptr_t mask, const std::array<std::int64_t, 3>& mask_stride, double p, std::uint64_t seed) {
  return {heads(q, q_stride),
          heads(keys, key_stride),
          heads(values, value_stride),
          address<void>(y),
          address<float>(logs),
          sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          sizes[4],
          sizes[5],
          scale,
          causal,
          static_cast<Type>(type),
          threads,
          address<const std::uint8_t>(mask),
          {mask_stride[0], mask_stride[1], mask_stride[2]},
          p,
          seed};
}

template <void (*kernel)(const Forward&)>
void define_forward(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t q, const Strides& q_stride, std::uintptr_t keys, const Strides& key_stride,
         std::uintptr_t values, const Strides& value_stride, std::uintptr_t y, std::uintptr_t logs,
         const std::array<std::int64_t, 6>& sizes, float scale, bool causal, int type, int threads, std::uintptr_t mask,
         const std::array<std::int64_t, 3>& mask_stride, double p, std::uint64_t seed) {
        const Forward call = forward(q, q_stride, keys, key_stride, values, value_stride, y, logs, sizes, scale, causal,
                                     type, threads, mask, mask_stride, p, seed);
        nb::gil_scoped_release unlocked;
        kernel(call);
      },
      nb::arg("q"), nb::arg("q_stride"), nb::arg("keys"), nb::arg("key_stride"), nb::arg("values"),
      nb::arg("value_stride"), nb::arg("y"), nb::arg("logs"), nb::arg("sizes"), nb::arg("scale"), nb::arg("causal"),
      nb::arg("type"), nb::arg("threads"), nb::arg("mask"), nb::arg("mask_stride"), nb::arg("p"), nb::arg("seed"),
      "Attention in tiles; sizes are batch, heads, key heads, queries, keys, width; csrc/attention/attention.h.");
}

template <void (*kernel)(const Backward&)>
void define_backward(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t grad, const Strides& grad_stride, std::uintptr_t q, const Strides& q_stride,
         std::uintptr_t keys, const Strides& key_stride, std::uintptr_t values, const Strides& value_stride,
         std::uintptr_t y, std::uintptr_t logs, std::uintptr_t grad_q, std::uintptr_t grad_keys,
         std::uintptr_t grad_values, const std::array<std::int64_t, 6>& sizes, float scale, bool causal, int type,
         int threads, std::uintptr_t mask, const std::array<std::int64_t, 3>& mask_stride, double p,
         std::uint64_t seed) {
        const Backward call{forward(q, q_stride, keys, key_stride, values, value_stride, y, logs, sizes, scale, causal,
                                    type, threads, mask, mask_stride, p, seed),
                            heads(grad, grad_stride), address<void>(grad_q), address<void>(grad_keys),
                            address<void>(grad_values)};
        nb::gil_scoped_release unlocked;
        kernel(call);
      },
      nb::arg("grad"), nb::arg("grad_stride"), nb::arg("q"), nb::arg("q_stride"), nb::arg("keys"),
      nb::arg("key_stride"), nb::arg("values"), nb::arg("value_stride"), nb::arg("y"), nb::arg("logs"),
      nb::arg("grad_q"), nb::arg("grad_keys"), nb::arg("grad_values"), nb::arg("sizes"), nb::arg("scale"),
      nb::arg("causal"), nb::arg("type"), nb::arg("threads"), nb::arg("mask"), nb::arg("mask_stride"), nb::arg("p"),
      nb::arg("seed"), "The gradients of attention in tiles; csrc/attention/attention.h.");
}

}  // namespace

void bind_attention(nb::module_& module) {
  define_forward<attention_generic>(module, "attention_generic");
  define_forward<attention_avx2>(module, "attention_avx2");
  define_forward<attention_avx512>(module, "attention_avx512");
  define_backward<attention_grad_generic>(module, "attention_grad_generic");
  define_backward<attention_grad_avx2>(module, "attention_grad_avx2");
  define_backward<attention_grad_avx512>(module, "attention_grad_avx512");
}
