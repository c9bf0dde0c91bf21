// Microkernels of the integer convolution: unsigned input codes times signed weights, exact sums in int32 (depth below
// 2^31 / (255 * 128) = 65,793).
//
// AVX-512 VNNI multiplies 64 pairs an instruction. A tile of 6 pixels by 64 channels holds 24 sums in registers; a step
// of 4 elements of depth loads 256 bytes of the panel and 4 of each pixel for 24 instructions.

#include "cpu_isa.h"
#include "elements.h"
#include "packed_fill_avx512.h"
#include "packed_gemm.h"

namespace qkernels {
namespace {

using CodesGemm = Gemm<uint8_t, int8_t, int32_t, 4>;
using Arguments = CodesGemm::Arguments;

void fill(const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, int8_t* lanes) {
  for (int64_t step = 0; step < steps; ++step, lanes += vectors * kLanes * 4)
    for (int64_t c = 0; c < kLanes; ++c) std::memcpy(lanes + 4 * c, rows + c * stride + 4 * step, 4);
}

template <int R, int V>
struct PortableTile {
  QK_VECTORIZED static void run(const Arguments& a) {
    for (int r = 0; r < R; ++r) {
      int32_t sums[V * kLanes];
      for (int c = 0; c < V * kLanes; ++c) sums[c] = a.start[c];
      const int8_t* panel = a.panel;
      for (int64_t run = 0; run < a.run_count; ++run) {
        const uint8_t* x = a.pixels[r] + a.runs[run];
        for (int64_t step = 0; step < a.run_steps; ++step, x += 4, panel += V * kLanes * 4)
          for (int c = 0; c < V * kLanes; ++c)
            for (int k = 0; k < 4; ++k) sums[c] += x[k] * panel[4 * c + k];
      }
      for (int c = 0; c < V * kLanes; ++c) a.sums[r * kBlockChannels + c] = sums[c];
    }
  }
};

#if defined(__x86_64__)
template <int R, int V>
struct VnniTile {
  QK_AVX512_VNNI static void run(const Arguments& a) {
    __m512i sums[R][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512i start = _mm512_load_si512(a.start + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
    const int8_t* panel = a.panel;
    for (int64_t run = 0; run < a.run_count; ++run) {
      const uint8_t* x[R];
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) x[r] = a.pixels[r] + a.runs[run];
      for (int64_t step = 0; step < a.run_steps; ++step, panel += V * 64) {
        __m512i weights[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) weights[v] = _mm512_load_si512(panel + v * 64);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, x[r] + 4 * step, 4);
          const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], codes, weights[v]);
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_store_si512(a.sums + r * kBlockChannels + v * kLanes, sums[r][v]);
  }
};
#endif

CodesGemm best_gemm() {
#if defined(__x86_64__)
  if (use_avx512()) return {&Tiles<VnniTile, CodesGemm::Tile>::choose, &fill_codes_avx512};
#endif
  return {&Tiles<PortableTile, CodesGemm::Tile>::choose, &fill};
}

}  // namespace

void convolve_codes(const Image<uint8_t>& image, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e) {
  convolve(best_gemm(), image, sizes, weights, e);
}

}  // namespace qkernels
