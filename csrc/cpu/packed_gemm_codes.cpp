// Microkernels of the integer convolution: unsigned input codes times signed weights, exact sums in int32 (depth below
// 2^31 / (255 * 128) = 65,793).
//
// AVX-512 VNNI multiplies 64 pairs an instruction. A tile of 6 pixels by 64 channels holds 24 sums in registers; a step
// of 4 elements of depth loads 256 bytes of the panel and 4 of each pixel for 24 instructions.
//
// AVX2 multiplies 32 pairs and adds two neighbors each in 16 bits, which is exact for weights of up to 7 bits; another
// instruction adds two neighbors of those in 32 bits. Weights of fewer bits leave room in the 16 for several steps. With
// AVX-VNNI one instruction does both.
//
// AMX: see packed_tile_amx.h.

#include "packed_fill_avx2.h"
#include "packed_fill_avx512.h"
#include "packed_gemm.h"
#include "packed_tile_amx.h"
#include "packed_tile_avx2.h"
#include "vectorized.h"

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
struct Avx2Codes {
  using Sums = __m256i;

  QK_AVX2 static __m256i broadcast(const uint8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
  }
  QK_AVX2 static __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
  QK_AVX2 static Sums load_sums(const int32_t* p) { return load(p); }
  QK_AVX2 static void store(int32_t* p, Sums sums) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), sums); }
};

// The products of so many steps added in 16 bits. Two with weights of 7 bits fit, 2 * 255 * 64, and for each bit less
// twice as many.
template <int Steps>
struct ShortProducts : Avx2Codes {
  struct Inputs {
    __m256i steps[Steps];
  };
  using Weights = Inputs;
  static constexpr int kSteps = Steps;

  QK_AVX2 static Inputs load_inputs(const uint8_t* x) {
    Inputs inputs;
#pragma GCC unroll 4
    for (int i = 0; i < Steps; ++i) inputs.steps[i] = broadcast(x + 4 * i);
    return inputs;
  }
  QK_AVX2 static Weights load_weights(const int8_t* p) {
    Weights weights;
#pragma GCC unroll 4
    for (int i = 0; i < Steps; ++i) weights.steps[i] = load(p + 4 * kLanes * i);
    return weights;
  }
  QK_AVX2 static Sums multiply_add(const Inputs& x, const Weights& weights, Sums sums) {
    __m256i pairs = _mm256_maddubs_epi16(x.steps[0], weights.steps[0]);
#pragma GCC unroll 4
    for (int i = 1; i < Steps; ++i)
      pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(x.steps[i], weights.steps[i]));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// Weights of 8 bits: codes with even and with odd indices, widened to 16 bits and multiplied apart.
struct WideProducts : Avx2Codes {
  struct Inputs {
    __m256i even, odd;
  };
  using Weights = Inputs;
  static constexpr int kSteps = 1;

  QK_AVX2 static Inputs load_inputs(const uint8_t* x) {
    const __m256i codes = broadcast(x);
    return {_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16(codes, 8)};
  }
  QK_AVX2 static Weights load_weights(const int8_t* p) {
    const __m256i codes = load(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8), _mm256_srai_epi16(codes, 8)};
  }
  QK_AVX2 static Sums multiply_add(Inputs x, Weights weights, Sums sums) {
    const __m256i even = _mm256_madd_epi16(x.even, weights.even), odd = _mm256_madd_epi16(x.odd, weights.odd);
    return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
  }
};

// Four products added in 32 bits, of weights of any bits: VNNI of CPUs without AVX-512. In assembly, so that the tiles
// for AVX2 take it in.
struct AvxVnniProducts : Avx2Codes {
  using Inputs = __m256i;
  using Weights = __m256i;
  static constexpr int kSteps = 1;

  QK_AVX2 static Inputs load_inputs(const uint8_t* x) { return broadcast(x); }
  QK_AVX2 static Weights load_weights(const int8_t* p) { return load(p); }
  QK_AVX2 static Sums multiply_add(Inputs x, Weights weights, Sums sums) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(weights));
    return sums;
  }
};

template <class Products>
constexpr CodesGemm kAvx2Gemm{kAvx2Tiles, &Avx2Tile<CodesGemm, Products>::run, &fill_codes_avx2};

// Runs are multiples of `channels`.
CodesGemm avx2_gemm(int bits, int64_t channels) {
  if (bits == 8) return kAvx2Gemm<WideProducts>;
  if (bits <= 5 && channels % 16 == 0) return kAvx2Gemm<ShortProducts<4>>;
  if (bits <= 6 && channels % 8 == 0) return kAvx2Gemm<ShortProducts<2>>;
  return kAvx2Gemm<ShortProducts<1>>;
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

CodesGemm gemm_of(Isa isa, int bits, int64_t channels) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512vnni: return {kWideTiles, &WideTiles<VnniTile, Arguments>::run, &fill_codes_avx512};
    case Isa::avxvnni: return kAvx2Gemm<AvxVnniProducts>;
    case Isa::avx2: return avx2_gemm(bits, channels);
#endif
    default: return {kWideTiles, &WideTiles<PortableTile, Arguments>::run, &fill};
  }
}

// Calls f with the kernels of an instruction set, for weights of so many bits and groups of so many stored channels.
template <class F>
auto with_gemm(Isa isa, int bits, int64_t channels, const F& f) {
#if defined(__x86_64__)
  if (isa == Isa::amx) return f(AmxGemm<AmxTiles<AmxCodes>>{&fill_codes_avx512});
#endif
  if (isa == Isa::emulated_amx) return f(AmxGemm<EmulatedTiles<AmxCodes>>{&fill});
  return f(gemm_of(isa, bits, channels));
}

// Calls f with the convolution whose panels are to be kept: of one output of an image that is not there.
template <class F>
auto with_kept(const Sizes& s, const PackedWeights& weights, const F& f) {
  constexpr int64_t step = CodesGemm::kStep;
  const int64_t group = (s.depth() + step - 1) / step * step, pixel = s.groups * group;
  Image<uint8_t> image{};
  image.pixel = pixel, image.group = group, image.raised_by = -1;
  image.tap_right = s.dilation_w == 1 ? pixel : 2 * pixel;  // all that is asked is whether taps are neighbors
  const std::vector<float> ones(s.members * s.out_channels, 1.0f);
  const Epilogue e{.channels = s.out_channels, .scale = ones.data(), .activation = Activation::none, .out = nullptr,
                   .out_dtype = ScalarType::Float};
  return with_gemm(e.isa, weights.bits, group, [&](const auto& gemm) {
    return f(std::make_shared<const Convolution<std::decay_t<decltype(gemm)>>>(gemm, image, s, weights, e));
  });
}

}  // namespace

void convolve_codes(
    const Pixels& x, const Sizes& sizes, const PackedWeights& weights, const Epilogue& e, Memory& memory,
    std::vector<Stage>& stages) {
  const Image<uint8_t> image = image_of_codes(x, sizes, CodesGemm::kStep, memory, stages);
  stages.push_back(with_gemm(e.isa, weights.bits, image.group, [&](const auto& gemm) {
    return convolution(gemm, image, sizes, weights, e);
  }));
}

int64_t panel_record_bytes(const Sizes& sizes, const PackedWeights& weights) {
  return with_kept(sizes, weights, [](const auto& convolution) { return convolution->record_bytes(); });
}

void keep_panels(const Sizes& sizes, const PackedWeights& weights, uint8_t* records) {
  with_kept(sizes, weights, [&](const auto& convolution) { run_stages({convolution->keep(convolution, records)}); });
}

}  // namespace qkernels
