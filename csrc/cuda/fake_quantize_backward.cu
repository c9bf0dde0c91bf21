// qkernels::fake_quantize_backward on CUDA devices. Its definition is qkernels/ops/reference.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "backward_types.cuh"
#include "quantize_columns.cuh"
#include "quantize_rows.cuh"

namespace qkernels::cuda {
namespace {

// The gradients of scale (i = 0) and of offset (i = 1) that are wanted, and the partial sums that they are folded from.
class ParameterGradients {
 public:
  ParameterGradients(const Context& context, int64_t channels, double factor)
      : context_(context), channels_(channels), factor_(factor) {}

  Tensor want(int i, const Tensor& like) {
    Tensor result = empty_as(like, ScalarType::Float);
    results_[i] = static_cast<float*>(result.data_ptr());
    return result;
  }

  // Tells the kernel where to put its `count` sums a channel.
  void place(Arguments& a, int64_t count, const Tensor& x) {
    a.grad_factor = factor_;
    count_ = count;
    if (count_ > 1) partials_ = empty_vector(checked_product({kinds(), channels_, count_}), ScalarType::Float, x);
    float* next = count_ > 1 ? static_cast<float*>(partials_->data_ptr()) : nullptr;
    for (int i = 0; i < 2; ++i) {
      if (results_[i] == nullptr) continue;
      a.sums[i] = count_ > 1 ? next : results_[i];
      next += count_ > 1 ? channels_ * count_ : 0;
    }
  }

  // After the kernel: adds the partial sums up.
  void fold(const Arguments& a) const {
    if (count_ <= 1) return;
    Folds<2> folds{};
    int n = 0;
    for (int i = 0; i < 2; ++i)
      if (results_[i] != nullptr) folds.at[n++] = {a.sums[i], results_[i], channels_, count_, factor_};
    launch_folds(context_, "fake_quantize_backward, fold", folds, n);
  }

  int kinds() const { return (results_[0] != nullptr) + (results_[1] != nullptr); }

 private:
  const Context& context_;
  int64_t channels_, count_ = 0;
  double factor_;
  float* results_[2] = {nullptr, nullptr};
  std::optional<Tensor> partials_;
};

// Units for a row-walk: one a channel, which needs no fold, where its sum is short or the channels fill the device.
int64_t wanted_units(const Extents& e, int64_t resident_threads) {
  constexpr int64_t kShortSum = 32;          // elements a thread
  constexpr int64_t kLongTensor = 1 << 22;  // elements: from here a fold costs little beside the walk
  const bool short_sum = e.outer * e.inner <= kShortSum * threads_of_row(e);
  const bool filled = e.channels * threads_of_row(e) >= resident_threads / 4;
  const bool long_tensor = e.outer * e.channels * e.inner > kLongTensor;
  return short_sum || (filled && !long_tensor) ? 1 : filling_units(e, resident_threads);
}

template <typename X, typename G, bool kAtenEdge>
void launch_backward(
    const Context& context, const Tensor& x, Arguments a, const Extents& e, ParameterGradients& gradients) {
  constexpr int N = kWidth<X, G>;
  if (prefer_columns(e)) {
    Matrix m{{}, cut_into_columns<N, kBackwardVectors>(e, context.resident_threads)};
    gradients.place(a, m.columns.sums_per_channel(), x);
    static_cast<Arguments&>(m) = a;
    const auto kernel = kAtenEdge || gradients.kinds() > 0 ? backward_columns<X, G, kAtenEdge, 2>
                                                           : backward_columns<X, G, kAtenEdge, kAtenEdge ? 2 : 0>;
    context.launch("fake_quantize_backward by columns", kernel, blocks_of<N>(m.columns), m);
  } else {
    Layer layer{{}, cut_into_rows<N, kBackwardVectors>(e, wanted_units(e, context.resident_threads))};
    gradients.place(a, layer.rows.units_per_channel, x);
    static_cast<Arguments&>(layer) = a;
    auto kernel = backward_rows<X, G, kAtenEdge, 2, 1>;
    if constexpr (!kAtenEdge) {
      if (gradients.kinds() == 1) kernel = backward_rows<X, G, false, 1, 1>;
      if (gradients.kinds() == 0) kernel = backward_rows<X, G, false, 0, 1>;
    }
    context.launch("fake_quantize_backward by rows", kernel, layer.rows.blocks(), Layers<1>{{layer}});
  }
  gradients.fold(a);
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(
    const Tensor& any_grad,
    const Tensor& any_x,
    const Tensor& any_scale,
    const std::optional<Tensor>& any_offset,
    int64_t qmin,
    int64_t qmax,
    std::optional<int64_t> axis,
    double grad_factor,
    bool aten_edge,
    bool param_grads) {
  const Op op{"fake_quantize_backward"};
  check_quantizer(op, any_x, any_scale, any_offset, qmin, qmax, axis);
  check_grad(op, any_grad, any_x);
  const Context context(any_x);
  Tensor x = dense(any_x), grad = laid_out_as(any_grad, x);
  const ScaleAndOffset per_channel(any_scale, any_offset);
  Tensor result = empty_as(x, x.scalar_type());

  ParameterGradients gradients(context, per_channel.scale.numel(), grad_factor);
  const Tensor none = empty_vector(0, ScalarType::Float, x);
  const Tensor grad_scale = param_grads ? gradients.want(0, per_channel.scale) : none;
  const Tensor grad_offset = param_grads && per_channel.offset ? gradients.want(1, per_channel.scale) : none;
  if (x.numel() == 0) {
    context.zero(grad_scale);
    context.zero(grad_offset);
    return {result, grad_scale, grad_offset};
  }

  // Types and options that no kernel is made for take the float32 one, over copies.
  const bool own_kernel = has_backward_kernel(x.scalar_type(), grad.scalar_type()) &&
      !(aten_edge && (x.scalar_type() != ScalarType::Float || grad.scalar_type() != ScalarType::Float));
  if (!own_kernel) {
    x = to_float32(x);
    grad = to_float32(grad);
  }
  Tensor grad_x = own_kernel ? result : empty_as(x, ScalarType::Float);

  const Extents e = extents(x, axis);
  Arguments a = per_channel.arguments(qmin, qmax);
  a.x = x.data_ptr();
  a.grad = grad.data_ptr();
  a.out = grad_x.data_ptr();
  a.aligned = is_aligned({a.x, a.grad, a.out});
  if (aten_edge) {
    launch_backward<float, float, true>(context, x, a, e, gradients);
  } else {
    with_backward_types(x.scalar_type(), grad.scalar_type(), [&]<typename X, typename G>(Type<X>, Type<G>) {
      launch_backward<X, G, false>(context, x, a, e, gradients);
    });
  }
  if (!own_kernel) torch::stable::copy_(result, grad_x);
  return {result, grad_scale, grad_offset};
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize_backward", TORCH_BOX(&qkernels::cuda::fake_quantize_backward));
}
