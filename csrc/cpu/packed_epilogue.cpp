// The epilogue in float32, each operation rounded, as docs/numerics.md has it: the same bits on every backend.

#include "packed_epilogue.h"

#include "../numerics.h"
#include "packed_activation.h"
#include "vectorized.h"

#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <type_traits>

namespace qkernels {
namespace {

constexpr int64_t kMostRows = 12;   // pixels handled at a time
constexpr int64_t kCacheLine = 64;  // bytes

struct NoResidual {};

template <class T>
constexpr bool is_code = std::is_same_v<T, uint8_t> || std::is_same_v<T, int8_t>;

template <class Sum, class Residual>
QK_ALWAYS_INLINE float value(
    const ChannelBlock& block, Bounds bounds, const Sum* sums, const Residual* residual, int64_t c) {
  float v = static_cast<float>(sums[c]) * block.multiplier[c] + block.bias[c];
  if constexpr (is_code<Residual>)
    v = v + static_cast<float>(residual[c]) * block.residual_scale;
  else if constexpr (!std::is_same_v<Residual, NoResidual>)
    v = v + load(residual[c]);
  return clamp(v, bounds.low, bounds.high);
}

template <class Sum, class Residual>
QK_VECTORIZED void values_of(
    const ChannelBlock& block, Bounds bounds, const Sum* sums, int64_t stride, const Residual* residual,
    int64_t channels, int64_t rows, float* values, int64_t values_stride) {
  for (int64_t row = 0; row < rows; ++row) {
#pragma omp simd
    for (int64_t c = 0; c < block.count; ++c)
      values[row * values_stride + c] = value(block, bounds, sums + row * stride, residual + row * channels, c);
  }
}

// The code is round(clamp(v / scale)) with IEEE division, which is slow. A product with 1 / scale differs from the
// quotient by less than 2^-14 in the range of codes, so it rounds to the same code unless it lies that near to a tie
// (or is NaN, or 1 / scale is not a number to rely on); then it is divided.
constexpr float kSure = 0.5f - 0x1p-14f;

struct Requantizer {
  float scale, inverse, qmin, qmax, of_nan;

  Requantizer(float given, float low, float high)
      : scale(valid_scale(given)), inverse(scale > 0x1p-100f && scale < 0x1p100f ? 1.0f / scale : NAN), qmin(low),
        qmax(high), of_nan(clamp(0.0f, low, high)) {}
};

// Of NaN, which no integer holds, 0.
QK_ALWAYS_INLINE uint8_t byte_of(float code) {
  return static_cast<uint8_t>(static_cast<int>(code == code ? code : 0.0f));
}

// Writes the codes of n values; false if some need the division.
template <class Value>
QK_ALWAYS_INLINE bool quick_codes(const Requantizer& q, int64_t n, uint8_t* codes, const Value& value) {
  int unsure = 0;
#pragma omp simd reduction(| : unsure)
  for (int64_t c = 0; c < n; ++c) {
    const float grid = clamp(value(c) * q.inverse, q.qmin, q.qmax), code = round_half_even(grid);
    unsure |= !(__builtin_fabsf(grid - code) < kSure);
    codes[c] = byte_of(code);
  }
  return !unsure;
}

QK_ALWAYS_INLINE void exact_codes(const Requantizer& q, int64_t n, uint8_t* codes, const float* values) {
  for (int64_t c = 0; c < n; ++c) {
    const float code = round_half_even(clamp(divide(values[c], q.scale), q.qmin, q.qmax));
    codes[c] = byte_of(code == code ? code : q.of_nan);
  }
}

QK_VECTORIZED void codes_of(
    Requantizer q, const float* values, int64_t n, int64_t rows, int64_t channels, uint8_t* out) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* v = values + row * kBlockChannels;
    if (!quick_codes(q, n, out + row * channels, [v](int64_t c) { return v[c]; }))
      exact_codes(q, n, out + row * channels, v);
  }
}

template <class Out>
QK_VECTORIZED void store_rows(const float* values, int64_t n, int64_t rows, int64_t channels, Out* out) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < n; ++c) store(out + row * channels + c, values[row * kBlockChannels + c]);
}

