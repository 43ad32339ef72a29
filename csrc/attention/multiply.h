// Products of fp32 in tiles of sums in registers: one operand's numbers are broadcast, the other's rows are vectors.
// Included by attention_engine.h; everything is unnamed (see linear/floats.h).
#pragma once
#include <cstdint>

namespace parco::attention {
namespace {

// C [rows, vectors] = A B, or more by that: A(r, i) = a[r * a_row + i * a_step], B(i, ·) = b + i * b_step.
struct Product {
  const float* a;
  std::int64_t a_row, a_step;
  const float* b;
  std::int64_t b_step;
  float* c;
  std::int64_t c_row, steps;
  bool adds;
};

// A function of its own, or GCC keeps the sums in memory.
template <class V, int rows, int vectors>
[[gnu::noinline]] void multiply_tile(const Product& p) {
  using F = typename V::F;
  F sum[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) sum[r][v] = p.adds ? V::load(p.c + r * p.c_row + v * V::lanes) : V::set(0.0f);
  const float *a = p.a, *b = p.b;
  for (std::int64_t i = 0; i < p.steps; i++, a += p.a_step, b += p.b_step) {
    F of_b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) of_b[v] = V::load(b + v * V::lanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      const F of_a = V::set(a[r * p.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; v++) sum[r][v] = V::fma(of_a, of_b[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) V::store(p.c + r * p.c_row + v * V::lanes, sum[r][v]);
}

constexpr int rows_at_once = 6;

template <class V, int vectors>
void multiply_columns(Product p, std::int64_t rows) {
  for (; rows >= rows_at_once; rows -= rows_at_once, p.a += rows_at_once * p.a_row, p.c += rows_at_once * p.c_row)
    multiply_tile<V, rows_at_once, vectors>(p);
  if (rows == 5) multiply_tile<V, 5, vectors>(p);
  if (rows == 4) multiply_tile<V, 4, vectors>(p);
  if (rows == 3) multiply_tile<V, 3, vectors>(p);
  if (rows == 2) multiply_tile<V, 2, vectors>(p);
  if (rows == 1) multiply_tile<V, 1, vectors>(p);
}

// `rows` by `columns`, whole vectors.
template <class V>
void multiply(Product p, std::int64_t rows, std::int64_t columns) {
  constexpr int wide = V::lanes == 8 ? 2 : 4;  // AVX2 has half of the registers
  for (; columns >= wide * V::lanes; columns -= wide * V::lanes, p.b += wide * V::lanes, p.c += wide * V::lanes)
    multiply_columns<V, wide>(p, rows);
  if constexpr (wide > 2) {
    if (columns == 3 * V::lanes) multiply_columns<V, 3>(p, rows);
    if (columns == 2 * V::lanes) multiply_columns<V, 2>(p, rows);
  }
  if (columns == V::lanes) multiply_columns<V, 1>(p, rows);
}

}  // namespace
}  // namespace parco::attention
