// Depthwise convolutions: each output channel reads one input channel, so the loops run over channels, which are
// adjacent in the image. The work is cut into (member, tile of four pixels); a thread unpacks a member's weights once.
//
// The input is read where it is: a tap outside the image points to a row of zeros. Of each output's taps a kernel loads
// an input element (one byte, or four) and multiplies it with a weight that the tile's pixels share.
//
// Scratch of a thread: C_out * taps weights.

#include "packed_conv2d.h"
#include "packed_weights.h"
#include "vectorized.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace qkernels {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kPixels = 4;               // of a tile
constexpr int64_t kGrainProducts = 1 << 15;  // fewer are not worth waking a thread for

// sums[r][c] = start[c] + sum over taps t of inputs[t * kPixels + r][first + c] * weights[t][c], for `count` channels.
template <class X, class Sum>
struct TileArguments {
  const X* const* inputs;
  int64_t taps, first, count;
  const Sum* weights;  // [taps, kBlockChannels]
  const Sum* start;
  Sum* sums;  // [pixels, kBlockChannels]
};

template <class X, class Sum>
QK_VECTORIZED void portable_tile(const TileArguments<X, Sum>& a) {
  for (int64_t r = 0; r < kPixels; ++r) {
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
struct Avx512Codes {
  using Register = __m512i;
  QK_AVX512 static Register load(const int32_t* p) { return _mm512_load_si512(p); }
  QK_AVX512 static Register load(__mmask16 used, const uint8_t* x) {
    return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(used, x));
  }
  QK_AVX512 static Register multiply_add(Register x, Register weight, Register sum) {
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(x, weight));
  }
  QK_AVX512 static void store(int32_t* p, Register v) { _mm512_store_si512(p, v); }
};

struct Avx512Floats {
  using Register = __m512;
  QK_AVX512 static Register load(const float* p) { return _mm512_load_ps(p); }
  QK_AVX512 static Register load(__mmask16 used, const float* x) { return _mm512_maskz_loadu_ps(used, x); }
  QK_AVX512 static Register multiply_add(Register x, Register weight, Register sum) {
    return _mm512_fmadd_ps(x, weight, sum);
  }
  QK_AVX512 static void store(float* p, Register v) { _mm512_store_ps(p, v); }
};

template <class Lanes, class X, class Sum>
QK_AVX512 void avx512_tile(const TileArguments<X, Sum>& a) {
  for (int64_t c = 0; c < a.count; c += kLanes) {
    const __mmask16 used = static_cast<__mmask16>(a.count - c >= kLanes ? 0xffff : (1 << (a.count - c)) - 1);
    typename Lanes::Register sums[kPixels];
    for (int64_t r = 0; r < kPixels; ++r) sums[r] = Lanes::load(a.start + c);
    for (int64_t t = 0; t < a.taps; ++t) {
      const auto weights = Lanes::load(a.weights + t * kBlockChannels + c);
      for (int64_t r = 0; r < kPixels; ++r)
        sums[r] = Lanes::multiply_add(Lanes::load(used, a.inputs[t * kPixels + r] + a.first + c), weights, sums[r]);
    }
    for (int64_t r = 0; r < kPixels; ++r) Lanes::store(a.sums + r * kBlockChannels + c, sums[r]);
  }
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
QK_AVX2 void avx2_tile(const TileArguments<X, Sum>& a) {
  int64_t c = 0;
  for (; c + kLanes <= a.count; c += kLanes) {
    typename Lanes::Register sums[kPixels][2];
    for (int64_t r = 0; r < kPixels; ++r)
      for (int64_t half = 0; half < 2; ++half) sums[r][half] = Lanes::load(a.start + c + 8 * half);
    for (int64_t t = 0; t < a.taps; ++t) {
      const Sum* weights = a.weights + t * kBlockChannels + c;
      for (int64_t r = 0; r < kPixels; ++r) {
        const X* x = a.inputs[t * kPixels + r] + a.first + c;
        for (int64_t half = 0; half < 2; ++half)
          sums[r][half] =
              Lanes::multiply_add(Lanes::load(x + 8 * half), Lanes::load(weights + 8 * half), sums[r][half]);
      }
    }
    for (int64_t r = 0; r < kPixels; ++r)
      for (int64_t half = 0; half < 2; ++half) Lanes::store(a.sums + r * kBlockChannels + c + 8 * half, sums[r][half]);
  }
  if (c < a.count)
    portable_tile<X, Sum>({a.inputs, a.taps, a.first + c, a.count - c, a.weights + c, a.start + c, a.sums + c});
}
#endif

// Up to 64 channels of a member: their weights, what each sum starts at, and the constants of their epilogue.
template <class Sum>
struct DepthwiseBlock {
  int64_t first;
  AlignedArray<Sum> weights;
  alignas(64) Sum start[kBlockChannels] = {};
  ChannelBlock constants;

  DepthwiseBlock(const Epilogue& e, int64_t member, int64_t channel, int64_t count, const int8_t* codes, int64_t taps,
                 int32_t raised_by)
      : first(channel), weights(kBlockChannels * taps), constants(e, member, channel, count) {
    std::fill_n(weights.data(), kBlockChannels * taps, Sum{});
    for (int64_t c = 0; c < count; ++c)
      for (int64_t t = 0; t < taps; ++t) {
        weights.data()[t * kBlockChannels + c] = codes[c * taps + t];
        start[c] -= static_cast<Sum>(raised_by * codes[c * taps + t]);
      }
  }
};

template <class Sum>
std::vector<DepthwiseBlock<Sum>> blocks_of(
    const Epilogue& e, int64_t member, const Sizes& s, const PackedWeights& packed, int32_t raised_by) {
  const int64_t taps = s.kernel_h * s.kernel_w;
  AlignedArray<int8_t> room(room_for_codes(s.out_channels * taps));
  const int8_t* codes =
      unpack_range(packed.data + member * packed.bytes, packed.bits, 0, s.out_channels * taps, room.data());
  std::vector<DepthwiseBlock<Sum>> blocks;
  for (int64_t first = 0; first < s.out_channels; first += kBlockChannels)
    blocks.emplace_back(
        e, member, first, std::min(kBlockChannels, s.out_channels - first), codes + first * taps, taps, raised_by);
  return blocks;
}

// Walks output pixels of a member, and says where the taps of each read.
template <class X>
class TapWalk {
 public:
  TapWalk(const Image<X>& image, const Sizes& s, int64_t member, int64_t pixel, const X* zeros)
      : image_(image), s_(s), zeros_(zeros), column_(pixel % s.out_width),
        row_(pixel / s.out_width % s.out_height),
        n_(pixel / s.out_width / s.out_height + (s.shared ? 0 : member * s.images)) {}

  // Writes the next pixel's pointers to every kPixels-th element of `inputs`.
  void next(const X** inputs) {
    const int64_t top = row_ * s_.stride_h - s_.pad_top, left = column_ * s_.stride_w - s_.pad_left;
    const X* image = image_.data + n_ * image_.image;
    for (int64_t i = 0; i < s_.kernel_h; ++i) {
      const int64_t y = top + i * s_.dilation_h;
      const bool row_inside = y >= 0 && y < s_.height;
      const X* row = row_inside ? image + y * image_.row : zeros_;
      for (int64_t j = 0; j < s_.kernel_w; ++j, inputs += kPixels) {
        const int64_t x = left + j * s_.dilation_w;
        *inputs = row_inside && x >= 0 && x < s_.width ? row + x * image_.pixel : zeros_;
      }
    }
    if (++column_ < s_.out_width) return;
    column_ = 0;
    if (++row_ < s_.out_height) return;
    row_ = 0;
    ++n_;
  }

 private:
  const Image<X>& image_;
  const Sizes& s_;
  const X* zeros_;
  int64_t column_, row_, n_;
};

template <class X, class Sum>
using Tile = void (*)(const TileArguments<X, Sum>&);

Tile<uint8_t, int32_t> codes_tile(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512vnni: return &avx512_tile<Avx512Codes>;
    case Isa::avx2: return &avx2_tile<Avx2Codes>;
#endif
    default: return &portable_tile;
  }
}

