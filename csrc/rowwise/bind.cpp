// rms_norm, layer_norm, gated and their derivatives, cross_entropy, dropout, rotate and attend of parco._C. Tensors
// come in as addresses; what they must be is checked by parco.kernels.rowwise.
#include <nanobind/stl/array.h>

#include "linear/coded_bind.h"
#include "rowwise/rowwise.h"

namespace nb = nanobind;
using namespace parco::rowwise;
using parco::linear::address;

namespace {

constexpr std::int64_t numbers_worth_unlocking = 1 << 15;

template <class Call>
void run(void (*kernel)(const Call&), const Call& call, std::int64_t numbers) {
  parco::linear::unlocked_if(numbers >= numbers_worth_unlocking, [&] { kernel(call); });
}

template <void (*kernel)(const Norm&)>
void define_norm(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t x, std::uintptr_t weight, std::uintptr_t y, std::int64_t rows, std::int64_t columns,
         float epsilon, float offset, bool rounded, int type, int weight_type, int y_type, int threads) {
        run(kernel,
            Norm{address<const void>(x), address<const void>(weight), address<void>(y), rows, columns, epsilon, offset,
                 rounded, static_cast<Type>(type), threads, false, nullptr, static_cast<Type>(weight_type),
                 static_cast<Type>(y_type)},
            rows * columns);
      },
      nb::arg("x"), nb::arg("weight"), nb::arg("y"), nb::arg("rows"), nb::arg("columns"), nb::arg("epsilon"),
      nb::arg("offset"), nb::arg("rounded"), nb::arg("type"), nb::arg("weight_type"), nb::arg("y_type"),
      nb::arg("threads"), "y = x / sqrt(mean(x * x) + epsilon) * (weight + offset), by rows; csrc/rowwise/rowwise.h.");
}

template <void (*kernel)(const Norm&)>
void define_layer_norm(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t y, std::int64_t rows,
         std::int64_t columns, float epsilon, int type, int weight_type, int y_type, int threads) {
        run(kernel,
            Norm{address<const void>(x), address<const void>(weight), address<void>(y), rows, columns, epsilon, 0.0f,
                 false, static_cast<Type>(type), threads, true, address<const void>(bias),
                 static_cast<Type>(weight_type), static_cast<Type>(y_type)},
            rows * columns);
      },
      nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("y"), nb::arg("rows"), nb::arg("columns"),
      nb::arg("epsilon"), nb::arg("type"), nb::arg("weight_type"), nb::arg("y_type"), nb::arg("threads"),
      "y = (x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, by rows; csrc/rowwise/rowwise.h.");
}

template <void (*kernel)(const NormGrad&)>
void define_norm_grad(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t grad, std::uintptr_t x, std::uintptr_t weight, std::uintptr_t grad_x,
         std::uintptr_t grad_weight, std::uintptr_t grad_bias, std::int64_t rows, std::int64_t columns, float epsilon,
         float offset, bool centered, int type, int weight_type, int y_type, int threads) {
        const Norm norm{address<const void>(x),
                        address<const void>(weight),
                        nullptr,
                        rows,
                        columns,
                        epsilon,
                        offset,
                        false,
                        static_cast<Type>(type),
                        threads,
                        centered,
                        nullptr,
                        static_cast<Type>(weight_type),
                        static_cast<Type>(y_type)};
        run(kernel,
            NormGrad{norm, address<const void>(grad), address<void>(grad_x), address<float>(grad_weight),
                     address<float>(grad_bias)},
            rows * columns);
      },
      nb::arg("grad"), nb::arg("x"), nb::arg("weight"), nb::arg("grad_x"), nb::arg("grad_weight"), nb::arg("grad_bias"),
      nb::arg("rows"), nb::arg("columns"), nb::arg("epsilon"), nb::arg("offset"), nb::arg("centered"), nb::arg("type"),
      nb::arg("weight_type"), nb::arg("y_type"), nb::arg("threads"),
      "The gradients of a norm, those of weight and bias in fp32 and at 0 left out; csrc/rowwise/rowwise.h.");
}

template <void (*kernel)(const Gate&)>
void define_gate(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t gate, std::uintptr_t up, std::uintptr_t y, std::int64_t rows, std::int64_t count,
         std::int64_t stride, int activation, int type, int threads) {
        run(kernel,
            Gate{address<const void>(gate), address<const void>(up), address<void>(y), count,
                 static_cast<Activation>(activation), static_cast<Type>(type), threads, rows, stride},
            rows * count);
      },
      nb::arg("gate"), nb::arg("up"), nb::arg("y"), nb::arg("rows"), nb::arg("count"), nb::arg("stride"),
      nb::arg("activation"), nb::arg("type"), nb::arg("threads"),
      "y = activation(gate) * up, of rows that are `stride` numbers apart.");
}

