// Filling panels with AVX-512: the codes of 16 channels, one after another in memory, become 16 lanes.
#pragma once

#include "cpu_isa.h"
#include "vectorized.h"

#include <cstdint>

#if defined(__x86_64__)

namespace qkernels {

// columns[j] gets the dwords j of rows[0..15], by exchanges of dwords, of pairs of them, and of quarters of a register.
QK_AVX512 inline void transpose_dwords(const __m512i rows[16], __m512i columns[16]) {
  __m512i pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      quads[i + 2 * half] = _mm512_unpacklo_epi64(pairs[i + half], pairs[i + half + 2]);
      quads[i + 2 * half + 1] = _mm512_unpackhi_epi64(pairs[i + half], pairs[i + half + 2]);
    }
  // Quarter q of quads[4 * i + j] is dword 4 * q + j of rows 4 * i .. 4 * i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_top = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
    const __m512i odd_top = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xdd);
    const __m512i even_bottom = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
    const __m512i odd_bottom = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xdd);
    columns[j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0x88);
    columns[4 + j] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88);
    columns[8 + j] = _mm512_shuffle_i32x4(even_top, even_bottom, 0xdd);
    columns[12 + j] = _mm512_shuffle_i32x4(odd_top, odd_bottom, 0xdd);
  }
}

// All read up to 63 bytes behind the last row.

// Panel rows [steps][16 * vectors][4] of int8.
QK_AVX512 inline void fill_codes_avx512(
    const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, int8_t* lanes) {
  for (int64_t begin = 0; begin < steps; begin += 16) {
    __m512i codes[16], fours[16];
    for (int c = 0; c < 16; ++c) codes[c] = _mm512_loadu_si512(rows + c * stride + 4 * begin);
    transpose_dwords(codes, fours);
    const int64_t count = steps - begin < 16 ? steps - begin : 16;
    for (int64_t i = 0; i < count; ++i) _mm512_store_si512(lanes + (begin + i) * vectors * 64, fours[i]);
  }
}

// Panel rows [steps][16 * vectors] of float32.
QK_AVX512 inline void fill_floats_avx512(
    const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, float* lanes) {
  for (int64_t begin = 0; begin < steps; begin += 64) {
    __m512i codes[16], fours[16];
    for (int c = 0; c < 16; ++c) codes[c] = _mm512_loadu_si512(rows + c * stride + begin);
    transpose_dwords(codes, fours);
    const int64_t count = steps - begin < 64 ? steps - begin : 64;
    for (int64_t i = 0; i < count; ++i) {
      const __m512i byte_on_top = _mm512_sll_epi32(fours[i / 4], _mm_cvtsi32_si128(static_cast<int>(24 - 8 * (i % 4))));
      _mm512_store_ps(lanes + (begin + i) * vectors * 16, _mm512_cvtepi32_ps(_mm512_srai_epi32(byte_on_top, 24)));
    }
  }
}

// Panel rows [steps][16 * vectors][2] of bfloat16, the upper halves of float32, which hold all of a code.
QK_AVX512 inline void fill_bfloat16s_avx512(
    const int8_t* rows, int64_t stride, int64_t steps, int64_t vectors, BFloat16* lanes) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t begin = 0; begin < steps; begin += 32) {
    __m512i codes[16], fours[16];
    for (int c = 0; c < 16; ++c) codes[c] = _mm512_loadu_si512(rows + c * stride + 2 * begin);
    transpose_dwords(codes, fours);
    const int64_t count = steps - begin < 32 ? steps - begin : 32;
    for (int64_t i = 0; i < count; ++i) {
      const __m512i second_on_top = _mm512_sll_epi32(fours[i / 2], _mm_cvtsi32_si128(i % 2 == 0 ? 16 : 0));
      const __m512i first_on_top = _mm512_slli_epi32(second_on_top, 8);
      const __m512i first = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(first_on_top, 24)));
      const __m512i second = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(second_on_top, 24)));
      _mm512_store_si512(
          lanes + (begin + i) * vectors * 32,
          _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, upper)));
    }
  }
}

}  // namespace qkernels
#endif
