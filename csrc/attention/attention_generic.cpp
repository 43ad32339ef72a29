#include "attention/attention_engine.h"
#include "rowwise/vector_generic.h"

namespace parco::attention {

void attention_generic(const Forward& call) { attention<rowwise::V1>(call); }
void attention_grad_generic(const Backward& call) { attention_grad<rowwise::V1>(call); }

}  // namespace parco::attention
