// The table of packed_network, and the stages of the steps that are no convolutions.
#pragma once

#include "packed_conv2d.h"

namespace qkernels {

// The columns, in the order of qkernels/ops/packed_network.py.
enum class Field : int64_t {
  kind, x, residual, result, part, dtype, images, channels, height, width,
  first, members, member, images_of_member, shared, bits, byte,
  kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w, groups,
  activation, qmin, qmax,
  packed, scale, bias, x_scale, residual_scale, out_scale,
  count
};
constexpr int64_t kFields = static_cast<int64_t>(Field::count);

enum Kind : int64_t { kQuantize, kConvolve, kMaxPool };

// Codes of floats, image i of the result with the scale of member i / images_of_member.
Stage quantization(
    const Pixels& x, int64_t image_bytes, int64_t images, int64_t images_of_member, const float* scales, float qmin,
    float qmax, char* codes, int64_t code_bytes);

// The largest code of each window; codes of what the padding is take no part.
Stage max_pool(const Pixels& x, const Sizes& s, char* out);

}  // namespace qkernels
