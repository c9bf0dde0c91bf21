// Reading and writing float32, bfloat16 and float16 elements in loops that the compiler vectorizes, and the attribute
// that compiles such a loop once for each instruction set and picks one when the library is loaded.
#pragma once

#include "../elements.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define QK_VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define QK_VECTORIZED
#endif
#define QK_ALWAYS_INLINE inline __attribute__((always_inline))

namespace qkernels {

constexpr int64_t kLaneBlock = 1024;  // elements summed in float32 before the sum goes on in float64

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

QK_ALWAYS_INLINE float load(float v) { return v; }
QK_ALWAYS_INLINE float load(Float16 v) { return static_cast<float>(v); }
QK_ALWAYS_INLINE float load(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

QK_ALWAYS_INLINE void store(float* p, float v) { *p = v; }
QK_ALWAYS_INLINE void store(Float16* p, float v) { *p = static_cast<Float16>(v); }
QK_ALWAYS_INLINE void store(BFloat16* p, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  p->bits = static_cast<uint16_t>(v != v ? 0x7fc0u : rounded);
}

// Calls f with the element type of a dtype, as Type<T>.
template <class F>
auto with_type(ScalarType dtype, F&& f) {
  return with_element<BFloat16, Float16>(dtype, std::forward<F>(f));
}

// Writes `bytes` around the caches: it saves reading every line that is about to be overwritten, a third of the traffic
// of a copy, and leaves the caches to others. For results too large to be in a cache still when they are read.
inline void stream(void* to, const void* from, int64_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(out) & 15);
  std::memcpy(out, in, head);
  int64_t i = head;
  for (; i + 16 <= bytes; i += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
  std::memcpy(out + i, in + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

}  // namespace qkernels
