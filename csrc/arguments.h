// What the ops ask of their arguments, for the kernels of both devices: programs that are compiled, exported or without
// Python call these directly. The same checks stand in qkernels/ops, with the messages that users of Python see.
#pragma once

#include "activation.h"
#include "checked.h"
#include "elements.h"
#include "numerics.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <ostream>
#include <string_view>
#include <vector>

namespace qkernels {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Axis = std::optional<int64_t>;

constexpr int64_t kMostCode = 1 << 22;  // float32 rounds to the nearest integer exactly up to here

// The op that asks; of a list of tensors, also which.
struct Op {
  const char* name;
  int64_t layer = -1;
};

inline std::ostream& operator<<(std::ostream& out, const Op& op) {
  out << op.name;
  return op.layer < 0 ? out : out << ", layer " << op.layer;
}

inline bool is_element(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline bool is_code(ScalarType dtype) { return dtype == ScalarType::Char || dtype == ScalarType::Byte; }

inline bool have_one_shape(const Tensor& a, const Tensor& b) {
  const auto of_a = a.sizes(), of_b = b.sizes();
  return of_a.size() == of_b.size() && std::equal(of_a.begin(), of_a.end(), of_b.begin());
}

inline void check_same_device(const Op& op, const char* name, const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(
      t.get_device_index() == x.get_device_index() && t.is_cpu() == x.is_cpu(), op, ": ", name,
      " must be on the device of the first argument");
}

inline void check_element(const Op& op, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(is_element(dtype), op, ": ", name, " must be float32, bfloat16 or float16, got ", dtype);
}

inline void check_x(const Op& op, const Tensor& x, Axis axis) {
  check_element(op, "x", x.scalar_type());
  STD_TORCH_CHECK(!axis || (*axis >= 0 && *axis < x.dim()), op, ": axis ", *axis, " is out of range for x");
}

inline void check_range(const Op& op, int64_t qmin, int64_t qmax) {
  STD_TORCH_CHECK(
      -kMostCode <= qmin && qmin < qmax && qmax <= kMostCode, op, ": need qmin < qmax within +-2**22, got qmin=", qmin,
      ", qmax=", qmax);
}

inline void check_float32(const Op& op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ", t.scalar_type());
}

// `t` (scale or offset) is float32 on x's device, with one element, or one a channel.
inline void check_per_scale(const Op& op, const char* name, const Tensor& t, const Tensor& x, Axis axis) {
  check_float32(op, name, t);
  check_same_device(op, name, t, x);
  STD_TORCH_CHECK(axis || t.numel() == 1, op, ": ", name, " must have one element without an axis");
  STD_TORCH_CHECK(
      !axis || (t.dim() == 1 && t.size(0) == x.size(*axis)), op, ": ", name, " must have shape (", x.size(*axis),
      "), one element for each channel along axis ", *axis);
}

// Training ----------------------------------------------------------------------------------------------------------

inline void check_quantizer(
    const Op& op, const Tensor& x, const Tensor& scale, const OptionalTensor& offset, int64_t qmin, int64_t qmax,
    Axis axis) {
  check_x(op, x, axis);
  check_range(op, qmin, qmax);
  check_per_scale(op, "scale", scale, x, axis);
  if (offset) check_per_scale(op, "offset", *offset, x, axis);
}

inline void check_grad(const Op& op, const Tensor& grad, const Tensor& x) {
  check_element(op, "grad", grad.scalar_type());
  check_same_device(op, "grad", grad, x);
  STD_TORCH_CHECK(have_one_shape(grad, x), op, ": grad must have the shape of x");
}

inline void check_layers(
    const char* name, const std::vector<Tensor>& xs, const std::vector<Tensor>& scales,
    const std::vector<int64_t>& qmins, const std::vector<int64_t>& qmaxs, Axis axis,
    const std::vector<double>& grad_factors) {
  const size_t layers = xs.size();
  STD_TORCH_CHECK(
      scales.size() == layers && qmins.size() == layers && qmaxs.size() == layers && grad_factors.size() == layers,
      name, ": xs, scales, qmins, qmaxs and grad_factors must have one entry a layer");
  for (size_t i = 0; i < layers; ++i) {
    const Op op{name, static_cast<int64_t>(i)};
    check_quantizer(op, xs[i], scales[i], std::nullopt, qmins[i], qmaxs[i], axis);
    STD_TORCH_CHECK(xs[i].scalar_type() == xs[0].scalar_type(), op, ": all xs must share a dtype");
    check_same_device(op, "x", xs[i], xs[0]);
  }
}

inline void check_grads(const char* name, const std::vector<Tensor>& grads, const std::vector<Tensor>& xs) {
  STD_TORCH_CHECK(grads.size() == xs.size(), name, ": grads and xs must have one entry a layer");
  for (size_t i = 0; i < grads.size(); ++i) {
    const Op op{name, static_cast<int64_t>(i)};
    check_grad(op, grads[i], xs[i]);
    STD_TORCH_CHECK(grads[i].scalar_type() == grads[0].scalar_type(), op, ": all grads must share a dtype");
  }
}

// Packed inference --------------------------------------------------------------------------------------------------

inline void check_bits(const Op& op, int64_t bits) {
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, op, ": bits must be 2..8, got ", bits);
}

inline void check_pack(const Tensor& codes, int64_t bits) {
  check_bits({"pack"}, bits);
  STD_TORCH_CHECK(is_code(codes.scalar_type()), "pack: codes must be int8 or uint8, got ", codes.scalar_type());
}

inline void check_packed(const Op& op, const Tensor& packed, int64_t bits, int64_t count) {
  check_bits(op, bits);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte, op, ": packed must be uint8, got ", packed.scalar_type());
  // Divided before anything is multiplied: `count` may be any number.
  const int64_t block_bytes = kChunkCodes * bits, blocks = count / kBlockCodes + (count % kBlockCodes != 0);
  STD_TORCH_CHECK(
      count >= 0 && packed.dim() > 0 && packed.size(packed.dim() - 1) % block_bytes == 0 &&
          packed.size(packed.dim() - 1) / block_bytes == blocks,
      op, ": packed must have ", block_bytes, " bytes for every 256 of ", count, " codes of ", bits, " bits");
}

