#include "linear/dense_engine.h"
#include "linear/dense_tiles.h"
#include "linear/float_vector_avx2.h"

namespace parco::linear {

void dense_avx2(const DenseCall& call) {
  call.rows > streamed_rows ? run_dense_tiles<Float256>(call) : run_dense<Float256>(call);
}

}  // namespace parco::linear
