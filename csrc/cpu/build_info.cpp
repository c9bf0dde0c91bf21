// What `python -m qkernels` says of this library and of the CPU: C functions, called without a tensor.

#include "cpu_isa.h"

#include <string>

#define QK_EXPORTED extern "C" __attribute__((visibility("default")))

QK_EXPORTED const char* qkernels_build_info() {
  static const std::string info = std::string(__VERSION__) + ", C++ " + std::to_string(__cplusplus);
  return info.c_str();
}

// The instruction sets that matter here and that this process may use, separated by spaces.
QK_EXPORTED const char* qkernels_cpu_features() {
  static const std::string features = [] {
    std::string found;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found += "avx2 ";
    if (__builtin_cpu_supports("fma")) found += "fma ";
    if (__builtin_cpu_supports("avxvnni")) found += "avxvnni ";
    if (__builtin_cpu_supports("avx512f")) found += "avx512f ";
    if (__builtin_cpu_supports("avx512bw")) found += "avx512bw ";
    if (__builtin_cpu_supports("avx512vnni")) found += "avx512vnni ";
    if (__builtin_cpu_supports("avx512bf16")) found += "avx512bf16 ";
    if (qkernels::may_use_amx()) found += "amx ";
#endif
    return found;
  }();
  return features.c_str();
}
