// The instructions that C++ has no words for, or that the compiler does not choose by itself. The kernels are otherwise
// plain CUDA C++, so tests/emulation runs them on a CPU with its own version of this file.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace qkernels::cuda {

// In assembly because the compiler splits a plain assignment into four stores here.
__device__ __forceinline__ void store_words(uint4* to, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Loads if `wanted` what is read once, and so takes no room in L1. Volatile, to stay before the barriers that follow;
// in assembly with its predicate, because the compiler copies registers around a branch.
__device__ __forceinline__ void load_words_once(uint32_t (&words)[4], const uint8_t* from, bool wanted) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
      : "l"(from), "r"(static_cast<int>(wanted)));
}

// sums += the product of a 16x16 tile a and a 16x8 tile b of bfloat16, two in a word. Lane 4 * i + j holds columns 2j,
// 2j + 1 of rows i and i + 8 of a, then columns 2j + 8, 2j + 9 of both; rows 2j, 2j + 1, then 2j + 8, 2j + 9 of column i
// of b; and the sums of row i, then of row i + 8, with columns 2j and 2j + 1.
__device__ __forceinline__ void multiply_tiles(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800  // packed_gemv refuses older GPUs
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace qkernels::cuda
