// The stages of packed_network's rows that are no convolutions.
#pragma once

#include "packed_conv2d.h"

namespace qkernels {

// Codes of floats, image i of the result with the scale of member i / images_of_member.
Stage quantization(
    const Pixels& x, int64_t image_bytes, int64_t images, int64_t images_of_member, const float* scales, float qmin,
    float qmax, char* codes, int64_t code_bytes);

// The largest code of each window; codes of what the padding is take no part.
Stage max_pool(const Pixels& x, const Sizes& s, char* out);

// Each channel's mean over the pixels of an image.
Stage mean(const float* x, int64_t images, int64_t pixels, int64_t channels, float* out);

// Each channel of an image times its factor: [images, channels] of them.
Stage gate(const float* x, const float* factors, int64_t images, int64_t pixels, int64_t channels, float* out);

// Layer norm over the channels of each pixel, with weight and bias [members, channels].
struct LayerNorm {
  int64_t pixels;  // of a member
  int64_t channels;
  const float *weight, *bias;
  float eps;
};
Stage layer_norm(const float* x, int64_t pixels, const LayerNorm& norm, float* out);

// Softmax(query key^T scale) value of `images` with so many tokens, of whose `width` channels the heads' query, key and
// value are those from the named ones on, [heads, depth] each.
struct Attention {
  int64_t images, tokens, width, heads, depth, query, key, value;
  float scale;
};
Stage attention_of(const float* x, const Attention& attention, float* out);

}  // namespace qkernels
