// Block and Mixture of parco._C. Tensors come in as addresses; parco.nn.mixture keeps them alive and right.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>

#include "experts/mixture.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;
using namespace parco::experts;
using parco::linear::address;
using parco::linear::Chain;

namespace {

Block make_block(const std::string& isa, const std::vector<Chain>& gate_up, const Chain& down, bool gated,
                 int activation, float limit, float slope, float raised) {
  const bool is_plain = std::isinf(limit) && slope == 1.0f && raised == 0.0f;
  std::optional<parco::rowwise::Cut> cut;
  if (!is_plain) cut = parco::rowwise::Cut{limit, slope, raised};
  const Block block{
      gate_up, down, gated, static_cast<parco::rowwise::Activation>(activation), parco::rowwise::operations_of(isa),
      cut};
  std::int64_t outputs = 0;
  for (const Chain& chain : gate_up) {
    if (chain.columns() != block.columns() || chain.type != block.type())
      throw std::invalid_argument("Block: its products have other inputs or types than results");
    outputs += chain.outputs();
  }
  if (outputs != (1 + gated) * block.inner()) throw std::invalid_argument("Block: its products do not fit together");
  return block;
}

void check_alike(const Block& block, std::int64_t columns, Type type) {
  if (block.columns() != columns || block.type() != type)
    throw std::invalid_argument("blocks of one mixture take and give the same numbers");
}

Mixture make_mixture(const std::vector<Block>& blocks, const Chain& router, std::int64_t choices, bool normalized,
                     const std::optional<Block>& shared, const std::optional<Chain>& shared_gate) {
  const std::int64_t columns = router.columns();
  const bool fits = router.outputs() == static_cast<std::int64_t>(blocks.size()) && choices > 0;
  if (!fits || choices > router.outputs()) throw std::invalid_argument("Mixture: a router of other blocks");
  for (const Block& block : blocks) check_alike(block, columns, router.type);
  if (shared) check_alike(*shared, columns, router.type);
  if (shared_gate && (!shared || shared_gate->columns() != columns || shared_gate->outputs() != 1))
    throw std::invalid_argument("Mixture: a gate without a block, or of other numbers");
  return {blocks, router, choices, normalized, shared, shared_gate};
}

void run_experts(const std::vector<const Block*>& blocks, const std::vector<std::int64_t>& numbers, std::uintptr_t x,
                 std::uintptr_t chosen, std::uintptr_t weights, std::uintptr_t y, std::int64_t rows,
                 std::int64_t choices, int threads) {
  if (blocks.empty() || blocks.size() != numbers.size())
    throw std::invalid_argument("run_experts: every block needs its number, and there must be one");
  std::vector<const Block*> by_number;
  for (std::size_t i = 0; i < blocks.size(); i++) {
    check_alike(*blocks[i], blocks[0]->columns(), blocks[0]->type());
    const std::size_t number = static_cast<std::size_t>(numbers[i]);
    if (number >= by_number.size()) by_number.resize(number + 1);
    by_number[number] = blocks[i];
  }
  nb::gil_scoped_release released;
  run(by_number, {address<const std::int64_t>(chosen), address<const float>(weights), choices}, address<const void>(x),
      address<void>(y), rows, threads);
}

void run_mixture(const Mixture& mixture, std::uintptr_t x, std::uintptr_t y, int threads) {
  nb::gil_scoped_release released;
  run(mixture, address<const void>(x), address<void>(y), threads);
}

}  // namespace

void bind_experts(nb::module_& module) {
  nb::class_<Block>(module, "Block", "A feed-forward block; csrc/experts/experts.h.")
      .def(nb::new_(&make_block), nb::kw_only(), nb::arg("isa"), nb::arg("gate_up"), nb::arg("down"), nb::arg("gated"),
           nb::arg("activation"), nb::arg("limit"), nb::arg("slope"), nb::arg("raised"));
  nb::class_<Mixture>(module, "Mixture", "Blocks and what chooses among them; csrc/experts/mixture.h.")
      .def(nb::new_(&make_mixture), nb::kw_only(), nb::arg("blocks"), nb::arg("router"), nb::arg("choices"),
           nb::arg("normalized"), nb::arg("shared").none(), nb::arg("shared_gate").none());
  module.def("run_experts", &run_experts, nb::arg("blocks"), nb::arg("numbers"), nb::arg("x"), nb::arg("chosen"),
             nb::arg("weights"), nb::arg("y"), nb::arg("rows"), nb::arg("choices"), nb::arg("threads"),
             "x [rows, columns] to y: for each row the weighted sum of the results of its chosen blocks, by number.");
  module.def("run_mixture", &run_mixture, nb::arg("mixture"), nb::arg("x"), nb::arg("y"), nb::arg("threads"),
             "One row x [columns] to y.");
}
