// linear_coded, linear_both, linear_dense and linear_chain of parco._C. Tensors come as addresses; what they must be is
// checked by parco.kernels.linear.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "linear/chain.h"
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
                 int bias_type, int activation, int addend_type) {
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
  call.y_type = call.x_type;
  call.after = {static_cast<Activation>(activation), nullptr, static_cast<Type>(addend_type)};
  return call;
}

template <void (*kernel)(const CodedCall&)>
void define(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const CodedCall& settled, std::uintptr_t x, std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero,
         std::uintptr_t factor, std::uintptr_t bias, std::uintptr_t addend, std::uintptr_t y, int threads) {
        const CodedCall call = with_tensors(settled, x, codes, scale, zero, factor, bias, addend, y, threads);
        unlocked(call, [&] { kernel(call); });
      },
      nb::arg("settled"), nb::arg("x"), nb::arg("codes"), nb::arg("scale"), nb::arg("zero"), nb::arg("factor"),
      nb::arg("bias"), nb::arg("addend"), nb::arg("y"), nb::arg("threads"),
      "y = activation(x @ (number of each code * scale * factor).T + bias) + addend. The machine must have the "
      "instruction set.");
}

template <void (*kernel)(const CodedCall&)>
void define_both(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const CodedCall& settled, std::uintptr_t x, std::uintptr_t x_scale, std::uintptr_t codes, std::uintptr_t scale,
         std::uintptr_t factor, std::uintptr_t y, int threads) {
        CodedCall call = with_tensors(settled, x, codes, scale, 0, factor, 0, 0, y, threads);
        call.x_scale = address<const float>(x_scale);
        unlocked(call, [&] { kernel(call); });
      },
      nb::arg("settled"), nb::arg("x"), nb::arg("x_scale"), nb::arg("codes"), nb::arg("scale"), nb::arg("factor"),
      nb::arg("y"), nb::arg("threads"),
      "x @ (...).T of two matrices of the same codes of 4 bits, x_scale fp32 [rows, groups]. The machine must have the "
      "instruction set.");
}

template <void (*kernel)(const DenseCall&)>
void run_dense(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t addend, std::uintptr_t y,
               std::int64_t rows, std::int64_t outputs, std::int64_t columns, int x_type, int weight_type,
               int bias_type, int y_type, int activation, int addend_type, int threads) {
  const DenseCall call{
      address<const void>(x),
      address<const void>(weight),
      address<const void>(bias),
      address<void>(y),
      rows,
      outputs,
      columns,
      threads,
      static_cast<Type>(x_type),
      static_cast<Type>(weight_type),
      static_cast<Type>(bias_type),
      static_cast<Type>(y_type),
      {static_cast<Activation>(activation), address<const void>(addend), static_cast<Type>(addend_type)}};
  unlocked_if(rows * outputs * columns >= worth_unlocking, [&] { kernel(call); });
}

template <void (*kernel)(const DenseCall&)>
void define_dense(nb::module_& module, const char* name) {
  module.def(name, &run_dense<kernel>, nb::arg("x"), nb::arg("weight"), nb::arg("bias"), nb::arg("addend"),
             nb::arg("y"), nb::arg("rows"), nb::arg("outputs"), nb::arg("columns"), nb::arg("x_type"),
             nb::arg("weight_type"), nb::arg("bias_type"), nb::arg("y_type"), nb::arg("activation"),
             nb::arg("addend_type"), nb::arg("threads"),
             "y = activation(x @ weight.T + bias) + addend; addresses, 0 for an absent one. The machine must have the "
             "instruction set.");
}

Product& add_factor(Chain& chain, std::size_t term, const std::string& kernel) {
  Product product{};
  if (!choose(kernel, product)) throw std::invalid_argument("no kernel is called " + kernel);
  if (term > chain.terms.size()) throw std::invalid_argument("a chain's terms are added in order");
  if (term == chain.terms.size()) chain.terms.emplace_back();
  chain.terms[term].push_back(product);
  return chain.terms[term].back();
}

void add_coded(Chain& chain, std::size_t term, const std::string& kernel, const CodedCall& settled) {
  Product& product = add_factor(chain, term, kernel);
  product.coded = settled, product.outputs = settled.outputs, product.columns = settled.columns;
}

