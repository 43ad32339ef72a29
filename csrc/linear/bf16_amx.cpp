#include "linear/bf16_dense.h"
#include "linear/bf16_panels.h"
#include "linear/float.h"
#include "linear/tiles_amx.h"

namespace parco::linear {

void dense_amx(const DenseCall& call) { run_bf16_dense<Processor>(call); }
void float_amx(const CodedCall& call) { run_bf16_codes<Processor>(call); }

}  // namespace parco::linear
