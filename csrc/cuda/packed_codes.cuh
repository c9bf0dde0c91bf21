// Codes into and out of the planes of a packed block, 4 codes to a 32-bit word: a word at the same place of a block's
// rows of 32 bytes holds bits of 4 neighboring codes of each of its 8 chunks. Shifting a whole word carries bits over
// the edges of its bytes, where no mask keeps them. All arguments but the words are known when this is compiled.
#pragma once

#include <cstdint>

#include "../numerics.h"

namespace qkernels::cuda {

constexpr int kChunks = kBlockCodes / kChunkCodes;  // of a block

// A byte, four times.
QK_INLINE constexpr uint32_t in_every_byte(uint32_t byte) { return byte * 0x01010101u; }

QK_INLINE constexpr uint32_t shifted_left(uint32_t word, int by) { return by < 0 ? word >> -by : word << by; }

// 4 codes of chunk `chunk`, from the words that row(r) gives of the block's rows: a shift and a three-input logic
// operation for each plane.
template <int kBits, typename Rows>
QK_INLINE uint32_t codes_of(const Rows& row, int chunk) {
  uint32_t codes = 0;
#pragma unroll
  for (int from = 0, width = 0; from < kBits; from += width) {
    width = plane_width(kBits, from);
    const uint32_t here = in_every_byte(((1u << width) - 1) << from);
    codes |= shifted_left(row(from + chunk % width), from - width * (chunk / width)) & here;
  }
  return codes;
}

// Flipping the highest bit of two's complement of kBits raises a code by 2^(kBits - 1), to one that is not negative.
// The bits to flip in a block's row `row`: all highest ones of its plane.
template <int kBits>
QK_INLINE constexpr uint32_t sign_bits(int row) {
  int from = 0;
  while (from + plane_width(kBits, from) < kBits) from += plane_width(kBits, from);
  const int width = kBits - from;
  return row < from ? 0 : width == 4 ? 0x88888888u : width == 2 ? 0xaaaaaaaau : 0xffffffffu;
}

// Two's complement of 8 bits from that of kBits: the raised code less what it was raised by. The highest bit of each
// byte is set meanwhile, so that none borrows. Codes without a sign pass through.
template <int kBits>
struct Sign {
  uint32_t offset, guard;

  explicit QK_INLINE Sign(bool is_signed) {
    const bool extend = is_signed && kBits < 8;
    offset = extend ? in_every_byte(1u << (kBits - 1)) : 0;
    guard = extend ? in_every_byte(0x80) : 0;
  }

  QK_INLINE uint32_t extend(uint32_t codes) const { return ((codes ^ (offset | guard)) - offset) ^ guard; }
};

// The word of row `row` of a block, from the words that codes(chunk) gives of each chunk.
template <int kBits, typename Chunks>
QK_INLINE uint32_t packed_word(const Chunks& codes, int row) {
  int from = 0;
  while (row >= from + plane_width(kBits, from)) from += plane_width(kBits, from);
  const int width = plane_width(kBits, from);
  uint32_t word = 0;
#pragma unroll
  for (int shift = 0, chunk = row - from; shift < 8; shift += width, chunk += width)
    word |= shifted_left(codes(chunk), shift - from) & in_every_byte(((1u << width) - 1) << shift);
  return word;
}

}  // namespace qkernels::cuda
