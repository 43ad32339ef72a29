#include "sparse/sparse.h"

namespace parco::sparse {

std::int64_t first_misplaced(const SparseCall& call) {
  const std::int64_t each = call.kept / call.block;
  for (std::int64_t band = 0; band < call.bands(); band++) {
    std::int64_t before = -1;
    for (std::int64_t j = 0; j < each; j++) {
      const std::int64_t column = call.block_column(band, j);
      if (column <= before || column >= call.across()) return band * each + j;
      before = column;
    }
  }
  return -1;
}

}  // namespace parco::sparse