#if defined(__x86_64__)
// The common epilogues without a trip through memory, a row of up to 64 channels at a time. An activation that clamps y
// clamps y / scale as well, at its bounds over scale; the function A of another comes before.
struct Avx512Channels {
  __m512 multiplier[4], bias[4];
  __mmask16 used[4];
};

QK_AVX512 inline Avx512Channels avx512_channels(const ChannelBlock& block) {
  Avx512Channels c;
  for (int v = 0; v < 4; ++v) {
    const int64_t left = block.count - 16 * v;
    c.used[v] = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
    c.multiplier[v] = _mm512_maskz_load_ps(c.used[v], block.multiplier + 16 * v);
    c.bias[v] = _mm512_maskz_load_ps(c.used[v], block.bias + 16 * v);
  }
  return c;
}

// 16 channels' y, before the activation.
template <class Residual>
QK_AVX512 inline __m512 avx512_values(
    const Avx512Channels& c, int v, const int32_t* sums, const Residual* residual, __m512 residual_scale) {
  __m512 y = _mm512_cvtepi32_ps(_mm512_load_si512(sums + 16 * v));
  y = _mm512_add_ps(_mm512_mul_ps(y, c.multiplier[v]), c.bias[v]);
  if constexpr (std::is_same_v<Residual, float>) {
    y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(c.used[v], residual + 16 * v));
  } else if constexpr (is_code<Residual>) {
    const __m128i bytes = _mm_maskz_loadu_epi8(c.used[v], residual + 16 * v);
    const __m512i codes = std::is_same_v<Residual, int8_t> ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    y = _mm512_add_ps(y, _mm512_mul_ps(_mm512_cvtepi32_ps(codes), residual_scale));
  }
  return y;
}

// V registers of sums to codes. What is added to round leaves the code in the lowest byte.
template <int V, Activation A, class Residual>
QK_AVX512 void codes_of_sums_avx512(
    const ChannelBlock& block, const Requantizer& q, Bounds bounds, const int32_t* sums, int64_t stride,
    const Residual* residual, int64_t channels, int64_t rows, uint8_t* out) {
  const Avx512Channels c = avx512_channels(block);
  const __m512 scale = _mm512_set1_ps(q.scale), inverse = _mm512_set1_ps(q.inverse), sure = _mm512_set1_ps(kSure);
  const __m512 low = _mm512_set1_ps(clamp(divide(bounds.low, q.scale), q.qmin, q.qmax));
  const __m512 high = _mm512_set1_ps(clamp(divide(bounds.high, q.scale), q.qmin, q.qmax));
  const __m512 residual_scale = _mm512_set1_ps(block.residual_scale), rounder = _mm512_set1_ps(0x1.8p23f);
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __mmask64 stored = block.count >= 64 ? ~__mmask64{0} : (__mmask64{1} << block.count) - 1;
  for (int64_t row = 0; row < rows; ++row, sums += stride, residual += channels, out += channels) {
    __m512 y[V];
    __m512i codes[4] = {};
    unsigned unsure = 0;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      y[v] = activated_avx512<A>(avx512_values(c, v, sums, residual, residual_scale));
      // Of these, the second operand comes out if one is NaN.
      const __m512 grid = _mm512_min_ps(high, _mm512_max_ps(low, _mm512_mul_ps(y[v], inverse)));
      const __m512 rounded = _mm512_add_ps(grid, rounder);
      const __m512 distance = _mm512_abs_ps(_mm512_sub_ps(grid, _mm512_sub_ps(rounded, rounder)));
      unsure |= _mm512_mask_cmp_ps_mask(c.used[v], distance, sure, _CMP_NLT_UQ);
      codes[v] = _mm512_and_si512(_mm512_castps_si512(rounded), byte);
    }
    if (__builtin_expect(unsure != 0, 0))
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m512 grid = _mm512_min_ps(high, _mm512_max_ps(low, _mm512_div_ps(y[v], scale)));
        __m512 code = _mm512_roundscale_ps(grid, _MM_FROUND_TO_NEAREST_INT);
        code = _mm512_mask_mov_ps(code, _mm512_cmp_ps_mask(code, code, _CMP_UNORD_Q), _mm512_set1_ps(q.of_nan));
        codes[v] = _mm512_and_si512(_mm512_cvtps_epi32(code), byte);
      }
    const __m512i words01 = _mm512_packus_epi32(codes[0], codes[1]), words23 = _mm512_packus_epi32(codes[2], codes[3]);
    const __m512i quarters = _mm512_packus_epi16(words01, words23);  // four channels of each register
    _mm512_mask_storeu_epi8(out, stored, _mm512_permutexvar_epi32(in_order, quarters));
  }
}

