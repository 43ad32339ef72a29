#include "rowwise/attention_engine.h"
#include "rowwise/dropout_engine.h"
#include "rowwise/gradient_engine.h"
#include "rowwise/loss_engine.h"
#include "rowwise/rowwise_engine.h"
#include "rowwise/vector_generic.h"

namespace parco::rowwise {

void norm_generic(const Norm& call) { norm<V1>(call); }
void gate_generic(const Gate& call) { gate<V1>(call); }
void norm_grad_generic(const NormGrad& call) { norm_grad<V1>(call); }
void gate_grad_generic(const GateGrad& call) { gate_grad<V1>(call); }
void cross_entropy_generic(const CrossEntropy& call) { cross_entropy<V1>(call); }
void dropout_generic(const Dropout& call) { dropout<V1>(call); }
void rotate_generic(const Rotation& call) { rotate<V1>(call); }
void attend_generic(const Attention& call) { attend<V1>(call); }
void add_generic(const Sum& call) { add<V1>(call); }
void mix_generic(const Mix& call) { mix<V1>(call); }

}  // namespace parco::rowwise
