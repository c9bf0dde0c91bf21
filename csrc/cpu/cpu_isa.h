// Which kernels a CPU gets, decided when they run, so that one binary serves all.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#endif
#define QK_AVX2 __attribute__((target("avx2,fma")))
#define QK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define QK_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

namespace qkernels {

// Kernels written in intrinsics, or loops that the compiler vectorizes; a CPU has all that come before its best.
enum class Isa { portable, avx2, avx512vnni };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return Isa::avx512vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

inline Isa isa_named(std::string_view name) {
  if (name == "portable") return Isa::portable;
  if (name == "avx2") return Isa::avx2;
  STD_TORCH_CHECK(
      name == "avx512vnni", "QKERNELS_CPU_ISA='", name, "': choose one of portable, avx2, avx512vnni, or unset it");
  return Isa::avx512vnni;
}

// The best of this CPU, or what QKERNELS_CPU_ISA forces, for tests and for comparison.
inline Isa cpu_isa() {
  const char* forced = std::getenv("QKERNELS_CPU_ISA");
  if (forced == nullptr) return best_isa();
  const Isa isa = isa_named(forced);
  STD_TORCH_CHECK(isa <= best_isa(), "QKERNELS_CPU_ISA=", forced, " cannot be had: this CPU lacks it");
  return isa;
}

}  // namespace qkernels
