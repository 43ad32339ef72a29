#include "linear/int_bytes_avx512.h"

namespace parco::linear {

void int_avx512(const CodedCall& call) {
  call.int8&& call.rows > Avx512::decode_words ? run_bytes(call) : run<Avx512>(call);
}

void int_both_avx512(const CodedCall& call) { run_bytes(call); }

}  // namespace parco::linear
