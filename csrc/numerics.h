// The arithmetic of fake quantization, for host and device. Every C++ backend calls these functions, or what gives the
// same bits (cuda/fast_quantizer.cuh), so what was trained is what is deployed, bit for bit. docs/numerics.md is the contract in words.
//
// Compile without contraction of a*b+c and without fast-math (setup.py does): the contract is IEEE float32.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define QK_INLINE __host__ __device__ __forceinline__
#else
#define QK_INLINE inline __attribute__((always_inline))
#endif

namespace qkernels {

// A scale that is not positive and finite poisons its slice: NaN.
QK_INLINE float valid_scale(float scale) {
  return scale > 0.0f && scale <= FLT_MAX ? scale : NAN;
}

// Division and rounding that no compiler flag approximates.
QK_INLINE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// a / scale; the scale is valid or NaN. A GPU's division has a slow path for rare operands and counts 0 among them, which
// behind a ReLU is every other activation: there scale / scale takes its place, and 1 - 1 (or NaN - NaN) is the result.
QK_INLINE float divide_by_scale(float a, float scale) {
#if defined(__CUDACC__) || defined(QK_EMULATED)
  const bool zero = a == 0.0f;
  const float quotient = divide(zero ? scale : a, scale);
  return zero ? quotient - quotient : quotient;
#else
  return divide(a, scale);
#endif
}

QK_INLINE float multiply_add_unfused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

// Rounded once.
QK_INLINE float fused_multiply_add(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

QK_INLINE float round_half_even(float v) {
#ifdef __CUDA_ARCH__
  return rintf(v);
#else
  return __builtin_rintf(v);
#endif
}

// NaN passes.
QK_INLINE float clamp(float v, float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1; min.NaN.f32 %0, %0, %2;" : "+f"(v) : "f"(low), "f"(high));
  return v;
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

// One quantizer: a valid scale, an offset (0 for none) and a range of codes.
struct Quantizer {
  float scale, offset, qmin, qmax;

  QK_INLINE float grid(float x) const { return divide_by_scale(x - offset, scale); }
  QK_INLINE float code(float v) const { return round_half_even(clamp(v, qmin, qmax)); }
  QK_INLINE float fake_quantize(float x) const { return multiply_add_unfused(code(grid(x)), scale, offset); }
};

// The LSQ gradient at one element: of x (straight through), and the terms that are summed for scale and offset.
struct Gradient {
  float x, scale, offset;
};

// AtenEdge decides "inside the range" after rounding, as PyTorch's own learnable op does, instead of before.
template <bool AtenEdge, typename Q>
QK_INLINE Gradient gradient(const Q& q, float x, float upstream) {
  const float v = q.grid(x);
  const float edge = AtenEdge ? round_half_even(v) : v;
  const bool inside = edge >= q.qmin && edge <= q.qmax;
  return {inside ? upstream : 0.0f, upstream * (q.code(v) - (inside ? v : 0.0f)), inside ? 0.0f : upstream};
}

// Packed codes (docs/format.md): blocks of 256 codes, eight chunks of 32. A block of b-bit codes is 32 * b bytes, cut
// into planes of 4, 2 and 1 bits, widest first (7 = 4+2+1, 8 = 4+4); the lowest bits of a code are in the first plane.
// The plane that starts at bit `from` begins at byte 32 * from of the block and, at width w, has w rows of 32 bytes:
// code t of chunk j is in byte t of row j % w, shifted by w * (j / w). So 32 successive codes are 32 successive bytes
// of each plane under one shift, and every row starts at a multiple of 32 bytes, at any number of bits.
constexpr int kChunkCodes = 32;
constexpr int kBlockCodes = 256;

// The width of the plane that starts at bit `from` of a `bits`-bit code.
QK_INLINE constexpr int plane_width(int bits, int from) {
  const int left = bits - from;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

QK_INLINE int64_t packed_bytes(int64_t codes, int bits) {
  return (codes + kBlockCodes - 1) / kBlockCodes * kChunkCodes * bits;
}

}  // namespace qkernels
