// Fake quantization by columns, of one tensor.
#pragma once

#include <cstdint>

#include "columns.cuh"
#include "quantize.cuh"

namespace qkernels::cuda {

struct Matrix : Arguments {
  Columns columns;
};

// The quantizers of N neighboring columns. What lies past the last column is never used.
template <int N>
struct ColumnQuantizers {
  Quantizer at[N];

  __device__ __forceinline__ ColumnQuantizers(const Matrix& m, int64_t column) {
#pragma unroll
    for (int k = 0; k < N; ++k)
      at[k] = column + k < m.columns.columns() ? m.quantizer((column + k) / m.columns.inner) : Quantizer{1.0f};
  }

  __device__ __forceinline__ const Quantizer& operator()(int k) const { return at[k]; }
};

// Traffic as forward_rows.
template <typename X, typename Y>
__global__ __launch_bounds__(kThreads) void forward_columns(const __grid_constant__ Matrix m) {
  constexpr int N = kWidth<X, Y>;
  const ColumnUnit unit = find_columns<N>(m.columns);
  const ColumnQuantizers<N> quantizers(m, unit.column);
  walk_columns<N, kForwardVectors>(
      m.columns, unit, m.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        quantize_vectors<kVectors, kWhole, X, Y>(m, first, step, row, quantizers);
      });
}

// Traffic as backward_rows. kSums: 0 for grad_x alone, 2 with the sums for scale and offset.
template <typename X, typename G, bool kAtenEdge, int kSums>
__global__ __launch_bounds__(kThreads) void backward_columns(const __grid_constant__ Matrix m) {
  constexpr int N = kWidth<X, G>;
  const ColumnUnit unit = find_columns<N>(m.columns);
  const ColumnQuantizers<N> quantizers(m, unit.column);
  float sums[2][N] = {};
  walk_columns<N, kBackwardVectors>(
      m.columns, unit, m.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        gradient_vectors<kVectors, kWhole, X, G, kAtenEdge>(
            m, first, step, row, quantizers, [&](int k, const Gradient& g) {
              if constexpr (kSums > 0) {
                sums[0][k] += g.scale;
                sums[1][k] += g.offset;
              }
            });
      });
  if constexpr (kSums > 0)
    sum_columns(m.columns, unit, sums, [&](int i, int64_t column, float sum) {
      m.write_sum(i, partial_of(m.columns, unit, column), sum, m.columns.sums_per_channel() == 1);
    });
}

}  // namespace qkernels::cuda
