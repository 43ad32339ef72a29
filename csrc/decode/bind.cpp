// DecoderLayer of parco._C: one token through a decoder's layer. Tensors come in as addresses; parco.nn.decode keeps
// them alive and right.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "decode/layer.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;
using namespace parco::decode;
using parco::linear::address;
using parco::linear::Chain;

namespace {

Scaling scaling(std::uintptr_t weight, std::uintptr_t bias, float epsilon, float offset, bool rounded, bool centered) {
  return {address<const void>(weight), address<const void>(bias), epsilon, offset, rounded, centered};
}

Layer make(const std::string& isa, std::int64_t columns, std::int64_t heads, std::int64_t key_heads, std::int64_t head,
           std::int64_t turning, float scale, float softcap, int type, bool parallel, bool interleaved,
           const Scaling& before, const std::vector<Scaling>& between, const std::vector<Scaling>& after,
           const std::vector<Scaling>& of_heads, const std::optional<parco::experts::Block>& block,
           const std::optional<parco::experts::Mixture>& mixture) {
  if (between.size() > 1 || after.size() % 2 || after.size() > 2 || of_heads.size() % 2 || of_heads.size() > 2)
    throw std::invalid_argument("DecoderLayer: at most one norm between, none or two after and of heads");
  if (block.has_value() == mixture.has_value()) throw std::invalid_argument("DecoderLayer: a block or a mixture");
  Layer layer{};
  layer.block = block, layer.mixture = mixture;
  layer.columns = columns, layer.heads = heads, layer.key_heads = key_heads;
  layer.head = head, layer.turning = turning, layer.scale = scale, layer.softcap = softcap;
  layer.type = static_cast<Type>(type);
  layer.parallel = parallel, layer.interleaved = interleaved;
  layer.rowwise = parco::rowwise::operations_of(isa);
  layer.before = before, layer.between = between, layer.after = after, layer.of_heads = of_heads;
  return layer;
}

// Whether every dictionary still holds, under its key, the very value. A layer of many experts has thousands of them.
bool unchanged(const nb::tuple& owners, const nb::tuple& keys, const nb::tuple& values) {
  const Py_ssize_t count = PyTuple_Size(owners.ptr());
  if (PyTuple_Size(keys.ptr()) != count || PyTuple_Size(values.ptr()) != count)
    throw std::invalid_argument("unchanged: every dictionary needs its key and its value");
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject* const found = PyDict_GetItemWithError(PyTuple_GetItem(owners.ptr(), i), PyTuple_GetItem(keys.ptr(), i));
    if (!found && PyErr_Occurred()) throw nb::python_error();
    if ((found ? found : Py_None) != PyTuple_GetItem(values.ptr(), i)) return false;
  }
  return true;
}

using Numbers = std::vector<std::int64_t>;

void run_layers(const std::vector<const Layer*>& layers, std::uintptr_t x, std::uintptr_t cos, std::uintptr_t sin,
                std::uintptr_t y, const std::vector<std::uintptr_t>& keys, const std::vector<std::uintptr_t>& values,
                const Numbers& known, const Numbers& key_stride, const Numbers& value_stride, int threads) {
  const std::size_t count = layers.size();
  if (keys.size() != count || values.size() != count || known.size() != count || key_stride.size() != count ||
      value_stride.size() != count)
    throw std::invalid_argument("run_layers: every layer needs its keys, values and strides");
  nb::gil_scoped_release released;
  for (std::size_t i = 0; i < count; i++) {
    run(*layers[i],
        {address<const void>(x), address<const void>(cos), address<const void>(sin), address<void>(y),
         address<void>(keys[i]), address<void>(values[i]), known[i], key_stride[i], value_stride[i], threads});
    x = y;
    y += static_cast<std::uintptr_t>(layers[i]->columns * parco::linear::size_of(layers[i]->type));
  }
}

}  // namespace

void bind_decode(nb::module_& module) {
  nb::class_<Scaling>(module, "Scaling", "A norm's weight, bias and numbers; csrc/decode/layer.h.")
      .def(nb::new_(&scaling), nb::arg("weight"), nb::arg("bias"), nb::arg("epsilon"), nb::arg("offset"),
           nb::arg("rounded"), nb::arg("centered"));
  nb::class_<Layer>(module, "DecoderLayer", "A decoder's layer for one token; csrc/decode/layer.h.")
      .def(nb::new_(&make), nb::kw_only(), nb::arg("isa"), nb::arg("columns"), nb::arg("heads"), nb::arg("key_heads"),
           nb::arg("head"), nb::arg("turning"), nb::arg("scale"), nb::arg("softcap"), nb::arg("type"),
           nb::arg("parallel"), nb::arg("interleaved"), nb::arg("before"), nb::arg("between"), nb::arg("after"),
           nb::arg("of_heads"), nb::arg("block").none(), nb::arg("mixture").none())
      .def(
          "multiply",
          [](Layer& layer, int place, const Chain& chain) {
            std::vector<Chain>* const all[] = {&layer.qkv, &layer.out};
            all[place]->push_back(chain);
          },
          nb::arg("place"), nb::arg("chain"), "Adds a product: 0 q, k, v, 1 out.");
  module.def("unchanged", &unchanged, nb::arg("owners"), nb::arg("keys"), nb::arg("values"),
             nb::sig("def unchanged(owners: tuple[dict[str, object], ...], keys: tuple[str, ...], values: "
                     "tuple[object, ...]) -> bool"),
             "Whether owner.get(key) is value for all of them.");
  module.def("run_layers", &run_layers, nb::arg("layers"), nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("y"),
             nb::arg("keys"), nb::arg("values"), nb::arg("known"), nb::arg("key_stride"), nb::arg("value_stride"),
             nb::arg("threads"),
             "One token through layers, each of the result before it, into y [layers, columns]; their keys and values "
             "have room for one behind the known ones.");
}
