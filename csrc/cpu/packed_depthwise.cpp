// Depthwise convolutions: each output channel reads one input channel, so the loops run over channels, which are
// adjacent in the image. The work is cut into (member, some blocks of 64 channels, slice of the pixels); a chunk
// unpacks its weights, and goes through its pixels by tiles of 16.
//
// The input is read where it is: a tap outside the image points to a row of zeros. Of each output's taps a kernel loads
// an input element (one byte, or four) and multiplies it with a weight that four pixels share.
//
// Scratch of a thread: C_out * taps weights.

#include "packed_conv2d.h"
#include "packed_depthwise_vnni.h"
#include "packed_weights.h"
#include "vectorized.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace qkernels {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kPixels = 16;      // of a tile
constexpr int64_t kPiece = 4;        // pixels whose sums are in registers
constexpr int64_t kSliceTiles = 16;  // fewer are not worth unpacking weights for once more

// sums[r][c] = start[c] + sum over taps t of inputs[t * kPixels + r][first + c] * weight, for `count` channels c and
// `pixels` r, a multiple of kPiece.
template <class X, class Weight, class Sum>
struct TileArguments {
  const X* const* inputs;
  int64_t pixels, taps, first, count;
  const Weight* weights;
  const Sum* start;
  Sum* sums;  // [pixels, kBlockChannels]
};

template <class X_, class Weight_, class Sum_>
struct Kernel {
  using X = X_;
  using Weight = Weight_;
  using Sum = Sum_;
  using Arguments = TileArguments<X, Weight, Sum>;

  void (*run)(const Arguments&);
  // The weights of up to 64 channels, of codes [channels][taps]; may read bytes behind them.
  void (*fill)(const int8_t* codes, int64_t channels, int64_t taps, Weight* weights);
  int64_t (*size)(int64_t taps);  // of these weights
};

// As [taps, kBlockChannels].
template <class Weight>
void fill(const int8_t* codes, int64_t channels, int64_t taps, Weight* weights) {
  std::fill_n(weights, kBlockChannels * taps, Weight{});
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t t = 0; t < taps; ++t) weights[t * kBlockChannels + c] = codes[c * taps + t];
}

int64_t size(int64_t taps) { return kBlockChannels * taps; }

template <class X, class Sum>
QK_VECTORIZED void portable_tile(const TileArguments<X, Sum, Sum>& a) {
  for (int64_t r = 0; r < a.pixels; ++r) {
    Sum* sums = a.sums + r * kBlockChannels;
    std::copy_n(a.start, a.count, sums);
    for (int64_t t = 0; t < a.taps; ++t) {
      const X* x = a.inputs[t * kPixels + r] + a.first;
      const Sum* weights = a.weights + t * kBlockChannels;
#pragma omp simd
      for (int64_t c = 0; c < a.count; ++c) sums[c] += static_cast<Sum>(x[c]) * weights[c];
    }
  }
}

#if defined(__x86_64__)
struct Avx512Floats {
  using Register = __m512;
  QK_AVX512 static Register load(const float* p) { return _mm512_load_ps(p); }
  QK_AVX512 static Register load(__mmask16 used, const float* x) { return _mm512_maskz_loadu_ps(used, x); }
  QK_AVX512 static Register multiply_add(Register x, Register weight, Register sum) {
    return _mm512_fmadd_ps(x, weight, sum);
  }
  QK_AVX512 static void store(float* p, Register v) { _mm512_store_ps(p, v); }
};

QK_AVX512 void avx512_tile(const TileArguments<float, float, float>& a) {
  using Lanes = Avx512Floats;
  for (int64_t c = 0; c < a.count; c += kLanes) {
    const __mmask16 used = static_cast<__mmask16>(a.count - c >= kLanes ? 0xffff : (1 << (a.count - c)) - 1);
    for (int64_t piece = 0; piece < a.pixels; piece += kPiece) {
      typename Lanes::Register sums[kPiece];
      for (int64_t r = 0; r < kPiece; ++r) sums[r] = Lanes::load(a.start + c);
      for (int64_t t = 0; t < a.taps; ++t) {
        const auto weights = Lanes::load(a.weights + t * kBlockChannels + c);
        const float* const* inputs = a.inputs + t * kPixels + piece;
        for (int64_t r = 0; r < kPiece; ++r)
          sums[r] = Lanes::multiply_add(Lanes::load(used, inputs[r] + a.first + c), weights, sums[r]);
      }
      for (int64_t r = 0; r < kPiece; ++r) Lanes::store(a.sums + (piece + r) * kBlockChannels + c, sums[r]);
    }
  }
}

