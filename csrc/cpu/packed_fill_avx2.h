// Filling panels with AVX2: the codes of 16 channels, one after another in memory, become two registers of lanes.
#pragma once

#include "cpu_isa.h"

#include <cstdint>

#if defined(__x86_64__)

namespace qkernels {

// columns[j] gets the dwords j of rows[0..7], by exchanges of dwords, of pairs of them, and of halves of a register.
QK_AVX2 inline void transpose_dwords(const __m256i rows[8], __m256i columns[8]) {
  __m256i pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int half = 0; half < 2; ++half) {
      quads[i + 2 * half] = _mm256_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
      quads[i + 2 * half + 1] = _mm256_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
    }
  // Half h of quads[4 * i + j] is dword 4 * h + j of rows 4 * i .. 4 * i + 3.
  for (int j = 0; j < 4; ++j) {
    columns[j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x20);
    columns[4 + j] = _mm256_permute2x128_si256(quads[j], quads[4 + j], 0x31);
  }
}

// The next 32 codes of 8 rows, four to a dword: fours[j] gets those of step j.
QK_AVX2 inline void load_fours(const int8_t* rows, int64_t stride, __m256i fours[8]) {
  __m256i codes[8];
  for (int c = 0; c < 8; ++c) codes[c] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + c * stride));
  transpose_dwords(codes, fours);
}

// Both read up to 31 bytes behind the last row.

// Panel rows [steps][16 * vectors][4] of int8.
QK_AVX2 inline void fill_codes_avx2(
    const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, int8_t* lanes) {
  for (int64_t begin = 0; begin < steps; begin += 8)
    for (int half = 0; half < 2; ++half) {
      __m256i fours[8];
      load_fours(rows + 8 * half * stride + 4 * begin, stride, fours);
      const int64_t count = steps - begin < 8 ? steps - begin : 8;
      int8_t* to = lanes + begin * vectors * 64 + 32 * half;
      for (int64_t i = 0; i < count; ++i)
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + i * vectors * 64), fours[i]);
    }
}

// Panel rows [steps][16 * vectors] of float32.
QK_AVX2 inline void fill_floats_avx2(
    const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, float* lanes) {
  for (int64_t begin = 0; begin < steps; begin += 32)
    for (int half = 0; half < 2; ++half) {
      __m256i fours[8];
      load_fours(rows + 8 * half * stride + begin, stride, fours);
      const int64_t count = steps - begin < 32 ? steps - begin : 32;
      float* to = lanes + begin * vectors * 16 + 8 * half;
      for (int64_t i = 0; i < count; ++i) {
        const __m256i byte_on_top =
            _mm256_sll_epi32(fours[i / 4], _mm_cvtsi32_si128(static_cast<int>(24 - 8 * (i % 4))));
        _mm256_store_ps(to + i * vectors * 16, _mm256_cvtepi32_ps(_mm256_srai_epi32(byte_on_top, 24)));
      }
    }
}

}  // namespace qkernels
#endif
