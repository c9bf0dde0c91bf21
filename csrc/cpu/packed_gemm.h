// The implicit matrix product behind a packed convolution, for any element type.
//
// It is a matrix product without the matrix: the input, its padding included, is one image in memory, in which the
// weights of every output pixel meet contiguous runs of elements at the same offsets from the pixel's first.
//
// The work is cut into (member, group, block of output channels, tile of a few output pixels), a block being as many
// panels of up to 64 channels as fit in kPanelBytes of the second-level cache, at least one. A thread takes a
// contiguous run of tiles. Where its block changes it unpacks that block's weights, which then stay in the cache while
// the tiles stream past. So weights are read once a thread from their bits, the input once a block, and sums never
// leave the registers and the first-level cache before they are finished.
//
// Scratch of a thread: kPanelBytes or one panel of 64 * depth weights, whichever is more, and 32 * depth codes, with
// depth = kernel_h * kernel_w * C_in / groups.
#pragma once

#include "packed_conv2d.h"
#include "packed_weights.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace qkernels {

constexpr int64_t kLanes = 16;                             // output channels in a vector
constexpr int64_t kMostVectors = kBlockChannels / kLanes;  // vectors of output channels in a tile
constexpr int64_t kMostPixels = 12;
constexpr int64_t kPanelBytes = 384 << 10;                 // that a block of several panels has at most
constexpr int64_t kRoomBehind = 64;                        // bytes behind codes that may be read
constexpr int64_t kGrainProducts = 1 << 19;                // fewer are not worth waking a thread for

// How large tiles are: up to `most_vectors` wide, and at most pixels[v - 1] high with v vectors.
struct TileSizes {
  int64_t most_vectors;
  int64_t pixels[kMostVectors];
};
constexpr TileSizes kWideTiles{4, {12, 12, 8, 6}};  // at most 24 vectors of sums

// One tile: sums[r][c] = start[c] + sum over runs t and elements k of pixels[r][runs[t] + k] * panel[t][k][c].
template <class X, class Weight, class Sum>
struct TileArguments {
  const X* pixels[kMostPixels];
  const int64_t* runs;  // offsets of the contiguous runs of a window
  int64_t run_count, run_steps;
  const Weight* panel;
  const Sum* start;
  Sum* sums;  // [pixels, kBlockChannels]
};

// A microkernel reads steps of kStep input elements, each against a panel row of [16 * vectors][kStep] weights.
template <class X_, class Weight_, class Sum_, int64_t kStep_>
struct Gemm {
  using X = X_;
  using Weight = Weight_;
  using Sum = Sum_;
  using Arguments = TileArguments<X, Weight, Sum>;
  static constexpr int64_t kStep = kStep_;

  // Computes a tile of that many pixels and vectors.
  using Run = void (*)(const Arguments&, int64_t pixels, int64_t vectors);
  // Writes 16 channels' codes, rows [channels][steps * kStep] that lie `stride` apart, into their lanes of the panel;
  // may read kRoomBehind bytes behind them.
  using Fill = void (*)(const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, Weight* lanes);

  TileSizes sizes;
  Run run;
  Fill fill;
};

// Where the contiguous runs of a window begin in an image, and their length: rows of the kernel if its columns are
// adjacent in memory, else single taps.
struct Runs {
  std::vector<int64_t> offsets;
  int64_t length;

  template <class X>
  Runs(const Image<X>& image, const Sizes& s) {
    const bool whole_rows = s.groups == 1 && image.tap_right == image.pixel;
    for (int64_t i = 0; i < s.kernel_h; ++i)
      for (int64_t j = 0; j < (whole_rows ? 1 : s.kernel_w); ++j)
        offsets.push_back(i * image.tap_down + j * image.tap_right);
    length = whole_rows ? s.kernel_w * image.pixel : image.group;
  }
  int64_t elements() const { return static_cast<int64_t>(offsets.size()) * length; }
};

