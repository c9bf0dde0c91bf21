// Tiles with AVX2, for any kind of products.
//
// A tile is 16 channels wide and is computed in pieces of 6 pixels, whose 12 registers of sums leave four for inputs
// and weights. Both pieces of a tile read the same weights, from the first-level cache if they fit: those of a narrow
// panel often do.
#pragma once

#include "packed_gemm.h"

#if defined(__x86_64__)

namespace qkernels {

constexpr TileSizes kAvx2Tiles{1, {12}};
constexpr int kPiecePixels = 6;

// Products says how: the registers Inputs (a pixel's elements of kSteps steps, in every lane), Weights (of 8 channels)
// and Sums, how they are loaded and stored, and multiply_add(Inputs, Weights, Sums). kSteps must divide a.run_steps.
template <class G, class Products>
struct Avx2Tile {
  using Arguments = typename G::Arguments;

  template <int R>
  QK_AVX2 static void run_piece(const Arguments& a, int64_t first) {
    typename Products::Sums sums[R][2];
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const typename Products::Sums start = Products::load_sums(a.start + 8 * half);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) sums[r][half] = start;
    }
    const typename G::Weight* panel = a.panel;
    for (int64_t run = 0; run < a.run_count; ++run) {
      const typename G::X* x[R];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) x[r] = a.pixels[first + r] + a.runs[run];
      for (int64_t step = 0; step < a.run_steps; step += Products::kSteps) {
        typename Products::Weights weights[2];
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) weights[half] = Products::load_weights(panel + 8 * half * G::kStep);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          const typename Products::Inputs inputs = Products::load_inputs(x[r] + step * G::kStep);
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half)
            sums[r][half] = Products::multiply_add(inputs, weights[half], sums[r][half]);
        }
        panel += Products::kSteps * kLanes * G::kStep;
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half)
        Products::store(a.sums + (first + r) * kBlockChannels + 8 * half, sums[r][half]);
  }

  template <int... R>
  static void run_pieces(const Arguments& a, int64_t pixels, std::integer_sequence<int, R...>) {
    static constexpr void (*table[])(const Arguments&, int64_t) = {&run_piece<R + 1>...};
    for (int64_t first = 0; first < pixels; first += kPiecePixels)
      table[std::min<int64_t>(kPiecePixels, pixels - first) - 1](a, first);
  }
  static void run(const Arguments& a, int64_t pixels, int64_t) {
    run_pieces(a, pixels, std::make_integer_sequence<int, kPiecePixels>());
  }
};

}  // namespace qkernels
#endif
