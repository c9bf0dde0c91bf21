// packed_conv2d and packed_conv2d_int8 for CPU tensors: what they check, and who does the work.

#include "huge_pages.h"
#include "packed_arguments.h"
#include "packed_conv2d.h"

#include <torch/csrc/stable/library.h>

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

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  STD_TORCH_CHECK(
      kernel > 0 && stride > 0 && dilation > 0 && padding >= 0 && size + padding > dilation * (kernel - 1),
      "qkernels: the kernel does not fit the padded image");
  return (size + padding - dilation * (kernel - 1) - 1) / stride + 1;
}

Sizes sizes_of(const Tensor& x, const Tensor& scale, const Geometry& g, bool shared) {
  STD_TORCH_CHECK(
      x.dim() == 4 && x.size(1) > 0 && scale.dim() == 2 && scale.size(0) > 0,
      "qkernels: x must be 4-d with channels, and scale 2-d with members");
  STD_TORCH_CHECK(
      g.kernel.size() == 2 && g.stride.size() == 2 && g.padding.size() == 4 && g.dilation.size() == 2,
      "qkernels: kernel, stride and dilation must be two numbers each, and padding four");
  const int64_t members = scale.size(0), channels = scale.size(1);
  STD_TORCH_CHECK(
      g.groups > 0 && x.size(1) % g.groups == 0 && channels % g.groups == 0,
      "qkernels: channels do not divide by groups");
  STD_TORCH_CHECK(shared || x.size(0) % members == 0, "qkernels: images do not divide among members");
  const int64_t top = g.padding[0], left = g.padding[1], bottom = g.padding[2], right = g.padding[3];
  return {
      .members = members,
      .images = shared ? x.size(0) : x.size(0) / members,
      .in_channels = x.size(1),
      .height = x.size(2),
      .width = x.size(3),
      .out_channels = channels,
      .out_height = output_size(x.size(2), g.kernel[0], g.stride[0], top + bottom, g.dilation[0]),
      .out_width = output_size(x.size(3), g.kernel[1], g.stride[1], left + right, g.dilation[1]),
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
}

Tensor empty_output(const Tensor& x, const Sizes& s, ScalarType dtype) {
  const int64_t h = s.out_height, w = s.out_width, c = s.out_channels;
  const int64_t sizes[] = {s.members * s.images, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  const Tensor y = empty_strided({sizes, 4}, {strides, 4}, dtype, x);
  prefer_huge_pages(y);
  return y;
}

void check_residual(const OptionalTensor& residual, const Tensor& y) {
  if (!residual) return;
  STD_TORCH_CHECK(residual->dim() == 4, "qkernels: residual must have the output's shape");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(residual->size(d) == y.size(d), "qkernels: residual must have the output's shape");
}

Tensor packed_conv2d(
    Tensor x, Tensor packed, Tensor scale, OptionalTensor bias, OptionalTensor residual, int64_t bits,
    Numbers kernel, Numbers stride, Numbers padding, Numbers dilation, int64_t groups, bool shared,
    std::string activation) {
  const Sizes s = sizes_of(x, scale, {kernel, stride, padding, dilation, groups}, shared);
  packed = torch::stable::contiguous(packed);
  const PackedWeights weights = weights_of(packed, s, bits);
  const OptionalTensor scales = floats("scale", scale, s.members * s.out_channels);
  bias = floats("bias", bias, s.members * s.out_channels);
  Tensor y = empty_output(x, s, x.scalar_type());
  check_residual(residual, y);
  if (residual) residual = channels_last(*residual);
  STD_TORCH_CHECK(
      !residual || residual->scalar_type() == x.scalar_type(), "qkernels: residual must have the dtype of x");
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
  if (s.depthwise())
    convolve_depthwise(image_of_floats(channels_last(x), s.unpadded(), 1), s, weights, e);
  else
    convolve_floats(image_of_floats(channels_last(x), s, 1), s, weights, e);
  return y;
}

Tensor packed_conv2d_int8(
    Tensor x, Tensor x_scale, Tensor packed, Tensor scale, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor residual_scale, OptionalTensor out_scale, int64_t bits, Numbers kernel, Numbers stride,
    Numbers padding, Numbers dilation, int64_t groups, bool shared, std::string activation, int64_t qmin, int64_t qmax,
    ScalarType out_dtype) {
  const Sizes s = sizes_of(x, scale, {kernel, stride, padding, dilation, groups}, shared);
  STD_TORCH_CHECK(is_code(x.scalar_type()), "qkernels: x must be int8 or uint8");
  packed = torch::stable::contiguous(packed);
  const PackedWeights weights = weights_of(packed, s, bits);
  const OptionalTensor scales = floats("scale", scale, s.members * s.out_channels);
  const OptionalTensor x_scales = floats("x_scale", x_scale, s.members);
  bias = floats("bias", bias, s.members * s.out_channels);
  residual_scale = floats("residual_scale", residual_scale, s.members);
  out_scale = floats("out_scale", out_scale, s.members);
  Tensor y = empty_output(x, s, out_dtype);
  check_residual(residual, y);
  if (residual) residual = channels_last(*residual);
  STD_TORCH_CHECK(
      (residual && is_code(residual->scalar_type())) == residual_scale.has_value() &&
          is_code(out_dtype) == out_scale.has_value(),
      "qkernels: scales of residual and output go with codes");
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
  if (s.depthwise())
    convolve_depthwise(image_of_codes(channels_last(x), s.unpadded(), 1), s, weights, e);
  else
    convolve_codes(image_of_codes(channels_last(x), s, 4), s, weights, e);
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("packed_conv2d", TORCH_BOX(&qkernels::packed_conv2d));
  m.impl("packed_conv2d_int8", TORCH_BOX(&qkernels::packed_conv2d_int8));
}