Tile<float, float> floats_tile(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512vnni: return &avx512_tile<Avx512Floats>;
    case Isa::avx2: return &avx2_tile<Avx2Floats>;
#endif
    default: return &portable_tile;
  }
}

template <class X, class Sum>
void convolve(
    Tile<X, Sum> run, const Image<X>& image, const Sizes& s, const PackedWeights& packed,
    const Epilogue& e) {
  const int64_t taps = s.kernel_h * s.kernel_w, pixels = s.out_pixels();
  const int64_t tiles = (pixels + kPixels - 1) / kPixels;
  const std::vector<X> zeros(s.out_channels, static_cast<X>(image.raised_by));
  const int64_t grain = std::max<int64_t>(1, kGrainProducts / (kPixels * s.out_channels * taps));

  torch::stable::parallel_for(0, s.members * tiles, grain, [&](int64_t begin, int64_t end) {
    std::vector<const X*> inputs(kPixels * taps, zeros.data());  // a last tile may have fewer pixels
    alignas(64) Sum sums[kPixels * kBlockChannels];
    while (begin < end) {
      const int64_t member = begin / tiles, last = std::min(end, (member + 1) * tiles);
      const std::vector<DepthwiseBlock<Sum>> blocks = blocks_of<Sum>(e, member, s, packed, image.raised_by);
      TapWalk<X> walk(image, s, member, (begin - member * tiles) * kPixels, zeros.data());
      for (; begin < last; ++begin) {
        const int64_t pixel = (begin - member * tiles) * kPixels, n = std::min(kPixels, pixels - pixel);
        for (int64_t r = 0; r < n; ++r) walk.next(inputs.data() + r);
        for (const DepthwiseBlock<Sum>& block : blocks) {
          run({inputs.data(), taps, block.first, block.constants.count, block.weights.data(), block.start, sums});
          finish(e, block.constants, sums, kBlockChannels, n, (member * pixels + pixel) * e.channels + block.first);
        }
      }
    }
  });
}

}  // namespace

void convolve_depthwise(
    const Image<uint8_t>& image, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e) {
  convolve(codes_tile(e.isa), image, sizes, weights, e);
}

void convolve_depthwise(
    const Image<float>& image, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e) {
  convolve(floats_tile(e.isa), image, sizes, weights, e);
}

}  // namespace qkernels
