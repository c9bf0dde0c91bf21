// Tiles of AMX: 16 pixels by 64 bytes of depth, times 64 bytes by 16 channels, in one instruction of 16 cycles. The bytes
// are 64 codes or 32 bfloat16, four bytes a step.
//
// A tile of 32 pixels by 64 channels is computed in two halves of 32 channels, four tiles of sums each, which take two
// tiles of inputs and two of weights a step: as many loads as products. The instruction is 16 times as fast as a vector
// multiplication, so inputs must not be touched on their way: they are loaded where they are, in the image.
//
// The rows of a tile of inputs are windows that lie equally far apart in memory. Where the windows of successive rows of
// an image do, too (a stride of one), all are walked as one row, with those between the ends of two rows, whose sums are
// dropped: of 28 columns 2, which costs less than to gather pixels. Other images are walked row by row, the last tile
// with pixels behind the row's end. Only what would reach behind the end of memory is gathered.
#pragma once

#include "packed_gemm.h"
#include "vectorized.h"

#include <cstring>
#include <type_traits>

namespace qkernels {

constexpr int64_t kTileRows = 16, kTileSteps = 16, kStepBytes = 4, kRowBytes = 64, kTilePixels = 2 * kTileRows;
constexpr int64_t kMostPrefetched = 8192;  // bytes

enum AmxTile { sums00, sums01, sums10, sums11, inputs0, inputs1, weights0, weights1, tile_count };

// What the instruction's configuration looks like in memory, for tiles as above.
struct alignas(64) AmxConfiguration {
  explicit AmxConfiguration(int64_t steps) {
    for (int tile = 0; tile < tile_count; ++tile) {
      const bool inputs = tile == inputs0 || tile == inputs1, weights = tile == weights0 || tile == weights1;
      row_bytes[tile] = static_cast<uint16_t>(inputs ? steps * kStepBytes : kRowBytes);
      rows[tile] = static_cast<uint8_t>(weights ? steps : kTileRows);
    }
  }
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// What tiles are of: codes, whose sums are exact.
struct AmxCodes {
  using X = uint8_t;
  using Weight = int8_t;
  using Sum = int32_t;
  static constexpr int64_t kStep = kStepBytes / sizeof(X);

  // Into how many tiles a run is cut: as few as there can be. What the last reads behind the run meets zeros.
  static int64_t run_tiles(int64_t steps) { return (steps + kTileSteps - 1) / kTileSteps; }
};

// Or bfloat16, with sums in float32. Codes of up to 8 bits are bfloat16 as they are, and so are their products with one
// exact in float32. The instruction takes denormals for zeros.
struct AmxBFloat16s {
  using X = BFloat16;
  using Weight = BFloat16;
  using Sum = float;
  static constexpr int64_t kStep = kStepBytes / sizeof(X);

  // A zero does not undo what lies behind a run, which may be infinite: tiles end where the run does.
  static int64_t run_tiles(int64_t steps) {
    int64_t tiles = (steps + kTileSteps - 1) / kTileSteps;
    while (steps % tiles != 0) ++tiles;
    return tiles;
  }
  // Of how many channels a group's must be a multiple so that its tiles are at least half as deep as they may be: of
  // pairs, or of all that a tile holds.
  static int64_t channel_step(int64_t channels) {
    const int64_t steps = (channels + kStep - 1) / kStep;
    return steps / run_tiles(steps) >= std::min(steps, kTileSteps / 2) ? kStep : kTileSteps * kStep;
  }
};

// The same in plain loops, for tests where the instructions are not to be had.
template <class Element_>
struct EmulatedTiles {
  using Element = Element_;
  struct Tile {
    int64_t rows, row_bytes;
    alignas(64) uint8_t bytes[kTileRows][kRowBytes];
  };
  static inline thread_local Tile tiles[tile_count];

