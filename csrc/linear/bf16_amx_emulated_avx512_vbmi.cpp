#include "linear/bf16_dense.h"
#include "linear/bf16_panels.h"
#include "linear/float.h"
#include "linear/tiles_emulated.h"

namespace parco::linear {

void dense_amx_emulated(const DenseCall& call) { run_bf16_dense<Emulation>(call); }
void float_amx_emulated(const CodedCall& call) { run_bf16_codes<Emulation>(call); }

}  // namespace parco::linear