// Walks the first elements of output pixels' windows in an image.
template <class X>
class Windows {
 public:
  Windows(const Image<X>& image, const Sizes& sizes, int64_t member, int64_t pixel)
      : image_(image), sizes_(sizes), column_(pixel % sizes.out_width),
        row_(pixel / sizes.out_width % sizes.out_height),
        n_(pixel / sizes.out_width / sizes.out_height + (sizes.shared ? 0 : member * sizes.images)) {
    seek();
  }
  const X* next() {
    const X* window = at_;
    at_ += image_.window_right;
    if (++column_ == sizes_.out_width) {
      column_ = 0;
      if (++row_ == sizes_.out_height) row_ = 0, ++n_;
      seek();
    }
    return window;
  }

 private:
  void seek() {
    at_ = image_.data + n_ * image_.image + row_ * image_.window_down + column_ * image_.window_right;
  }
  const Image<X>& image_;
  const Sizes& sizes_;
  int64_t column_, row_, n_;
  const X* at_;
};

// How the output channels of a group are cut: into panels of a multiple of 16 channels, and blocks of panels.
struct ChannelCut {
  int64_t channels, panel_channels, panels, block_panels, blocks, tile_pixels;

  ChannelCut(const TileSizes& sizes, int64_t group_channels, int64_t channel_bytes) : channels(group_channels) {
    const int64_t vectors = (channels + kLanes - 1) / kLanes;
    panels = (vectors + sizes.most_vectors - 1) / sizes.most_vectors;
    panel_channels = (vectors + panels - 1) / panels * kLanes;
    panels = (channels + panel_channels - 1) / panel_channels;
    block_panels = std::clamp<int64_t>(kPanelBytes / (panel_channels * channel_bytes), 1, panels);
    blocks = (panels + block_panels - 1) / block_panels;
    tile_pixels = sizes.pixels[panel_channels / kLanes - 1];
  }
};

// The weights of some channels as the microkernel reads them: [steps][16 * vectors][kStep], zeros where a group's
// channels or the last 16 outputs were filled up; what each channel's sum starts at; and its epilogue's constants.
template <class G>
struct Panel {
  int64_t first, vectors;
  typename G::Weight* weights;
  alignas(64) typename G::Sum start[kBlockChannels] = {};
  ChannelBlock constants;
};

// Unpacks panels.
template <class G>
class Unpacker {
 public:
  Unpacker(const G& gemm, const Sizes& s, const PackedWeights& packed, const Image<typename G::X>& image,
           int64_t elements)
      : gemm_(gemm), sizes_(s), packed_(packed), image_(image), elements_(elements),
        room_(room_for_codes(kLanes * s.codes_a_channel())), rows_(kLanes * elements + kRoomBehind) {}

  // Channels [first, first + count) of a member into `weights`.
  Panel<G> panel(const Epilogue& e, int64_t member, int64_t first, int64_t count, typename G::Weight* weights) {
    Panel<G> panel{first, (count + kLanes - 1) / kLanes, weights, {}, ChannelBlock(e, member, first, count)};
    const int64_t length = sizes_.codes_a_channel();
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const int64_t channel = first + v * kLanes, n = std::min(kLanes, first + count - channel);
      const int8_t* codes = unpack_range(
          packed_.data + member * packed_.bytes, packed_.bits, channel * length, n * length, room_.data());
      for (int64_t c = 0; image_.raised_by != 0 && c < n; ++c)
        panel.start[v * kLanes + c] = -image_.raised_by * sum(codes + c * length, length);
      int64_t stride = length;
      if (n < kLanes || length != elements_) codes = filled_up(codes, n), stride = elements_;
      gemm_.fill(codes, stride, elements_ / G::kStep, panel.vectors, weights + v * kLanes * G::kStep);
    }
    return panel;
  }

 private:
  static int32_t sum(const int8_t* codes, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += codes[i];
    return total;
  }
  // All 16 channels, with the zeros between taps that the image has between pixels.
  const int8_t* filled_up(const int8_t* codes, int64_t n) {
    std::fill_n(rows_.data(), kLanes * elements_, 0);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t tap = 0; tap < elements_ / image_.group; ++tap)
        std::copy_n(
            codes + c * sizes_.codes_a_channel() + tap * sizes_.depth(), sizes_.depth(),
            rows_.data() + c * elements_ + tap * image_.group);
    return rows_.data();
  }

  const G& gemm_;
  const Sizes& sizes_;
  const PackedWeights& packed_;
  const Image<typename G::X>& image_;
  int64_t elements_;
  AlignedArray<int8_t> room_, rows_;
};

