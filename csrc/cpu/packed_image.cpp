// The copy of a convolution's input that its kernels read: every element once, plus the padding.

#include "../checked.h"
#include "packed_conv2d.h"
#include "vectorized.h"

#include <type_traits>

namespace qkernels {
namespace {

constexpr int64_t kBytesOfWork = 16;  // that are copied while an instruction multiplies

template <class To, class From>
QK_ALWAYS_INLINE To convert(From v) {
  if constexpr (std::is_same_v<From, To>)
    return v;
  else if constexpr (std::is_same_v<From, int8_t>)
    return static_cast<uint8_t>(v) ^ 0x80;  // + 128
  else
    return load(v);
}

template <class From, class To>
QK_VECTORIZED void convert_row(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = convert<To>(from[i]);
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
      to[g * channels.stored + c] = channels.repeated    ? convert<To>(from[g])
                                    : c < channels.depth ? convert<To>(from[g * channels.depth + c])
                                                         : zero;
}

// Pixels of three channels, filled up to four: those of pictures.
template <class From, class To>
QK_VECTORIZED void convert_colors(const From* from, int64_t n, To zero, To* to) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t c = 0; c < 3; ++c) to[4 * j + c] = convert<To>(from[3 * j + c]);
    to[4 * j + 3] = zero;
  }
}

// The rows, or the columns, of an image: those of the input and its padding in their order or, where most of them would
// be padding that no window reads (a stride or a dilation of millions has such), the taps of each window by themselves.
struct Lines {
  int64_t size, before, kernel, stride, dilation;
  int64_t count;
  bool windows;  // of the second kind

  Lines(int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation, int64_t outputs)
      : size(size), before(before), kernel(kernel), stride(stride), dilation(dilation), count(size + before + after),
        windows(false) {
    if (before + after <= size || checked_product({outputs, kernel}) >= count) return;
    count = outputs * kernel;
    windows = true;
  }
  bool are_the_inputs() const { return count == size && !windows; }
  // Lines from a window to the next, and from a tap to the next; of one alone any number will do.
  int64_t window_step() const { return windows ? kernel : std::min(stride, count); }
  int64_t tap_step() const { return windows ? 1 : std::min(dilation, count); }
  // The line of the input that line i is, or -1 for padding.
  int64_t source(int64_t i) const {
    const int64_t line = (windows ? i / kernel * stride + i % kernel * dilation : i) - before;
    return line < size ? std::max<int64_t>(line, -1) : -1;
  }
};

// One row of an image out of one of the input.
template <class From, class To>
void convert_line(const From* source, const Lines& columns, int64_t depth, const Channels& channels, To zero, To* to) {
  const int64_t pixel = channels.count();
  const auto convert_columns = [&](const From* from, int64_t n, To* inside) {
    if (channels.as_they_are()) return convert_row(from, n * depth, inside);
    if (depth == 3 && channels.stored == 4 && !channels.repeated) return convert_colors(from, n, zero, inside);
    for (int64_t j = 0; j < n; ++j) convert_pixel(from + j * depth, channels, zero, inside + j * pixel);
  };
  if (columns.windows) {
    for (int64_t j = 0; j < columns.count; ++j, to += pixel)
      if (const int64_t column = columns.source(j); column < 0)
        std::fill_n(to, pixel, zero);
      else
        convert_columns(source + column * depth, 1, to);
    return;
  }
  To* inside = std::fill_n(to, columns.before * pixel, zero);
  convert_columns(source, columns.size, inside);
  std::fill_n(inside + columns.size * pixel, (columns.count - columns.before - columns.size) * pixel, zero);
}

template <class From, class To>
Image<To> image_of(
    const Pixels& x, const Sizes& s, int64_t step, To zero, Memory& memory, std::vector<Stage>& stages) {
  const int64_t h = s.height, w = s.width, c = s.in_channels;
  Channels channels{s.groups, s.depth(), (s.depth() + step - 1) / step * step, false};
  if (s.depthwise()) channels.stored = s.out_channels / s.groups, channels.repeated = true;
  const int32_t raised_by = std::is_same_v<From, int8_t> ? 128 : 0;
  const Lines rows(h, s.pad_top, s.pad_bottom, s.kernel_h, s.stride_h, s.dilation_h, s.out_height);
  const Lines columns(w, s.pad_left, s.pad_right, s.kernel_w, s.stride_w, s.dilation_w, s.out_width);
  const int64_t pixel = channels.count(), row = checked_product({columns.count, pixel});
  const auto image = [&](const To* data) -> Image<To> {
    const int64_t size = checked_product({rows.count, row});
    return {
        data, data + checked_product({x.images, size}), size, row, pixel, rows.window_step() * row,
        columns.window_step() * pixel,
        rows.tap_step() * row, columns.tap_step() * pixel, channels.stored, raised_by};
  };
  const From* from = static_cast<const From*>(x.data);
  if constexpr (std::is_same_v<From, To>)
    if (rows.are_the_inputs() && columns.are_the_inputs() && channels.as_they_are()) return image(from);

  const int64_t lines = checked_product({x.images, rows.count});
  To* to = static_cast<To*>(memory.take(checked_product({lines, row, sizeof(To)})));
  stages.push_back(evenly_cut(lines, lines * row * sizeof(To) / kBytesOfWork, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t source = rows.source(i % rows.count);
      if (source < 0)
        std::fill_n(to + i * row, row, zero);
      else
        convert_line(from + (i / rows.count * h + source) * w * c, columns, c, channels, zero, to + i * row);
    }
  }));
  return image(to);
}

}  // namespace

Image<uint8_t> image_of_codes(
    const Pixels& x, const Sizes& sizes, int64_t step, Memory& memory, std::vector<Stage>& stages) {
  return x.dtype == ScalarType::Char ? image_of<int8_t, uint8_t>(x, sizes, step, 128, memory, stages)
                                     : image_of<uint8_t, uint8_t>(x, sizes, step, 0, memory, stages);
}

Image<float> image_of_floats(
    const Pixels& x, const Sizes& sizes, int64_t step, Memory& memory, std::vector<Stage>& stages) {
  return with_type(x.dtype, [&]<class X>(Type<X>) {
    return image_of<X, float>(x, sizes, step, 0.0f, memory, stages);
  });
}

Image<BFloat16> image_of_bfloat16s(
    const Pixels& x, const Sizes& sizes, int64_t step, Memory& memory, std::vector<Stage>& stages) {
  return image_of<BFloat16, BFloat16>(x, sizes, step, BFloat16{0}, memory, stages);
}

}  // namespace qkernels
