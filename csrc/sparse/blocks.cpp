#include "sparse/sparse.h"

namespace parco::sparse {

std::int64_t first_outside(const SparseCall& call) {
  const std::int64_t each = call.kept / call.block;
  for (std::int64_t band = 0; band < call.bands(); band++) {
    for (std::int64_t j = 0; j < each; j++) {
      const std::int64_t column = call.block_column(band, j);
      if (column < 0 || column >= call.across()) return band * each + j;
    }
  }
  return -1;
}

}  // namespace parco::sparse
