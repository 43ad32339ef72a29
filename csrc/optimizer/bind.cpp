// adamw of parco._C. Tensors come in as addresses; what they must be is checked by parco.kernels.optimizer.
#include <nanobind/stl/vector.h>

#include "linear/coded_bind.h"
#include "optimizer/adamw.h"

namespace nb = nanobind;
using namespace parco::optimizer;
using parco::linear::address;

namespace {

constexpr std::int64_t numbers_worth_unlocking = 1 << 15;
constexpr std::size_t whole_numbers = 12;  // of each parameter

Parameter parameter(const std::int64_t* of, float step_size, float second_root, std::int64_t first_span) {
  const auto at = [&](int i) { return static_cast<std::uintptr_t>(of[i]); };
  const std::int64_t rows = of[6], columns = of[7], in_row = (columns + block - 1) / block;
  const bool coded = of[4];
  return {address<void>(at(0)),
          address<const void>(at(1)),
          address<void>(at(2)),
          address<void>(at(3)),
          address<void>(at(4)),
          address<void>(at(5)),
          rows,
          columns,
          of[8],
          static_cast<std::uint64_t>(of[9]),
          static_cast<Type>(of[10]),
          static_cast<Type>(of[11]),
          step_size,
          second_root,
          first_span,
          coded ? rows * in_row : (rows * columns + block - 1) / block};
}

template <void (*kernel)(const Adamw&)>
void define_adamw(nb::module_& module, const char* name) {
  module.def(
      name,
      [](const std::vector<std::int64_t>& whole, const std::vector<float>& factors, float grad_factor, float decay,
         float first_weight, float second_decay, float second_weight, float epsilon, std::uint64_t seed,
         bool stochastic, int threads) {
        std::vector<Parameter> parameters;
        std::int64_t spans = 0;
        for (std::size_t i = 0; i < whole.size() / whole_numbers; i++) {
          parameters.push_back(parameter(&whole[i * whole_numbers], factors[2 * i], factors[2 * i + 1], spans));
          spans += parameters.back().spans;
        }
        const Adamw call{parameters.data(),
                         static_cast<std::int64_t>(parameters.size()),
                         spans,
                         grad_factor,
                         decay,
                         first_weight,
                         second_decay,
                         second_weight,
                         epsilon,
                         seed,
                         stochastic,
                         threads};
        parco::linear::unlocked_if(spans * block >= numbers_worth_unlocking, [&] { kernel(call); });
      },
      nb::arg("whole"), nb::arg("factors"), nb::arg("grad_factor"), nb::arg("decay"), nb::arg("first_weight"),
      nb::arg("second_decay"), nb::arg("second_weight"), nb::arg("epsilon"), nb::arg("seed"), nb::arg("stochastic"),
      nb::arg("threads"),
      "AdamW's step of several parameters, 12 whole numbers and 2 factors of each; csrc/optimizer/adamw.h.");
}

}  // namespace

void bind_optimizer(nb::module_& module) {
  define_adamw<adamw_generic>(module, "adamw_generic");
  define_adamw<adamw_avx2>(module, "adamw_avx2");
  define_adamw<adamw_avx512>(module, "adamw_avx512");
}
