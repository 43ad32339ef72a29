#include "cast/cast_engine.h"

namespace parco::cast {

void cast_generic(const CastCall& call) { run_cast(call); }
void amax_generic(const AmaxCall& call) { run_amax(call, group_amax); }
void greatest_generic(const AmaxCall& call) { run_greatest(call, group_amax); }

}  // namespace parco::cast
