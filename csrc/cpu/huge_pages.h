// Large results are mapped afresh by malloc on every call, and the page faults of their first use can take longer than
// the kernel that writes them.
#pragma once

#include "../tensor_layout.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qkernels {

constexpr int64_t kFreshBytes = 32 << 20;  // from here on glibc's malloc never reuses memory
constexpr int64_t kHugePage = 2 << 20;

// Asks the system for 2 MiB pages behind a tensor of `least` bytes or more that nobody has written yet.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& t, [[maybe_unused]] int64_t least = kFreshBytes) {
#if defined(__linux__)
  const int64_t bytes = t.numel() * t.element_size();
  if (bytes < least) return;
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.data_ptr()) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.data_ptr()) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace qkernels
