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

template <int Bits>
void unpack_bits(const uint8_t* packed, bool is_signed, int64_t blocks, uint8_t* codes) {
  if (is_signed)
    unpack<Bits, true>(packed, blocks, codes);
  else
    unpack<Bits, false>(packed, blocks, codes);
}

}  // namespace

void unpack_blocks(const uint8_t* packed, int bits, bool is_signed, int64_t blocks, uint8_t* codes) {
  switch (bits) {
    case 2: return unpack_bits<2>(packed, is_signed, blocks, codes);
    case 3: return unpack_bits<3>(packed, is_signed, blocks, codes);
    case 4: return unpack_bits<4>(packed, is_signed, blocks, codes);
    case 5: return unpack_bits<5>(packed, is_signed, blocks, codes);
    case 6: return unpack_bits<6>(packed, is_signed, blocks, codes);
    case 7: return unpack_bits<7>(packed, is_signed, blocks, codes);
    default: return unpack_bits<8>(packed, is_signed, blocks, codes);
  }
}

}  // namespace qkernels
