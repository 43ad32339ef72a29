// Several products in one call: y = the sum of terms, each x times the transposes of its factors, the last one first,
// + bias. One term of one factor is a product as it is; one of two, a matrix of low rank; a sum of both, a matrix and
// its correction.
//
// What stands between two factors is rounded to the type of x, as it is where each product is an operation of its own.
// Terms are added in fp32, the last one first, and rounded once.
#pragma once
#include <string>
#include <vector>

#include "linear/coded.h"
#include "linear/dense.h"

namespace parco::linear {

// One matrix and the kernel that multiplies by it.
struct Product {
  CodedCall coded;
  DenseCall dense;
  void (*run_coded)(const CodedCall&);
  void (*run_dense)(const DenseCall&);
  std::int64_t outputs, columns;
};

struct Chain {
  std::vector<std::vector<Product>> terms;  // the bias is that of the first factor of the first
  Type type;                                // of x and y

  std::int64_t outputs() const { return terms[0][0].outputs; }
  std::int64_t columns() const { return terms[0].back().columns; }
};

// x [rows, columns] to y [rows, outputs]. Throws std::bad_alloc.
void run(const Chain& chain, const void* x, void* y, std::int64_t rows, int threads);

// The kernel of that name in parco.kernels.linear's tables, in `product`. False where there is none.
bool choose(const std::string& name, Product& product);

}  // namespace parco::linear
