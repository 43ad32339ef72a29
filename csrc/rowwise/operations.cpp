#include "rowwise/operations.h"

#include <stdexcept>

namespace parco::rowwise {

Operations operations_of(const std::string& isa) {
  if (isa == "generic") return {norm_generic, gate_generic, rotate_generic, attend_generic, add_generic, mix_generic};
  if (isa == "avx2") return {norm_avx2, gate_avx2, rotate_avx2, attend_avx2, add_avx2, mix_avx2};
  if (isa == "avx512" || isa == "avx512_vbmi" || isa == "amx")
    return {norm_avx512, gate_avx512, rotate_avx512, attend_avx512, add_avx512, mix_avx512};
  throw std::invalid_argument("isa: '" + isa + "' is no instruction set that these operations are compiled for");
}

}  // namespace parco::rowwise
