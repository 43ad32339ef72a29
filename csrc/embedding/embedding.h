// Rows of a stored matrix, expanded to floats.
#pragma once
#include "linear/coded.h"

namespace parco::embedding {

// Row indices[m] of `matrix` goes to matrix.y, for matrix.rows of them; matrix.outputs is how many there are to choose
// from. Returns the position of the first index outside, or -1: then y is whole.
std::int64_t embedding_generic(const linear::CodedCall& matrix, const std::int64_t* indices);

}  // namespace parco::embedding