void add_dense(Chain& chain, std::size_t term, const std::string& kernel, std::int64_t outputs, std::int64_t columns,
               int weight_type, int bias_type) {
  Product& product = add_factor(chain, term, kernel);
  product.outputs = product.dense.outputs = outputs, product.columns = product.dense.columns = columns;
  product.dense.x_type = chain.type;
  product.dense.weight_type = static_cast<Type>(weight_type), product.dense.bias_type = static_cast<Type>(bias_type);
}

using Addresses = std::vector<std::uintptr_t>;

// A chain with its tensors: of each factor its codes, scale, zero and factor, or its matrix and three that are null.
Chain placed(const Chain& settled, const Addresses& tensors, std::uintptr_t bias) {
  Chain chain = settled;
  std::size_t next = 0;
  const auto take = [&] {
    if (next == tensors.size()) throw std::invalid_argument("the chain has more tensors than are given");
    return tensors[next++];
  };
  for (auto& term : chain.terms) {
    for (Product& product : term) {
      const std::uintptr_t own = &product == &chain.terms[0][0] ? bias : 0;
      const std::uintptr_t first = take(), scale = take(), zero = take(), factor = take();
      if (product.run_dense) {
        product.dense.weight = address<const void>(first), product.dense.bias = address<const void>(own);
        continue;
      }
      product.coded = with_tensors(product.coded, 0, first, scale, zero, factor, own, 0, 0, 1);
    }
  }
  return chain;
}

void run_chain(const Chain& settled, const Addresses& tensors, std::uintptr_t bias, std::uintptr_t x, std::uintptr_t y,
               std::int64_t rows, int threads) {
  const Chain chain = placed(settled, tensors, bias);
  std::int64_t products = 0;
  for (const auto& term : chain.terms)
    for (const Product& product : term) products += rows * product.outputs * product.columns;
  unlocked_if(products >= worth_unlocking,
              [&] { run(chain, address<const void>(x), address<void>(y), rows, threads); });
}

void bind_chain(nb::module_& module) {
  nb::class_<Chain>(module, "Chain", "Several products in one call; csrc/linear/chain.h.")
      .def(nb::new_([](int type) { return Chain{{}, static_cast<Type>(type)}; }), nb::arg("type"))
      .def("coded", &add_coded, nb::arg("term"), nb::arg("kernel"), nb::arg("settled"), "A factor stored as codes.")
      .def("dense", &add_dense, nb::arg("term"), nb::arg("kernel"), nb::arg("outputs"), nb::arg("columns"),
           nb::arg("weight_type"), nb::arg("bias_type"), "A dense factor.")
      .def("placed", &placed, nb::arg("tensors"), nb::arg("bias"), "The same with the addresses of its tensors.");
  module.def("run_chain", &run_chain, nb::arg("settled"), nb::arg("tensors"), nb::arg("bias"), nb::arg("x"),
             nb::arg("y"), nb::arg("rows"), nb::arg("threads"), "x [rows, columns] to y [rows, outputs].");
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
           nb::arg("x_type"), nb::arg("scale_type"), nb::arg("bias_type"), nb::arg("activation"),
           nb::arg("addend_type"));
  define<int_generic>(module, "int_generic");
  define<int_avx2>(module, "int_avx2");
  define<int_avx512>(module, "int_avx512");
  define<int_avx512_vbmi>(module, "int_avx512_vbmi");
  define<int_amx>(module, "int_amx");
  define<int_amx_emulated>(module, "int_amx_emulated");
  define<float_generic>(module, "float_generic");
  define<float_avx2>(module, "float_avx2");
  define<float_avx512>(module, "float_avx512");
  define<float_avx512_vbmi>(module, "float_avx512_vbmi");
  define<float_amx>(module, "float_amx");
  define<float_amx_emulated>(module, "float_amx_emulated");
  define_both<int_both_avx512>(module, "int_both_avx512");
  define_both<int_both_avx512_vbmi>(module, "int_both_avx512_vbmi");
  define_layout<pack_codes>(module, "pack_codes", "Codes by rows as panels; csrc/linear/coded.h.");
  define_layout<unpack_codes>(module, "unpack_codes", "Panels as codes by rows.");
  define_dense<dense_generic>(module, "linear_dense_generic");
  define_dense<dense_avx2>(module, "linear_dense_avx2");
  define_dense<dense_avx512>(module, "linear_dense_avx512");
  define_dense<dense_amx>(module, "linear_dense_amx");
  define_dense<dense_amx_emulated>(module, "linear_dense_amx_emulated");
  bind_chain(module);
}
