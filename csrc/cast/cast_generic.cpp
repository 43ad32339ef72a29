#include "cast/tile_engine.h"

namespace parco::cast {

void cast_generic(const CastCall& call) { run_cast(call); }
void tiles_generic(const TilesCall& call) {
  run_tiles(
      call, [](const CastCall& part, auto rounding) { cast_rows<decltype(rounding)::value>(part, 0, part.rows); },
      turn_tile);
}
void amax_generic(const AmaxCall& call) { run_amax(call, group_amax); }
void greatest_generic(const AmaxCall& call) { run_greatest(call, group_amax); }

}  // namespace parco::cast