void vnni_tile(const TileArguments<uint8_t, int8_t, int32_t>& a) {
  for (int64_t piece = 0; piece < a.pixels; piece += kPiece)
    depthwise_quads(
        a.inputs + piece, kPixels, a.taps, a.first, a.count, a.weights, a.start, a.sums + piece * kBlockChannels);
}

struct Avx2Codes {
  using Register = __m256i;
  QK_AVX2 static Register load(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  QK_AVX2 static Register load(const uint8_t* x) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x)));
  }
  // A product of 16-bit halves is that of the lanes: the high half of x is zero.
  QK_AVX2 static Register multiply_add(Register x, Register weight, Register sum) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(x, weight));
  }
  QK_AVX2 static void store(int32_t* p, Register v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
};

struct Avx2Floats {
  using Register = __m256;
  QK_AVX2 static Register load(const float* p) { return _mm256_loadu_ps(p); }
  QK_AVX2 static Register multiply_add(Register x, Register weight, Register sum) {
    return _mm256_fmadd_ps(x, weight, sum);
  }
  QK_AVX2 static void store(float* p, Register v) { _mm256_store_ps(p, v); }
};

// Two registers of channels at a time; the last few channels are left to portable_tile.
template <class Lanes, class X, class Sum>
QK_AVX2 void avx2_tile(const TileArguments<X, Sum, Sum>& a) {
  int64_t c = 0;
  for (; c + kLanes <= a.count; c += kLanes)
    for (int64_t piece = 0; piece < a.pixels; piece += kPiece) {
      typename Lanes::Register sums[kPiece][2];
      for (int64_t r = 0; r < kPiece; ++r)
        for (int64_t half = 0; half < 2; ++half) sums[r][half] = Lanes::load(a.start + c + 8 * half);
      for (int64_t t = 0; t < a.taps; ++t) {
        const Sum* weights = a.weights + t * kBlockChannels + c;
        for (int64_t r = 0; r < kPiece; ++r) {
          const X* x = a.inputs[t * kPixels + piece + r] + a.first + c;
          for (int64_t half = 0; half < 2; ++half)
            sums[r][half] =
                Lanes::multiply_add(Lanes::load(x + 8 * half), Lanes::load(weights + 8 * half), sums[r][half]);
        }
      }
      for (int64_t r = 0; r < kPiece; ++r)
        for (int64_t half = 0; half < 2; ++half)
          Lanes::store(a.sums + (piece + r) * kBlockChannels + c + 8 * half, sums[r][half]);
    }
  if (c < a.count)
    portable_tile<X, Sum>(
        {a.inputs, a.pixels, a.taps, a.first + c, a.count - c, a.weights + c, a.start + c, a.sums + c});
}
#endif

using CodesKernel = Kernel<uint8_t, int32_t, int32_t>;
using FloatsKernel = Kernel<float, float, float>;

CodesKernel codes_kernel(Isa isa) {
#if defined(__x86_64__)
  if (has_avx2(isa)) return {&avx2_tile<Avx2Codes>, &fill, &size};
#endif
  return {&portable_tile, &fill, &size};
}

FloatsKernel floats_kernel(Isa isa) {
#if defined(__x86_64__)
  if (has_avx512(isa)) return {&avx512_tile, &fill, &size};
  if (has_avx2(isa)) return {&avx2_tile<Avx2Floats>, &fill, &size};
#endif
  return {&portable_tile, &fill, &size};
}

// Up to 64 channels of a member: their weights, what each sum starts at, and the constants of their epilogue.
template <class K>
struct DepthwiseBlock {
  int64_t first;
  const typename K::Weight* weights;
  alignas(64) typename K::Sum start[kBlockChannels] = {};
  ChannelBlock constants;