// `t` is float32, of that shape, and on the device of x.
inline void check_members(
    const Op& op, const char* name, const Tensor& t, std::initializer_list<int64_t> shape, const Tensor& x) {
  check_float32(op, name, t);
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(
      sizes.size() == shape.size() && std::equal(sizes.begin(), sizes.end(), shape.begin()), op, ": ", name,
      " must have one element for each member", shape.size() > 1 ? " and channel" : "");
  check_same_device(op, name, t, x);
}

inline void check_quantize(const Tensor& x, const Tensor& scale, int64_t qmin, int64_t qmax, Axis axis) {
  check_quantizer({"quantize"}, x, scale, std::nullopt, qmin, qmax, axis);
  STD_TORCH_CHECK(
      (qmin >= -128 && qmax <= 127) || (qmin >= 0 && qmax <= 255), "quantize: codes in [", qmin, ", ", qmax,
      "] fit neither int8 nor uint8");
}

inline void check_dequantize_packed(
    const Tensor& packed, const Tensor& scale, int64_t bits, int64_t count, ScalarType out_dtype) {
  const Op op{"dequantize_packed"};
  check_packed(op, packed, bits, count);
  STD_TORCH_CHECK(
      packed.dim() == 2 && scale.dim() == 2 && scale.size(0) == packed.size(0) && scale.size(1) > 0, op,
      ": packed must be [members, bytes] and scale [members, channels]");
  STD_TORCH_CHECK(count % scale.size(1) == 0, op, ": ", count, " codes do not divide into ", scale.size(1), " channels");
  check_same_device(op, "scale", scale, packed);
  check_float32(op, "scale", scale);
  check_element(op, "out_dtype", out_dtype);
}

// What all layers of packed weights share; x is [images, in_channels, ...], and a kernel has so many taps.
inline void check_packed_layer(
    const Op& op, const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& bias, int64_t bits,
    int64_t taps, int64_t groups, bool shared, std::string_view activation) {
  STD_TORCH_CHECK(
      packed.dim() == 2 && scale.dim() == 2 && scale.size(0) == packed.size(0) && scale.size(0) > 0, op,
      ": packed must be [members, bytes] and scale [members, channels]");
  const int64_t members = scale.size(0), channels = scale.size(1), in_channels = x.size(1);
  STD_TORCH_CHECK(in_channels > 0, op, ": x must have channels");
  STD_TORCH_CHECK(
      groups > 0 && in_channels % groups == 0 && channels % groups == 0, op, ": ", in_channels, " input and ", channels,
      " output channels do not divide by groups=", groups);
  STD_TORCH_CHECK(
      shared || x.size(0) % members == 0, op, ": ", x.size(0), " images do not divide among ", members, " members");
  check_packed(op, packed, bits, checked_product({channels, checked_product({taps, in_channels / groups})}));
  check_same_device(op, "packed", packed, x);
  check_members(op, "scale", scale, {members, channels}, x);
  if (bias) check_members(op, "bias", *bias, {members, channels}, x);
  activation_named(activation);
}

inline void check_packed_gemv(
    const Tensor& x, const Tensor& packed, const Tensor& scale, const OptionalTensor& bias, int64_t bits, bool shared,
    std::string_view activation) {
  const Op op{"packed_gemv"};
  STD_TORCH_CHECK(x.dim() == 2, op, ": x must be [rows, in]");
  check_element(op, "x", x.scalar_type());
  check_packed_layer(op, x, packed, scale, bias, bits, 1, 1, shared, activation);
}

}  // namespace qkernels