// V registers of sums to float32.
template <int V, Activation A, class Residual>
QK_AVX512 void floats_of_sums_avx512(
    const ChannelBlock& block, Bounds bounds, const int32_t* sums, int64_t stride, const Residual* residual,
    int64_t channels, int64_t rows, float* out) {
  const Avx512Channels c = avx512_channels(block);
  const __m512 low = _mm512_set1_ps(bounds.low), high = _mm512_set1_ps(bounds.high);
  const __m512 residual_scale = _mm512_set1_ps(block.residual_scale);
  for (int64_t row = 0; row < rows; ++row, sums += stride, residual += channels, out += channels)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m512 y = activated_avx512<A>(avx512_values(c, v, sums, residual, residual_scale));
      _mm512_mask_storeu_ps(out + 16 * v, c.used[v], _mm512_min_ps(high, _mm512_max_ps(low, y)));
    }
}

// The first n bytes at p, or 8 of more. A copy of a known size is one instruction.
QK_AVX2 inline __m128i load_bytes(const void* p, int64_t n) {
  int64_t bytes = 0;
  n >= 8 ? std::memcpy(&bytes, p, 8) : std::memcpy(&bytes, p, n);
  return _mm_cvtsi64_si128(bytes);
}

QK_AVX2 inline void store_bytes(void* p, __m128i v, int64_t n) {
  const int64_t bytes = _mm_cvtsi128_si64(v);
  n >= 8 ? std::memcpy(p, &bytes, 8) : std::memcpy(p, &bytes, n);
}

// The same 8 channels at a time; of a last few, the others are computed and not stored.
template <Activation A, class Residual>
QK_AVX2 void codes_of_sums_avx2(
    const ChannelBlock& block, const Requantizer& q, Bounds bounds, const int32_t* sums, int64_t stride,
    const Residual* residual, int64_t channels, int64_t rows, uint8_t* out) {
  const __m256 scale = _mm256_set1_ps(q.scale), inverse = _mm256_set1_ps(q.inverse);
  const __m256 low = _mm256_set1_ps(clamp(divide(bounds.low, q.scale), q.qmin, q.qmax));
  const __m256 high = _mm256_set1_ps(clamp(divide(bounds.high, q.scale), q.qmin, q.qmax));
  const __m256 residual_scale = _mm256_set1_ps(block.residual_scale), sign = _mm256_set1_ps(-0.0f);
  for (int64_t c = 0; c < block.count; c += 8) {
    const int64_t n = block.count - c;
    const __m256 multiplier = _mm256_load_ps(block.multiplier + c), bias = _mm256_load_ps(block.bias + c);
    for (int64_t row = 0; row < rows; ++row) {
      const __m256i sum = _mm256_load_si256(reinterpret_cast<const __m256i*>(sums + row * stride + c));
      __m256 v = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), multiplier), bias);
      if constexpr (is_code<Residual>) {
        const __m128i bytes = load_bytes(residual + row * channels + c, n);
        const __m256i codes =
            std::is_same_v<Residual, int8_t> ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
        v = _mm256_add_ps(v, _mm256_mul_ps(_mm256_cvtepi32_ps(codes), residual_scale));
      }
      v = activated_avx2<A>(v);
      __m256 grid = _mm256_min_ps(high, _mm256_max_ps(low, _mm256_mul_ps(v, inverse)));
      __m256 code = _mm256_round_ps(grid, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      const __m256 distance = _mm256_andnot_ps(sign, _mm256_sub_ps(grid, code));
      if (_mm256_movemask_ps(_mm256_cmp_ps(distance, _mm256_set1_ps(kSure), _CMP_NLT_UQ))) {
        grid = _mm256_min_ps(high, _mm256_max_ps(low, _mm256_div_ps(v, scale)));
        code = _mm256_round_ps(grid, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        code = _mm256_blendv_ps(code, _mm256_set1_ps(q.of_nan), _mm256_cmp_ps(code, code, _CMP_UNORD_Q));
      }
      const __m256i low_bytes = _mm256_and_si256(_mm256_cvtps_epi32(code), _mm256_set1_epi32(255));
      const __m128i words =
          _mm_packus_epi32(_mm256_castsi256_si128(low_bytes), _mm256_extracti128_si256(low_bytes, 1));
      store_bytes(out + row * channels + c, _mm_packus_epi16(words, words), n);
    }
  }
}
#endif