  static void enter(int64_t steps) {
    const AmxConfiguration c(steps);
    for (int tile = 0; tile < tile_count; ++tile) tiles[tile] = {c.rows[tile], c.row_bytes[tile], {}};
  }
  static void leave() {}
  template <int T>
  static void load(const void* from, int64_t stride) {
    for (int64_t row = 0; row < tiles[T].rows; ++row)
      std::memcpy(tiles[T].bytes[row], static_cast<const char*>(from) + row * stride, tiles[T].row_bytes);
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    for (int64_t row = 0; row < tiles[T].rows; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, tiles[T].bytes[row], tiles[T].row_bytes);
  }
  template <int Sums, int Inputs, int Weights>
  static void multiply_add() {
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t c = 0; c < kTileRows; ++c) {
        auto sum = element<typename Element::Sum>(tiles[Sums].bytes[r] + 4 * c);
        for (int64_t byte = 0; byte < tiles[Inputs].row_bytes; byte += sizeof(X)) {
          const uint8_t* weight = tiles[Weights].bytes[byte / kStepBytes] + kStepBytes * c + byte % kStepBytes;
          sum += value(element<X>(tiles[Inputs].bytes[r] + byte)) * value(element<typename Element::Weight>(weight));
        }
        std::memcpy(tiles[Sums].bytes[r] + 4 * c, &sum, 4);
      }
  }

 private:
  using X = typename Element::X;

  template <class T>
  static T element(const uint8_t* from) {
    T result;
    std::memcpy(&result, from, sizeof result);
    return result;
  }
  static int32_t value(int32_t code) { return code; }
  static float value(BFloat16 v) { return qkernels::load(v); }
};

#if defined(__x86_64__)
// In assembly, since the intrinsics of GCC 12 are macros that want the tiles' numbers as digits.
template <class Element_>
struct AmxTiles {
  using Element = Element_;

  static void enter(int64_t steps) {
    const AmxConfiguration configuration(steps);
    asm volatile("ldtilecfg %0" : : "m"(configuration));
  }
  static void leave() { asm volatile("tilerelease"); }
  template <int T>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
  }
  template <int Sums, int Inputs, int Weights>
  static void multiply_add() {
    if constexpr (std::is_same_v<Element, AmxCodes>)
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
    else
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
  }
};
#endif

// Up to 16 windows, those of a tile of inputs.
template <class X>
struct AmxRows {
  const X* first;
  int64_t apart;        // bytes
  const int64_t* runs;  // offsets of the runs of a window, in elements
};

// What one or two tiles of inputs are multiplied with.
template <class Element>
struct AmxArguments {
  AmxRows<typename Element::X> rows[2];
  int64_t run_count, run_tiles, tile_steps;
  const typename Element::Weight* panel;
  int64_t vectors;  // of the panel
  const typename Element::Sum* start;
  typename Element::Sum* sums;  // [32, kBlockChannels]
};

template <class Tiles>
struct AmxKernel {
  using Element = typename Tiles::Element;

