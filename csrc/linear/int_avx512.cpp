#include "linear/int_avx512.h"

namespace parco::linear {

void int_avx512(const CodedCall& call) { run<Avx512>(call); }

}  // namespace parco::linear