// Calls f(pointer to the residual's element `at`, of its type).
template <class F>
void with_residual(const Epilogue& e, int64_t at, const F& f) {
  if (e.residual == nullptr) return f(static_cast<const NoResidual*>(nullptr));
  switch (e.residual_dtype) {
    case ScalarType::Byte: return f(static_cast<const uint8_t*>(e.residual) + at);
    case ScalarType::Char: return f(static_cast<const int8_t*>(e.residual) + at);
    case ScalarType::BFloat16: return f(static_cast<const BFloat16*>(e.residual) + at);
    case ScalarType::Half: return f(static_cast<const Float16*>(e.residual) + at);
    default: return f(static_cast<const float*>(e.residual) + at);
  }
}

int64_t bytes_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: return 1;
  }
}

void store_values(const Epilogue& e, const ChannelBlock& block, const float* values, int64_t rows, int64_t at) {
  const int64_t n = block.count;
  switch (e.out_dtype) {
    case ScalarType::BFloat16: return store_rows(values, n, rows, e.channels, static_cast<BFloat16*>(e.out) + at);
    case ScalarType::Half: return store_rows(values, n, rows, e.channels, static_cast<Float16*>(e.out) + at);
    default: {
      const Requantizer q(block.out_scale, e.qmin, e.qmax);
      return codes_of(q, values, n, rows, e.channels, static_cast<uint8_t*>(e.out) + at);
    }
  }
}

template <class Sum>
void finish_rows(
    const Epilogue& e, const ChannelBlock& block, const Sum* sums, int64_t stride, int64_t rows, int64_t at) {
  alignas(64) float scratch[kMostRows * kBlockChannels];
  const bool in_place = e.out_dtype == ScalarType::Float;
  const int64_t values_stride = in_place ? e.channels : kBlockChannels;
  for (int64_t done = 0; done < rows; done += kMostRows) {
    const int64_t m = std::min(kMostRows, rows - done), out = at + done * e.channels;
    float* values = in_place ? static_cast<float*>(e.out) + out : scratch;
    with_residual(e, out, [&](const auto* residual) {
      values_of(
          block, bounds_of(e.activation), sums + done * stride, stride, residual, e.channels, m, values,
          values_stride);
    });
    with_function(e.activation, [&]<Activation A>() {
      if constexpr (A != Activation::none)
        for (int64_t row = 0; row < m; ++row) activate<A>(values + row * values_stride, block.count);
    });
    if (!in_place) store_values(e, block, values, m, out);
  }
}

#if defined(__x86_64__)
// Functions are compiled for sums to which nothing is added, as they come in networks.
template <Activation A, class Residual>
constexpr bool is_common = A == Activation::none || std::is_same_v<Residual, NoResidual>;

