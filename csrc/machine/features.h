// What this CPU can run, with the operating system's consent.
#pragma once

#include <cstdint>
#include <string>

namespace parco {

// Levels as in parco.machine: each is true only where CPUID reports the instructions and XGETBV says that the operating
// system saves their registers.
struct Features {
  bool avx2 = false;         // AVX2, FMA, F16C and BMI2
  bool avx512 = false;       // F, BW, VL and DQ
  bool avx512_vbmi = false;  // avx512, VBMI, VBMI2 and VNNI
  bool amx = false;          // avx512_vbmi, AMX-TILE, AMX-INT8, AMX-BF16 and the permission to use tiles
  bool avx_vnni = false;     // 256-bit vpdpbusd without AVX-512
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool amx_int8 = false;  // reported by CPUID and XGETBV; usable when amx is true
  bool amx_bf16 = false;
  std::string model;     // brand string, trimmed
  std::int64_t l1d = 0;  // bytes, as CPUID reports them for one instance of the cache; 0 where it does not
  std::int64_t l2 = 0;
  std::int64_t l3 = 0;
};

// Detected once.
const Features& features();

// Whether tiles may be used in this process: asks Linux for the permission (arch_prctl) the first time.
bool amx_ready();

}  // namespace parco
