// Experts of parco._C. Tensors come in as addresses; parco.nn.mixture keeps them alive and right.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "experts/experts.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;
using namespace parco::experts;
using parco::linear::address;
using parco::linear::Chain;

namespace {

Experts make(const std::string& isa, std::int64_t columns, int type) {
  return {{}, columns, static_cast<Type>(type), rowwise_of(isa)};
}

void add_block(Experts& experts, const std::vector<Chain>& gate_up, const Chain& down, bool gated, int activation) {
  const Block block{gate_up, {down}, gated, static_cast<parco::rowwise::Activation>(activation)};
  std::int64_t outputs = 0;
  for (const Chain& chain : gate_up) {
    if (chain.columns() != experts.columns || chain.type != experts.type)
      throw std::invalid_argument("Experts: a product of another input");
    outputs += chain.outputs();
  }
  if (outputs != (1 + gated) * block.inner() || down.outputs() != experts.columns || down.type != experts.type)
    throw std::invalid_argument("Experts: the products of a block do not fit together");
  experts.blocks.push_back(block);
}

void run_experts(const Experts& experts, std::uintptr_t x, std::uintptr_t blocks, std::uintptr_t weights,
                 std::uintptr_t y, std::int64_t rows, std::int64_t choices, int threads) {
  nb::gil_scoped_release released;
  run(experts, {address<const std::int64_t>(blocks), address<const float>(weights), choices}, address<const void>(x),
      address<void>(y), rows, threads);
}

}  // namespace

void bind_experts(nb::module_& module) {
  nb::class_<Experts>(module, "Experts", "Feed-forward blocks; csrc/experts/experts.h.")
      .def(nb::new_(&make), nb::kw_only(), nb::arg("isa"), nb::arg("columns"), nb::arg("type"))
      .def("add", &add_block, nb::arg("gate_up"), nb::arg("down"), nb::arg("gated"), nb::arg("activation"),
           "Adds a block.");
  module.def("run_experts", &run_experts, nb::arg("experts"), nb::arg("x"), nb::arg("blocks"), nb::arg("weights"),
             nb::arg("y"), nb::arg("rows"), nb::arg("choices"), nb::arg("threads"),
             "x [rows, columns] to y: for each row the weighted sum of the results of its chosen blocks.");
}
