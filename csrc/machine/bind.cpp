#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "machine/features.h"
#include "machine/probe.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

bool usable(parco::Isa isa) {
  const parco::Features& f = parco::features();
  switch (isa) {
    case parco::Isa::generic:
      return true;
    case parco::Isa::avx2:
      return f.avx2;
    case parco::Isa::avx512:
      return f.avx512;
    case parco::Isa::avx512_vbmi:
      return f.avx512_vbmi;
    case parco::Isa::amx:
      return f.amx;
  }
  return false;
}

parco::Isa parse_isa(const std::string& name) {
  const char* const names[] = {"generic", "avx2", "avx512", "avx512_vbmi", "amx"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i] && usable(static_cast<parco::Isa>(i))) return static_cast<parco::Isa>(i);
  throw nb::value_error(("isa must be an instruction set that this machine can run, not '" + name + "'").c_str());
}

parco::Element parse_element(const std::string& name) {
  const char* const names[] = {"fp32", "bf16", "int16", "int8"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return static_cast<parco::Element>(i);
  throw nb::value_error(("element must be fp32, bf16, int16 or int8, not '" + name + "'").c_str());
}

void check_counts(int threads, int repeats) {
  if (threads < 1) throw nb::value_error("threads must be at least 1");
  if (repeats < 1) throw nb::value_error("repeats must be at least 1");
}

double multiply_adds(const std::string& isa_name, const std::string& element_name, int threads, double seconds,
                     int repeats) {
  check_counts(threads, repeats);
  const parco::Isa isa = parse_isa(isa_name);
  const parco::Element element = parse_element(element_name);
  nb::gil_scoped_release release;
  return parco::multiply_adds_per_second(isa, element, threads, seconds, repeats);
}

double read_bytes(const std::string& isa_name, std::size_t bytes, int threads, int repeats) {
  check_counts(threads, repeats);
  const parco::Isa isa = parse_isa(isa_name);
  nb::gil_scoped_release release;
  return parco::read_bytes_per_second(isa, (bytes + 4095) / 4096 * 4096, threads, repeats);
}

void read_once(const std::string& isa_name, std::uintptr_t address, std::size_t bytes, int threads) {
  check_counts(threads, 1);
  if (address % 64) throw nb::value_error("address must be a multiple of 64");
  const parco::Isa isa = parse_isa(isa_name);
  nb::gil_scoped_release release;
  parco::read_once(isa, reinterpret_cast<const std::uint8_t*>(address), bytes / 4096 * 4096, threads);
}

double copy_bytes(std::size_t bytes, int threads, int repeats) {
  check_counts(threads, repeats);
  nb::gil_scoped_release release;
  return parco::copy_bytes_per_second((bytes + 4095) / 4096 * 4096, threads, repeats);
}

// glibc keeps what is freed between blocks in use until it is asked.
void release_memory() {
#ifdef __GLIBC__
  nb::gil_scoped_release release;
  malloc_trim(0);
#endif
}

}  // namespace

void bind_machine(nb::module_& module) {
  using parco::Features;
  nb::class_<Features>(module, "Features", "What CPUID, XGETBV and arch_prctl say of this CPU; caches in bytes.")
      .def_ro("avx2", &Features::avx2)
      .def_ro("avx512", &Features::avx512)
      .def_ro("avx512_vbmi", &Features::avx512_vbmi)
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
  module.def("machine_features", &parco::features, nb::rv_policy::reference,
             "The features of this machine, detected once.");
  module.def("machine_release_memory", &release_memory, "Gives memory that was freed back to the system.");
  module.def("machine_multiply_adds_per_second", &multiply_adds, "isa"_a, "element"_a, "threads"_a, "seconds"_a,
             "repeats"_a,
             "Multiply-adds per second on operands in L1: the median of `repeats` runs of `seconds` each.");
  module.def(
      "machine_read_bytes_per_second", &read_bytes, "isa"_a, "bytes"_a, "threads"_a, "repeats"_a,
      "Bytes read per second from a buffer of `bytes`, rounded up to whole pages: the median of `repeats` passes.");
  module.def("machine_read_once", &read_once, "isa"_a, "address"_a, "bytes"_a, "threads"_a,
             "Reads memory that is there, its whole pages, once: for benchmarks to time beside what does more.");
  module.def(
      "machine_copy_bytes_per_second", &copy_bytes, "bytes"_a, "threads"_a, "repeats"_a,
      "Bytes copied per second (each read and written) between buffers of `bytes`: the median of `repeats` passes.");
}
