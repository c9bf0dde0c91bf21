// How the packed ops take their arguments apart, once they are checked.
#pragma once

#include "../arguments.h"
#include "huge_pages.h"
#include "packed_conv2d.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

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

// Tensors' memory, for what the stages of one op hand on.
class TensorMemory : public Memory {
 public:
  explicit TensorMemory(const Tensor& like) : like_(like) {}
  void* take(int64_t bytes) override {
    tensors_.push_back(empty_vector(bytes, ScalarType::Byte, like_));
    prefer_huge_pages(tensors_.back());
    return tensors_.back().data_ptr();
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

inline Pixels pixels_of(const Tensor& x) { return {x.data_ptr(), x.scalar_type(), x.size(0)}; }

}  // namespace qkernels
