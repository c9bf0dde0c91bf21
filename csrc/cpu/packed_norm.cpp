// Layer norms between packed layers, a pixel or token at a time.

#include "lanes.h"
#include "packed_network.h"

#include <cmath>

namespace qkernels {
namespace {

QK_VECTORIZED void normalize(
    const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  const float count = static_cast<float>(n);
  const float mean = sum_in_lanes(x, n, [](FloatLanes v) { return v; }) / count;
  const float squares = sum_in_lanes(x, n, [mean](FloatLanes v) { return (v - mean) * (v - mean); });
  const float factor = 1.0f / std::sqrt(squares / count + eps);
  for (int64_t c = 0; c < n; ++c) y[c] = (x[c] - mean) * factor * weight[c] + bias[c];
}

}  // namespace

Stage layer_norm(const float* x, int64_t pixels, const LayerNorm& norm, float* out) {
  const int64_t n = norm.channels;
  return evenly_cut(pixels, pixels * n / 4, [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t member = pixel / norm.pixels;
      normalize(x + pixel * n, n, norm.eps, norm.weight + member * n, norm.bias + member * n, out + pixel * n);
    }
  });
}

}  // namespace qkernels
