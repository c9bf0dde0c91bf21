// The implicit matrix product behind a packed convolution, for any element type.
//
// It is a matrix product without the matrix: the input, its padding included, is one image in memory, in which the
// weights of every output pixel meet contiguous runs of elements at the same offsets from the pixel's first.
//
// The work is cut into (member, group, block of output channels, slice of the output pixels), a block being one or more
// panels of up to 64 channels, at most kPanelBytes of the second-level cache. A chunk unpacks its block's weights, which
// stay in the cache while the tiles of a few pixels stream past. So weights are read once from their bits, or once a
// slice where a few channels have many pixels, the input once a block, and sums never leave the registers and the
// first-level cache before they are finished.
//
// Scratch of a thread: kPanelBytes or one panel of 64 * depth weights, whichever is more, and 32 * depth codes, with
// depth = kernel_h * kernel_w * C_in / groups; where inputs are gathered for tiles, 32 * depth elements more.
#pragma once

#include "packed_panels.h"
#include "packed_weights.h"

#include <algorithm>
#include <memory>
#include <vector>

namespace qkernels {

constexpr int64_t kMostPixels = 12;
constexpr int64_t kRoomBehind = 64;                        // bytes behind codes that may be read
constexpr int64_t kSlicePixels = 256;                      // fewer are not worth unpacking weights for once more

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

// The weights of some channels as the microkernel reads them: [steps][16 * vectors][kStep], zeros where a group's
// channels, the last 16 outputs or a run were filled up; what each channel's sum starts at; and its epilogue's
// constants.
template <class G>
struct Panel {
  int64_t first, vectors;
  const typename G::Weight* weights;
  alignas(64) typename G::Sum start[kBlockChannels] = {};
  ChannelBlock constants;
};

// Unpacks panels.
template <class G>
class Unpacker {
 public:
  Unpacker(const G& gemm, const Sizes& s, const PackedWeights& packed, const Image<typename G::X>& image,
           const Depth& depth, Isa isa, Scratch& scratch)
      : gemm_(gemm), sizes_(s), packed_(packed), image_(image), depth_(depth), isa_(isa),
        elements_(depth.count * depth.steps * G::kStep),
        room_(scratch.take<int8_t>(room_for_codes(kLanes * s.codes_a_channel()))),
        rows_(scratch.take<int8_t>(kLanes * elements_ + kRoomBehind)) {}

  // Channels [first, first + count) of a member into `weights`.
  Panel<G> panel(const Epilogue& e, int64_t member, int64_t first, int64_t count, typename G::Weight* weights) {
    Panel<G> panel{first, (count + kLanes - 1) / kLanes, weights, {}, ChannelBlock(e, member, first, count)};
    const int64_t length = sizes_.codes_a_channel();
    for (int64_t v = 0; v < panel.vectors; ++v) {
      const int64_t channel = first + v * kLanes, n = std::min(kLanes, first + count - channel);
      const int8_t* codes = unpack_range(
          packed_.data + member * packed_.bytes, packed_.bits, channel * length, n * length, isa_, room_);
      for (int64_t c = 0; image_.raised_by != 0 && c < n; ++c)
        panel.start[v * kLanes + c] = -image_.raised_by * sum(codes + c * length, length);
      int64_t stride = length;
      if (n < kLanes || length != elements_) codes = filled_up(codes, n), stride = elements_;
      fill(codes, stride, panel.vectors, weights + v * kLanes * G::kStep);
    }
    return panel;
  }

 private:
  // 16 channels' codes into their lanes.
  void fill(const int8_t* codes, int64_t stride, int64_t vectors, typename G::Weight* lanes) const {
    const int64_t step = vectors * kLanes * G::kStep;
    if (depth_.panel_steps == depth_.steps)
      return gemm_.fill(codes, stride, depth_.count * depth_.steps, vectors, lanes);
    for (int64_t run = 0; run < depth_.count; ++run) {
      gemm_.fill(codes + run * depth_.steps * G::kStep, stride, depth_.steps, vectors, lanes);
      for (int64_t i = depth_.steps; i < depth_.panel_steps; ++i)
        std::fill_n(lanes + i * step, kLanes * G::kStep, typename G::Weight{});
      lanes += depth_.panel_steps * step;
    }
  }
  static int32_t sum(const int8_t* codes, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += codes[i];
    return total;
  }
  // All 16 channels, with the zeros between taps that the image has between pixels.
  const int8_t* filled_up(const int8_t* codes, int64_t n) {
    std::fill_n(rows_, kLanes * elements_, 0);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t tap = 0; tap < elements_ / image_.group; ++tap)
        std::copy_n(
            codes + c * sizes_.codes_a_channel() + tap * sizes_.depth(), sizes_.depth(),
            rows_ + c * elements_ + tap * image_.group);
    return rows_;
  }

