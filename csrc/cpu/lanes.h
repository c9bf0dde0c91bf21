// Sixteen floats as one value, whatever the CPU's registers hold: sums in lanes come out the same on all of them.
#pragma once

#include "vectorized.h"

namespace qkernels {

constexpr int64_t kFloatLanes = 16;
typedef float FloatLanes __attribute__((vector_size(kFloatLanes * sizeof(float))));

// The sum of f(x[i]), i < n: element i in lane i % 16, then halves of the lanes.
template <class F>
QK_ALWAYS_INLINE float sum_in_lanes(const float* x, int64_t n, const F& f) {
  FloatLanes sums = {};
  int64_t i = 0;
  for (; i + kFloatLanes <= n; i += kFloatLanes) {
    FloatLanes v;
    std::memcpy(&v, x + i, sizeof v);
    sums += f(v);
  }
  FloatLanes rest = {};
  std::memcpy(&rest, x + i, (n - i) * sizeof(float));
  rest = f(rest);
  float halves[kFloatLanes];
  for (int64_t lane = 0; lane < kFloatLanes; ++lane) halves[lane] = sums[lane] + (lane < n - i ? rest[lane] : 0.0f);
  for (int64_t half = kFloatLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) halves[lane] += halves[lane + half];
  return halves[0];
}

}  // namespace qkernels
