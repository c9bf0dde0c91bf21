// packed_gemv for CPU tensors. For one row a member, every weight is read from its bits, bits / 8 bytes of it, and used
// once; with more rows it pays to widen the weights first, as the convolution of 1x1 images does.
//
// Scratch of a thread: 16 * in codes.

#include "packed_arguments.h"
#include "packed_weights.h"
#include "vectorized.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

namespace qkernels {
namespace {

constexpr int64_t kChannels = 16;  // unpacked at a time
constexpr int64_t kProducts = 16;  // of an instruction

// In as many sums as keep the processor's adders busy.
QK_VECTORIZED float dot(const float* x, const int8_t* codes, int64_t n) {
  constexpr int64_t lanes = 64;
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += x[i + lane] * static_cast<float>(codes[i + lane]);
  for (int64_t lane = 0; i + lane < n; ++lane) sums[lane] += x[i + lane] * static_cast<float>(codes[i + lane]);
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

// One row a member.
void multiply(
    const Pixels& x, const Sizes& s, const PackedWeights& packed, const Epilogue& e, Memory& memory,
    std::vector<Stage>& stages) {
  const int64_t depth = s.in_channels, blocks = (s.out_channels + kChannels - 1) / kChannels;
  const float* rows = image_of_floats(x, s, 1, memory, stages).data;
  stages.push_back(evenly_cut(
      s.members * blocks, s.members * s.out_channels * depth / kProducts, [=](int64_t begin, int64_t end) {
        Scratch scratch;
        int8_t* room = scratch.take<int8_t>(room_for_codes(kChannels * depth));
        alignas(64) float sums[kChannels];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t member = block / blocks, first = block % blocks * kChannels;
          const int64_t count = std::min(kChannels, s.out_channels - first);
          const int8_t* codes = unpack_range(
              packed.data + member * packed.bytes, packed.bits, first * depth, count * depth, e.isa, room);
          const float* row = rows + (s.shared ? 0 : member * depth);
          for (int64_t c = 0; c < count; ++c) sums[c] = dot(row, codes + c * depth, depth);
          finish(e, ChannelBlock(e, member, first, count), sums, kChannels, 1, member * e.channels + first);
        }
      }));
}

Tensor packed_gemv(
    Tensor x, Tensor packed, Tensor scale, OptionalTensor bias, int64_t bits, bool shared, std::string activation) {
  check_packed_gemv(x, packed, scale, bias, bits, shared, activation);
  const int64_t members = scale.size(0), channels = scale.size(1), rows = shared ? x.size(0) : x.size(0) / members;
  const Sizes s{
      .members = members, .images = rows, .in_channels = x.size(1), .out_channels = channels, .shared = shared};
  packed = torch::stable::contiguous(packed);
  const PackedWeights weights = weights_of(packed, bits);
  const OptionalTensor scales = torch::stable::contiguous(scale);
  bias = contiguous(bias);
  const int64_t sizes[] = {checked_product({members, rows}), channels}, strides[] = {channels, 1};
  Tensor y = empty_strided({sizes, 2}, {strides, 2}, x.scalar_type(), x);
  const Epilogue e{
      .channels = channels,
      .scale = data(scales),
      .bias = data(bias),
      .activation = activation_named(activation),
      .out = y.data_ptr(),
      .out_dtype = x.scalar_type()};
  if (y.numel() == 0) return y;
  x = torch::stable::contiguous(x);
  TensorMemory memory(x);
  std::vector<Stage> stages;
  (rows == 1 ? multiply : convolve_floats)(pixels_of(x), s, weights, e, memory, stages);
  run_stages(stages);
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("packed_gemv", TORCH_BOX(&qkernels::packed_gemv));
}
