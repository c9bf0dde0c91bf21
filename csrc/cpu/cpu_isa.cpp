// What only the operating system can tell of a CPU.

#include "cpu_isa.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qkernels {

bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  // Tiles are 8 KiB of state that Linux saves for those only who have asked: arch_prctl(ARCH_REQ_XCOMP_PERM).
  constexpr long request = 0x1023, tile_data = 18;
  static const bool may = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
      __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, request, tile_data) == 0;
  return may;
#else
  return false;
#endif
}

}  // namespace qkernels
