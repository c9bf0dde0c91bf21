// The activations that packed layers end with, for host and device: their names, and what they compute. All backends in
// C++ call `activated`, so they give the same bits.
#pragma once

#include "numerics.h"

#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <iterator>
#include <string>
#include <string_view>

namespace qkernels {

enum class Activation { none, relu, relu6, silu, hardswish, hardsigmoid, sigmoid, gelu, gelu_tanh };

// By number.
constexpr std::string_view kActivationNames[] = {
    "none", "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh"};

inline Activation activation_named(std::string_view name) {
  std::string names;
  for (size_t number = 0; number < std::size(kActivationNames); ++number) {
    if (kActivationNames[number] == name) return static_cast<Activation>(number);
    names.append(number == 0 ? "" : ", ").append(kActivationNames[number]);
  }
  STD_TORCH_CHECK(false, "qkernels: activation must be one of ", names);
}

// 2^n of a normal number.
QK_INLINE float power_of_two(int n) {
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

// exp(x) within two units in the last place, at least exp(-87), since denormal numbers are slow, or infinity: 2^n times a
// polynomial in the rest, |r| <= log(2) / 2. 2^n is applied in two factors, each of which is a normal number.
QK_INLINE float exponential(float x) {
  x = clamp(x, -87.0f, 104.0f);
  const float scaled = round_half_even(x * 1.44269504f), n = scaled == scaled ? scaled : 0.0f;  // r is NaN then
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int power = static_cast<int>(n), half = power >> 1;
  return p * power_of_two(half) * power_of_two(power - half);
}

QK_INLINE float sigmoid(float v) { return divide(1.0f, 1.0f + exponential(-v)); }
QK_INLINE float hardsigmoid(float v) { return divide(clamp(v + 3.0f, 0.0f, 6.0f), 6.0f); }
QK_INLINE float hardswish(float v) { return divide(v * clamp(v + 3.0f, 0.0f, 6.0f), 6.0f); }
QK_INLINE float silu(float v) { return divide(v, 1.0f + exponential(-v)); }

// v times the normal distribution function: what is positive of v, less |v| times the probability beyond |v|. That
// probability is exp(-v^2 / 2) times a function that falls slowly, here a quotient of polynomials whose terms are all
// positive: nothing cancels, and small results are as exact as large ones. Its relative error is at most 5e-9 on [0, 13],
// by weighted least squares on Chebyshev nodes, with math.erfc; beyond 13 nothing is left.
QK_INLINE float gelu(float v) {
  const float a = clamp(v < 0.0f ? -v : v, 0.0f, 13.0f);
  float p = 0.00399434753f;
  p = p * a + 0.0398087464f;
  p = p * a + 0.180783898f;
  p = p * a + 0.434976071f;
  p = p * a + 0.5f;
  float q = 0.0100121945f;
  q = q * a + 0.099793382f;
  q = q * a + 0.463000506f;
  q = q * a + 1.19230521f;
  q = q * a + 1.66783702f;
  q = q * a + 1.0f;
  const float beyond = divide(a * exponential(-0.5f * (a * a)) * p, q);
  const float y = (v < 0.0f ? 0.0f : v) - beyond;
  return v < -13.0f ? v * 0.0f : y;  // of -infinity NaN, as in PyTorch
}

// PyTorch's v / 2 * (1 + tanh(u)), in which 1 + tanh(u) is 2 / (1 + exp(-2 u)).
QK_INLINE float gelu_tanh(float v) {
  const float twice = 1.59576912f * (v + 0.044715f * (v * v * v));
  return divide(v, 1.0f + exponential(-twice));
}

// NaN passes.
QK_INLINE float activated(float v, Activation activation) {
  switch (activation) {
    case Activation::relu: return v < 0.0f ? 0.0f : v;
    case Activation::relu6: return clamp(v, 0.0f, 6.0f);
    case Activation::silu: return silu(v);
    case Activation::hardswish: return hardswish(v);
    case Activation::hardsigmoid: return hardsigmoid(v);
    case Activation::sigmoid: return sigmoid(v);
    case Activation::gelu: return gelu(v);
    case Activation::gelu_tanh: return gelu_tanh(v);
    default: return v;
  }
}

}  // namespace qkernels