  // Of codes [count][taps].
  DepthwiseBlock(const K& kernel, const Epilogue& e, int64_t member, int64_t channel, int64_t count,
                 const int8_t* codes, int64_t taps, int32_t raised_by, typename K::Weight* room)
      : first(channel), weights(room), constants(e, member, channel, count) {
    kernel.fill(codes, count, taps, room);
    for (int64_t i = 0; raised_by != 0 && i < count * taps; ++i)
      start[i / taps] -= static_cast<typename K::Sum>(raised_by * codes[i]);
  }
};

// Walks output pixels of a member, and says where the taps of each read.
template <class X>
class TapWalk {
 public:
  TapWalk(const Image<X>& image, const Sizes& s, int64_t member, int64_t pixel, const X* zeros)
      : image_(image), s_(s), zeros_(zeros), column_(pixel % s.out_width),
        row_(pixel / s.out_width % s.out_height),
        n_(pixel / s.out_width / s.out_height + (s.shared ? 0 : member * s.images)),
        reach_h_((s.kernel_h - 1) * s.dilation_h), reach_w_((s.kernel_w - 1) * s.dilation_w) {
    for (int64_t i = 0; i < s.kernel_h; ++i)
      for (int64_t j = 0; j < s.kernel_w; ++j)
        offsets_.push_back(i * s.dilation_h * image.row + j * s.dilation_w * image.pixel);
  }

  // Writes the next pixel's pointers to every kPixels-th element of `inputs`.
  void next(const X** inputs) {
    const int64_t top = row_ * s_.stride_h - s_.pad_top, left = column_ * s_.stride_w - s_.pad_left;
    const X* window = image_.data + n_ * image_.image + top * image_.row + left * image_.pixel;
    if (top >= 0 && left >= 0 && top + reach_h_ < s_.height && left + reach_w_ < s_.width)
      for (size_t t = 0; t < offsets_.size(); ++t) inputs[t * kPixels] = window + offsets_[t];
    else
      at_the_edge(top, left, window, inputs);
    if (++column_ < s_.out_width) return;
    column_ = 0;
    if (++row_ < s_.out_height) return;
    row_ = 0;
    ++n_;
  }

 private:
  // Of a window at (top, left), whose taps outside the image read zeros.
  void at_the_edge(int64_t top, int64_t left, const X* window, const X** inputs) const {
    size_t t = 0;
    for (int64_t i = 0; i < s_.kernel_h; ++i) {
      const int64_t y = top + i * s_.dilation_h;
      for (int64_t j = 0; j < s_.kernel_w; ++j, ++t) {
        const int64_t x = left + j * s_.dilation_w;
        const bool inside = y >= 0 && y < s_.height && x >= 0 && x < s_.width;
        inputs[t * kPixels] = inside ? window + offsets_[t] : zeros_;
      }
    }
  }

  const Image<X>& image_;
  const Sizes& s_;
  const X* zeros_;
  int64_t column_, row_, n_, reach_h_, reach_w_;
  std::vector<int64_t> offsets_;  // of the taps in a window
};

template <class K>
class Convolution {
 public:
  using X = typename K::X;