template <Activation A, class Residual>
bool finish_avx512(
    const Epilogue& e, const ChannelBlock& block, const int32_t* sums, int64_t stride, const Residual* residual,
    int64_t rows, int64_t at) {
  constexpr bool known =
      is_code<Residual> || std::is_same_v<Residual, float> || std::is_same_v<Residual, NoResidual>;
  const auto with_vectors = [&](const auto& run) {
    switch ((block.count + 15) / 16) {
      case 1: return run.template operator()<1>();
      case 2: return run.template operator()<2>();
      case 3: return run.template operator()<3>();
      default: return run.template operator()<4>();
    }
  };
  const Bounds bounds = bounds_of(e.activation);
  if constexpr (known && is_common<A, Residual>) {
    if (e.out_scale != nullptr) {
      const Requantizer q(block.out_scale, e.qmin, e.qmax);
      uint8_t* out = static_cast<uint8_t*>(e.out) + at;
      with_vectors([&]<int V>() {
        codes_of_sums_avx512<V, A>(block, q, bounds, sums, stride, residual, e.channels, rows, out);
      });
      return true;
    }
    if (e.out_dtype == ScalarType::Float) {
      float* out = static_cast<float*>(e.out) + at;
      with_vectors([&]<int V>() {
        floats_of_sums_avx512<V, A>(block, bounds, sums, stride, residual, e.channels, rows, out);
      });
      return true;
    }
  }
  return false;
}

template <Activation A, class Residual>
bool finish_avx2(
    const Epilogue& e, const ChannelBlock& block, const int32_t* sums, int64_t stride, const Residual* residual,
    int64_t rows, int64_t at) {
  if constexpr ((is_code<Residual> || std::is_same_v<Residual, NoResidual>) && is_common<A, Residual>) {
    if (e.out_scale == nullptr) return false;
    const Requantizer q(block.out_scale, e.qmin, e.qmax);
    uint8_t* out = static_cast<uint8_t*>(e.out) + at;
    codes_of_sums_avx2<A>(block, q, bounds_of(e.activation), sums, stride, residual, e.channels, rows, out);
    return true;
  }
  return false;
}
#endif

// Whether there are instructions for what is to be done, and it is done.
bool finish_quickly(
    const Epilogue& e, const ChannelBlock& block, const int32_t* sums, int64_t stride, int64_t rows, int64_t at) {
  bool done = false;
#if defined(__x86_64__)
  if (!(has_avx512(e.isa) || has_avx2(e.isa))) return false;
  with_function(e.activation, [&]<Activation A>() {
    with_residual(e, at, [&](const auto* residual) {
      done = has_avx512(e.isa) ? finish_avx512<A>(e, block, sums, stride, residual, rows, at)
                               : finish_avx2<A>(e, block, sums, stride, residual, rows, at);
    });
  });
#endif
  return done;
}

}  // namespace

ChannelBlock::ChannelBlock(const Epilogue& e, int64_t member, int64_t first, int64_t n) : count(n) {
  for (int64_t c = 0; c < n; ++c) {
    const int64_t i = member * e.channels + first + c;
    multiplier[c] = e.x_scale ? e.scale[i] * e.x_scale[member] : e.scale[i];
    bias[c] = e.bias ? e.bias[i] : 0.0f;
  }
  residual_scale = e.residual_scale ? e.residual_scale[member] : 1.0f;
  out_scale = e.out_scale ? e.out_scale[member] : 1.0f;
}

void prefetch_results(const Epilogue& e, const ChannelBlock& block, int64_t rows, int64_t out) {
  const int64_t size = bytes_of(e.out_dtype);
  for (int64_t row = 0; row < rows; ++row) {
    const char* results = static_cast<const char*>(e.out) + (out + row * e.channels) * size;
    for (int64_t byte = 0; byte < block.count * size; byte += kCacheLine) __builtin_prefetch(results + byte, 1);
  }
}

void finish(
    const Epilogue& e, const ChannelBlock& block, const int32_t* sums, int64_t stride, int64_t rows, int64_t out) {
  if (!finish_quickly(e, block, sums, stride, rows, out)) finish_rows(e, block, sums, stride, rows, out);
}

void finish(
    const Epilogue& e, const ChannelBlock& block, const float* sums, int64_t stride, int64_t rows, int64_t out) {
  finish_rows(e, block, sums, stride, rows, out);
}

}  // namespace qkernels
