// Which kernels a CPU gets, decided when they run, so that one binary serves all.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#endif
#define QK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define QK_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

namespace qkernels {

// Whether to use AVX-512 kernels written in intrinsics. QKERNELS_CPU_ISA=portable keeps to loops that the compiler
// vectorizes, for tests and for comparison.
inline bool use_avx512() {
#if defined(__x86_64__)
  const char* isa = std::getenv("QKERNELS_CPU_ISA");
  return (isa == nullptr || std::strcmp(isa, "portable") != 0) && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace qkernels
