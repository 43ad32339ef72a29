#include "attention/attention_engine.h"
#include "cast/avx512_codes.h"
#include "rowwise/vector_avx512.h"

namespace parco::attention {
namespace {

struct V512 : rowwise::V512 {
  struct Random : cast::avx512::Random {
    using cast::avx512::Random::Random;
    void draw(std::int64_t key, std::uint32_t* to) const {
      cast::avx512::Random::draw(key, reinterpret_cast<__m512i*>(to));
    }
  };
};

}  // namespace

void attention_avx512(const Forward& call) { attention<V512>(call); }
void attention_grad_avx512(const Backward& call) { attention_grad<V512>(call); }

}  // namespace parco::attention
