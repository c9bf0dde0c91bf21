// Kernels with the mistakes that the emulated device must find; `mistakes NAME` runs one.
#include "cuda_runtime.h"

#include <cstdio>
#include <string>
#include <vector>

constexpr int kThreads = 256;

// Each thread takes what its mirror image left in shared memory.
__global__ void reverse(const int* in, int* out, bool with_barrier) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (with_barrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void exchange_in_half_a_warp(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void barrier_for_some(int* out) {
  out[threadIdx.x] = 0;
  if (threadIdx.x == 40) __syncthreads();
}

__global__ void read_between_words(const int* in, int* out) {
  const char* const bytes = reinterpret_cast<const char*>(in);
  out[threadIdx.x] = static_cast<int>(reinterpret_cast<const uint4*>(bytes + 16 * threadIdx.x + 4)->x);
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  constexpr int kBlocks = 3;
  std::vector<int> in(4 * kBlocks * kThreads), out(kBlocks * kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  if (name == "half a warp") emulation::launch(exchange_in_half_a_warp, kBlocks, kThreads, out.data());
  if (name == "barrier for some") emulation::launch(barrier_for_some, kBlocks, kThreads, out.data());
  if (name == "between words") emulation::launch(read_between_words, kBlocks, kThreads, in.data(), out.data());
  if (name == "no barrier" || name == "none") {
    emulation::launch(reverse, kBlocks, kThreads, in.data(), out.data(), name == "none");
    for (int i = 0; i < kBlocks * kThreads; ++i)
      if (out[i] != i / kThreads * kThreads + kThreads - 1 - i % kThreads) {
        std::puts("a result is wrong");
        return 1;
      }
  }
  return 0;
}