  // 16 or 32 pixels by 16 or 32 channels from vector v of the panel on.
  template <bool TwoRows, bool TwoColumns>
  static void run_part(const AmxArguments<Element>& a, int64_t v) {
    constexpr int64_t columns = kLanes * Element::kStep;  // elements of a tile's row of weights
    const int64_t step = a.vectors * kRowBytes, tile = a.tile_steps * Element::kStep;
    const auto* start = a.start + v * kLanes;
    Tiles::template load<sums00>(start, 0);
    if constexpr (TwoColumns) Tiles::template load<sums01>(start + kLanes, 0);
    if constexpr (TwoRows) Tiles::template load<sums10>(start, 0);
    if constexpr (TwoRows && TwoColumns) Tiles::template load<sums11>(start + kLanes, 0);
    const auto* panel = a.panel + v * columns;
    for (int64_t run = 0; run < a.run_count; ++run) {
      const auto* x = a.rows[0].first + a.rows[0].runs[run];
      const auto* below = TwoRows ? a.rows[1].first + a.rows[1].runs[run] : nullptr;
      for (int64_t i = 0; i < a.run_tiles; ++i, panel += a.tile_steps * a.vectors * columns) {
        Tiles::template load<weights0>(panel, step);
        Tiles::template load<inputs0>(x + i * tile, a.rows[0].apart);
        Tiles::template multiply_add<sums00, inputs0, weights0>();
        if constexpr (TwoColumns) {
          Tiles::template load<weights1>(panel + columns, step);
          Tiles::template multiply_add<sums01, inputs0, weights1>();
        }
        if constexpr (TwoRows) {
          Tiles::template load<inputs1>(below + i * tile, a.rows[1].apart);
          Tiles::template multiply_add<sums10, inputs1, weights0>();
        }
        if constexpr (TwoRows && TwoColumns) Tiles::template multiply_add<sums11, inputs1, weights1>();
      }
    }
    auto* sums = a.sums + v * kLanes;
    constexpr int64_t row = kBlockChannels * sizeof(*sums), half = kTileRows * kBlockChannels;
    Tiles::template store<sums00>(sums, row);
    if constexpr (TwoColumns) Tiles::template store<sums01>(sums + kLanes, row);
    if constexpr (TwoRows) Tiles::template store<sums10>(sums + half, row);
    if constexpr (TwoRows && TwoColumns) Tiles::template store<sums11>(sums + half + kLanes, row);
  }
  template <bool TwoRows>
  static void run(const AmxArguments<Element>& a) {
    int64_t v = 0;
    for (; v + 2 <= a.vectors; v += 2) run_part<TwoRows, true>(a, v);
    if (v < a.vectors) run_part<TwoRows, false>(a, v);
  }
};

// The windows of a member as rows of tiles: `rows` rows of `columns`, of which `pitch` apart in memory each begins.
struct TiledRows {
  int64_t images, rows, columns, pitch;
  int64_t tiles_an_image;

  template <class X>
  TiledRows(const Image<X>& image, const Sizes& s)
      : images(s.images), rows(s.out_height), columns(s.out_width),
        pitch((columns + kTileRows - 1) / kTileRows * kTileRows) {
    if (image.image == rows * image.window_down) rows *= images, images = 1;
    const int64_t between = image.window_right ? image.window_down / image.window_right : 0;
    if (between >= columns && between <= pitch && between * image.window_right == image.window_down) {
      pitch = between;
      if (pitch == columns) columns *= rows, pitch = columns, rows = 1;
    }
    tiles_an_image = ((rows - 1) * pitch + columns + kTileRows - 1) / kTileRows;
  }
  int64_t tiles() const { return images * tiles_an_image; }
};

template <class Tiles>
struct AmxGemm {
  using Element = typename Tiles::Element;
  using X = typename Element::X;
  using Weight = typename Element::Weight;
  using Sum = typename Element::Sum;
  using Job = TileJob<AmxGemm>;
  static constexpr int64_t kStep = Element::kStep;

  typename Gemm<X, Weight, Sum, kStep>::Fill fill;

  int64_t most_vectors() const { return kMostVectors; }
  // Tiles are as deep as they need be for as many of them.
  static int64_t tile_steps(int64_t steps) { return (steps - 1) / Element::run_tiles(steps) + 1; }
  Depth depth(int64_t runs, int64_t steps) const {
    return {runs, steps, Element::run_tiles(steps) * tile_steps(steps)};
  }
  int64_t tiles(const Image<X>& image, const Sizes& s, int64_t) const { return (TiledRows(image, s).tiles() + 1) / 2; }

