// The elements of tensors by dtype, for kernels of both devices.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace qkernels {

using torch::headeronly::ScalarType;

template <typename T>
struct Type {
  using type = T;
};

// Calls f with the element type of a dtype, as Type<T>; BFloat16 and Float16 are what a device calls them.
template <typename BFloat16, typename Float16, typename F>
auto with_element(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float: return f(Type<float>{});
    case ScalarType::BFloat16: return f(Type<BFloat16>{});
    case ScalarType::Half: return f(Type<Float16>{});
    default: STD_TORCH_CHECK(false, "qkernels: elements must be float32, bfloat16 or float16");
  }
}

// A code takes a byte, whatever its bits.
inline ScalarType code_dtype(bool is_signed) { return is_signed ? ScalarType::Char : ScalarType::Byte; }

}  // namespace qkernels
