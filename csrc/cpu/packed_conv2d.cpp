// packed_conv2d and packed_conv2d_int8 for CPU tensors: what they check, and who does the work.

#include "huge_pages.h"
#include "packed_arguments.h"
#include "packed_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

namespace qkernels {
namespace {

using Numbers = std::vector<int64_t>;

// As the schema has it: (height, width) each, and padding as (top, left, bottom, right).
struct Geometry {
  const Numbers &kernel, &stride, &padding, &dilation;
  int64_t groups;
};

void check_geometry(const Op& op, const Geometry& g) {
  STD_TORCH_CHECK(
      g.kernel.size() == 2 && g.stride.size() == 2 && g.padding.size() == 4 && g.dilation.size() == 2, op,
      ": kernel, stride and dilation must be two numbers each, and padding four");
  const auto least = [](const Numbers& numbers) { return *std::min_element(numbers.begin(), numbers.end()); };
  STD_TORCH_CHECK(
      least(g.kernel) > 0 && least(g.stride) > 0 && least(g.dilation) > 0 && g.groups > 0 && least(g.padding) >= 0, op,
      ": kernel, stride, dilation and groups must be positive and padding not negative");
}

int64_t output_size(const Op& op, int64_t padded, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t reach = checked_product({dilation, kernel - 1});
  STD_TORCH_CHECK(padded > reach, op, ": the kernel is larger than the padded image");
  return (padded - reach - 1) / stride + 1;
}

// What both convolutions ask, of arguments that the op has found to be of the right dtypes.
Sizes sizes_of(
    const Op& op, const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, int64_t bits, const Geometry& g, bool shared, const std::string& activation) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be [images, channels, height, width]");
  check_geometry(op, g);
  const int64_t taps = checked_product({g.kernel[0], g.kernel[1]});
  check_packed_layer(op, x, packed, scale, bias, bits, taps, g.groups, shared, activation);
  const int64_t members = scale.size(0), channels = scale.size(1);
  const int64_t top = g.padding[0], left = g.padding[1], bottom = g.padding[2], right = g.padding[3];
  const int64_t padded_height = checked_sum({x.size(2), top, bottom});
  const int64_t padded_width = checked_sum({x.size(3), left, right});
  const Sizes s{
      .members = members,
      .images = shared ? x.size(0) : x.size(0) / members,
      .in_channels = x.size(1),
      .height = x.size(2),
      .width = x.size(3),
      .out_channels = channels,
      .out_height = output_size(op, padded_height, g.kernel[0], g.stride[0], g.dilation[0]),
      .out_width = output_size(op, padded_width, g.kernel[1], g.stride[1], g.dilation[1]),
      .kernel_h = g.kernel[0],
      .kernel_w = g.kernel[1],
      .stride_h = g.stride[0],
      .stride_w = g.stride[1],
      .pad_top = top,
      .pad_left = left,
      .pad_bottom = bottom,
      .pad_right = right,
      .dilation_h = g.dilation[0],
      .dilation_w = g.dilation[1],
      .groups = g.groups,
      .shared = shared};
  if (residual) {
    const int64_t shape[] = {checked_product({members, s.images}), channels, s.out_height, s.out_width};
    const auto sizes = residual->sizes();
    STD_TORCH_CHECK(
        std::equal(sizes.begin(), sizes.end(), std::begin(shape), std::end(shape)), op,
        ": residual must have the output's shape");
    check_same_device(op, "residual", *residual, x);
  }
  return s;
}

Tensor empty_output(const Tensor& x, const Sizes& s, ScalarType dtype) {
  const int64_t h = s.out_height, w = s.out_width, c = s.out_channels, row = checked_product({w, c});
  const int64_t sizes[] = {checked_product({s.members, s.images}), c, h, w};
  const int64_t strides[] = {checked_product({h, row}), 1, row, c};
  const Tensor y = empty_strided({sizes, 4}, {strides, 4}, dtype, x);
  prefer_huge_pages(y);
  return y;
}

void check_codes_arguments(
    const Op& op, const Tensor& x, const Tensor& x_scale, const OptionalTensor& residual,
    const OptionalTensor& residual_scale, const OptionalTensor& out_scale, const Sizes& s, int64_t qmin, int64_t qmax,
    ScalarType out_dtype) {
  STD_TORCH_CHECK(
      s.codes_a_channel() <= kMostTerms, op, ": a sum of ", s.codes_a_channel(), " products may exceed int32");
  STD_TORCH_CHECK(
      (residual && is_code(residual->scalar_type())) == residual_scale.has_value(), op,
      ": residual_scale goes with an int8 or uint8 residual, and only with one");
  STD_TORCH_CHECK(
      !residual || is_code(residual->scalar_type()) || is_element(residual->scalar_type()), op,
      ": residual must be codes or float32, bfloat16 or float16, got ", residual->scalar_type());
  check_members(op, "x_scale", x_scale, {s.members}, x);
  if (residual_scale) check_members(op, "residual_scale", *residual_scale, {s.members}, x);
  if (out_scale) check_members(op, "out_scale", *out_scale, {s.members}, x);
  STD_TORCH_CHECK(
      is_code(out_dtype) == out_scale.has_value(), op,
      ": out_scale goes with an int8 or uint8 out_dtype, and only with one");
  if (!is_code(out_dtype)) return check_element(op, "out_dtype", out_dtype);
  check_range(op, qmin, qmax);
  const bool fits = out_dtype == ScalarType::Char ? qmin >= -128 && qmax <= 127 : qmin >= 0 && qmax <= 255;
  STD_TORCH_CHECK(fits, op, ": codes in [", qmin, ", ", qmax, "] do not fit ", out_dtype);
}

Tensor packed_conv2d(
    Tensor x, Tensor packed, Tensor scale, OptionalTensor bias, OptionalTensor residual, int64_t bits,
    Numbers kernel, Numbers stride, Numbers padding, Numbers dilation, int64_t groups, bool shared,
    std::string activation) {
  const Op op{"packed_conv2d"};
  check_element(op, "x", x.scalar_type());
  STD_TORCH_CHECK(
      !residual || residual->scalar_type() == x.scalar_type(), op, ": residual must have the dtype of x");
  const Geometry g{kernel, stride, padding, dilation, groups};
  const Sizes s = sizes_of(op, x, packed, scale, bias, residual, bits, g, shared, activation);
  packed = torch::stable::contiguous(packed);
  const PackedWeights weights = weights_of(packed, bits);
  const OptionalTensor scales = torch::stable::contiguous(scale);
  bias = contiguous(bias);
  if (residual) residual = channels_last(*residual);
  const Tensor y = empty_output(x, s, x.scalar_type());
  const Epilogue e{
      .channels = s.out_channels,
      .scale = data(scales),
      .bias = data(bias),
      .residual = residual ? residual->data_ptr() : nullptr,
      .residual_dtype = x.scalar_type(),
      .activation = activation_named(activation),
      .out = y.data_ptr(),
      .out_dtype = x.scalar_type()};
  if (y.numel() == 0) return y;
  x = channels_last(x);
  TensorMemory memory(x);
  std::vector<Stage> stages;
  (s.depthwise() ? convolve_depthwise_floats : convolve_floats)(pixels_of(x), s, weights, e, memory, stages);
  run_stages(stages);
  return y;
}

Tensor packed_conv2d_int8(
    Tensor x, Tensor x_scale, Tensor packed, Tensor scale, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor residual_scale, OptionalTensor out_scale, int64_t bits, Numbers kernel, Numbers stride,
    Numbers padding, Numbers dilation, int64_t groups, bool shared, std::string activation, int64_t qmin, int64_t qmax,
    ScalarType out_dtype) {
  const Op op{"packed_conv2d_int8"};
  STD_TORCH_CHECK(is_code(x.scalar_type()), op, ": x must be int8 or uint8 codes, got ", x.scalar_type());
  const Geometry g{kernel, stride, padding, dilation, groups};
  const Sizes s = sizes_of(op, x, packed, scale, bias, residual, bits, g, shared, activation);
  check_codes_arguments(op, x, x_scale, residual, residual_scale, out_scale, s, qmin, qmax, out_dtype);
  packed = torch::stable::contiguous(packed);
  const PackedWeights weights = weights_of(packed, bits);
  const OptionalTensor scales = torch::stable::contiguous(scale), x_scales = torch::stable::contiguous(x_scale);
  bias = contiguous(bias);
  residual_scale = contiguous(residual_scale);
  out_scale = contiguous(out_scale);
  if (residual) residual = channels_last(*residual);
  const Tensor y = empty_output(x, s, out_dtype);
  const Epilogue e{
      .channels = s.out_channels,
      .scale = data(scales),
      .x_scale = data(x_scales),
      .bias = data(bias),
      .residual = residual ? residual->data_ptr() : nullptr,
      .residual_dtype = residual ? residual->scalar_type() : ScalarType::Float,
      .residual_scale = data(residual_scale),
      .activation = activation_named(activation),
      .out = y.data_ptr(),
      .out_dtype = out_dtype,
      .out_scale = data(out_scale),
      .qmin = static_cast<float>(qmin),
      .qmax = static_cast<float>(qmax)};
  if (y.numel() == 0) return y;
  x = channels_last(x);
  TensorMemory memory(x);
  std::vector<Stage> stages;
  (s.depthwise() ? convolve_depthwise_codes : convolve_codes)(pixels_of(x), s, weights, e, memory, stages);
  run_stages(stages);
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("packed_conv2d", TORCH_BOX(&qkernels::packed_conv2d));
  m.impl("packed_conv2d_int8", TORCH_BOX(&qkernels::packed_conv2d_int8));
}
