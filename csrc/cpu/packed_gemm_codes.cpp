// Microkernels of the integer convolution: unsigned input codes times signed weights, exact sums in int32 (depth below
// 2^31 / (255 * 128) = 65,793).
//
// AVX-512 VNNI multiplies 64 pairs an instruction. A tile of 6 pixels by 64 channels holds 24 sums in registers; a step
// of 4 elements of depth loads 256 bytes of the panel and 4 of each pixel for 24 instructions.
//
// AVX2 multiplies 32 pairs and adds two neighbors each in 16 bits, which is exact for weights of up to 7 bits; the next
// instruction adds two neighbors of those in 32 bits.

#include "elements.h"
#include "packed_fill_avx2.h"
#include "packed_fill_avx512.h"
#include "packed_gemm.h"
#include "packed_tile_avx2.h"

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
// Weights of up to 7 bits: 2 * 255 * 64 fits in 16 bits.
struct SevenBitProducts {
  using Inputs = __m256i;
  using Weights = __m256i;
  using Sums = __m256i;

  QK_AVX2 static Inputs load_inputs(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  QK_AVX2 static Weights load_weights(const int8_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  QK_AVX2 static Sums load_sums(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  QK_AVX2 static Sums multiply_add(Inputs x, Weights weights, Sums sums) {
    const __m256i pairs = _mm256_maddubs_epi16(x, weights);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  QK_AVX2 static void store(int32_t* p, Sums sums) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), sums); }
};

// Weights of 8 bits: codes with even and with odd indices, widened to 16 bits and multiplied apart.
struct EightBitProducts : SevenBitProducts {
  struct Inputs {
    __m256i even, odd;
  };
  using Weights = Inputs;

  QK_AVX2 static Inputs load_inputs(const uint8_t* x) {
    const __m256i codes = SevenBitProducts::load_inputs(x);
    return {_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16(codes, 8)};
  }
  QK_AVX2 static Weights load_weights(const int8_t* p) {
    const __m256i codes = SevenBitProducts::load_weights(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), _mm256_srai_epi16(codes, 8)};
  }
  QK_AVX2 static Sums multiply_add(Inputs x, Weights weights, Sums sums) {
    const __m256i even = _mm256_madd_epi16(x.even, weights.even), odd = _mm256_madd_epi16(x.odd, weights.odd);
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
  }
};

template <class Products>
CodesGemm avx2_gemm() {
  return {kAvx2Tiles, &Avx2Tile<CodesGemm, Products>::run, &fill_codes_avx2};
}

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

CodesGemm gemm_of(Isa isa, int bits) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512vnni: return {kWideTiles, &WideTiles<VnniTile, Arguments>::run, &fill_codes_avx512};
    case Isa::avx2: return bits < 8 ? avx2_gemm<SevenBitProducts>() : avx2_gemm<EightBitProducts>();
#endif
    default: return {kWideTiles, &WideTiles<PortableTile, Arguments>::run, &fill};
  }
}

}  // namespace

void convolve_codes(const Image<uint8_t>& image, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e) {
  convolve(gemm_of(e.isa, weights.bits), image, sizes, weights, e);
}

}  // namespace qkernels
