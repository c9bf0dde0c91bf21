// Unpacking on CPUs. Each chunk of 32 codes is 32 bytes of every plane under one shift, so with the number of bits and
// the chunk known at compile time it is a handful of byte-wise vector instructions: bits / 8 bytes read and one
// written a code.

#include "packed_weights.h"

#include "vectorized.h"

#include <utility>

namespace qkernels {
namespace {

// The bits of code t of chunk J from bit `From` upward.
template <int Bits, int J, int From = 0>
QK_ALWAYS_INLINE uint8_t bits_of_code(const uint8_t* block, int t) {
  if constexpr (From < Bits) {
    constexpr int width = plane_width(Bits, From);
    const uint8_t row = block[kChunkCodes * (From + J % width) + t];
    const uint8_t plane = (row >> (width * (J / width))) & ((1 << width) - 1);
    return static_cast<uint8_t>(plane << From) | bits_of_code<Bits, J, From + width>(block, t);
  } else {
    return 0;
  }
}

template <int Bits, bool Signed, int J>
QK_ALWAYS_INLINE void unpack_chunk(const uint8_t* block, uint8_t* codes) {
  constexpr uint8_t sign = Signed ? 1 << (Bits - 1) : 0;
  for (int t = 0; t < kChunkCodes; ++t)
    codes[J * kChunkCodes + t] = static_cast<uint8_t>((bits_of_code<Bits, J>(block, t) ^ sign) - sign);
}

template <int Bits, bool Signed, int... J>
QK_ALWAYS_INLINE void unpack_chunks(const uint8_t* block, uint8_t* codes, std::integer_sequence<int, J...>) {
  (unpack_chunk<Bits, Signed, J>(block, codes), ...);
}

template <int Bits, bool Signed>
QK_VECTORIZED void unpack(const uint8_t* __restrict__ packed, int64_t blocks, uint8_t* __restrict__ codes) {
  for (int64_t i = 0; i < blocks; ++i)
    unpack_chunks<Bits, Signed>(
        packed + i * kChunkCodes * Bits, codes + i * kBlockCodes, std::make_integer_sequence<int, 8>());
}

#if defined(__x86_64__)
// The bits of codes [64 * Pair, 64 * Pair + 64) from bit `From` upward, where they belong in each byte; the rest of a
// byte is of no use. Two chunks are successive rows of a plane, or one row under two shifts.
template <int Bits, int Pair, int From>
QK_AVX512 inline __m512i plane_of_pair(const uint8_t* block) {
  constexpr int width = plane_width(Bits, From), row = 2 * Pair % width;
  const uint8_t* rows = block + kChunkCodes * (From + row);
  if constexpr (width == 1) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
    constexpr int first = 2 * Pair - From, second = first + 1;  // shifts to the right, or if negative to the left
    const __m512i right = _mm512_set_epi64(
        second > 0 ? second : 0, second > 0 ? second : 0, second > 0 ? second : 0, second > 0 ? second : 0,
        first > 0 ? first : 0, first > 0 ? first : 0, first > 0 ? first : 0, first > 0 ? first : 0);
    const __m512i left = _mm512_set_epi64(
        second < 0 ? -second : 0, second < 0 ? -second : 0, second < 0 ? -second : 0, second < 0 ? -second : 0,
        first < 0 ? -first : 0, first < 0 ? -first : 0, first < 0 ? -first : 0, first < 0 ? -first : 0);
    if constexpr (first >= 0) return _mm512_srlv_epi64(twice, right);
    if constexpr (second <= 0) return _mm512_sllv_epi64(twice, left);
    return _mm512_srlv_epi64(_mm512_sllv_epi64(twice, left), right);
  } else {
    constexpr int shift = width * (2 * Pair / width) - From;
    const __m512i two = _mm512_loadu_si512(rows);
    if constexpr (shift == 0) return two;
    return shift > 0 ? _mm512_srli_epi64(two, shift) : _mm512_slli_epi64(two, -shift);
  }
}

template <int Bits, int Pair, int From = 0>
QK_AVX512 inline __m512i codes_of_pair(const uint8_t* block, __m512i codes) {
  if constexpr (From < Bits) {
    constexpr int width = plane_width(Bits, From);
    const __m512i mask = _mm512_set1_epi8(static_cast<char>(((1 << width) - 1) << From));
    // (plane & mask) | codes
    codes = _mm512_ternarylogic_epi64(plane_of_pair<Bits, Pair, From>(block), mask, codes, 0xea);
    return codes_of_pair<Bits, Pair, From + width>(block, codes);
  } else {
    return codes;
  }
}

template <int Bits, bool Signed, int... Pair>
QK_AVX512 void unpack_avx512(
    const uint8_t* packed, int64_t blocks, uint8_t* codes, std::integer_sequence<int, Pair...>) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(1 << (Bits - 1)));
  for (int64_t i = 0; i < blocks; ++i, packed += kChunkCodes * Bits, codes += kBlockCodes) {
    const __m512i pairs[] = {codes_of_pair<Bits, Pair>(packed, _mm512_setzero_si512())...};
    for (int p = 0; p < 4; ++p)
      _mm512_storeu_si512(
          codes + 64 * p, Signed ? _mm512_sub_epi8(_mm512_xor_si512(pairs[p], sign), sign) : pairs[p]);
  }
}
#endif

template <int Bits, bool Signed>
void unpack_for(Isa isa, const uint8_t* packed, int64_t blocks, uint8_t* codes) {
#if defined(__x86_64__)
  if (has_avx512(isa))
    return unpack_avx512<Bits, Signed>(packed, blocks, codes, std::make_integer_sequence<int, 4>());
#endif
  unpack<Bits, Signed>(packed, blocks, codes);
}

template <int Bits>
void unpack_bits(const uint8_t* packed, bool is_signed, int64_t blocks, Isa isa, uint8_t* codes) {
  is_signed ? unpack_for<Bits, true>(isa, packed, blocks, codes) : unpack_for<Bits, false>(isa, packed, blocks, codes);
}

}  // namespace

void unpack_blocks(const uint8_t* packed, int bits, bool is_signed, int64_t blocks, Isa isa, uint8_t* codes) {
  switch (bits) {
    case 2: return unpack_bits<2>(packed, is_signed, blocks, isa, codes);
    case 3: return unpack_bits<3>(packed, is_signed, blocks, isa, codes);
    case 4: return unpack_bits<4>(packed, is_signed, blocks, isa, codes);
    case 5: return unpack_bits<5>(packed, is_signed, blocks, isa, codes);
    case 6: return unpack_bits<6>(packed, is_signed, blocks, isa, codes);
    case 7: return unpack_bits<7>(packed, is_signed, blocks, isa, codes);
    default: return unpack_bits<8>(packed, is_signed, blocks, isa, codes);
  }
}

}  // namespace qkernels
