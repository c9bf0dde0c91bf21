// A Quantizer (../numerics.h) that gives the same bits in half of the instructions.
//
// A GPU's division finds the reciprocal, and looks out for rare operands, anew for each element. Here the reciprocal of
// the scale is found once, and v * (1 / scale) corrected twice by its remainder: the second correction rounds as the
// division does (Markstein 1990), as long as nothing overflows and remainders are exact. Hence the scale is brought
// next to 1 first, by a power of two, and v into the range before it is divided.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../numerics.h"

namespace qkernels::cuda {

QK_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  return bits;
}

QK_INLINE float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

struct FastQuantizer : Quantizer {
  float power;       // of two, that brings the scale into [1, 4), from below 2**-126 at least to 2**-22
  float scaled;      // the scale there
  float reciprocal;  // its

  QK_INLINE explicit FastQuantizer(const Quantizer& q) : Quantizer(q) {
    const uint32_t exponent = bits_of(scale) >> 23;
    power = float_of((exponent < 254 ? 254 - exponent : 1) << 23);
    scaled = scale * power;
    reciprocal = divide(1.0f, scaled);
  }

  // v / scaled for |v| <= (2**22 + 1) * scaled, to the last bit unless v is rare: below 2**-100, but not 0.
  QK_INLINE float quotient(float v) const {
    float q = v * reciprocal;
    q = fmaf(fmaf(-q, scaled, v), reciprocal, q);
    return fmaf(fmaf(-q, scaled, v), reciprocal, q);
  }

  // Clamped before the division or after it, the code is the same: a rounded bound is off by 2**-24 of itself, its
  // quotient by a quarter of a code at most. What is rare has code 0, however it is divided.
  QK_INLINE float fake_quantize(float x) const {
    const float v = clamp((x - offset) * power, qmin * scaled, qmax * scaled);
    return multiply_add_unfused(round_half_even(quotient(v)), scale, offset);
  }

  // (x - offset) / scale; what lies outside the range may be moved, but stays outside.
  QK_INLINE float grid(float x) const {
    const float v = (x - offset) * power;
    const uint32_t magnitude = 2 * bits_of(v) - 1;
    least = magnitude < least ? magnitude : least;
    return quotient(clamp(v, (qmin - 1.0f) * scaled, (qmax + 1.0f) * scaled));
  }

  // Whether `grid` met a v whose remainders may have bits that float32 has not.
  QK_INLINE bool met_rare() const { return least < 27u << 24; }

 private:
  mutable uint32_t least = UINT32_MAX;  // of the magnitudes, which make 0 the largest
};

}  // namespace qkernels::cuda
