// The table of packed_network: its rows, as they are read, and the values that rows give.
#pragma once

#include "../checked.h"
#include "packed_arguments.h"

#include <algorithm>
#include <array>

namespace qkernels {

// The columns, in the order of qkernels/ops/packed_network.py.
enum class Field : int64_t {
  kind, x, residual, result, part, dtype, images, channels, height, width,
  first, members, member, images_of_member, shared, bits, byte,
  kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w, groups,
  activation, qmin, qmax, heads, tokens, query, key, value,
  packed, panels, scale, bias, x_scale, residual_scale, out_scale,
  count
};
constexpr int64_t kFields = static_cast<int64_t>(Field::count);

enum Kind : int64_t { kQuantize, kConvolve, kMaxPool, kMean, kGate, kNorm, kAttend };

inline constexpr Op kNetworkOp{"packed_network"};
constexpr int64_t kMostSize = int64_t{1} << 40;  // of a number in the table

// One row of the table, copied: what is checked of it stays so, whoever writes to the tensor.
class Row {
 public:
  Row(const int64_t* numbers, int64_t index) : index_(index) {
    std::copy_n(numbers, kFields, numbers_.begin());
    for (int64_t i = 0; i < kFields; ++i)
      check(numbers_[i] >= -kMostSize && numbers_[i] <= kMostSize, "has a number out of range");
  }
  int64_t operator[](Field field) const { return numbers_[static_cast<int64_t>(field)]; }
  int64_t at_least(int64_t least, Field field) const {
    check((*this)[field] >= least, "has a size that is too small");
    return (*this)[field];
  }
  void check(bool right, const char* what) const { STD_TORCH_CHECK(right, kNetworkOp, ": row ", index_, " ", what); }

 private:
  std::array<int64_t, kFields> numbers_;
  int64_t index_;
};

// A result, or an input: [images, channels, height, width], the channels next to each other in memory.
struct Value {
  char* data;
  ScalarType dtype;
  int64_t images, channels, height, width;
  int64_t last_use = -1;  // the row

  bool is_float32() const { return dtype == ScalarType::Float; }
  float* floats() const { return reinterpret_cast<float*>(data); }
  int64_t pixels() const { return images * height * width; }
  int64_t pixel_bytes() const { return channels * (is_code(dtype) ? 1 : dtype == ScalarType::Float ? 4 : 2); }
  int64_t image_bytes() const { return height * width * pixel_bytes(); }
  Pixels from(int64_t image, int64_t count) const { return {data + image * image_bytes(), dtype, count}; }
};

inline ScalarType dtype_of(const Row& row, Field field) {
  const auto dtype = static_cast<ScalarType>(row[field]);  // which has 8 bits
  row.check(
      static_cast<int64_t>(dtype) == row[field] && (is_code(dtype) || is_element(dtype)),
      "has a dtype of neither codes nor floats");
  return dtype;
}

}  // namespace qkernels
