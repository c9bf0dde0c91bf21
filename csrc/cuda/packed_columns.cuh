// Rows of x as columns of bfloat16 in shared memory, laid out for the tensor cores. bfloat16 holds every code exactly,
// and a float16 or float32 is the exact sum of two or three bfloat16, so columns of those parts keep all of x.
#pragma once

#include <cstdint>

#include "../numerics.h"
#include "launch.cuh"
#include "packed_memory.cuh"

namespace qkernels::cuda {

template <typename X>
constexpr int kParts = sizeof(X) == sizeof(float) ? 3 : 2;
template <>
constexpr int kParts<bf16> = 1;

// Takes the leading 8 bits of v's significand away from it, as the bits of a bfloat16. Below 2^-133 there are none.
__device__ __forceinline__ uint32_t take_leading(float& v) {
  if (v != v) return 0x7fff;  // every part of NaN is NaN
  const uint32_t bits = __float_as_uint(v) >> 16;
  const float rest = v - __uint_as_float(bits << 16);
  v = rest == rest ? rest : 0.0f;  // infinity leaves nothing
  return bits;
}

// Where the columns are in shared memory. A block of 256 values takes 528 bytes, a column 64 more than a multiple of
// 128: so 8 lanes that read 16 bytes each, of 2 columns, 2 blocks and 2 halves of a chunk, find different banks.
struct StagedColumns {
  static constexpr int kBlockBytes = kBlockCodes * sizeof(bf16) + 16;
  static constexpr int kMaxBlocks = 64;   // of all columns together
  static constexpr int kMaxColumns = 16;
  static constexpr int kBytes = kMaxBlocks * kBlockBytes + kMaxColumns * 112;

  int columns, blocks, pitch;

  // As many blocks of each column at a time as fit, and an even number.
  static StagedColumns fit(int columns, int64_t wanted_blocks) {
    const int blocks = static_cast<int>(std::min<int64_t>(kMaxBlocks / columns / 2, ceil_div(wanted_blocks, 2))) * 2;
    return {columns, blocks, blocks * kBlockBytes + ((64 - blocks * kBlockBytes) & 127)};
  }

  __device__ __forceinline__ uint8_t* at(uint8_t* shared, int column, int block) const {
    return shared + column * pitch + block * kBlockBytes;
  }
};

// Writes the values [first, first + 256 * blocks) of `rows` rows of x, counted from each row's begin; those outside the
// row are 0. `begin`: the index in x of the first row's begin.
template <typename X>
__device__ __forceinline__ void stage(
    const StagedColumns& to, uint8_t* shared, const X* x, bool aligned, int64_t begin, int in, int rows,
    int64_t first) {
  constexpr int N = 8, kVectors = kBlockCodes / N;
#pragma unroll 1  // the registers are full of weights by now
  for (int i = threadIdx.x; i < rows * to.blocks * kVectors; i += kThreads) {
    const int row = i / (to.blocks * kVectors), at = i - row * to.blocks * kVectors;
    const int64_t row_begin = begin + int64_t{row} * in, index = row_begin + first + at * N;
    const Span span{row_begin, row_begin + in, aligned && index % N == 0};
    const Vector<X, N> values = load<false, N>(x, index, span);
    float rest[N];
#pragma unroll
    for (int k = 0; k < N; ++k) rest[k] = to_float(values.at[k]);
#pragma unroll
    for (int part = 0; part < kParts<X>; ++part) {
      Words<4> words;
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = take_leading(rest[2 * w]);
        words.at[w] = low | take_leading(rest[2 * w + 1]) << 16;
      }
      uint8_t* const block = to.at(shared, row * kParts<X> + part, at / kVectors);
      *reinterpret_cast<Words<4>*>(block + at % kVectors * sizeof(words)) = words;
    }
  }
}

}  // namespace qkernels::cuda
