#include "machine/features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace parco {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves zeros where the leaf does not exist
  return r;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// The register states that the operating system saves (XCR0). Only valid where CPUID.1:ECX.OSXSAVE is set.
std::uint64_t saved_states() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

std::string brand() {
  char text[49] = {};
  if (cpuid(0x80000000u).eax < 0x80000004u) return "unknown x86-64";
  for (unsigned i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i);
    const unsigned words[4] = {r.eax, r.ebx, r.ecx, r.edx};
    std::memcpy(text + 16 * i, words, 16);
  }
  const std::string all(text);
  const auto first = all.find_first_not_of(' ');
  if (first == std::string::npos) return "unknown x86-64";
  return all.substr(first, all.find_last_not_of(' ') - first + 1);
}

// Deterministic cache parameters: leaf 4 on Intel, 0x8000001D in the same layout on AMD.
void read_caches(Features& f) {
  for (const unsigned leaf : {4u, 0x8000001Du}) {
    for (unsigned index = 0; index < 16; ++index) {
      const Registers r = cpuid(leaf, index);
      const unsigned type = r.eax & 31u, level = (r.eax >> 5) & 7u;
      if (type == 0) break;
      const std::int64_t ways = (r.ebx >> 22) + 1, partitions = ((r.ebx >> 12) & 1023u) + 1, line = (r.ebx & 4095u) + 1;
      const std::int64_t bytes = ways * partitions * line * (static_cast<std::int64_t>(r.ecx) + 1);
      if (level == 1 && type == 1) f.l1d = bytes;
      if (level == 2 && type != 2) f.l2 = bytes;
      if (level == 3 && type != 2) f.l3 = bytes;
    }
    if (f.l1d) return;
  }
}

bool request_tiles() {
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}

Features detect() {
  Features f;
  f.model = brand();
  read_caches(f);
  const Registers one = cpuid(1), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  if (!bit(one.ecx, 27)) return f;  // no OSXSAVE: no register beyond SSE is saved
  const std::uint64_t states = saved_states();
  const bool ymm = (states & 0x6) == 0x6, zmm = ymm && (states & 0xE0) == 0xE0, tiles = (states & 0x60000) == 0x60000;

  f.avx2 = ymm && bit(seven.ebx, 5) && bit(seven.ebx, 8) && bit(one.ecx, 12) && bit(one.ecx, 29);
  f.avx_vnni = f.avx2 && bit(seven_one.eax, 4);
  f.avx512 = zmm && f.avx2 && bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);
  f.avx512_vnni = f.avx512 && bit(seven.ecx, 11);
  f.avx512_vbmi = f.avx512_vnni && bit(seven.ecx, 1) && bit(seven.ecx, 6);
  f.avx512_bf16 = f.avx512 && bit(seven_one.eax, 5);
  f.avx512_fp16 = f.avx512 && bit(seven.edx, 23);
  const bool tile = tiles && bit(seven.edx, 24);
  f.amx_int8 = tile && bit(seven.edx, 25);
  f.amx_bf16 = tile && bit(seven.edx, 22);
  // *amx.cpp is compiled with AVX-512 BF16 too, and every CPU with AMX has it.
  f.amx = f.avx512_vbmi && f.avx512_bf16 && f.amx_int8 && f.amx_bf16 && request_tiles();
  return f;
}

}  // namespace

const Features& features() {
  static const Features found = detect();
  return found;
}

bool amx_ready() { return features().amx; }

}  // namespace parco