template <void (*kernel)(const GateGrad&)>
void define_gate_grad(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t grad, std::uintptr_t gate, std::uintptr_t up, std::uintptr_t grad_gate, std::uintptr_t grad_up,
         std::int64_t count, int activation, int type, int threads) {
        const Gate of{address<const void>(gate),           address<const void>(up), nullptr, count,
                      static_cast<Activation>(activation), static_cast<Type>(type), threads};
        run(kernel, GateGrad{of, address<const void>(grad), address<void>(grad_gate), address<void>(grad_up)}, count);
      },
      nb::arg("grad"), nb::arg("gate"), nb::arg("up"), nb::arg("grad_gate"), nb::arg("grad_up"), nb::arg("count"),
      nb::arg("activation"), nb::arg("type"), nb::arg("threads"), "The gradients of activation(gate) * up.");
}

template <void (*kernel)(const CrossEntropy&)>
void define_cross_entropy(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t logits, std::uintptr_t labels, std::uintptr_t factors, std::uintptr_t losses, std::int64_t rows,
         std::int64_t columns, float softcap, float smoothing, bool gradient, int type, int rounded, int threads) {
        run(kernel,
            CrossEntropy{address<void>(logits), address<const std::int64_t>(labels), address<const float>(factors),
                         address<float>(losses), rows, columns, softcap, smoothing, gradient, static_cast<Type>(type),
                         static_cast<Type>(rounded), threads},
            rows * columns);
      },
      nb::arg("logits"), nb::arg("labels"), nb::arg("factors"), nb::arg("losses"), nb::arg("rows"), nb::arg("columns"),
      nb::arg("softcap"), nb::arg("smoothing"), nb::arg("gradient"), nb::arg("type"), nb::arg("rounded"),
      nb::arg("threads"),
      "Each row's cross entropy with its label; the logits become its derivative; csrc/rowwise/rowwise.h.");
}

template <void (*kernel)(const Dropout&)>
void define_dropout(nb::module_& module, const char* name) {
  module.def(
      name,
      [](std::uintptr_t x, std::uintptr_t y, std::int64_t rows, std::int64_t columns, std::uint64_t seed, double p,
         int type, int threads) {
        run(kernel,
            Dropout{address<const void>(x), address<void>(y), rows, columns, seed, p, static_cast<Type>(type), threads},
            rows * columns);
      },
      nb::arg("x"), nb::arg("y"), nb::arg("rows"), nb::arg("columns"), nb::arg("seed"), nb::arg("p"), nb::arg("type"),
      nb::arg("threads"), "y = x, of which the share p is dropped; csrc/rowwise/rowwise.h.");
}

template <void (*kernel)(const Rotation&)>
void define_rotation(nb::module_& module, const char* name) {
  using Strides = std::array<std::int64_t, 4>;
  module.def(
      name,
      [](std::uintptr_t q, const Strides& q_stride, std::int64_t q_heads, std::uintptr_t turned_q, std::uintptr_t k,
         const Strides& k_stride, std::int64_t k_heads, std::uintptr_t turned_k, std::uintptr_t cos, std::uintptr_t sin,
         bool same_angles, std::int64_t batch, std::int64_t tokens, std::int64_t columns, std::int64_t rest, int type,
         int angle_type, int threads) {
        const std::int64_t width = columns + rest;
        const auto heads = [&](std::uintptr_t x, const Strides& from, std::int64_t count, std::uintptr_t y) {
          return Heads{address<const void>(x),
                       address<void>(y),
                       count,
                       {from[0], from[1], from[2]},
                       {tokens * count * width, width, count * width}};
        };
        run(kernel,
            Rotation{{heads(q, q_stride, q_heads, turned_q), heads(k, k_stride, k_heads, turned_k)},
                     address<const void>(cos),
                     address<const void>(sin),
                     batch,
                     tokens,
                     columns,
                     rest,
                     {same_angles ? 0 : tokens * columns, columns},
                     static_cast<Type>(type),
                     threads,
                     static_cast<Type>(angle_type)},
            batch * tokens * width * (q_heads + k_heads));
      },
      nb::arg("q"), nb::arg("q_stride"), nb::arg("q_heads"), nb::arg("turned_q"), nb::arg("k"), nb::arg("k_stride"),
      nb::arg("k_heads"), nb::arg("turned_k"), nb::arg("cos"), nb::arg("sin"), nb::arg("same_angles"), nb::arg("batch"),
      nb::arg("tokens"), nb::arg("columns"), nb::arg("rest"), nb::arg("type"), nb::arg("angle_type"),
      nb::arg("threads"),
      "Queries and keys [batch, heads, tokens, columns + rest], of any strides but the last, turned; the results lie "
      "as "
      "[batch, tokens, heads, ...].");
}

