#include "attention/attention_engine.h"
#include "rowwise/vector_avx2.h"

namespace parco::attention {

using rowwise::V256;

void attention_avx2(const Forward& call) { attention<V256>(call); }
void attention_grad_avx2(const Backward& call) { attention_grad<V256>(call); }

}  // namespace parco::attention