  const G& gemm_;
  const Sizes& sizes_;
  const PackedWeights& packed_;
  const Image<typename G::X>& image_;
  const Depth depth_;
  Isa isa_;
  int64_t elements_;
  int8_t *room_, *rows_;
};

// What a kernel computes tiles of: the output pixels of a member's channels of a group, those in `panels`.
template <class G>
struct TileJob {
  const Image<typename G::X>& image;
  const Sizes& sizes;
  const Epilogue& e;
  const Runs& runs;
  const Depth& depth;
  const std::vector<Panel<G>>& panels;
  int64_t member, group;

  int64_t out(int64_t pixel, const Panel<G>& panel) const {
    return (member * sizes.out_pixels() + pixel) * e.channels + panel.first;
  }
};

// A kernel reads steps of kStep input elements, each against a panel row of [16 * vectors][kStep] weights. This one
// takes pixels wherever they are.
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

  int64_t most_vectors() const { return sizes.most_vectors; }
  Depth depth(int64_t runs, int64_t steps) const { return {runs, steps, steps}; }
  int64_t tile_pixels(int64_t vectors) const { return sizes.pixels[vectors - 1]; }
  int64_t tiles(const Image<X>&, const Sizes& s, int64_t vectors) const {
    return (s.out_pixels() + tile_pixels(vectors) - 1) / tile_pixels(vectors);
  }
  // The tiles [first, last), of panels of so many vectors.
  void run_tiles(const TileJob<Gemm>& job, int64_t vectors, int64_t first, int64_t last, Scratch&) const {
    const int64_t height = tile_pixels(vectors), stop = std::min(job.sizes.out_pixels(), last * height);
    alignas(64) Sum sums[kMostPixels * kBlockChannels];
    Windows<X> windows(job.image, job.sizes, job.member, first * height);
    Arguments tile{{}, job.runs.offsets.data(), job.depth.count, job.depth.steps, nullptr, nullptr, sums};
    for (int64_t pixel = first * height; pixel < stop; pixel += height) {
      const int64_t n = std::min(height, stop - pixel);
      for (int64_t r = 0; r < n; ++r) tile.pixels[r] = windows.next() + job.group * job.image.group;
      for (const Panel<Gemm>& panel : job.panels) {
        tile.panel = panel.weights;
        tile.start = panel.start;
        prefetch_results(job.e, panel.constants, n, job.out(pixel, panel));
        run(tile, n, panel.vectors);
        finish(job.e, panel.constants, sums, kBlockChannels, n, job.out(pixel, panel));
      }
    }
  }
};

// A convolution, a chunk at a time.
template <class G>
class Convolution {
 public:
  Convolution(const G& gemm, const Image<typename G::X>& image, const Sizes& s, const PackedWeights& packed,
              const Epilogue& e)
      : gemm_(gemm), image_(image), s_(s), packed_(packed), e_(e), runs_(image, s),
        depth_(gemm.depth(static_cast<int64_t>(runs_.offsets.size()), runs_.length / G::kStep)),
        cut_(gemm.most_vectors(), s.out_channels / s.groups,
             depth_.count * depth_.panel_steps * G::kStep * sizeof(typename G::Weight), s.members * s.groups,
             wanted_chunks()),
        vectors_(cut_.panel_channels / kLanes), tiles_(gemm.tiles(image, s, vectors_)),
        records_(cut_, depth_, G::kStep * sizeof(typename G::Weight), s), kept_(records_.are_in(packed, s.members)) {
    // One slice for each thread, more of many pixels, or where weights need not be unpacked once more.
    const int64_t blocks = s.members * s.groups * cut_.blocks;
    const auto of_blocks = [blocks](int64_t chunks) { return (chunks + blocks - 1) / blocks; };
    const int64_t most =
        kept_ ? tiles_ : std::max(of_blocks(wanted_chunks() / kChunksOfAThread), s.out_pixels() / kSlicePixels);
    slices_ = std::clamp<int64_t>(of_blocks(wanted_chunks()), 1, std::clamp<int64_t>(most, 1, tiles_));
  }

  Stage stage(std::shared_ptr<const Convolution> self) const {
    constexpr int64_t products = 64 / sizeof(typename G::Weight);  // of an instruction
    const int64_t work = s_.members * s_.out_pixels() * s_.out_channels * runs_.elements() / products;
    return {s_.members * s_.groups * cut_.blocks * slices_, work, [self](int64_t chunk) { self->run(chunk); }};
  }

