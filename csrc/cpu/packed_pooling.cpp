// Max pools of codes, since quantization keeps the order: the largest code is the largest value. Means of floats.

#include "packed_network.h"
#include "vectorized.h"

namespace qkernels {
namespace {

template <class T>
QK_VECTORIZED void largest(const T* x, int64_t n, T* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] > y[i] ? x[i] : y[i];
}

// One row of the result.
template <class T>
void pool_row(const T* image, const Sizes& s, int64_t row, T* out) {
  const int64_t top = row * s.stride_h - s.pad_top, depth = s.in_channels;
  const int64_t first = std::max<int64_t>(0, top), last = std::min(s.height, top + s.kernel_h);
  for (int64_t column = 0; column < s.out_width; ++column, out += depth) {
    const int64_t left = column * s.stride_w - s.pad_left;
    const int64_t from = std::max<int64_t>(0, left), to = std::min(s.width, left + s.kernel_w);
    std::copy_n(image + (first * s.width + from) * depth, depth, out);
    for (int64_t y = first; y < last; ++y)
      for (int64_t x = from; x < to; ++x) largest(image + (y * s.width + x) * depth, depth, out);
  }
}

template <class T>
Stage pool(const T* x, const Sizes& s, T* out) {
  const int64_t rows = s.images * s.out_height, row = s.out_width * s.in_channels;
  const int64_t work = rows * row * std::min(s.kernel_h, s.height) * std::min(s.kernel_w, s.width) / 16;
  return evenly_cut(rows, work, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      pool_row(x + i / s.out_height * s.height * s.width * s.in_channels, s, i % s.out_height, out + i * row);
  });
}

constexpr int64_t kChannels = 64;  // at a time

QK_VECTORIZED void mean_of_channels(const float* x, int64_t pixels, int64_t stride, int64_t n, float* out) {
  float sums[kChannels] = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += stride)
    for (int64_t c = 0; c < n; ++c) sums[c] += x[c];
  for (int64_t c = 0; c < n; ++c) out[c] = sums[c] / static_cast<float>(pixels);
}

QK_VECTORIZED void multiply(const float* x, const float* factors, int64_t n, float* out) {
  for (int64_t c = 0; c < n; ++c) out[c] = x[c] * factors[c];
}

}  // namespace

Stage max_pool(const Pixels& x, const Sizes& s, char* out) {
  if (x.dtype == ScalarType::Char)
    return pool(static_cast<const int8_t*>(x.data), s, reinterpret_cast<int8_t*>(out));
  return pool(static_cast<const uint8_t*>(x.data), s, reinterpret_cast<uint8_t*>(out));
}

Stage mean(const float* x, int64_t images, int64_t pixels, int64_t channels, float* out) {
  const int64_t blocks = (channels + kChannels - 1) / kChannels, elements = images * pixels * channels;
  return evenly_cut(images * blocks, elements / 16, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / blocks, first = i % blocks * kChannels;
      mean_of_channels(
          x + image * pixels * channels + first, pixels, channels, std::min(kChannels, channels - first),
          out + image * channels + first);
    }
  });
}

Stage gate(const float* x, const float* factors, int64_t images, int64_t pixels, int64_t channels, float* out) {
  return evenly_cut(images * pixels, images * pixels * channels / 16, [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel)
      multiply(x + pixel * channels, factors + pixel / pixels * channels, channels, out + pixel * channels);
  });
}

}  // namespace qkernels
