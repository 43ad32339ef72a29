#include "linear/int_tiles.h"
#include "linear/tiles_amx.h"

namespace parco::linear {

void int_amx(const CodedCall& call) { run_tiles<Processor>(call); }

}  // namespace parco::linear
