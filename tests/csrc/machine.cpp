// What the machine reports is consistent, and every probe that it can run stays inside its buffers; built with
// sanitizers.
#include <cstdio>

#include "machine/features.h"
#include "machine/probe.h"

using namespace parco;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "not so: %s\n", what);
  failures++;
}

}  // namespace

int main() {
  const Features& f = features();
  expect(!f.model.empty() && f.model.front() != ' ' && f.model.back() != ' ', "the model is named, without blanks");
  expect(f.l1d > 0 && f.l2 >= f.l1d, "caches are sized");
  expect(!f.avx512 || f.avx2, "avx512 contains avx2");
  expect(!f.avx512_vbmi || (f.avx512 && f.avx512_vnni), "avx512_vbmi contains avx512 and VNNI");
  expect(!f.amx || (f.avx512_vbmi && f.avx512_bf16 && f.amx_int8 && f.amx_bf16), "amx contains avx512_vbmi and BF16");
  expect(amx_ready() == f.amx, "tiles are ready exactly where amx is reported");
  expect(&features() == &f, "detected once");

  const bool usable[] = {true, f.avx2, f.avx512, f.avx512_vbmi, f.amx};
  for (int isa = 0; isa < 5; isa++) {
    if (!usable[isa]) continue;
    for (int element = 0; element < 4; element++) {
      const double rate =
          multiply_adds_per_second(static_cast<Isa>(isa), static_cast<Element>(element), 2, /*seconds=*/1e-4, 3);
      expect(rate > 0, "a product's rate is positive");
    }
    expect(read_bytes_per_second(static_cast<Isa>(isa), 5 * 4096, 2, 3) > 0,
           "reading pages that threads share unevenly");
    expect(read_bytes_per_second(static_cast<Isa>(isa), 4096, 3, 3) > 0, "fewer pages than threads");
  }
  expect(copy_bytes_per_second(5 * 4096, 2, 3) > 0, "copying");
  return failures != 0;
}
