#include "linear/int_avx512_vbmi.h"

#include "linear/int_bytes_avx512.h"

namespace parco::linear {

void int_avx512_vbmi(const CodedCall& call) {
  call.int8&& call.rows > Bytes512::decode_words ? run_bytes<Bytes512>(call) : run<Bytes512>(call);
}

void int_both_avx512_vbmi(const CodedCall& call) { run_bytes<Bytes512>(call); }

}  // namespace parco::linear
