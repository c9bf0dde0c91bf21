// Microkernels of the convolution with float activations: float32 input times codes, widened to float32 in the panel.
//
// AVX-512 multiplies and adds 16 pairs an instruction, AVX2 8; tiles are those of the integer kernels.
//
// AMX multiplies bfloat16 input by codes as bfloat16: see packed_tile_amx.h.

#include "packed_fill_avx2.h"
#include "packed_fill_avx512.h"
#include "packed_gemm_floats.h"
#include "packed_tile_amx.h"
#include "packed_tile_avx2.h"
#include "vectorized.h"

namespace qkernels {
namespace {

using Arguments = FloatGemm::Arguments;

QK_VECTORIZED void fill(const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, float* lanes) {
  for (int64_t step = 0; step < steps; ++step, lanes += vectors * kLanes)
    for (int64_t c = 0; c < kLanes; ++c) lanes[c] = rows[c * stride + step];
}

void fill_pairs(const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, BFloat16* lanes) {
  for (int64_t step = 0; step < steps; ++step, lanes += vectors * kLanes * 2)
    for (int64_t c = 0; c < kLanes; ++c)
      for (int64_t k = 0; k < 2; ++k) store(lanes + 2 * c + k, rows[c * stride + 2 * step + k]);
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
struct FloatProducts {
  using Inputs = __m256;
  using Weights = __m256;
  using Sums = __m256;
  static constexpr int kSteps = 1;

  QK_AVX2 static Inputs load_inputs(const float* x) { return _mm256_broadcast_ss(x); }
  QK_AVX2 static Weights load_weights(const float* p) { return _mm256_load_ps(p); }
  QK_AVX2 static Sums load_sums(const float* p) { return _mm256_load_ps(p); }
  QK_AVX2 static Sums multiply_add(Inputs x, Weights weights, Sums sums) { return _mm256_fmadd_ps(x, weights, sums); }
  QK_AVX2 static void store(float* p, Sums sums) { _mm256_store_ps(p, sums); }
};

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

}  // namespace

FloatGemm float_gemm(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::amx:
    case Isa::avx512vnni: return {kWideTiles, &WideTiles<Avx512Tile, Arguments>::run, &fill_floats_avx512};
    case Isa::avxvnni:
    case Isa::avx2: return {kAvx2Tiles, &Avx2Tile<FloatGemm, FloatProducts>::run, &fill_floats_avx2};
#endif
    default: return {kWideTiles, &WideTiles<PortableTile, Arguments>::run, &fill};
  }
}

namespace {

Stage convolution_of(
    const Image<BFloat16>& image, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e) {
#if defined(__x86_64__)
  if (e.isa == Isa::amx)
    return convolution(AmxGemm<AmxTiles<AmxBFloat16s>>{&fill_bfloat16s_avx512}, image, sizes, weights, e);
#endif
  return convolution(AmxGemm<EmulatedTiles<AmxBFloat16s>>{&fill_pairs}, image, sizes, weights, e);
}

}  // namespace

void convolve_floats(
    const Pixels& x, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e, Memory& memory,
    std::vector<Stage>& stages) {
  if (x.dtype == ScalarType::BFloat16 && (e.isa == Isa::amx || e.isa == Isa::emulated_amx)) {
    const int64_t step = AmxBFloat16s::channel_step(sizes.depth());
    const Image<BFloat16> image = image_of_bfloat16s(x, sizes, step, memory, stages);
    return stages.push_back(convolution_of(image, sizes, weights, e));
  }
  stages.push_back(convolution(float_gemm(e.isa), image_of_floats(x, sizes, 1, memory, stages), sizes, weights, e));
}

}  // namespace qkernels
