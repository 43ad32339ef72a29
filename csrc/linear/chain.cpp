#include "linear/chain.h"

#include <algorithm>

#include "linear/float.h"
#include "linear/int.h"

namespace parco::linear {
namespace {

// Rows of x at a time, so that what stands between factors stays in a core's cache, and enough of them to repay reading
// the matrices again.
constexpr std::int64_t most_rows = 512, least_rows = 128, cached_bytes = 1 << 20;

// The call of a product, but for what a kernel of its kind alone knows.
template <class Call>
void multiply(void (*kernel)(const Call&), Call call, const void* x, void* y, Type y_type, std::int64_t rows,
              int threads, const void* addend) {
  call.x = x, call.y = y, call.y_type = y_type, call.rows = rows, call.threads = threads;
  call.after.addend = addend, call.after.addend_type = Type::fp32;
  kernel(call);
}

void multiply(const Product& product, const void* x, void* y, Type y_type, std::int64_t rows, int threads,
              const void* addend = nullptr) {
  product.run_coded ? multiply(product.run_coded, product.coded, x, y, y_type, rows, threads, addend)
                    : multiply(product.run_dense, product.dense, x, y, y_type, rows, threads, addend);
}

// Numbers between the factors of any term, for one row.
std::int64_t most_between(const Chain& chain) {
  std::int64_t most = 0;
  for (const auto& term : chain.terms)
    for (std::size_t i = 1; i < term.size(); i++) most = std::max(most, term[i].outputs);
  return most;
}

void run_slab(const Chain& chain, const char* x, char* y, std::int64_t rows, int threads, char* const* between,
              float* sums) {
  const float* addend = nullptr;
  for (std::size_t t = chain.terms.size(); t-- > 0;) {
    const std::vector<Product>& term = chain.terms[t];
    const void* from = x;
    for (std::size_t i = term.size(); i-- > 1;) {
      multiply(term[i], from, between[i % 2], chain.type, rows, threads);
      from = between[i % 2];
    }
    if (t == 0) return multiply(term[0], from, y, chain.type, rows, threads, addend);
    multiply(term[0], from, sums, Type::fp32, rows, threads, addend);
    addend = sums;
  }
}

}  // namespace

void run(const Chain& chain, const void* x, void* y, std::int64_t rows, int threads) {
  const std::int64_t size = size_of(chain.type), between_bytes = most_between(chain) * size;
  const bool sums = chain.terms.size() > 1;
  std::int64_t slab = rows;
  if (between_bytes || sums)
    slab = std::min(rows, std::clamp(cached_bytes / std::max<std::int64_t>(1, between_bytes), least_rows, most_rows));
  const std::size_t between_size = rounded(static_cast<std::size_t>(slab * between_bytes));
  const std::size_t sums_size = sums ? static_cast<std::size_t>(slab * chain.outputs()) * sizeof(float) : 0;
  char* memory = static_cast<char*>(scratch(2 * between_size + sums_size, Caller::chain));
  char* const between[] = {memory, memory + between_size};
  // Slabs of nearly one height: kernels for few rows add in another order than those for many.
  const std::int64_t slabs = (rows + slab - 1) / slab;
  for (std::int64_t i = 0; i < slabs; i++) {
    const std::int64_t first = rows * i / slabs, count = rows * (i + 1) / slabs - first;
    run_slab(chain, static_cast<const char*>(x) + first * chain.columns() * size,
             static_cast<char*>(y) + first * chain.outputs() * size, count, threads, between,
             reinterpret_cast<float*>(memory + 2 * between_size));
  }
}

bool choose(const std::string& name, Product& product) {
  static const struct {
    const char* name;
    void (*run)(const CodedCall&);
  } coded[] = {{"int-linear-generic", int_generic},
               {"int-linear-avx2", int_avx2},
               {"int-linear-avx512", int_avx512},
               {"int-linear-avx512_vbmi", int_avx512_vbmi},
               {"int-linear-amx", int_amx},
               {"int8-linear-generic", int_generic},
               {"int8-linear-avx2", int_avx2},
               {"int8-linear-avx512", int_avx512},
               {"int8-linear-avx512_vbmi", int_avx512_vbmi},
               {"int8-linear-amx", int_amx},
               {"float-linear-generic", float_generic},
               {"float-linear-avx2", float_avx2},
               {"float-linear-avx512", float_avx512},
               {"float-linear-avx512_vbmi", float_avx512_vbmi},
               {"float-linear-amx", float_amx}};
  static const struct {
    const char* name;
    void (*run)(const DenseCall&);
  } dense[] = {{"dense-linear-generic", dense_generic},
               {"dense-linear-avx2", dense_avx2},
               {"dense-linear-avx512", dense_avx512},
               {"dense-linear-amx", dense_amx}};
  for (const auto& each : coded)
    if (name == each.name) product.run_coded = each.run;
  for (const auto& each : dense)
    if (name == each.name) product.run_dense = each.run;
  return product.run_coded || product.run_dense;
}

}  // namespace parco::linear