  void run_tiles(const Job& job, int64_t vectors, int64_t first, int64_t last, Scratch& scratch) const {
    const TiledRows all(job.image, job.sizes);
    const int64_t window = job.depth.count * job.depth.panel_steps * kStep;
    X* gathered = scratch.take<X>(kTilePixels * window);
    std::vector<int64_t> runs(job.depth.count);  // of a gathered window
    for (int64_t t = 0; t < job.depth.count; ++t) runs[t] = t * job.depth.panel_steps * kStep;
    alignas(64) Sum sums[kTilePixels * kBlockChannels];
    const int64_t steps = job.depth.steps;
    AmxArguments<Element> a{
        {}, job.depth.count, Element::run_tiles(steps), tile_steps(steps), nullptr, vectors, nullptr, sums};
    Tiles::enter(a.tile_steps);
    for (int64_t tile = 2 * first; tile < std::min(2 * last, all.tiles()); tile += 2) {
      const bool two = tile + 1 < all.tiles();
      for (int64_t i = 0; i <= two; ++i)
        a.rows[i] = rows_of(job, all, tile + i, gathered + i * kTileRows * window, runs.data(), window);
      prefetch(job, all, tile + 2);
      for (const Panel<AmxGemm>& panel : job.panels) {
        a.panel = panel.weights;
        a.vectors = panel.vectors;
        a.start = panel.start;
        two ? AmxKernel<Tiles>::template run<true>(a) : AmxKernel<Tiles>::template run<false>(a);
        for (int64_t i = 0; i <= two; ++i)
          finish_tile(job, all, tile + i, panel, sums + i * kTileRows * kBlockChannels);
      }
    }
    Tiles::leave();
  }

 private:
  // The window in row i of those from a tile's first on.
  static const X* window_at(const Job& job, const TiledRows& all, int64_t tile, int64_t i) {
    const Image<X>& image = job.image;
    const int64_t n = tile / all.tiles_an_image + (job.sizes.shared ? 0 : job.member * job.sizes.images);
    i += tile % all.tiles_an_image * kTileRows;
    return image.data + n * image.image + job.group * image.group + i / all.pitch * image.window_down +
        i % all.pitch * image.window_right;
  }

  // Asks for what two tiles will read first: loads of tiles wait for their rows one by one.
  static void prefetch(const Job& job, const TiledRows& all, int64_t tile) {
    if (tile >= all.tiles()) return;
    const X* begin = window_at(job, all, tile, 0) + job.runs.offsets.back();
    const int64_t bytes = (kTilePixels * job.image.window_right + job.depth.steps * kStep) * sizeof(X);
    for (int64_t byte = 0; byte < std::min(bytes, kMostPrefetched); byte += kRowBytes)
      __builtin_prefetch(reinterpret_cast<const char*>(begin) + byte);
  }

  static AmxRows<X> rows_of(
      const Job& job, const TiledRows& all, int64_t tile, X* gathered, const int64_t* gathered_runs, int64_t window) {
    const Image<X>& image = job.image;
    const int64_t begin = tile % all.tiles_an_image * kTileRows;
    const auto at = [&](int64_t i) { return window_at(job, all, tile, i); };
    const X* last = at(0) + (kTileRows - 1) * image.window_right + job.runs.offsets.back();
    if (last + job.depth.panel_steps * kStep <= image.end)
      return {at(0), image.window_right * int64_t{sizeof(X)}, job.runs.offsets.data()};
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t i = begin + r;
      if (i / all.pitch >= all.rows || i % all.pitch >= all.columns) continue;  // whose sums are dropped
      for (int64_t t = 0; t < job.depth.count; ++t)
        std::copy_n(at(r) + job.runs.offsets[t], job.depth.steps * kStep, gathered + r * window + gathered_runs[t]);
    }
    return {gathered, window * int64_t{sizeof(X)}, gathered_runs};
  }

  // The sums that are outputs, a row of the image at a time.
  static void finish_tile(
      const Job& job, const TiledRows& all, int64_t tile, const Panel<AmxGemm>& panel, const Sum* sums) {
    const int64_t image = tile / all.tiles_an_image, begin = tile % all.tiles_an_image * kTileRows;
    const int64_t end = begin + kTileRows;
    for (int64_t row = begin / all.pitch; row < all.rows && row * all.pitch < end; ++row) {
      const int64_t from = std::max(begin, row * all.pitch), to = std::min(end, row * all.pitch + all.columns);
      if (from >= to) continue;
      const int64_t pixel = (image * all.rows + row) * all.columns + from - row * all.pitch;
      finish(
          job.e, panel.constants, sums + (from - begin) * kBlockChannels, kBlockChannels, to - from,
          job.out(pixel, panel));
    }
  }
};

}  // namespace qkernels
