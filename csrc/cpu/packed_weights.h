// Codes from their packed bits (the layout is in numerics.h), a block of 256 at a time.
#pragma once

#include "../numerics.h"

#include <cstdint>
#include <memory>

namespace qkernels {

// Uninitialized memory for the kernels' vector registers.
template <class T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t n) : bytes_(new char[n * sizeof(T) + 63]) {}
  T* data() const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(bytes_.get());
    return reinterpret_cast<T*>((at + 63) & ~uintptr_t{63});
  }

 private:
  std::unique_ptr<char[]> bytes_;
};

// Writes the 256 * blocks codes of `blocks` successive blocks, in two's complement if `is_signed`.
void unpack_blocks(const uint8_t* packed, int bits, bool is_signed, int64_t blocks, uint8_t* codes);

// Room for any `codes` successive codes, together with the rest of the blocks that they begin and end in. At least 256
// bytes are left behind the last code.
constexpr int64_t room_for_codes(int64_t codes) { return codes + 2 * kBlockCodes; }

// Unpacks the signed codes [begin, begin + count) of one packed tensor into `room` (room_for_codes(count) bytes) and
// returns where they start in it.
inline const int8_t* unpack_range(const uint8_t* packed, int bits, int64_t begin, int64_t count, int8_t* room) {
  const int64_t first = begin / kBlockCodes, last = (begin + count + kBlockCodes - 1) / kBlockCodes;
  unpack_blocks(
      packed + first * kChunkCodes * bits, bits, true, last - first, reinterpret_cast<uint8_t*>(room));
  return room + begin % kBlockCodes;
}

}  // namespace qkernels
