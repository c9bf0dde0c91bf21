// exp() in loops that the compiler vectorizes, the same bits on every CPU.
#pragma once

#include "../numerics.h"
#include "vectorized.h"

#include <bit>

namespace qkernels {

// exp(x) for x <= 88 within two units in the last place: 2^n times a polynomial in the rest, |r| <= log(2) / 2.
QK_ALWAYS_INLINE float exponential(float x) {
  x = clamp(x, -104.0f, 88.7f);
  const float rounded = round_half_even(x * 1.44269504f);
  const float n = rounded > -151.0f ? rounded : -151.0f;  // also of NaN, which r is then
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, each of which is a normal number.
  const int32_t half = static_cast<int32_t>(n) >> 1, rest = static_cast<int32_t>(n) - half;
  return p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((rest + 127) << 23);
}

}  // namespace qkernels
