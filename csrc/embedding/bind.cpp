// embedding_generic of parco._C.
#include "embedding/embedding.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;

void bind_embedding(nb::module_& module) {
  using namespace parco;
  module.def(
      "embedding_generic",
      [](const linear::CodedCall& settled, std::uintptr_t indices, std::uintptr_t codes, std::uintptr_t scale,
         std::uintptr_t zero, std::uintptr_t factor, std::uintptr_t y, int threads) {
        const linear::CodedCall call = linear::with_tensors(settled, 0, codes, scale, zero, factor, 0, 0, y, threads);
        return linear::unlocked(
            call, [&] { return embedding::embedding_generic(call, linear::address<const std::int64_t>(indices)); });
      },
      nb::arg("settled"), nb::arg("indices"), nb::arg("codes"), nb::arg("scale"), nb::arg("zero"), nb::arg("factor"),
      nb::arg("y"), nb::arg("threads"),
      "Expands rows of a stored matrix; returns the position of the first index outside it, or -1.");
}
