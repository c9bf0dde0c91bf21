// Sizes that are computed from an op's numbers, which may be anything: a sum or a product that 64 bits do not hold is an
// error. What is computed from the elements of a tensor that is there (its blocks, its bytes) needs no such care: memory
// bounds it.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>

namespace qkernels {

inline int64_t checked_sum(std::initializer_list<int64_t> terms) {
  int64_t sum = 0;
  for (int64_t term : terms)
    STD_TORCH_CHECK(
        !__builtin_add_overflow(sum, term, &sum), "qkernels: a size does not fit 64 bits, with a term of ", term);
  return sum;
}

inline int64_t checked_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors)
    STD_TORCH_CHECK(
        !__builtin_mul_overflow(product, factor, &product), "qkernels: a size does not fit 64 bits, with a factor of ",
        factor);
  return product;
}

}  // namespace qkernels
