// The pairs of dtypes (x, grad) that the backward has kernels for: equal ones, and a float32 x quantized to 16 bits.
#pragma once

#include "launch.cuh"

namespace qkernels::cuda {

inline bool has_backward_kernel(ScalarType x, ScalarType grad) { return x == grad || x == ScalarType::Float; }

// Calls f with the element types of a pair, as Type<X>, Type<G>.
template <typename F>
void with_backward_types(ScalarType x, ScalarType grad, F&& f) {
  with_type(grad, [&]<typename G>(Type<G> g) { x == grad ? f(g, g) : f(Type<float>{}, g); });
}

// A dense tensor in float32, laid out the same.
inline Tensor to_float32(const Tensor& t) {
  Tensor copy = empty_as(t, ScalarType::Float);
  torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace qkernels::cuda
