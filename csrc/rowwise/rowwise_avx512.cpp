#include "rowwise/attention_engine.h"
#include "rowwise/dropout_engine.h"
#include "rowwise/gradient_engine.h"
#include "rowwise/loss_engine.h"
#include "rowwise/rowwise_engine.h"
#include "rowwise/vector_avx512.h"

namespace parco::rowwise {

void norm_avx512(const Norm& call) { norm<V512>(call); }
void gate_avx512(const Gate& call) { gate<V512>(call); }
void norm_grad_avx512(const NormGrad& call) { norm_grad<V512>(call); }
void gate_grad_avx512(const GateGrad& call) { gate_grad<V512>(call); }
void cross_entropy_avx512(const CrossEntropy& call) { cross_entropy<V512>(call); }
void dropout_avx512(const Dropout& call) { dropout<V512>(call); }
void rotate_avx512(const Rotation& call) { rotate<V512>(call); }
void attend_avx512(const Attention& call) { attend<V512>(call); }
void add_avx512(const Sum& call) { add<V512>(call); }
void mix_avx512(const Mix& call) { mix<V512>(call); }

}  // namespace parco::rowwise
