// Microkernels of the convolution with float activations: float32 input times codes, widened to float32 in the panel.
//
// AVX-512 multiplies and adds 16 pairs an instruction; tiles are those of the integer kernels.

#include "cpu_isa.h"
#include "elements.h"
#include "packed_fill_avx512.h"
#include "packed_gemm.h"

namespace qkernels {
namespace {

using FloatGemm = Gemm<float, float, float, 1>;
using Arguments = FloatGemm::Arguments;

QK_VECTORIZED void fill(const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, float* lanes) {
  for (int64_t step = 0; step < steps; ++step, lanes += vectors * kLanes)
    for (int64_t c = 0; c < kLanes; ++c) lanes[c] = rows[c * stride + step];
}

template <int R, int V>
struct PortableTile {
  QK_VECTORIZED static void run(const Arguments& a) {
    for (int r = 0; r < R; ++r) {
      float sums[V * kLanes] = {};
      const float* panel = a.panel;
      for (int64_t run = 0; run < a.run_count; ++run) {
        const float* x = a.pixels[r] + a.runs[run];
        for (int64_t step = 0; step < a.run_steps; ++step, panel += V * kLanes)
          for (int c = 0; c < V * kLanes; ++c) sums[c] += x[step] * panel[c];
      }
      for (int c = 0; c < V * kLanes; ++c) a.sums[r * kBlockChannels + c] = sums[c];
    }
  }
};

#if defined(__x86_64__)
template <int R, int V>
struct Avx512Tile {
  QK_AVX512 static void run(const Arguments& a) {
    __m512 sums[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
    const float* panel = a.panel;
    for (int64_t run = 0; run < a.run_count; ++run) {
      const float* x[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) x[r] = a.pixels[r] + a.runs[run];
      for (int64_t step = 0; step < a.run_steps; ++step, panel += V * kLanes) {
        __m512 weights[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) weights[v] = _mm512_load_ps(panel + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const __m512 element = _mm512_set1_ps(x[r][step]);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[r][v] = _mm512_fmadd_ps(element, weights[v], sums[r][v]);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_store_ps(a.sums + r * kBlockChannels + v * kLanes, sums[r][v]);
  }
};
#endif

FloatGemm best_gemm() {
#if defined(__x86_64__)
  if (use_avx512()) return {&Tiles<Avx512Tile, FloatGemm::Tile>::choose, &fill_floats_avx512};
#endif
  return {&Tiles<PortableTile, FloatGemm::Tile>::choose, &fill};
}

}  // namespace

void convolve_floats(const Image<float>& image, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e) {
  convolve(best_gemm(), image, sizes, weights, e);
}

}  // namespace qkernels
