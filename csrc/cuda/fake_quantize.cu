// qkernels::fake_quantize on CUDA devices. Its definition is qkernels/ops/reference.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "quantize_columns.cuh"
#include "quantize_rows.cuh"

namespace qkernels::cuda {
namespace {

Tensor fake_quantize(
    const Tensor& any_x,
    const Tensor& any_scale,
    const std::optional<Tensor>& any_offset,
    int64_t qmin,
    int64_t qmax,
    std::optional<int64_t> axis,
    double /* grad_factor */,
    bool /* aten_edge */,
    ScalarType out_dtype) {
  const Op op{"fake_quantize"};
  check_quantizer(op, any_x, any_scale, any_offset, qmin, qmax, axis);
  check_element(op, "out_dtype", out_dtype);
  const Context context(any_x);
  const Tensor x = dense(any_x);
  const ScaleAndOffset per_channel(any_scale, any_offset);
  Tensor y = empty_as(x, out_dtype);
  if (x.numel() == 0) return y;

  const Extents e = extents(x, axis);
  Arguments a = per_channel.arguments(qmin, qmax);
  a.x = x.data_ptr();
  a.out = y.data_ptr();
  a.aligned = is_aligned({a.x, a.out});
  with_type(x.scalar_type(), [&]<typename X>(Type<X>) {
    with_type(out_dtype, [&]<typename Y>(Type<Y>) {
      constexpr int N = kWidth<X, Y>;
      if (prefer_columns(e)) {
        const Matrix m{a, cut_into_columns<N, kForwardVectors>(e, context.resident_threads)};
        context.launch("fake_quantize by columns", forward_columns<X, Y>, blocks_of<N>(m.columns), m);
      } else {
        const Layer layer{a, cut_into_rows<N, kForwardVectors>(e, filling_units(e, context.resident_threads))};
        context.launch("fake_quantize by rows", forward_rows<X, Y, 1>, layer.rows.blocks(), Layers<1>{{layer}});
      }
    });
  });
  return y;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize", TORCH_BOX(&qkernels::cuda::fake_quantize));
}
