// How the packed ops reach memory: 16 bytes an access where the address allows it, a grid that strides over its units.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "launch.cuh"

namespace qkernels::cuda {

template <int N>
struct alignas(N * sizeof(uint32_t)) Words {
  uint32_t at[N];
};

__device__ __forceinline__ bool is_aligned_to_words(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

__device__ __forceinline__ Words<4> to_words(const uint4& v) { return {v.x, v.y, v.z, v.w}; }
__device__ __forceinline__ Words<2> to_words(const uint2& v) { return {v.x, v.y}; }
__device__ __forceinline__ Words<1> to_words(const uint32_t& v) { return {v}; }

// From an address that is a multiple of their size.
template <int N>
__device__ __forceinline__ Words<N> load_words(const void* from) {
  using Access = std::conditional_t<N == 4, uint4, std::conditional_t<N == 2, uint2, uint32_t>>;
  return to_words(*static_cast<const Access*>(from));
}

__device__ __forceinline__ void store_words(uint8_t* to, const Words<4>& w) {
  store_words(reinterpret_cast<uint4*>(to), make_uint4(w.at[0], w.at[1], w.at[2], w.at[3]));
}

// Bytes [first, first + 16) of base[0 ... count - 1]; those past the end read as 0.
__device__ __forceinline__ Words<4> load_bytes(const uint8_t* base, int64_t first, int64_t count) {
  if (first + 16 <= count && is_aligned_to_words(base + first)) return load_words<4>(base + first);
  Words<4> words{};
#pragma unroll
  for (int k = 0; k < 16; ++k)
    if (first + k < count) words.at[k / 4] |= static_cast<uint32_t>(base[first + k]) << (8 * (k % 4));
  return words;
}

// The first `count` elements of a vector, or all of them.
template <typename T, int N>
__device__ __forceinline__ void store_up_to(T* to, const Vector<T, N>& v, int64_t count) {
  static_assert(sizeof(v) == sizeof(uint4));
  if (count >= N && is_aligned_to_words(to)) {
    store_words(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&v));
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k)
      if (k < count) to[k] = v.at[k];
  }
}

// Threads of a striding grid take the units first_unit(), + unit_step(), ...
__device__ __forceinline__ int64_t first_unit() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t unit_step() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// Blocks of such a grid: enough to fill the device a few times over.
inline int64_t striding_blocks(const Context& context, int64_t units) {
  constexpr int64_t kWaves = 4;
  return std::min(ceil_div(units, kThreads), kWaves * context.resident_threads / kThreads);
}

inline Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = checked_product({strides[d], std::max<int64_t>(sizes[d], 1)});
  return empty_strided(sizes, strides, dtype, like);
}

// `t` itself if it is contiguous and starts at a multiple of 16 bytes, else a copy that is and does.
inline Tensor aligned_contiguous(const Tensor& t) {
  const Tensor contiguous = torch::stable::contiguous(t);
  return is_aligned({contiguous.data_ptr()}) ? contiguous : torch::stable::clone(contiguous);
}

template <int kBits>
struct Bits {};

// Calls f with the number of bits of a code, as Bits<bits>.
template <typename F>
void with_bits(int64_t bits, F&& f) {
  switch (bits) {
    case 2: return f(Bits<2>{});
    case 3: return f(Bits<3>{});
    case 4: return f(Bits<4>{});
    case 5: return f(Bits<5>{});
    case 6: return f(Bits<6>{});
    case 7: return f(Bits<7>{});
    case 8: return f(Bits<8>{});
    default: STD_TORCH_CHECK(false, "bits must be 2..8, got ", bits);
  }
}

}  // namespace qkernels::cuda
