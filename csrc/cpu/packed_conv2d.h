// What the packed convolutions share: their sizes, the input as the kernels read it, and the kernels' entry points.
#pragma once

#include "packed_epilogue.h"
#include "stages.h"
#include "vectorized.h"

#include "../tensor_layout.h"

#include <cstdint>
#include <vector>

namespace qkernels {

// Of a sum of products of codes that surely fits int32.
constexpr int64_t kMostTerms = (int64_t{1} << 31) / (255 * 128);

struct Sizes {  // a linear layer's but for the four without a value here
  int64_t members, images;  // images of each member
  int64_t in_channels, height = 1, width = 1;
  int64_t out_channels, out_height = 1, out_width = 1;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  int64_t groups = 1;
  bool shared = false;  // every member sees the same images

  int64_t depth() const { return in_channels / groups; }
  int64_t codes_a_channel() const { return kernel_h * kernel_w * depth(); }
  int64_t out_pixels() const { return images * out_height * out_width; }  // of a member
  bool depthwise() const { return groups > 1 && depth() == 1; }
  Sizes unpadded() const {
    Sizes result = *this;
    result.pad_top = result.pad_left = result.pad_bottom = result.pad_right = 0;
    return result;
  }
};

// The packed codes of every member, [members, bytes], and what packed_panels has made of them, if anything.
struct PackedWeights {
  const uint8_t* data;
  int64_t bytes;  // of a member
  int bits;
  const uint8_t* records = nullptr;
  int64_t record_bytes = 0;
};

// Elements in the order [images, height, width, channels], one after another.
struct Pixels {
  const void* data;
  ScalarType dtype;
  int64_t images;
};

// Memory for what the stages of an op hand on; it stays until they have run.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual void* take(int64_t bytes) = 0;
};

// The input as [images, height, width, channels]: uint8 codes, raised by `raised_by` if they are signed, or float32,
// or bfloat16. Strides are in elements.
template <class X>
struct Image {
  const X *data, *end;
  int64_t image, row, pixel;
  int64_t window_down, window_right;  // from an output's window to those below and beside it
  int64_t tap_down, tap_right;        // from a tap of the kernel to those below and beside it
  int64_t group;              // channels of a group: its own, then zeros that fill them up to the kernel's step
  int32_t raised_by;
};

// Lays x out as an image that includes the padding and whose groups are a multiple of `step` channels, by a stage that
// copies it; no copy if x is one already. For a depthwise convolution a channel is repeated for each output channel
// that reads it. A copy takes as many elements as x has with its padding, or where that is more than twice as high or
// wide as x at most one kernel for each output.
Image<uint8_t> image_of_codes(
    const Pixels& x, const Sizes& sizes, int64_t step, Memory& memory, std::vector<Stage>& stages);
Image<float> image_of_floats(
    const Pixels& x, const Sizes& sizes, int64_t step, Memory& memory, std::vector<Stage>& stages);
Image<BFloat16> image_of_bfloat16s(
    const Pixels& x, const Sizes& sizes, int64_t step, Memory& memory, std::vector<Stage>& stages);

// Adds the stages that compute e.out of x.
using Convolve = void(
    const Pixels& x, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e, Memory& memory,
    std::vector<Stage>& stages);
Convolve convolve_codes, convolve_floats;
Convolve convolve_depthwise_codes, convolve_depthwise_floats;  // of depthwise convolutions

// The records of the members' weights as convolutions of codes read them on this CPU; see packed_panels.h.
int64_t panel_record_bytes(const Sizes& sizes, const PackedWeights& weights);
void keep_panels(const Sizes& sizes, const PackedWeights& weights, uint8_t* records);

}  // namespace qkernels
