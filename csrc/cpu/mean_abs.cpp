// mean_abs for CPU tensors: one read of x.

#include "../arguments.h"
#include "vectorized.h"
#include "work.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>

namespace qkernels {
namespace {

template <class X>
QK_VECTORIZED double abs_row(const X* x, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kLaneBlock) {
    const int64_t end = begin + kLaneBlock < n ? begin + kLaneBlock : n;
    float lane = 0;
#pragma omp simd reduction(+ : lane)
    for (int64_t i = begin; i < end; ++i) lane += __builtin_fabsf(load(x[i]));
    total += lane;
  }
  return total;
}

template <class X>
QK_VECTORIZED void abs_columns(const X* x, int64_t n, double* sums) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sums[i] += __builtin_fabsf(load(x[i]));
}

template <class X>
Partials abs_sums(const Tensor& t, const Walk& walk) {
  const X* x = static_cast<const X*>(t.data_ptr());
  const std::vector<Block> blocks = cut({walk});
  Partials sums(walk, static_cast<int64_t>(blocks.size()));
  run_blocks(blocks, [&](int64_t i) {
    for (int64_t unit = blocks[i].first_unit; unit < blocks[i].last_unit; ++unit) {
      if (walk.by_rows)
        sums.unit(unit) = abs_row(x + walk.begin(unit), walk.length(unit));
      else
        abs_columns(x + walk.begin(unit), walk.length(unit), sums.block(i));
    }
  });
  return sums;
}

Tensor mean_abs(Tensor x, std::optional<int64_t> axis) {
  check_x({"mean_abs"}, x, axis);
  x = dense(x);
  const Walk walk(extents(x, axis));
  const int64_t count = walk.e.outer * walk.e.inner;
  Tensor out = axis ? empty_vector(walk.e.channels, ScalarType::Float, x)
                    : empty_strided({}, {}, ScalarType::Float, x);
  const Partials sums = with_type(x.scalar_type(), [&]<class X>(Type<X>) { return abs_sums<X>(x, walk); });
  sums.fold(1.0 / static_cast<double>(count > 0 ? count : 1), static_cast<float*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("mean_abs", TORCH_BOX(&qkernels::mean_abs));
}
