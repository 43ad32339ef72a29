#include "attention/attention_engine.h"
#include "rowwise/vector_generic.h"

namespace parco::attention {

using rowwise::V1;

void attention_generic(const Forward& call) { attention<V1>(call); }
void attention_grad_generic(const Backward& call) { attention_grad<V1>(call); }

}  // namespace parco::attention
