// Depthwise tiles of codes with AVX-512 VNNI, which adds four products at once: those of four taps of a channel.
//
// The bytes of four taps, 64 channels each, are interleaved by twos and by fours, within quarters of a register. So
// register k holds, of quarter q, channels 16 q + 4 k .. 16 q + 4 k + 3; weights lie in that order, and so do the sums
// until their quarters are exchanged.
#pragma once

#include "cpu_isa.h"
#include "packed_epilogue.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)

namespace qkernels {

constexpr int64_t kTapsAtOnce = 4;

inline int64_t quads_of(int64_t taps) { return (taps + kTapsAtOnce - 1) / kTapsAtOnce; }

// The weights of up to 64 channels, codes [channels][taps], as [quads][4 registers][64]; zeros fill them up. May read
// three bytes behind the codes.
inline void fill_quads(const int8_t* codes, int64_t channels, int64_t taps, int8_t* weights) {
  const int64_t quads = quads_of(taps), last = taps - (quads - 1) * kTapsAtOnce;
  std::memset(weights, 0, quads * 4 * 64);
  const uint32_t used = last == kTapsAtOnce ? ~0u : (1u << (8 * last)) - 1;
  for (int64_t c = 0; c < channels; ++c) {
    int8_t* at = weights + c / 4 % 4 * 64 + c / 16 * 16 + c % 4 * 4;
    for (int64_t q = 0; q < quads; ++q) {
      uint32_t four;
      std::memcpy(&four, codes + c * taps + q * kTapsAtOnce, sizeof four);
      if (q == quads - 1) four &= used;
      std::memcpy(at + q * 4 * 64, &four, sizeof four);
    }
  }
}

// sums[r][c] = start[c] + sum over taps t of inputs[t * stride + r][first + c] * weights, of four pixels r.
QK_AVX512_VNNI inline void depthwise_quads(
    const uint8_t* const* inputs, int64_t stride, int64_t taps, int64_t first, int64_t channels, const int8_t* weights,
    const int32_t* start, int32_t* sums) {
  constexpr int pixels = 4;
  const __mmask64 used = channels >= 64 ? ~__mmask64{0} : (__mmask64{1} << channels) - 1;
  __m512i acc[pixels][4];
#pragma GCC unroll 4
  for (int r = 0; r < pixels; ++r)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc[r][k] = _mm512_setzero_si512();
  for (int64_t tap = 0; tap < taps; tap += kTapsAtOnce, weights += 4 * 64) {
    // Of missing taps the weights are zeros, so any input will do.
    const int64_t t1 = tap + 1 < taps ? tap + 1 : tap, t2 = tap + 2 < taps ? tap + 2 : tap;
    const int64_t t3 = tap + 3 < taps ? tap + 3 : tap;
#pragma GCC unroll 4
    for (int r = 0; r < pixels; ++r) {
      const __m512i x0 = _mm512_maskz_loadu_epi8(used, inputs[tap * stride + r] + first);
      const __m512i x1 = _mm512_maskz_loadu_epi8(used, inputs[t1 * stride + r] + first);
      const __m512i x2 = _mm512_maskz_loadu_epi8(used, inputs[t2 * stride + r] + first);
      const __m512i x3 = _mm512_maskz_loadu_epi8(used, inputs[t3 * stride + r] + first);
      const __m512i low01 = _mm512_unpacklo_epi8(x0, x1), high01 = _mm512_unpackhi_epi8(x0, x1);
      const __m512i low23 = _mm512_unpacklo_epi8(x2, x3), high23 = _mm512_unpackhi_epi8(x2, x3);
      const __m512i fours[] = {
          _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
          _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k)
        acc[r][k] = _mm512_dpbusd_epi32(acc[r][k], fours[k], _mm512_load_si512(weights + 64 * k));
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < pixels; ++r) {
    const __m512i top01 = _mm512_shuffle_i32x4(acc[r][0], acc[r][1], 0x44);
    const __m512i bottom01 = _mm512_shuffle_i32x4(acc[r][0], acc[r][1], 0xee);
    const __m512i top23 = _mm512_shuffle_i32x4(acc[r][2], acc[r][3], 0x44);
    const __m512i bottom23 = _mm512_shuffle_i32x4(acc[r][2], acc[r][3], 0xee);
    const __m512i in_order[] = {
        _mm512_shuffle_i32x4(top01, top23, 0x88), _mm512_shuffle_i32x4(top01, top23, 0xdd),
        _mm512_shuffle_i32x4(bottom01, bottom23, 0x88), _mm512_shuffle_i32x4(bottom01, bottom23, 0xdd)};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      _mm512_store_si512(
          sums + r * kBlockChannels + 16 * v, _mm512_add_epi32(in_order[v], _mm512_load_si512(start + 16 * v)));
  }
}

}  // namespace qkernels
#endif
