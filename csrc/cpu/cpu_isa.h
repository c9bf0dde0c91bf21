// Which kernels a CPU gets, decided when they run, so that one binary serves all.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <iterator>
#include <string_view>

#if defined(__x86_64__)
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define QK_AVX2 __attribute__((target("avx2,fma")))
#define QK_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))
#define QK_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#endif

namespace qkernels {

// Kernels written in intrinsics, or loops that the compiler vectorizes. With `emulated_amx` the kernels for AMX run on
// tiles that are arrays, on any CPU, for tests.
enum class Isa { portable, emulated_amx, avx2, avxvnni, avx512vnni, amx };

inline bool has_avx512(Isa isa) { return isa == Isa::avx512vnni || isa == Isa::amx; }
inline bool has_avx2(Isa isa) { return isa == Isa::avx2 || isa == Isa::avxvnni; }

constexpr Isa kIsas[] = {Isa::amx, Isa::avx512vnni, Isa::avxvnni, Isa::avx2, Isa::emulated_amx, Isa::portable};
constexpr std::string_view kIsaNames[] = {"amx", "avx512vnni", "avxvnni", "avx2", "emulated_amx", "portable"};

// Whether the CPU has the tiles and the kernel lets this process use them, which it is asked once.
bool may_use_amx();

inline bool has(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::amx: return has(Isa::avx512vnni) && may_use_amx();
    case Isa::avx512vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    case Isa::avxvnni: return has(Isa::avx2) && __builtin_cpu_supports("avxvnni");
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default: return true;
  }
#else
  return isa == Isa::portable || isa == Isa::emulated_amx;
#endif
}

// The best of this CPU.
inline Isa best_isa() {
  for (Isa isa : kIsas)
    if (isa != Isa::emulated_amx && has(isa)) return isa;
  return Isa::portable;
}

// The best of this CPU, or what QKERNELS_CPU_ISA forces, for tests and for comparison.
inline Isa cpu_isa() {
  static const Isa best = best_isa();
  const char* forced = std::getenv("QKERNELS_CPU_ISA");
  if (forced == nullptr) return best;
  for (size_t i = 0; i < std::size(kIsas); ++i)
    if (kIsaNames[i] == forced) {
      STD_TORCH_CHECK(has(kIsas[i]), "QKERNELS_CPU_ISA=", forced, " cannot be had: this CPU lacks it");
      return kIsas[i];
    }
  STD_TORCH_CHECK(
      false, "QKERNELS_CPU_ISA='", forced,
      "': choose one of portable, avx2, avxvnni, avx512vnni, amx, emulated_amx, or unset it");
}

}  // namespace qkernels
