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
  const float r = fused_multiply_add(n, 2.12194440e-4f, fused_multiply_add(n, -0.693359375f, x));
  float p = 1.0f / 5040;
  p = fused_multiply_add(p, r, 1.0f / 720);
  p = fused_multiply_add(p, r, 1.0f / 120);
  p = fused_multiply_add(p, r, 1.0f / 24);
  p = fused_multiply_add(p, r, 1.0f / 6);
  p = fused_multiply_add(p, r, 0.5f);
  p = fused_multiply_add(p, r, 1.0f);
  p = fused_multiply_add(p, r, 1.0f);
  const int power = static_cast<int>(n), half = power >> 1;
  return p * power_of_two(half) * power_of_two(power - half);
}

QK_INLINE float sigmoid(float v) { return divide(1.0f, 1.0f + exponential(-v)); }
QK_INLINE float hardsigmoid(float v) { return divide(clamp(v + 3.0f, 0.0f, 6.0f), 6.0f); }
QK_INLINE float hardswish(float v) { return divide(v * clamp(v + 3.0f, 0.0f, 6.0f), 6.0f); }
QK_INLINE float silu(float v) { return divide(v, 1.0f + exponential(-v)); }

// v times the normal distribution function, which is 1/2 + v g(v^2): g is a polynomial on [0, 5.5^2], by weighted least
// squares on Chebyshev nodes, with math.erf, reweighted until the error was even. Within 8e-7 of the exact value (PyTorch's
// is within 12e-7). Beyond 5.5 the function is 0 or 1. Multiplications and additions are fused, half as many instructions.
QK_INLINE float gelu(float v) {
  const float a = clamp(v, -5.5f, 5.5f), s = fused_multiply_add(a * a, 0.0661156997f, -1.0f);  // [0, 5.5^2] as [-1, 1]
  float g = 0.000428736152f;
  g = fused_multiply_add(g, s, -0.00127524161f);
  g = fused_multiply_add(g, s, 0.00134186947f);
  g = fused_multiply_add(g, s, -0.00149307994f);
  g = fused_multiply_add(g, s, 0.00388025981f);
  g = fused_multiply_add(g, s, -0.00739217876f);
  g = fused_multiply_add(g, s, 0.0106614055f);
  g = fused_multiply_add(g, s, -0.0148147047f);
  g = fused_multiply_add(g, s, 0.0202361457f);
  g = fused_multiply_add(g, s, -0.0260776728f);
  g = fused_multiply_add(g, s, 0.032088086f);
  g = fused_multiply_add(g, s, -0.0387908183f);
  g = fused_multiply_add(g, s, 0.0477367155f);
  g = fused_multiply_add(g, s, -0.0641723722f);
  g = fused_multiply_add(g, s, 0.128551945f);
  float share = clamp(fused_multiply_add(a, g, 0.5f), 0.0f, 1.0f);
  share = v > -5.5f ? share : v * 0.0f;  // of minus infinity and NaN, NaN
  return v * (v < 5.5f ? share : 1.0f);
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
