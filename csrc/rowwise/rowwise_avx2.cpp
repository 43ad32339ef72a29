#include "rowwise/attention_engine.h"
#include "rowwise/dropout_engine.h"
#include "rowwise/gradient_engine.h"
#include "rowwise/loss_engine.h"
#include "rowwise/rowwise_engine.h"
#include "rowwise/vector_avx2.h"

namespace parco::rowwise {

void norm_avx2(const Norm& call) { norm<V256>(call); }
void gate_avx2(const Gate& call) { gate<V256>(call); }
void norm_grad_avx2(const NormGrad& call) { norm_grad<V256>(call); }
void gate_grad_avx2(const GateGrad& call) { gate_grad<V256>(call); }
void cross_entropy_avx2(const CrossEntropy& call) { cross_entropy<V256>(call); }
void dropout_avx2(const Dropout& call) { dropout<V256>(call); }
void rotate_avx2(const Rotation& call) { rotate<V256>(call); }
void attend_avx2(const Attention& call) { attend<V256>(call); }
void add_avx2(const Sum& call) { add<V256>(call); }
void mix_avx2(const Mix& call) { mix<V256>(call); }

}  // namespace parco::rowwise
