#include "linear/int_tiles.h"
#include "linear/tiles_emulated.h"

namespace parco::linear {

void int_amx_emulated(const CodedCall& call) { run_tiles<Emulation>(call); }

}  // namespace parco::linear
