// Fake quantization by rows, of one tensor or of many in one launch. The layers are described in the kernel's
// parameters: no copy to the device precedes a launch, and a CUDA graph can hold it.
#pragma once

#include <cstdint>

#include "quantize.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace qkernels::cuda {

struct Layer : Arguments {
  Rows rows;
};

template <int kCapacity>
struct Layers {
  Layer at[kCapacity];
  uint32_t first_block[kCapacity];
  int32_t count;

  __device__ __forceinline__ int layer_of_block() const {
    int low = 0, high = kCapacity == 1 ? 1 : count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_block[middle] <= blockIdx.x ? low : high) = middle;
    }
    return low;
  }
};

// Reads x, writes y: 8 bytes an element in float32, 4 in bfloat16 and float16.
template <typename X, typename Y, int kCapacity>
__global__ __launch_bounds__(kThreads) void forward_rows(const __grid_constant__ Layers<kCapacity> layers) {
  const int l = layers.layer_of_block();
  const Layer& layer = layers.at[l];
  const Unit unit = find_unit(layer.rows, blockIdx.x - layers.first_block[l]);
  if (!unit.any()) return;
  const FastQuantizer q(layer.quantizer(unit.channel));
  walk_rows<kWidth<X, Y>, kForwardVectors>(
      layer.rows, unit, layer.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        quantize_vectors<kVectors, kWhole, X, Y>(layer, first, step, row, [&](int) { return q; });
      });
}

// Reads x and grad, writes grad_x: 12 bytes an element in float32, 6 in bfloat16 and float16. kSums: 0 for grad_x
// alone, 1 with the sums for scale, 2 with those for offset. Three blocks a multiprocessor leave 85 registers: with 64,
// which the compiler would choose, one kernel spills.
template <typename X, typename G, bool kAtenEdge, int kSums, int kCapacity>
__global__ __launch_bounds__(kThreads, 3) void backward_rows(const __grid_constant__ Layers<kCapacity> layers) {
  const int l = layers.layer_of_block();
  const Layer& layer = layers.at[l];
  const Unit unit = find_unit(layer.rows, blockIdx.x - layers.first_block[l]);
  const Quantizer q = unit.any() ? layer.quantizer(unit.channel) : Quantizer{};
  float sums[kSums > 0 ? kSums : 1];
  // At once: the vectors whose loads are in flight together.
  const auto walk = [&]<int kAtOnce>(const auto& by) {
    for (float& sum : sums) sum = 0.0f;
    walk_rows<kWidth<X, G>, kBackwardVectors>(
        layer.rows, unit, layer.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
#pragma unroll 1
          for (int v = 0; v < kVectors; v += kAtOnce)
            gradient_vectors<kVectors < kAtOnce ? kVectors : kAtOnce, kWhole, X, G, kAtenEdge>(
                layer, first + v * step, step, row, [&](int) -> decltype(by) { return by; }, [&](int, const Gradient& g) {
                  if constexpr (kSums > 0) sums[0] += g.scale;
                  if constexpr (kSums > 1) sums[1] += g.offset;
                });
        });
  };
  const FastQuantizer fast(q);
  walk.template operator()<kBackwardVectors>(fast);
  if (fast.met_rare()) walk.template operator()<1>(q);  // once more, exactly
  if constexpr (kSums > 0) {
    group_sum(sums, layer.rows.group());
    if (unit.any() && layer.rows.lane() == 0)
#pragma unroll
      for (int i = 0; i < kSums; ++i) layer.write_sum(i, unit.index, sums[i], layer.rows.units_per_channel == 1);
  }
}

}  // namespace qkernels::cuda
