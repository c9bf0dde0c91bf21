// How the packed ops take their arguments apart. The messages that users see are qkernels/ops'; these checks keep a
// direct call of the op from reading where it must not.
#pragma once

#include "../numerics.h"
#include "packed_conv2d.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace qkernels {

using OptionalTensor = std::optional<Tensor>;

inline bool is_code(ScalarType dtype) { return dtype == ScalarType::Char || dtype == ScalarType::Byte; }

// A contiguous float32 tensor of that many elements, or null.
inline OptionalTensor floats(const char* name, const OptionalTensor& t, int64_t count) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(
      t->scalar_type() == ScalarType::Float && t->numel() == count, "qkernels: ", name, " must be float32 with ", count,
      " elements");
  return torch::stable::contiguous(*t);
}

inline const float* data(const OptionalTensor& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

inline Tensor channels_last(const Tensor& t) {
  return torch::stable::contiguous(t, torch::headeronly::MemoryFormat::ChannelsLast);
}

inline PackedWeights weights_of(const Tensor& packed, const Sizes& s, int64_t bits) {
  const int64_t bytes = packed_bytes(s.out_channels * s.codes_a_channel(), bits);
  STD_TORCH_CHECK(
      bits >= 2 && bits <= 8 && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 &&
          packed.size(0) == s.members && packed.size(1) == bytes,
      "qkernels: packed does not hold the weights");
  return {static_cast<const uint8_t*>(packed.data_ptr()), bytes, static_cast<int>(bits)};
}

}  // namespace qkernels