  int64_t record_bytes() const { return records_.bytes; }

  // A stage that writes the members' records. The image says by how much each sum is to be changed: -1 leaves it.
  Stage keep(std::shared_ptr<const Convolution> self, uint8_t* records) const {
    const int64_t panels = s_.members * s_.groups * cut_.panels;
    return evenly_cut(panels, panels * records_.panel_bytes / 16, [self, records](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) self->keep_panel(panel, records);
    });
  }

 private:
  void keep_panel(int64_t index, uint8_t* records) const {
    const int64_t panel = index % cut_.panels, group = index / cut_.panels % s_.groups;
    const int64_t member = index / cut_.panels / s_.groups;
    Scratch scratch;
    Unpacker<G> unpacker(gemm_, s_, packed_, image_, depth_, e_.isa, scratch);
    const Panel<G> kept = unpacker.panel(
        e_, member, channel(group, panel), channels(panel),
        reinterpret_cast<typename G::Weight*>(records + records_.panel_at(member, group, panel)));
    std::memcpy(
        records + records_.sums_at(member) + kept.first * sizeof(kept.start[0]), kept.start,
        channels(panel) * sizeof(kept.start[0]));
    std::memcpy(records + member * records_.bytes, records_.header, sizeof records_.header);
  }

  // The first output channel of a panel, and how many it has.
  int64_t channel(int64_t group, int64_t panel) const { return group * cut_.channels + panel * cut_.panel_channels; }
  int64_t channels(int64_t panel) const {
    return std::min(cut_.panel_channels, cut_.channels - panel * cut_.panel_channels);
  }

  void run(int64_t chunk) const {
    const int64_t slice = chunk % slices_, block = chunk / slices_;
    const int64_t member = block / (s_.groups * cut_.blocks), group = block / cut_.blocks % s_.groups;
    Scratch scratch;
    const std::vector<Panel<G>> panels = panels_of(member, group, block % cut_.blocks * cut_.block_panels, scratch);
    const TileJob<G> job{image_, s_, e_, runs_, depth_, panels, member, group};
    gemm_.run_tiles(job, vectors_, slice * tiles_ / slices_, (slice + 1) * tiles_ / slices_, scratch);
  }

  std::vector<Panel<G>> panels_of(int64_t member, int64_t group, int64_t first_panel, Scratch& scratch) const {
    const int64_t end = std::min(first_panel + cut_.block_panels, cut_.panels);
    std::vector<Panel<G>> panels;
    if (kept_) {
      for (int64_t p = first_panel; p < end; ++p) panels.push_back(kept_panel(member, group, p));
      return panels;
    }
    const int64_t size = cut_.panel_channels * depth_.count * depth_.panel_steps * G::kStep;
    auto* weights = scratch.take<typename G::Weight>(cut_.block_panels * size);
    Unpacker<G> unpacker(gemm_, s_, packed_, image_, depth_, e_.isa, scratch);
    for (int64_t p = first_panel; p < end; ++p, weights += size)
      panels.push_back(unpacker.panel(e_, member, channel(group, p), channels(p), weights));
    return panels;
  }

  Panel<G> kept_panel(int64_t member, int64_t group, int64_t panel) const {
    const int64_t first = channel(group, panel), n = channels(panel);
    const uint8_t* weights = packed_.records + records_.panel_at(member, group, panel);
    Panel<G> result{
        first, (n + kLanes - 1) / kLanes, reinterpret_cast<const typename G::Weight*>(weights), {},
        ChannelBlock(e_, member, first, n)};
    std::memcpy(
        result.start, packed_.records + records_.sums_at(member) + first * sizeof(result.start[0]),
        n * sizeof(result.start[0]));
    for (int64_t c = 0; c < n; ++c) result.start[c] *= -image_.raised_by;
    return result;
  }

  const G gemm_;
  const Image<typename G::X> image_;
  const Sizes s_;
  const PackedWeights packed_;
  const Epilogue e_;
  const Runs runs_;
  const Depth depth_;
  const ChannelCut cut_;
  const int64_t vectors_, tiles_;
  const PanelRecords records_;
  const bool kept_;  // whether the weights bring such records
  int64_t slices_;
};

template <class G>
Stage convolution(
    const G& gemm, const Image<typename G::X>& image, const Sizes& s, const PackedWeights& packed, const Epilogue& e) {
  const auto convolution = std::make_shared<const Convolution<G>>(gemm, image, s, packed, e);
  return convolution->stage(convolution);
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
