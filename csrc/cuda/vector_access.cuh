// Loads and stores of several elements at once: 16 bytes an access inside a row, element by element at its ends.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "instructions.cuh"

namespace qkernels::cuda {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }

// To nearest, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float v) { return __float2half_rn(v); }

template <typename T, int N>
struct alignas(16) Vector {
  static_assert(N * sizeof(T) % sizeof(uint4) == 0);
  T at[N];
};

// Elements a thread takes at a time: 16 bytes of the narrowest of the types.
template <typename... T>
constexpr int kWidth = 16 / std::min({sizeof(T)...});

// The elements [begin, end) that an access must stay within. `aligned`: every tensor of the launch starts at a multiple
// of 16 bytes, so that a vector whose first element's index is a multiple of N is one 16-byte access (or two).
struct Span {
  int64_t begin, end;
  bool aligned;

  template <int N>
  __device__ __forceinline__ bool whole(int64_t first) const {
    return aligned && first >= begin && first + N <= end;
  }
};

// Elements [first, first + N); those outside the span read as 0. kWhole: the caller knows that span.whole(first).
template <bool kWhole, int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* base, int64_t first, const Span& span) {
  constexpr int kWords = N * sizeof(T) / sizeof(uint4);
  Vector<T, N> v;
  if (kWhole || span.whole<N>(first)) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      reinterpret_cast<uint4*>(&v)[w] = reinterpret_cast<const uint4*>(base + first)[w];
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      v.at[k] = first + k >= span.begin && first + k < span.end ? base[first + k] : from_float<T>(0.0f);
  }
  return v;
}

// Writes those of the elements [first, first + N) that lie in the span.
template <bool kWhole, int N, typename T>
__device__ __forceinline__ void store(T* base, int64_t first, const Span& span, const Vector<T, N>& v) {
  constexpr int kWords = N * sizeof(T) / sizeof(uint4);
  if (kWhole || span.whole<N>(first)) {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      store_words(reinterpret_cast<uint4*>(base + first) + w, reinterpret_cast<const uint4*>(&v)[w]);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (first + k >= span.begin && first + k < span.end) base[first + k] = v.at[k];
  }
}

}  // namespace qkernels::cuda
