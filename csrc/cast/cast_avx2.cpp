#include "cast/tile_engine.h"

namespace parco::cast {

void cast_avx2(const CastCall& call) { run_cast(call); }
void tiles_avx2(const TilesCall& call) {
  run_tiles(
      call, [](const CastCall& part, auto rounding) { cast_rows<decltype(rounding)::value>(part, 0, part.rows); },
      turn_tile);
}
void amax_avx2(const AmaxCall& call) { run_amax(call, group_amax); }
void greatest_avx2(const AmaxCall& call) { run_greatest(call, group_amax); }

}  // namespace parco::cast
