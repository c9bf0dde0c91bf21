// What follows the sums of a packed convolution: scale, bias, residual, activation, and codes again.
#pragma once

#include "../activation.h"
#include "cpu_isa.h"

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace qkernels {

using torch::headeronly::ScalarType;

constexpr int64_t kBlockChannels = 64;  // output channels that a tile has at most

// Pointers to float32 vectors of all members, [members, channels] or [members]; null where the op has none. Residual
// and output are [members, pixels, channels].
struct Epilogue {
  int64_t channels;
  const float* scale;
  const float* x_scale = nullptr;
  const float* bias = nullptr;
  const void* residual = nullptr;
  ScalarType residual_dtype = ScalarType::Float;
  const float* residual_scale = nullptr;
  Activation activation;
  void* out;
  ScalarType out_dtype;
  const float* out_scale = nullptr;
  float qmin = 0.0f, qmax = 0.0f;
  Isa isa = cpu_isa();  // of all kernels of this call
};

// The constants of `count` channels of a member from `first` upward, gathered once for many tiles.
struct ChannelBlock {
  ChannelBlock(const Epilogue& e, int64_t member, int64_t first, int64_t count);

  int64_t count;
  alignas(64) float multiplier[kBlockChannels], bias[kBlockChannels];
  float residual_scale, out_scale;
};

// Asks for the lines that finish() will write, so that they arrive while the sums are computed.
void prefetch_results(const Epilogue& e, const ChannelBlock& block, int64_t rows, int64_t out);

// Finishes `rows` pixels' sums, [rows, stride], whose outputs start at element `out` and lie e.channels apart.
void finish(
    const Epilogue& e, const ChannelBlock& block, const int32_t* sums, int64_t stride, int64_t rows, int64_t out);
void finish(const Epilogue& e, const ChannelBlock& block, const float* sums, int64_t stride, int64_t rows, int64_t out);

}  // namespace qkernels
