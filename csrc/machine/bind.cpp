#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "machine/features.h"

namespace nb = nanobind;
using namespace nb::literals;

void bind_machine(nb::module_& module) {
    using parco::Features;
    nb::class_<Features>(module, "Features", "What CPUID, XGETBV and arch_prctl say of this CPU; caches in bytes.")
        .def_ro("avx2", &Features::avx2)
        .def_ro("avx512", &Features::avx512)
        .def_ro("amx", &Features::amx)
        .def_ro("avx_vnni", &Features::avx_vnni)
        .def_ro("avx512_vnni", &Features::avx512_vnni)
        .def_ro("avx512_bf16", &Features::avx512_bf16)
        .def_ro("avx512_fp16", &Features::avx512_fp16)
        .def_ro("amx_int8", &Features::amx_int8)
        .def_ro("amx_bf16", &Features::amx_bf16)
        .def_ro("model", &Features::model)
        .def_ro("l1d", &Features::l1d)
        .def_ro("l2", &Features::l2)
        .def_ro("l3", &Features::l3);
    module.def("machine_features", &parco::features, nb::rv_policy::reference, "The features of this machine, detected once.");
}
