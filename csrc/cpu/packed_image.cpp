// The copy of a convolution's input that its kernels read: every element once, plus the padding.

#include "huge_pages.h"
#include "packed_conv2d.h"
#include "vectorized.h"
#include "work.h"

#include <type_traits>

namespace qkernels {
namespace {

QK_ALWAYS_INLINE uint8_t convert(uint8_t code) { return code; }
QK_ALWAYS_INLINE uint8_t convert(int8_t code) { return static_cast<uint8_t>(code) ^ 0x80; }  // + 128
template <class T>
QK_ALWAYS_INLINE float convert(T v) {
  return load(v);
}

template <class From, class To>
QK_VECTORIZED void convert_row(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
}

// How a pixel's channels are stored: `groups` runs of `depth`, each filled up to `stored`, or each repeated.
struct Channels {
  int64_t groups, depth, stored;
  bool repeated;

  bool as_they_are() const { return depth == stored; }
  int64_t count() const { return groups * stored; }
};

template <class From, class To>
void convert_pixel(const From* from, const Channels& channels, To zero, To* to) {
  for (int64_t g = 0; g < channels.groups; ++g)
    for (int64_t c = 0; c < channels.stored; ++c)
      to[g * channels.stored + c] = channels.repeated    ? convert(from[g])
                                    : c < channels.depth ? convert(from[g * channels.depth + c])
                                                         : zero;
}

template <class From, class To>
Image<To> image_of(const Tensor& x, const Sizes& s, int64_t step, To zero, ScalarType stored_dtype) {
  const int64_t h = s.height, w = s.width, c = s.in_channels;
  Channels channels{s.groups, s.depth(), (s.depth() + step - 1) / step * step, false};
  if (s.depthwise()) channels.stored = s.out_channels / s.groups, channels.repeated = true;
  const int32_t raised_by = std::is_same_v<From, int8_t> ? 128 : 0;
  const int64_t rows = s.padded_height(), columns = s.padded_width(), pixel = channels.count();
  const From* from = static_cast<const From*>(x.data_ptr());
  if constexpr (std::is_same_v<From, To>)
    if (rows == h && columns == w && channels.as_they_are())
      return {from, h * w * pixel, w * pixel, pixel, channels.stored, raised_by, x};

  Tensor copy = empty_vector(x.size(0) * rows * columns * pixel, stored_dtype, x);
  prefer_huge_pages(copy);
  To* to = static_cast<To*>(copy.data_ptr());
  const int64_t grain = std::max<int64_t>(1, kSerialElements / std::max<int64_t>(1, columns * pixel));
  torch::stable::parallel_for(0, x.size(0) * rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % rows - s.pad_top;
      To* line = to + i * columns * pixel;
      if (row < 0 || row >= h) {
        std::fill_n(line, columns * pixel, zero);
        continue;
      }
      const From* source = from + (i / rows * h + row) * w * c;
      To* inside = std::fill_n(line, s.pad_left * pixel, zero);
      if (channels.as_they_are())
        convert_row(source, w * c, inside);
      else
        for (int64_t j = 0; j < w; ++j) convert_pixel(source + j * c, channels, zero, inside + j * pixel);
      std::fill_n(inside + w * pixel, s.pad_right * pixel, zero);
    }
  });
  return {to, rows * columns * pixel, columns * pixel, pixel, channels.stored, raised_by, copy};
}

}  // namespace

Image<uint8_t> image_of_codes(const Tensor& x, const Sizes& sizes, int64_t step) {
  return x.scalar_type() == ScalarType::Char ? image_of<int8_t, uint8_t>(x, sizes, step, 128, ScalarType::Byte)
                                             : image_of<uint8_t, uint8_t>(x, sizes, step, 0, ScalarType::Byte);
}

Image<float> image_of_floats(const Tensor& x, const Sizes& sizes, int64_t step) {
  return with_type(x.scalar_type(), [&]<class X>(Type<X>) {
    return image_of<X, float>(x, sizes, step, 0.0f, ScalarType::Float);
  });
}

}  // namespace qkernels