template <void (*kernel)(const Attention&)>
void define_attention(nb::module_& module, const char* name) {
  using Strides = std::array<std::int64_t, 4>;
  module.def(
      name,
      [](std::uintptr_t q, const Strides& q_stride, std::uintptr_t keys, const Strides& key_stride,
         std::uintptr_t values, const Strides& value_stride, std::uintptr_t y, std::int64_t batch, std::int64_t heads,
         std::int64_t key_heads, std::int64_t count, std::int64_t columns, float scale, float softcap, int type,
         int threads, std::uintptr_t sinks) {
        run(kernel,
            Attention{address<const void>(q),
                      address<const void>(keys),
                      address<const void>(values),
                      address<void>(y),
                      batch,
                      heads,
                      key_heads,
                      count,
                      columns,
                      {q_stride[0], q_stride[1]},
                      {key_stride[0], key_stride[1], key_stride[2]},
                      {value_stride[0], value_stride[1], value_stride[2]},
                      scale,
                      static_cast<Type>(type),
                      threads,
                      softcap,
                      address<const void>(sinks)},
            batch * heads * count * columns);
      },
      nb::arg("q"), nb::arg("q_stride"), nb::arg("keys"), nb::arg("key_stride"), nb::arg("values"),
      nb::arg("value_stride"), nb::arg("y"), nb::arg("batch"), nb::arg("heads"), nb::arg("key_heads"), nb::arg("count"),
      nb::arg("columns"), nb::arg("scale"), nb::arg("softcap"), nb::arg("type"), nb::arg("threads"), nb::arg("sinks"),
      "One query for every head against keys [batch, key_heads, count, columns]; csrc/rowwise/rowwise.h.");
}

}  // namespace

void bind_rowwise(nb::module_& module) {
  define_norm<norm_generic>(module, "rms_norm_generic");
  define_norm<norm_avx2>(module, "rms_norm_avx2");
  define_norm<norm_avx512>(module, "rms_norm_avx512");
  define_layer_norm<norm_generic>(module, "layer_norm_generic");
  define_layer_norm<norm_avx2>(module, "layer_norm_avx2");
  define_layer_norm<norm_avx512>(module, "layer_norm_avx512");
  define_gate<gate_generic>(module, "gated_generic");
  define_gate<gate_avx2>(module, "gated_avx2");
  define_gate<gate_avx512>(module, "gated_avx512");
  define_norm_grad<norm_grad_generic>(module, "norm_grad_generic");
  define_norm_grad<norm_grad_avx2>(module, "norm_grad_avx2");
  define_norm_grad<norm_grad_avx512>(module, "norm_grad_avx512");
  define_gate_grad<gate_grad_generic>(module, "gated_grad_generic");
  define_gate_grad<gate_grad_avx2>(module, "gated_grad_avx2");
  define_gate_grad<gate_grad_avx512>(module, "gated_grad_avx512");
  define_cross_entropy<cross_entropy_generic>(module, "cross_entropy_generic");
  define_cross_entropy<cross_entropy_avx2>(module, "cross_entropy_avx2");
  define_cross_entropy<cross_entropy_avx512>(module, "cross_entropy_avx512");
  define_dropout<dropout_generic>(module, "dropout_generic");
  define_dropout<dropout_avx2>(module, "dropout_avx2");
  define_dropout<dropout_avx512>(module, "dropout_avx512");
  define_rotation<rotate_generic>(module, "rotate_generic");
  define_rotation<rotate_avx2>(module, "rotate_avx2");
  define_rotation<rotate_avx512>(module, "rotate_avx512");
  define_attention<attend_generic>(module, "attend_generic");
  define_attention<attend_avx2>(module, "attend_avx2");
  define_attention<attend_avx512>(module, "attend_avx512");
}
