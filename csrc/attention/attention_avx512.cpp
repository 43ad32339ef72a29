#include "attention/attention_engine.h"
#include "rowwise/vector_avx512.h"

namespace parco::attention {

using rowwise::V512;

void attention_avx512(const Forward& call) { attention<V512>(call); }
void attention_grad_avx512(const Backward& call) { attention_grad<V512>(call); }

}  // namespace parco::attention
