// How the packed ops take their arguments apart, once they are checked.
#pragma once

#include "../arguments.h"
#include "packed_conv2d.h"

#include <torch/csrc/stable/ops.h>

namespace qkernels {

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

inline const float* data(const OptionalTensor& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

inline Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline PackedWeights weights_of(const Tensor& packed, int64_t bits) {
  return {static_cast<const uint8_t*>(packed.data_ptr()), packed.size(1), static_cast<int>(bits)};
}

}  // namespace qkernels
