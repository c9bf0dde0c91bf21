// The activations that packed layers end with.
#pragma once

#include "numerics.h"

#include <torch/headeronly/util/Exception.h>

#include <string_view>

namespace qkernels {

enum class Activation { none, relu, relu6, silu };

inline Activation activation_named(std::string_view name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "relu6") return Activation::relu6;
  STD_TORCH_CHECK(name == "silu", "qkernels: activation must be none, relu, relu6 or silu");
  return Activation::silu;
}

}  // namespace qkernels
