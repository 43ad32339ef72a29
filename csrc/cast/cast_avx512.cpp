#include "cast/cast_engine.h"

namespace parco::cast {

void cast_avx512(const CastCall& call) { run_cast(call); }
void amax_avx512(const AmaxCall& call) { run_amax(call); }

}  // namespace parco::cast
