// embedding_int of parco._C. Tensors come as addresses; what they must be is checked by parco.kernels.linear.embedding.
#include <nanobind/nanobind.h>

#include "embedding/embedding.h"

namespace nb = nanobind;

static std::int64_t run(std::uintptr_t indices, std::uintptr_t codes, std::uintptr_t scale, std::uintptr_t zero,
                        std::uintptr_t y, std::int64_t rows, std::int64_t table_rows, std::int64_t columns,
                        std::int64_t group, std::int64_t scale_stride, int bits, int scale_type, int y_type,
                        int threads) {
  using namespace parco;
  const embedding::EmbeddingCall call{reinterpret_cast<const std::int64_t*>(indices),
                                      reinterpret_cast<const std::uint8_t*>(codes),
                                      reinterpret_cast<const void*>(scale),
                                      reinterpret_cast<const std::uint8_t*>(zero),
                                      reinterpret_cast<void*>(y),
                                      rows,
                                      table_rows,
                                      columns,
                                      group,
                                      scale_stride,
                                      bits,
                                      threads,
                                      static_cast<linear::Type>(scale_type),
                                      static_cast<linear::Type>(y_type)};
  if (rows * columns < 1 << 16) return embedding::embedding_generic(call);
  nb::gil_scoped_release unlocked;
  return embedding::embedding_generic(call);
}

void bind_embedding(nb::module_& module) {
  module.def("embedding_int_generic", &run, nb::arg("indices"), nb::arg("codes"), nb::arg("scale"), nb::arg("zero"),
             nb::arg("y"), nb::arg("rows"), nb::arg("table_rows"), nb::arg("columns"), nb::arg("group"),
             nb::arg("scale_stride"), nb::arg("bits"), nb::arg("scale_type"), nb::arg("y_type"), nb::arg("threads"),
             "Expands rows of a table; returns the position of the first index outside it, or -1.");
}
