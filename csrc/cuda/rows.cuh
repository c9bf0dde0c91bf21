// "Rows" access: `inner` neighboring elements share a scale. A tensor seen as [outer, channels, inner] is walked row
// by row, where row (o, c) is the elements [(o * channels + c) * inner, + inner). A weight with one scale an output
// channel is [1, C, rest]; a tensor with one scale in all is one long row.
//
// A row is cut into tiles; a unit of work is some consecutive tiles of one channel, done by a group of threads: a
// block, or fewer lanes than a warp where rows are short. So a unit has one scale, and one partial sum for it.
#pragma once

#include <cstdint>

#include "../numerics.h"
#include "launch.cuh"

namespace qkernels::cuda {

constexpr int64_t kLongRow = 2048;  // from here a whole block walks a row

// How a tensor is cut. A tile is kVectors vectors of N elements for each thread of the group.
struct Rows {
  int64_t outer, channels, inner;
  int64_t segments;        // tiles in a row
  int64_t tiles_per_unit;  // but for the last unit of a channel
  int32_t units_per_channel;
  int32_t log2_group;

  // Threads of a unit: up to 32, or kThreads.
  __host__ __device__ __forceinline__ int group() const { return 1 << log2_group; }
  __device__ __forceinline__ int lane() const { return threadIdx.x & (group() - 1); }

  int64_t blocks() const { return ceil_div(channels * units_per_channel, kThreads >> log2_group); }
};

// wanted_units: how many units to make of the tensor where it has that many tiles (at least one a channel).
template <int N, int kVectors>
Rows cut_into_rows(const Extents& e, int64_t wanted_units) {
  Rows r{e.outer, e.channels, e.inner};
  const int64_t unaligned = e.inner % N == 0 ? 0 : N - 1;  // elements before a row's first whole vector, at most
  r.log2_group = 2;
  while (r.log2_group < 5 && r.group() * N < e.inner + unaligned) ++r.log2_group;
  if (e.inner > kLongRow) r.log2_group = kLog2Threads;
  r.segments = ceil_div(e.inner + unaligned, int64_t{r.group()} * N * kVectors);
  const int64_t tiles = e.outer * r.segments;
  const int64_t units = std::max<int64_t>(1, std::min(tiles, ceil_div(wanted_units, std::max<int64_t>(e.channels, 1))));
  r.tiles_per_unit = std::max<int64_t>(1, ceil_div(tiles, units));
  r.units_per_channel = static_cast<int32_t>(std::max<int64_t>(1, ceil_div(tiles, r.tiles_per_unit)));
  return r;
}

// Threads that walk a row together, at most: to estimate with.
inline int64_t threads_of_row(const Extents& e) { return e.inner > kLongRow ? kThreads : 32; }

// Units that fill the device a few times over, so that the last ones to end leave little of it idle.
inline int64_t filling_units(const Extents& e, int64_t resident_threads) {
  constexpr int64_t kWaves = 4;
  return kWaves * resident_threads / threads_of_row(e);
}

// The unit of this thread in block `block` of a tensor. Threads past the last unit get one without tiles.
struct Unit {
  int64_t index, channel, tile, end_tile;

  __device__ __forceinline__ bool any() const { return tile < end_tile; }
};

__device__ __forceinline__ Unit find_unit(const Rows& r, uint32_t block) {
  Unit u;
  u.index = (static_cast<int64_t>(block) * kThreads + threadIdx.x) >> r.log2_group;
  if (r.units_per_channel == 1) {
    u.channel = u.index;
    u.tile = 0;
  } else {  // then the units are few enough for 32 bits
    u.channel = static_cast<uint32_t>(u.index) / static_cast<uint32_t>(r.units_per_channel);
    u.tile = (u.index - u.channel * r.units_per_channel) * r.tiles_per_unit;
  }
  u.end_tile = u.channel < r.channels ? min(u.tile + r.tiles_per_unit, r.outer * r.segments) : u.tile;
  return u;
}

// Calls body<n, whole>(first, step, row) so that every element of the unit is covered once by the n vectors that start
// at first, first + step, ...: n = kVectors, all whole, inside a row; one at a time, maybe partial, at its ends.
template <int N, int kVectors, typename Body>
__device__ __forceinline__ void walk_rows(const Rows& r, Unit u, bool aligned, Body&& body) {
  if (!u.any()) return;
  const int step = r.group() * N;
  int64_t o = r.segments == 1 ? u.tile : r.outer == 1 ? 0 : u.tile / r.segments;
  int64_t segment = u.tile - o * r.segments;
  for (; u.tile < u.end_tile; ++u.tile) {
    const int64_t begin = (o * r.channels + u.channel) * r.inner;
    const Span row{begin, begin + r.inner, aligned};
    const int64_t first = begin / N * N + segment * (kVectors * step) + r.lane() * N;
    if (aligned && first >= row.begin && first + (kVectors - 1) * step + N <= row.end) {
      body.template operator()<kVectors, true>(first, step, row);
    } else {
#pragma unroll 1
      for (int v = 0; v < kVectors; ++v)
        if (first + v * step < row.end) body.template operator()<1, false>(first + v * step, step, row);
    }
    if (++segment == r.segments) {
      segment = 0;
      ++o;
    }
  }
}

}  // namespace qkernels::cuda
