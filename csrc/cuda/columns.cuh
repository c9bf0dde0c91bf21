// "Columns" access: few neighboring elements share a scale (channels last: inner = 1). A tensor seen as
// [outer, channels, inner] is walked as a matrix of `outer` rows and channels * inner columns; a thread keeps N
// neighboring columns, their scales and their sums in registers, and walks down the rows.
#pragma once

#include <cstdint>

#include "../numerics.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace qkernels::cuda {

// Columns need rows enough to share the work among blocks; else rows serve better.
inline bool prefer_columns(const Extents& e) { return e.channels > 1 && e.inner < 16 && e.outer >= 16; }

// How a matrix is cut: a block is width() threads across and rows() down.
struct Columns {
  int64_t outer, channels, inner;
  int32_t log2_width;
  int32_t blocks_per_column;  // blocks that share a column: they take its rows in turn

  __host__ __device__ __forceinline__ int width() const { return 1 << log2_width; }  // threads across
  __host__ __device__ __forceinline__ int rows() const { return kThreads >> log2_width; }  // threads down
  __host__ __device__ __forceinline__ int64_t columns() const { return channels * inner; }
  // Partial sums that the blocks leave for a channel.
  __host__ __device__ __forceinline__ int64_t sums_per_channel() const { return blocks_per_column * inner; }
};

template <int N, int kVectors>
Columns cut_into_columns(const Extents& e, int64_t resident_threads) {
  Columns c{e.outer, e.channels, e.inner, 0, 1};
  while (c.log2_width < kLog2Threads && c.width() * N < c.columns()) ++c.log2_width;
  const int64_t across = ceil_div(c.columns(), c.width() * N);
  const int64_t row_sets = ceil_div(e.outer, c.rows() * kVectors);
  constexpr int64_t kWaves = 2;
  c.blocks_per_column = static_cast<int32_t>(
      std::max<int64_t>(1, std::min(row_sets, ceil_div(kWaves * resident_threads / kThreads, across))));
  return c;
}

template <int N>
int64_t blocks_of(const Columns& c) {
  return ceil_div(c.columns(), c.width() * N) * c.blocks_per_column;
}

// The columns of this thread, and the rows that it walks.
struct ColumnUnit {
  int64_t column, row;
  int32_t row_step, share;  // share: which of the blocks_per_column
};

template <int N>
__device__ __forceinline__ ColumnUnit find_columns(const Columns& c) {
  const uint32_t across = blockIdx.x / static_cast<uint32_t>(c.blocks_per_column);
  ColumnUnit u;
  u.share = static_cast<int32_t>(blockIdx.x - across * c.blocks_per_column);
  u.column = (static_cast<int64_t>(across) * c.width() + (threadIdx.x & (c.width() - 1))) * N;
  u.row = static_cast<int64_t>(u.share) * c.rows() + (threadIdx.x >> c.log2_width);
  u.row_step = c.rows() * c.blocks_per_column;
  return u;
}

// Calls body<n, whole>(first, step, row) as walk_rows does; all vectors of a call lie in the same columns.
template <int N, int kVectors, typename Body>
__device__ __forceinline__ void walk_columns(const Columns& c, const ColumnUnit& u, bool aligned, Body&& body) {
  const int64_t columns = c.columns();
  if (u.column >= columns) return;
  const bool whole = aligned && columns % N == 0;
  const int64_t row_step = u.row_step, step = row_step * columns;
  int64_t o = u.row;
  if (whole)
    for (; o + (kVectors - 1) * row_step < c.outer; o += kVectors * row_step)
      body.template operator()<kVectors, true>(o * columns + u.column, step, Span{});
  for (; o < c.outer; o += row_step)
    body.template operator()<1, false>(
        o * columns + u.column, step, Span{o * columns, (o + 1) * columns, whole});
}

// Adds up the sums of the block's rows for each column, in a fixed order, and calls emit(i, column, sum) for the i-th
// kind of sum. All threads of the block must call it, once in a kernel.
template <int kSums, int N, typename Emit>
__device__ __forceinline__ void sum_columns(
    const Columns& c, const ColumnUnit& u, float (&sums)[kSums][N], Emit&& emit) {
  __shared__ float of_row[kSums][kThreads * N];
  for (int offset = 16; offset >= c.width(); offset /= 2)
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int k = 0; k < N; ++k) sums[i][k] += __shfl_xor_sync(kWholeWarp, sums[i][k], offset);

  // Lanes that hold the same columns now hold the same sums; one of them a warp speaks for all.
  const int log2_lanes = max(c.log2_width, 5), rows = kThreads >> log2_lanes, width = c.width() * N;
  const int lane = threadIdx.x & ((1 << log2_lanes) - 1), row = threadIdx.x >> log2_lanes;
  if (lane < c.width())
#pragma unroll
    for (int i = 0; i < kSums; ++i)
#pragma unroll
      for (int k = 0; k < N; ++k) of_row[i][row * width + lane * N + k] = sums[i][k];
  __syncthreads();

  const int64_t first = u.column - (threadIdx.x & (c.width() - 1)) * N;
  for (int j = threadIdx.x; j < width && first + j < c.columns(); j += kThreads)
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float sum = of_row[i][j];
      for (int r = 1; r < rows; ++r) sum += of_row[i][r * width + j];
      emit(i, first + j, sum);
    }
}

// Where the sum of a column stands among the partials: those of a channel together, as Fold wants them.
__device__ __forceinline__ int64_t partial_of(const Columns& c, const ColumnUnit& u, int64_t column) {
  const int64_t channel = column / c.inner;
  return (channel * c.blocks_per_column + u.share) * c.inner + (column - channel * c.inner);
}

}  // namespace qkernels::cuda
