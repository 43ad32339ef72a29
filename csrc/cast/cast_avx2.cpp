#include "cast/cast_engine.h"

namespace parco::cast {

void cast_avx2(const CastCall& call) { run_cast(call); }
void amax_avx2(const AmaxCall& call) { run_amax(call, group_amax); }
void greatest_avx2(const AmaxCall& call) { run_greatest(call, group_amax); }

}  // namespace parco::cast
