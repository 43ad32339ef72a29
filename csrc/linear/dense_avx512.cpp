#include "linear/dense_engine.h"
#include "linear/dense_tiles.h"
#include "linear/float_vector_avx512.h"

namespace parco::linear {

void dense_avx512(const DenseCall& call) {
  call.rows > streamed_rows ? run_dense_tiles<Float512>(call) : run_dense<Float512>(call);
}

}  // namespace parco::linear
