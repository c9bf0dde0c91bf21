// How the host code sees tensors: dense in memory, as [outer, channels, inner], in whatever order the dimensions lie.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

namespace qkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor of the given sizes and strides on the device of `like`.
inline Tensor empty_strided(
    torch::headeronly::IntHeaderOnlyArrayRef sizes,
    torch::headeronly::IntHeaderOnlyArrayRef strides,
    ScalarType dtype,
    const Tensor& like) {
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(
          torch::stable::detail::from(dtype)), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty_vector(int64_t n, ScalarType dtype, const Tensor& like) {
  const int64_t one = 1;
  return empty_strided({&n, 1}, {&one, 1}, dtype, like);
}

// A new tensor shaped and laid out as `like`, which must be dense.
inline Tensor empty_as(const Tensor& like, ScalarType dtype) {
  return empty_strided(like.sizes(), like.strides(), dtype, like);
}

// True if every element of the tensor's memory span is used exactly once.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<int64_t> order;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int64_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// `t` itself if it is dense (or empty), else a dense copy that keeps the order of its dimensions.
inline Tensor dense(const Tensor& t) {
  if (t.numel() == 0 || is_dense(t)) return t;
  Tensor copy = torch::stable::empty_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}

// `t` itself if its elements lie in the order of `like` (dense, same shape), else a copy laid out so.
inline Tensor laid_out_as(const Tensor& t, const Tensor& like) {
  bool same = true;
  for (int64_t d = 0; d < like.dim(); ++d)
    same = same && (like.size(d) == 1 || t.stride(d) == like.stride(d));
  if (same || t.numel() == 0) return t;
  Tensor copy = empty_as(like, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

// The extents of a dense tensor in memory order; one channel without an axis.
struct Extents {
  int64_t outer, channels, inner;
};

inline Extents extents(const Tensor& t, std::optional<int64_t> axis) {
  if (!axis || t.size(*axis) == 1 || t.numel() == 0)
    return {1, axis ? t.size(*axis) : 1, axis && t.size(*axis) == 0 ? 0 : t.numel()};
  const int64_t channels = t.size(*axis), inner = t.stride(*axis);
  return {t.numel() / (channels * inner), channels, inner};
}

}  // namespace qkernels
