// The part of CUDA C++ that csrc/cuda uses, for a CPU: one thread after another, a block at a time. A thread runs until
// it must wait for others of its warp or block, and every time that threads may go on they go on in another order; so
// a barrier that is missing shows up as a result that is wrong or changes from run to run.
//
// What is undefined on a GPU ends the process: lanes of a warp that do not all take part in an exchange, threads that
// wait for each other forever, and (by the compiler's sanitizer) an access whose address is not aligned to its size.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#define CUDART_VERSION 13000
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block runs at a time

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr int kWarp = 32, kMostThreads = 1024;

// Of the thread that runs now.
extern dim3 thread, block, grid;

void wait_for_warp();
void wait_for_block();
void run(dim3 blocks, int threads, const std::function<void()>& kernel);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, Arguments&&... arguments) {
  run(blocks, threads, [&] { kernel(arguments...); });
}

// What each lane of the warp gives, as an array that all its lanes read. The next exchange uses another array: before
// the one after that, all have read this one.
template <class T, class Read>
auto exchange(const T& mine, Read&& read) {
  static T given[2][kMostThreads];
  static bool second[kMostThreads];
  T* const now = given[second[thread.x]];
  second[thread.x] = !second[thread.x];
  now[thread.x] = mine;
  wait_for_warp();
  return read(&now[thread.x / kWarp * kWarp]);
}

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define gridDim emulation::grid

inline void __syncthreads() { emulation::wait_for_block(); }

template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes) {
  if (mask != 0xffffffffu) std::abort();  // no kernel here exchanges among fewer
  return emulation::exchange(v, [&](const T* of_lane) { return of_lane[(threadIdx.x % emulation::kWarp) ^ lanes]; });
}

template <class A, class B>
constexpr auto min(A a, B b) { return a < b ? a : b; }
template <class A, class B>
constexpr auto max(A a, B b) { return a < b ? b : a; }

inline uint32_t __float_as_uint(float v) { return std::bit_cast<uint32_t>(v); }
inline float __uint_as_float(uint32_t v) { return std::bit_cast<float>(v); }

// Byte i of the result is that of (y, x), counted from x's lowest, which the i-th hexadecimal digit of s names.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (8 * (s >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxThreadsPerMultiProcessor,
  cudaDevAttrComputeCapabilityMajor
};

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  // A small one, so that small tensors take several turns of all its threads.
  *value = which == cudaDevAttrMultiProcessorCount ? 4 : which == cudaDevAttrMaxThreadsPerMultiProcessor ? 1024 : 9;
  return cudaSuccess;
}
