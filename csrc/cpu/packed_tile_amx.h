// Tiles of AMX: 16 pixels by 64 codes of depth, times 64 codes by 16 channels, in one instruction of 16 cycles.
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

#include <cstring>
#include <optional>

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

// The same in plain loops, for tests where the instructions are not to be had.
struct EmulatedTiles {
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
        int32_t sum;
        std::memcpy(&sum, tiles[Sums].bytes[r] + 4 * c, 4);
        for (int64_t k = 0; k < tiles[Inputs].row_bytes; ++k)
          sum += tiles[Inputs].bytes[r][k] * static_cast<int8_t>(tiles[Weights].bytes[k / 4][4 * c + k % 4]);
        std::memcpy(tiles[Sums].bytes[r] + 4 * c, &sum, 4);
      }
  }
};

#if defined(__x86_64__)
// In assembly, since the intrinsics of GCC 12 are macros that want the tiles' numbers as digits.
struct AmxTiles {
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
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
  }
};
#endif

// Up to 16 windows, those of a tile of inputs.
struct AmxRows {
  const uint8_t* first;
  int64_t apart;        // bytes
  const int64_t* runs;  // offsets of the runs of a window
};

// What one or two tiles of inputs are multiplied with.
struct AmxArguments {
  AmxRows rows[2];
  int64_t run_count, run_tiles, tile_steps;
  const int8_t* panel;
  int64_t vectors;  // of the panel
  const int32_t* start;
  int32_t* sums;  // [32, kBlockChannels]
};

template <class Tiles>
struct AmxKernel {
  // 16 or 32 pixels by 16 or 32 channels from vector v of the panel on.
  template <bool TwoRows, bool TwoColumns>
  static void run_part(const AmxArguments& a, int64_t v) {
    const int64_t step = a.vectors * kRowBytes, tile_bytes = a.tile_steps * kStepBytes;
    const int32_t* start = a.start + v * kLanes;
    Tiles::template load<sums00>(start, 0);
    if constexpr (TwoColumns) Tiles::template load<sums01>(start + kLanes, 0);
    if constexpr (TwoRows) Tiles::template load<sums10>(start, 0);
    if constexpr (TwoRows && TwoColumns) Tiles::template load<sums11>(start + kLanes, 0);
    const int8_t* panel = a.panel + v * kRowBytes;
    for (int64_t run = 0; run < a.run_count; ++run) {
      const uint8_t* x = a.rows[0].first + a.rows[0].runs[run];
      const uint8_t* below = TwoRows ? a.rows[1].first + a.rows[1].runs[run] : nullptr;
      for (int64_t tile = 0; tile < a.run_tiles; ++tile, panel += a.tile_steps * step) {
        Tiles::template load<weights0>(panel, step);
        Tiles::template load<inputs0>(x + tile * tile_bytes, a.rows[0].apart);
        Tiles::template multiply_add<sums00, inputs0, weights0>();
        if constexpr (TwoColumns) {
          Tiles::template load<weights1>(panel + kRowBytes, step);
          Tiles::template multiply_add<sums01, inputs0, weights1>();
        }
        if constexpr (TwoRows) {
          Tiles::template load<inputs1>(below + tile * tile_bytes, a.rows[1].apart);
          Tiles::template multiply_add<sums10, inputs1, weights0>();
        }
        if constexpr (TwoRows && TwoColumns) Tiles::template multiply_add<sums11, inputs1, weights1>();
      }
    }
    int32_t* sums = a.sums + v * kLanes;
    constexpr int64_t row = kBlockChannels * sizeof(int32_t), below = kTileRows * kBlockChannels;
    Tiles::template store<sums00>(sums, row);
    if constexpr (TwoColumns) Tiles::template store<sums01>(sums + kLanes, row);
    if constexpr (TwoRows) Tiles::template store<sums10>(sums + below, row);
    if constexpr (TwoRows && TwoColumns) Tiles::template store<sums11>(sums + below + kLanes, row);
  }
  template <bool TwoRows>
  static void run(const AmxArguments& a) {
    int64_t v = 0;
    for (; v + 2 <= a.vectors; v += 2) run_part<TwoRows, true>(a, v);
    if (v < a.vectors) run_part<TwoRows, false>(a, v);
  }
};

// The windows of a member as rows of tiles: `rows` rows of `columns`, of which `pitch` apart in memory each begins.
struct TiledRows {
  int64_t images, rows, columns, pitch;
  int64_t tiles_an_image;

  TiledRows(const Image<uint8_t>& image, const Sizes& s)
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
  using X = uint8_t;
  using Weight = int8_t;
  using Sum = int32_t;
  using Job = TileJob<AmxGemm>;
  static constexpr int64_t kStep = kStepBytes;

  Gemm<X, Weight, Sum, kStep>::Fill fill;

  int64_t most_vectors() const { return kMostVectors; }
  // Tiles as deep as they need be for as few of them as there can be.
  static int64_t run_tiles(const Depth& depth) { return (depth.steps + kTileSteps - 1) / kTileSteps; }
  static int64_t tile_steps(const Depth& depth) { return (depth.steps + run_tiles(depth) - 1) / run_tiles(depth); }
  Depth depth(int64_t runs, int64_t steps) const {
    Depth depth{runs, steps, steps};
    depth.panel_steps = run_tiles(depth) * tile_steps(depth);
    return depth;
  }
  int64_t tiles(const Image<X>& image, const Sizes& s, int64_t) const { return (TiledRows(image, s).tiles() + 1) / 2; }

  void run_tiles(const Job& job, int64_t vectors, int64_t first, int64_t last, Scratch& scratch) const {
    const TiledRows all(job.image, job.sizes);
    const int64_t window = job.depth.count * job.depth.panel_steps * kStep;
    X* gathered = scratch.take<X>(kTilePixels * window);
    std::vector<int64_t> runs(job.depth.count);  // of a gathered window
    for (int64_t t = 0; t < job.depth.count; ++t) runs[t] = t * job.depth.panel_steps * kStep;
    alignas(64) Sum sums[kTilePixels * kBlockChannels];
    AmxArguments a{{}, job.depth.count, run_tiles(job.depth), tile_steps(job.depth), nullptr, vectors, nullptr, sums};
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
    const int64_t bytes = kTilePixels * job.image.window_right + job.depth.steps * kStep;
    for (int64_t byte = 0; byte < std::min(bytes, kMostPrefetched); byte += kRowBytes) __builtin_prefetch(begin + byte);
  }

  static AmxRows rows_of(
      const Job& job, const TiledRows& all, int64_t tile, X* gathered, const int64_t* gathered_runs, int64_t window) {
    const Image<X>& image = job.image;
    const int64_t begin = tile % all.tiles_an_image * kTileRows;
    const auto at = [&](int64_t i) { return window_at(job, all, tile, i); };
    const X* last = at(0) + (kTileRows - 1) * image.window_right + job.runs.offsets.back();
    if (last + job.depth.panel_steps * kStep <= image.end)
      return {at(0), image.window_right, job.runs.offsets.data()};
    for (int64_t r = 0; r < kTileRows; ++r) {
      const int64_t i = begin + r;
      if (i / all.pitch >= all.rows || i % all.pitch >= all.columns) continue;  // whose sums are dropped
      for (int64_t t = 0; t < job.depth.count; ++t)
        std::copy_n(at(r) + job.runs.offsets[t], job.depth.steps * kStep, gathered + r * window + gathered_runs[t]);
    }
    return {gathered, window, gathered_runs};
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
