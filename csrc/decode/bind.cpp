// DecoderLayer of parco._C: one token through a decoder's layer. Tensors come in as addresses; parco.nn.decode keeps
// them alive and right.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "decode/layer.h"
#include "linear/coded_bind.h"

namespace nb = nanobind;
using namespace parco::decode;
using parco::linear::address;

namespace {

Scaling scaling(std::uintptr_t weight, float epsilon, float offset, bool rounded) {
  return {address<const void>(weight), epsilon, offset, rounded};
}

Layer make(const std::string& isa, std::int64_t columns, std::int64_t heads, std::int64_t key_heads, std::int64_t head,
           std::int64_t turning, std::int64_t inner, float scale, int type, int activation, const Scaling& before,
           const Scaling& between, const std::vector<Scaling>& of_heads) {
  Layer layer{};
  layer.columns = columns, layer.heads = heads, layer.key_heads = key_heads;
  layer.head = head, layer.turning = turning, layer.inner = inner, layer.scale = scale;
  layer.type = static_cast<Type>(type);
  layer.activation = static_cast<parco::rowwise::Activation>(activation);
  layer.rowwise = rowwise_of(isa);
  layer.before = before, layer.between = between, layer.of_heads = of_heads;
  return layer;
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
  nb::class_<Scaling>(module, "Scaling", "An RMS norm's weight and numbers; csrc/decode/layer.h.")
      .def(nb::new_(&scaling), nb::arg("weight"), nb::arg("epsilon"), nb::arg("offset"), nb::arg("rounded"));
  nb::class_<Layer>(module, "DecoderLayer", "A decoder's layer for one token; csrc/decode/layer.h.")
      .def(nb::new_(&make), nb::kw_only(), nb::arg("isa"), nb::arg("columns"), nb::arg("heads"), nb::arg("key_heads"),
           nb::arg("head"), nb::arg("turning"), nb::arg("inner"), nb::arg("scale"), nb::arg("type"),
           nb::arg("activation"), nb::arg("before"), nb::arg("between"), nb::arg("of_heads"))
      .def(
          "multiply",
          [](Layer& layer, int place, const parco::linear::Chain& chain) {
            std::vector<parco::linear::Chain>* const all[] = {&layer.qkv, &layer.out, &layer.gate_up, &layer.down};
            all[place]->push_back(chain);
          },
          nb::arg("place"), nb::arg("chain"), "Adds a product: 0 q, k, v, 1 out, 2 gate, up, 3 down.");
  module.def("run_layers", &run_layers, nb::arg("layers"), nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("y"),
             nb::arg("keys"), nb::arg("values"), nb::arg("known"), nb::arg("key_stride"), nb::arg("value_stride"),
             nb::arg("threads"),
             "One token through layers, each of the result before it, into y [layers, columns]; their keys and values "
             "have room for one behind the known ones.");
}
