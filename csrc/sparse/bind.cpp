// linear_masked and linear_blocks of parco._C. Tensors come as addresses; what they must be is checked by
// parco.kernels.sparse.
#include <nanobind/nanobind.h>

#include "linear/coded_bind.h"
#include "sparse/sparse.h"

namespace nb = nanobind;
using namespace parco::sparse;
using parco::linear::address;

namespace {

// Of the codes of a format: what `parco::cast::DecodeCall` says of them. Null where the numbers are floats.
struct Codes {
  parco::cast::DecodeCall call{};
};

Codes settle_codes(std::uintptr_t values, std::int64_t group, std::int64_t block_rows, std::int64_t scale_stride,
                   int bits, int offset, int pattern, int scale_type) {
  Codes codes;
  codes.call.values = address<const float>(values);
  codes.call.group = group, codes.call.block_rows = block_rows, codes.call.scale_stride = scale_stride;
  codes.call.bits = bits, codes.call.offset = offset;
  codes.call.pattern = static_cast<parco::cast::Pattern>(pattern);
  codes.call.scale_type = static_cast<Type>(scale_type);
  return codes;
}

// Returns the index in `where` of the first block that is misplaced, and then does nothing; otherwise -1.
template <void (*kernel)(const SparseCall&)>
std::int64_t run(const Codes* codes, std::uintptr_t x, std::uintptr_t values, std::uintptr_t scale, std::uintptr_t zero,
                 std::uintptr_t factor, std::uintptr_t where, std::uintptr_t bias, std::uintptr_t y, std::int64_t rows,
                 std::int64_t outputs, std::int64_t columns, std::int64_t kept, int block, int index_bytes, int x_type,
                 int value_type, int bias_type, int threads) {
  SparseCall call{};
  call.x = address<const void>(x), call.bias = address<const void>(bias), call.y = address<void>(y);
  call.rows = rows, call.outputs = outputs, call.columns = columns, call.kept = kept;
  call.block = block, call.index_bytes = index_bytes, call.threads = threads;
  call.x_type = call.y_type = static_cast<Type>(x_type);
  call.value_type = static_cast<Type>(value_type), call.bias_type = static_cast<Type>(bias_type);
  if (block)
    call.blocks = address<const void>(where);
  else
    call.mask = address<const std::uint8_t>(where);
  if (codes) {
    call.codes = codes->call;
    call.codes.codes = address<const std::uint8_t>(values);
    call.codes.scale = address<const void>(scale);
    call.codes.zero = address<const std::uint8_t>(zero);
    call.codes.factor = address<const float>(factor);
    call.codes.columns = kept;
  } else {
    call.values = address<const void>(values);
  }
  if (block) {
    const std::int64_t wrong = first_misplaced(call);
    if (wrong >= 0) return wrong;
  }
  parco::linear::unlocked_if(rows * outputs * kept >= parco::linear::worth_unlocking, [&] { kernel(call); });
  return -1;
}

template <void (*kernel)(const SparseCall&)>
void define(nb::module_& module, const char* name) {
  module.def(
      name, &run<kernel>, nb::arg("codes").none(), nb::arg("x"), nb::arg("values"), nb::arg("scale"), nb::arg("zero"),
      nb::arg("factor"), nb::arg("where"), nb::arg("bias"), nb::arg("y"), nb::arg("rows"), nb::arg("outputs"),
      nb::arg("columns"), nb::arg("kept"), nb::arg("block"), nb::arg("index_bytes"), nb::arg("x_type"),
      nb::arg("value_type"), nb::arg("bias_type"), nb::arg("threads"),
      "y = x @ W.T + bias with W of `kept` numbers in each row, where a mask (block 0) or blocks say; addresses, "
      "0 for an absent one. Returns the index of the first block outside the matrix or out of order, or -1. The "
      "machine must "
      "have the instruction set.");
}

}  // namespace

void bind_sparse(nb::module_& module) {
  nb::class_<Codes>(module, "SparseCodes")
      .def(nb::new_(&settle_codes), nb::arg("values"), nb::arg("group"), nb::arg("block_rows"), nb::arg("scale_stride"),
           nb::arg("bits"), nb::arg("offset"), nb::arg("pattern"), nb::arg("scale_type"));
  define<masked_generic>(module, "sparse_masked_generic");
  define<masked_avx2>(module, "sparse_masked_avx2");
  define<masked_avx512>(module, "sparse_masked_avx512");
  define<masked_avx512_vbmi>(module, "sparse_masked_avx512_vbmi");
  define<blocks_generic>(module, "sparse_blocks_generic");
  define<blocks_avx2>(module, "sparse_blocks_avx2");
  define<blocks_avx512>(module, "sparse_blocks_avx512");
}