template <class G>
void convolve(
    const G& gemm, const Image<typename G::X>& image, const Sizes& s, const PackedWeights& packed, const Epilogue& e) {
  const Runs runs(image, s);
  const int64_t channel_weights = runs.elements();
  const ChannelCut cut(gemm.sizes, s.out_channels / s.groups, channel_weights * sizeof(typename G::Weight));
  const int64_t pixels = s.out_pixels(), height = cut.tile_pixels, tiles = (pixels + height - 1) / height;
  const int64_t products = height * cut.block_panels * cut.panel_channels * channel_weights;

  const auto run_tiles = [&](int64_t begin, int64_t end) {
    Unpacker<G> unpacker(gemm, s, packed, image, channel_weights);
    AlignedArray<typename G::Weight> weights(cut.block_panels * cut.panel_channels * channel_weights);
    alignas(64) typename G::Sum sums[kMostPixels * kBlockChannels];
    std::vector<Panel<G>> panels;
    while (begin < end) {
      const int64_t block = begin / tiles, last = std::min(end, (block + 1) * tiles);
      const int64_t member = block / (s.groups * cut.blocks), group = block / cut.blocks % s.groups;
      const int64_t first_panel = block % cut.blocks * cut.block_panels;
      panels.clear();
      for (int64_t p = 0; p < std::min(cut.block_panels, cut.panels - first_panel); ++p) {
        const int64_t first = (first_panel + p) * cut.panel_channels;
        panels.push_back(unpacker.panel(
            e, member, group * cut.channels + first, std::min(cut.panel_channels, cut.channels - first),
            weights.data() + p * cut.panel_channels * channel_weights));
      }
      const int64_t stop = std::min(pixels, (last - block * tiles) * height);
      int64_t pixel = (begin - block * tiles) * height;
      Windows<typename G::X> windows(image, s, member, pixel);
      typename G::Arguments tile{{}, runs.offsets.data(), static_cast<int64_t>(runs.offsets.size()),
                                 runs.length / G::kStep, nullptr, nullptr, sums};
      for (; pixel < stop; pixel += height) {
        const int64_t n = std::min(height, stop - pixel);
        for (int64_t r = 0; r < n; ++r) tile.pixels[r] = windows.next() + group * image.group;
        for (const Panel<G>& panel : panels) {
          tile.panel = panel.weights;
          tile.start = panel.start;
          const int64_t out = (member * pixels + pixel) * e.channels + panel.first;
          prefetch_results(e, panel.constants, n, out);
          gemm.run(tile, n, panel.vectors);
          finish(e, panel.constants, sums, kBlockChannels, n, out);
        }
      }
      begin = last;
    }
  };
  torch::stable::parallel_for(
      0, s.members * s.groups * cut.blocks * tiles, std::max<int64_t>(1, kGrainProducts / products), run_tiles);
}

// A table of wide tiles: WideTiles<Tile, Arguments>::run(a, pixels, vectors) is Tile<pixels, vectors>::run(a).
template <template <int, int> class Tile, class Arguments>
struct WideTiles {
  template <int V, int... R>
  static void run_pixels(const Arguments& a, int64_t pixels, std::integer_sequence<int, R...>) {
    static constexpr void (*table[])(const Arguments&) = {&Tile<R + 1, V>::run...};
    table[pixels - 1](a);
  }
  template <int V>
  static void run_vectors(const Arguments& a, int64_t pixels) {
    run_pixels<V>(a, pixels, std::make_integer_sequence<int, kWideTiles.pixels[V - 1]>());
  }
  static void run(const Arguments& a, int64_t pixels, int64_t vectors) {
    switch (vectors) {
      case 1: return run_vectors<1>(a, pixels);
      case 2: return run_vectors<2>(a, pixels);
      case 3: return run_vectors<3>(a, pixels);
      default: return run_vectors<4>(a, pixels);
    }
  }
};

}  // namespace qkernels
