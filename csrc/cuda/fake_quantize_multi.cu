// qkernels::fake_quantize_multi and its backward on CUDA devices: every layer of a model in one launch. The definition
// of both is qkernels/ops/reference.py.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "backward_types.cuh"
#include "quantize_rows.cuh"

namespace qkernels::cuda {
namespace {

// As many layers as the parameters of a kernel hold: 32764 bytes since CUDA 12.1, 4 KB before.
#if CUDART_VERSION >= 12010
constexpr size_t kParameterBytes = 32764;
#else
constexpr size_t kParameterBytes = 4096;
#endif
constexpr int kMaxLayers = (kParameterBytes - 16) / (sizeof(Layer) + sizeof(uint32_t));
constexpr int kMaxFolds = (kParameterBytes - 16) / sizeof(Fold);
static_assert(sizeof(Layers<kMaxLayers>) <= kParameterBytes);
static_assert(sizeof(Folds<kMaxFolds>) + sizeof(int) <= kParameterBytes);

// Units of about `elements` elements for each thread.
int64_t units_of(const Extents& e, int64_t elements) {
  return ceil_div(e.outer * e.channels * e.inner, elements * threads_of_row(e));
}

// Launches a kernel over all layers: once, unless there are more than kMaxLayers.
void launch_layers(
    const Context& context, const char* name, void (*kernel)(Layers<kMaxLayers>), const std::vector<Layer>& layers) {
  const auto packed = std::make_unique<Layers<kMaxLayers>>();
  for (size_t next = 0; next < layers.size();) {
    int64_t blocks = 0;
    packed->count = 0;
    for (; next < layers.size() && packed->count < kMaxLayers; ++next) {
      const int64_t more = layers[next].rows.blocks();
      if (packed->count > 0 && blocks + more > std::numeric_limits<int32_t>::max()) break;
      packed->at[packed->count] = layers[next];
      packed->first_block[packed->count++] = static_cast<uint32_t>(blocks);
      blocks += more;
    }
    context.launch(name, kernel, blocks, *packed);
  }
}

std::vector<Tensor> fake_quantize_multi(
    const std::vector<Tensor>& xs,
    const std::vector<Tensor>& scales,
    const std::vector<int64_t>& qmins,
    const std::vector<int64_t>& qmaxs,
    std::optional<int64_t> axis,
    const std::vector<double>& grad_factors,
    std::optional<ScalarType> out_dtype) {
  const size_t n = xs.size();
  const char* op = "fake_quantize_multi";
  check_layers(op, xs, scales, qmins, qmaxs, axis, grad_factors);
  if (out_dtype) check_element({op}, "out_dtype", *out_dtype);
  if (n == 0) return {};
  const Context context(xs[0]);
  const ScalarType x_dtype = xs[0].scalar_type(), y_dtype = out_dtype.value_or(x_dtype);
  std::vector<Tensor> ys, kept;  // kept: copies that the launch reads
  std::vector<Layer> layers;
  with_type(x_dtype, [&]<typename X>(Type<X>) {
    with_type(y_dtype, [&]<typename Y>(Type<Y>) {
      for (size_t i = 0; i < n; ++i) {
        const Tensor x = dense(xs[i]);
        const ScaleAndOffset per_channel(scales[i], std::nullopt);
        ys.push_back(empty_as(x, y_dtype));
        if (x.numel() == 0) continue;
        kept.insert(kept.end(), {x, per_channel.scale});
        const Extents e = extents(x, axis);
        Layer layer{per_channel.arguments(qmins[i], qmaxs[i]),
                    cut_into_rows<kWidth<X, Y>, kForwardVectors>(e, units_of(e, 32))};
        layer.x = x.data_ptr();
        layer.out = ys.back().data_ptr();
        layer.aligned = is_aligned({layer.x, layer.out});
        layers.push_back(layer);
      }
      launch_layers(context, "fake_quantize_multi", forward_rows<X, Y, kMaxLayers>, layers);
    });
  });
  return ys;
}

// Launches the folds that single scales of large tensors need: all in one, unless there are more than kMaxFolds.
void launch_all_folds(const Context& context, const std::vector<Fold>& folds) {
  const auto packed = std::make_unique<Folds<kMaxFolds>>();
  for (size_t next = 0; next < folds.size();) {
    int n = 0;
    while (next < folds.size() && n < kMaxFolds) packed->at[n++] = folds[next++];
    launch_folds(context, "fake_quantize_multi_backward, fold", *packed, n);
  }
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> fake_quantize_multi_backward(
    const std::vector<Tensor>& grads,
    const std::vector<Tensor>& xs,
    const std::vector<Tensor>& scales,
    const std::vector<int64_t>& qmins,
    const std::vector<int64_t>& qmaxs,
    std::optional<int64_t> axis,
    const std::vector<double>& grad_factors,
    bool param_grads) {
  const size_t n = xs.size();
  const char* op = "fake_quantize_multi_backward";
  check_layers(op, xs, scales, qmins, qmaxs, axis, grad_factors);
  check_grads(op, grads, xs);
  if (n == 0) return {};
  const Context context(xs[0]);
  const ScalarType x_dtype = xs[0].scalar_type();
  // Types that no kernel is made for take the float32 one, over copies.
  const bool own_kernel = has_backward_kernel(x_dtype, grads[0].scalar_type());
  const ScalarType kernel_x = own_kernel ? x_dtype : ScalarType::Float;
  const ScalarType kernel_grad = own_kernel ? grads[0].scalar_type() : ScalarType::Float;

  std::vector<Tensor> grad_xs, grad_scales, computed, kept;  // computed: where the kernel writes grad_xs
  std::vector<Layer> layers;
  std::vector<Fold> folds;
  with_backward_types(kernel_x, kernel_grad, [&]<typename X, typename G>(Type<X>, Type<G>) {
    for (size_t i = 0; i < n; ++i) {
      const Tensor dense_x = dense(xs[i]);
      const Tensor laid_out = laid_out_as(grads[i], dense_x);
      const ScaleAndOffset per_channel(scales[i], std::nullopt);
      grad_xs.push_back(empty_as(dense_x, x_dtype));
      grad_scales.push_back(
          param_grads ? empty_as(per_channel.scale, ScalarType::Float) : empty_vector(0, ScalarType::Float, dense_x));
      computed.push_back(own_kernel ? grad_xs.back() : empty_as(dense_x, ScalarType::Float));
      if (dense_x.numel() == 0) {
        context.zero(grad_scales.back());
        continue;
      }
      const Tensor x = own_kernel ? dense_x : to_float32(dense_x);
      const Tensor grad = own_kernel ? laid_out : to_float32(laid_out);
      kept.insert(kept.end(), {x, grad, per_channel.scale});

      // Many channels: one unit sums each, so nothing is left to fold.
      const Extents e = extents(x, axis);
      const int64_t units = e.channels > 1 && param_grads ? 1 : units_of(e, 64);
      Layer layer{per_channel.arguments(qmins[i], qmaxs[i]), cut_into_rows<kWidth<X, G>, kBackwardVectors>(e, units)};
      layer.x = x.data_ptr();
      layer.grad = grad.data_ptr();
      layer.out = computed.back().data_ptr();
      layer.grad_factor = grad_factors[i];
      layer.aligned = is_aligned({layer.x, layer.grad, layer.out});
      if (param_grads) {
        float* const result = static_cast<float*>(grad_scales.back().data_ptr());
        const int64_t count = layer.rows.units_per_channel;
        layer.sums[0] = result;
        if (count > 1) {
          kept.push_back(empty_vector(checked_product({e.channels, count}), ScalarType::Float, x));
          layer.sums[0] = static_cast<float*>(kept.back().data_ptr());
          folds.push_back({layer.sums[0], result, e.channels, count, grad_factors[i]});
        }
      }
      layers.push_back(layer);
    }
    launch_layers(context, "fake_quantize_multi_backward",
                  param_grads ? backward_rows<X, G, false, 1, kMaxLayers> : backward_rows<X, G, false, 0, kMaxLayers>,
                  layers);
  });
  launch_all_folds(context, folds);
  if (!own_kernel)
    for (size_t i = 0; i < n; ++i) torch::stable::copy_(grad_xs[i], computed[i]);
  return {grad_xs, grad_scales};
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quantize_multi", TORCH_BOX(&qkernels::cuda::fake_quantize_multi));
  m.impl("fake_quantize_multi_backward", TORCH_BOX(&qkernels::cuda::fake_quantize_multi_backward));
}
