// csrc/cuda/instructions.cuh for a CPU: what the instructions do, by NVIDIA's manual of PTX.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <array>

namespace qkernels::cuda {

inline void store_words(uint4* to, const uint4& v) { *to = v; }

inline void load_words_once(uint32_t (&words)[4], const uint8_t* from, bool wanted) {
  if (!wanted) return;
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32. With groupID = lane / 4 and t = lane % 4: register i of a holds
// row groupID + 8 * (i % 2) and columns 2t + 8 * (i / 2), + 1; register i of b rows 2t + 8 * i, + 1 of column groupID;
// sums i row groupID + 8 * (i / 2) and column 2t + i % 2. The products and their sum are exact here, then rounded.
inline void multiply_tiles(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Given {
    uint32_t a[4], b[2];
  };
  const auto bfloat16 = [](uint32_t pair, int i) { return __uint_as_float(pair >> (16 * i) << 16); };
  const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto products = emulation::exchange(Given{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, [&](const Given* lanes) {
    std::array<double, 4> result;
    for (int i = 0; i < 4; ++i) {
      const int column = 2 * t + i % 2;
      result[i] = sums[i];
      for (int k = 0; k < 16; ++k) {
        const int of_k = k % 8 / 2, half = k / 8;
        result[i] += static_cast<double>(bfloat16(lanes[4 * group + of_k].a[i / 2 + 2 * half], k % 2)) *
            bfloat16(lanes[4 * column + of_k].b[half], k % 2);
      }
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) sums[i] = static_cast<float>(products[i]);
}

}  // namespace qkernels::cuda
