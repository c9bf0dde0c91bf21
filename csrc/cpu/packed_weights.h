// Codes from their packed bits (the layout is in numerics.h), a block of 256 at a time.
#pragma once

#include "../numerics.h"
#include "cpu_isa.h"

#include <cstdint>

namespace qkernels {

// Writes the 256 * blocks codes of `blocks` successive blocks, in two's complement if `is_signed`.
void unpack_blocks(const uint8_t* packed, int bits, bool is_signed, int64_t blocks, Isa isa, uint8_t* codes);

// Room for any `codes` successive codes, together with the rest of the blocks that they begin and end in. At least 256
// bytes are left behind the last code.
constexpr int64_t room_for_codes(int64_t codes) { return codes + 2 * kBlockCodes; }

// Unpacks the signed codes [begin, begin + count) of one packed tensor into `room` (room_for_codes(count) bytes) and
// returns where they start in it.
inline const int8_t* unpack_range(
    const uint8_t* packed, int bits, int64_t begin, int64_t count, Isa isa, int8_t* room) {
  const int64_t first = begin / kBlockCodes, last = (begin + count + kBlockCodes - 1) / kBlockCodes;
  unpack_blocks(
      packed + first * kChunkCodes * bits, bits, true, last - first, isa, reinterpret_cast<uint8_t*>(room));
  return room + begin % kBlockCodes;
}

}  // namespace qkernels
