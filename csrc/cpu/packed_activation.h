// Activations in the epilogue: bounds where they clamp, and otherwise a function of each element, which the compiler
// vectorizes for every instruction set from its one definition in ../activation.h.
#pragma once

#include "../activation.h"
#include "cpu_isa.h"
#include "vectorized.h"

#include <limits>

namespace qkernels {

struct Bounds {
  float low, high;
};

inline Bounds bounds_of(Activation activation) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  switch (activation) {
    case Activation::relu: return {0.0f, infinity};
    case Activation::relu6: return {0.0f, 6.0f};
    default: return {-infinity, infinity};
  }
}

// Calls f.operator()<A>() with the activation that is left to compute, which is none where bounds_of() has it.
template <class F>
void with_function(Activation activation, const F& f) {
  switch (activation) {
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::hardswish: return f.template operator()<Activation::hardswish>();
    case Activation::hardsigmoid: return f.template operator()<Activation::hardsigmoid>();
    case Activation::sigmoid: return f.template operator()<Activation::sigmoid>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return f.template operator()<Activation::gelu_tanh>();
    default: return f.template operator()<Activation::none>();
  }
}

template <Activation A>
QK_VECTORIZED void activate(float* values, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] = activated(values[i], A);
}

#if defined(__x86_64__)
// Of one register. The array is none in what is compiled: a loop over it is what GCC and Clang vectorize.
template <Activation A>
QK_AVX512 inline __m512 activated_avx512(__m512 v) {
  if constexpr (A == Activation::none) return v;
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, v);
#pragma omp simd simdlen(16)
  for (int i = 0; i < 16; ++i) lanes[i] = activated(lanes[i], A);
  return _mm512_load_ps(lanes);
}

template <Activation A>
QK_AVX2 inline __m256 activated_avx2(__m256 v) {
  if constexpr (A == Activation::none) return v;
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
#pragma omp simd simdlen(8)
  for (int i = 0; i < 8; ++i) lanes[i] = activated(lanes[i], A);
  return _mm256_load_ps(lanes);
}
#endif

}  // namespace qkernels
