// Fake quantization of a few vectors, forward and backward: the part that walking rows and walking columns share.
#pragma once

#include <cstdint>
#include <optional>

#include "../numerics.h"
#include "fast_quantizer.cuh"
#include "launch.cuh"
#include "vector_access.cuh"

namespace qkernels::cuda {

constexpr int kForwardVectors = 4;   // loads in flight, each 16 bytes or more
constexpr int kBackwardVectors = 2;  // of x and of grad

// One tensor to quantize. `sums` take what is summed for scale and for offset, or are nullptr where that is not wanted:
// the gradients themselves if one unit of work serves a scale, else partial sums, which a fold adds up.
struct Arguments {
  const void* x;
  const void* grad;  // backward only
  void* out;         // y forward, grad_x backward
  const float* scale;
  const float* offset;  // nullptr for none
  float* sums[2];
  double grad_factor;
  float qmin, qmax;
  bool aligned;

  __device__ __forceinline__ Quantizer quantizer(int64_t channel) const {
    return {valid_scale(scale[channel]), offset == nullptr ? 0.0f : offset[channel], qmin, qmax};
  }

  __device__ __forceinline__ void write_sum(int i, int64_t at, float sum, bool complete) const {
    if (sums[i] != nullptr) sums[i][at] = complete ? static_cast<float>(sum * grad_factor) : sum;
  }
};

// Scale and offset as kernels read them: dense, one a channel of x.
struct ScaleAndOffset {
  Tensor scale;
  std::optional<Tensor> offset;

  ScaleAndOffset(const Tensor& s, const OptionalTensor& o) : scale(dense(s)) {
    if (o) offset = dense(*o);
  }

  Arguments arguments(int64_t qmin, int64_t qmax) const {
    Arguments a{};
    a.scale = static_cast<const float*>(scale.data_ptr());
    a.offset = offset ? static_cast<const float*>(offset->data_ptr()) : nullptr;
    a.qmin = static_cast<float>(qmin);
    a.qmax = static_cast<float>(qmax);
    return a;
  }
};

// y of the vectors at first, first + step, ...; quantizer(k) is that of each vector's k-th element.
template <int kVectors, bool kWhole, typename X, typename Y, typename Q>
__device__ __forceinline__ void quantize_vectors(
    const Arguments& a, int64_t first, int64_t step, const Span& span, Q&& quantizer) {
  constexpr int N = kWidth<X, Y>;
  Vector<X, N> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) x[v] = load<kWhole, N>(static_cast<const X*>(a.x), first + v * step, span);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Vector<Y, N> y;
#pragma unroll
    for (int k = 0; k < N; ++k) y.at[k] = from_float<Y>(quantizer(k).fake_quantize(to_float(x[v].at[k])));
    store<kWhole, N>(static_cast<Y*>(a.out), first + v * step, span, y);
  }
}

// grad_x of those vectors; each element's Gradient goes to accumulate(k, gradient). Elements outside the span come
// there with an upstream gradient of 0, so they add 0 (or NaN to a slice that is NaN already).
template <int kVectors, bool kWhole, typename X, typename G, bool kAtenEdge, typename Q, typename A>
__device__ __forceinline__ void gradient_vectors(
    const Arguments& a, int64_t first, int64_t step, const Span& span, Q&& quantizer, A&& accumulate) {
  constexpr int N = kWidth<X, G>;
  Vector<X, N> x[kVectors];
  Vector<G, N> upstream[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    x[v] = load<kWhole, N>(static_cast<const X*>(a.x), first + v * step, span);
    upstream[v] = load<kWhole, N>(static_cast<const G*>(a.grad), first + v * step, span);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Vector<X, N> grad_x;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Gradient g = gradient<kAtenEdge>(quantizer(k), to_float(x[v].at[k]), to_float(upstream[v].at[k]));
      grad_x.at[k] = from_float<X>(g.x);
      accumulate(k, g);
    }
    store<kWhole, N>(static_cast<X*>(a.out), first + v * step, span, grad_x);
  }
}

}  // namespace qkernels::cuda