  Convolution(const K& kernel, const Image<X>& image, const Sizes& s, const PackedWeights& packed, const Epilogue& e)
      : kernel_(kernel), image_(image), s_(s), packed_(packed), e_(e), taps_(s.kernel_h * s.kernel_w),
        tiles_((s.out_pixels() + kPixels - 1) / kPixels),
        blocks_((s.out_channels + kBlockChannels - 1) / kBlockChannels),
        zeros_(s.out_channels, static_cast<X>(image.raised_by)) {
    const int64_t wanted = (wanted_chunks() + s.members - 1) / s.members;
    slices_ = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, tiles_ / kSliceTiles));
    parts_ = std::clamp<int64_t>((wanted + slices_ - 1) / slices_, 1, blocks_);
  }

  Stage stage(std::shared_ptr<const Convolution> self) const {
    const int64_t work = s_.members * s_.out_pixels() * s_.out_channels * taps_ / kLanes;
    return {s_.members * parts_ * slices_, work, [self](int64_t chunk) { self->run(chunk); }};
  }

 private:
  void run(int64_t chunk) const {
    const int64_t slice = chunk % slices_, part = chunk / slices_ % parts_, member = chunk / slices_ / parts_;
    Scratch scratch;
    const auto blocks = unpack(member, part * blocks_ / parts_, (part + 1) * blocks_ / parts_, scratch);
    const X** inputs = scratch.take<const X*>(kPixels * taps_);
    std::fill_n(inputs, kPixels * taps_, zeros_.data());  // a last tile may have fewer pixels
    alignas(64) typename K::Sum sums[kPixels * kBlockChannels];
    const int64_t first = slice * tiles_ / slices_, last = (slice + 1) * tiles_ / slices_;
    TapWalk<X> walk(image_, s_, member, first * kPixels, zeros_.data());
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t pixel = tile * kPixels, n = std::min(kPixels, s_.out_pixels() - pixel);
      for (int64_t r = 0; r < n; ++r) walk.next(inputs + r);
      for (const DepthwiseBlock<K>& block : blocks) {
        kernel_.run({inputs, (n + kPiece - 1) / kPiece * kPiece, taps_, block.first, block.constants.count,
                     block.weights, block.start, sums});
        finish(
            e_, block.constants, sums, kBlockChannels, n,
            (member * s_.out_pixels() + pixel) * e_.channels + block.first);
      }
    }
  }

  // The blocks [first, last).
  std::vector<DepthwiseBlock<K>> unpack(int64_t member, int64_t first, int64_t last, Scratch& scratch) const {
    const int64_t begin = first * kBlockChannels, end = std::min(s_.out_channels, last * kBlockChannels);
    const int64_t count = (end - begin) * taps_;
    const int8_t* codes = unpack_range(
        packed_.data + member * packed_.bytes, packed_.bits, begin * taps_, count, e_.isa,
        scratch.take<int8_t>(room_for_codes(count)));
    auto* weights = scratch.take<typename K::Weight>((last - first) * kernel_.size(taps_));
    std::vector<DepthwiseBlock<K>> blocks;
    for (int64_t channel = begin; channel < end; channel += kBlockChannels) {
      blocks.emplace_back(
          kernel_, e_, member, channel, std::min(kBlockChannels, end - channel), codes + (channel - begin) * taps_,
          taps_, image_.raised_by, weights);
      weights += kernel_.size(taps_);
    }
    return blocks;
  }

  const K kernel_;
  const Image<X> image_;
  const Sizes s_;
  const PackedWeights packed_;
  const Epilogue e_;
  const int64_t taps_, tiles_, blocks_;
  int64_t slices_, parts_;
  const std::vector<X> zeros_;
};

template <class K>
Stage convolution(
    const K& kernel, const Image<typename K::X>& image, const Sizes& s, const PackedWeights& packed,
    const Epilogue& e) {
  const auto convolution = std::make_shared<const Convolution<K>>(kernel, image, s, packed, e);
  return convolution->stage(convolution);
}

}  // namespace

void convolve_depthwise_codes(
    const Pixels& x, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e, Memory& memory,
    std::vector<Stage>& stages) {
  const Image<uint8_t> image = image_of_codes(x, sizes.unpadded(), 1, memory, stages);
#if defined(__x86_64__)
  if (has_avx512(e.isa)) {
    const Kernel<uint8_t, int8_t, int32_t> kernel{
        &vnni_tile, &fill_quads, [](int64_t taps) { return 4 * kBlockChannels * quads_of(taps); }};
    return stages.push_back(convolution(kernel, image, sizes, weights, e));
  }
#endif
  stages.push_back(convolution(codes_kernel(e.isa), image, sizes, weights, e));
}

void convolve_depthwise_floats(
    const Pixels& x, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e, Memory& memory,
    std::vector<Stage>& stages) {
  const Image<float> image = image_of_floats(x, sizes.unpadded(), 1, memory, stages);
  stages.push_back(convolution(floats_kernel(e.isa), image, sizes, weights, e));
}

}  // namespace qkernels
