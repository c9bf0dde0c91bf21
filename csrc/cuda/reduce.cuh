// Sums in a fixed order, so that a run repeats bit for bit: no atomics.
#pragma once

#include <algorithm>
#include <cstdint>

#include "launch.cuh"

namespace qkernels::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// The sum of each v[i] over a group of threads: `group` is 1, 2, ... 32 neighboring lanes, or kThreads for the block.
// All threads of the block must call it, once in a kernel. The first thread of a group gets the sum.
template <int kSums, typename T>
__device__ __forceinline__ void group_sum(T (&v)[kSums], int group) {
  for (int offset = min(group, 32) / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < kSums; ++i) v[i] += __shfl_xor_sync(kWholeWarp, v[i], offset);
  if (group <= 32) return;  // the same for the whole block

  constexpr int kWarps = kThreads / 32;
  __shared__ T of_warp[kSums][kWarps];
  if (threadIdx.x % 32 == 0)
#pragma unroll
    for (int i = 0; i < kSums; ++i) of_warp[i][threadIdx.x / 32] = v[i];
  __syncthreads();
  if (threadIdx.x == 0)
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      v[i] = of_warp[i][0];
      for (int w = 1; w < kWarps; ++w) v[i] += of_warp[i][w];
    }
}

// results[c] = factor * sum of partials[c * count ... c * count + count - 1]
struct Fold {
  const float* partials;
  float* results;
  int64_t channels, count;
  double factor;
};

template <int kCapacity>
struct Folds {
  Fold at[kCapacity];
};

// One group of threads a channel; row y of the grid is fold y.
template <int kCapacity>
__global__ __launch_bounds__(kThreads) void fold_kernel(
    const __grid_constant__ Folds<kCapacity> folds, int log2_group) {
  const Fold& fold = folds.at[blockIdx.y];
  const int group = 1 << log2_group, lane = threadIdx.x & (group - 1);
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) >> log2_group;
  double sum[1] = {0.0};
  if (channel < fold.channels)
#pragma unroll 8  // so many loads in flight
    for (int64_t i = lane; i < fold.count; i += group)
      sum[0] += static_cast<double>(fold.partials[channel * fold.count + i]);
  group_sum(sum, group);
  if (channel < fold.channels && lane == 0)
    fold.results[channel] = static_cast<float>(sum[0] * fold.factor);
}

template <int kCapacity>
void launch_folds(const Context& context, const char* name, const Folds<kCapacity>& folds, int n) {
  int64_t channels = 0, count = 0;
  for (int i = 0; i < n; ++i) {
    channels = std::max(channels, folds.at[i].channels);
    count = std::max(count, folds.at[i].count);
  }
  if (channels == 0) return;
  const int log2_group = count > 128 ? kLog2Threads : 5;
  const int64_t blocks = ceil_div(channels, kThreads >> log2_group);
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), name, ": too many channels for one launch");
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(n));
  fold_kernel<kCapacity><<<grid, kThreads, 0, context.stream>>>(folds, log2_group);
  check(cudaGetLastError(), name);
}

}  // namespace qkernels::cuda
