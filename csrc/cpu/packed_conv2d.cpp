// packed_conv2d and packed_conv2d_int8 for CPU tensors: what they check, and who does the work.

#include "huge_pages.h"
#include "packed_arguments.h"
#include "packed_conv2d.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace qkernels {
namespace {

struct Geometry {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w,
      groups;
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
  const int64_t members = scale.size(0), channels = scale.size(1);
  STD_TORCH_CHECK(
      g.groups > 0 && x.size(1) % g.groups == 0 && channels % g.groups == 0,
      "qkernels: channels do not divide by groups");
  STD_TORCH_CHECK(shared || x.size(0) % members == 0, "qkernels: images do not divide among members");
  return {
      members, shared ? x.size(0) : x.size(0) / members, x.size(1), x.size(2), x.size(3), channels,
      output_size(x.size(2), g.kernel_h, g.stride_h, g.pad_top + g.pad_bottom, g.dilation_h),
      output_size(x.size(3), g.kernel_w, g.stride_w, g.pad_left + g.pad_right, g.dilation_w),
      g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.pad_top, g.pad_left, g.pad_bottom, g.pad_right, g.dilation_h,
      g.dilation_w, g.groups, shared};
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
    int64_t kernel_h, int64_t kernel_w, int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left,
    int64_t pad_bottom, int64_t pad_right, int64_t dilation_h, int64_t dilation_w, int64_t groups, bool shared,
    std::string activation) {
  const Geometry geometry{kernel_h,   kernel_w,  stride_h,   stride_w,   pad_top, pad_left,
                          pad_bottom, pad_right, dilation_h, dilation_w, groups};
  const Sizes s = sizes_of(x, scale, geometry, shared);
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
      s.out_channels, data(scales), nullptr, data(bias), residual ? residual->data_ptr() : nullptr, x.scalar_type(),
      nullptr, activation_named(activation), y.data_ptr(), x.scalar_type(), nullptr, 0.0f, 0.0f};
  if (y.numel() == 0) return y;
  if (s.depthwise())
    convolve_depthwise(image_of_floats(channels_last(x), s.unpadded(), 1), s, weights, e);
  else
    convolve_floats(image_of_floats(channels_last(x), s, 1), s, weights, e);
  return y;
}

Tensor packed_conv2d_int8(
    Tensor x, Tensor x_scale, Tensor packed, Tensor scale, OptionalTensor bias, OptionalTensor residual,
    OptionalTensor residual_scale, OptionalTensor out_scale, int64_t bits, int64_t kernel_h, int64_t kernel_w,
    int64_t stride_h, int64_t stride_w, int64_t pad_top, int64_t pad_left, int64_t pad_bottom, int64_t pad_right,
    int64_t dilation_h, int64_t dilation_w, int64_t groups, bool shared, std::string activation, int64_t qmin,
    int64_t qmax, ScalarType out_dtype) {
  const Geometry geometry{kernel_h,   kernel_w,  stride_h,   stride_w,   pad_top, pad_left,
                          pad_bottom, pad_right, dilation_h, dilation_w, groups};
  const Sizes s = sizes_of(x, scale, geometry, shared);
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
      s.out_channels, data(scales), data(x_scales), data(bias), residual ? residual->data_ptr() : nullptr,
      residual ? residual->scalar_type() : ScalarType::Float, data(residual_scale), activation_named(activation),
      y.data_ptr(), out_dtype, data(out_scale), static_cast<float>(qmin), static_cast<float>(qmax)};
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
