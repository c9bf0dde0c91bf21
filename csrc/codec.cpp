// Python module `_codec`: a bit codec for numpy arrays, which needs no tensor library.

#include "numerics.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>

namespace py = pybind11;

namespace {

using Codes = py::array_t<uint8_t, py::array::c_style>;

constexpr int kChunk = qkernels::kChunkCodes, kBlock = qkernels::kBlockCodes;

void check_bits(int bits) {
  if (bits < 2 || bits > 8) throw py::value_error("bits must be 2..8, got " + std::to_string(bits));
}

// Calls visit(index of the code, its byte, the shift of its bits there, the lowest of them, a mask) for every plane.
template <class Visit>
void visit_codes(int64_t count, int bits, const Visit& visit) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t block = i / kBlock * kChunk * bits;
    const int chunk = i % kBlock / kChunk, t = i % kChunk;
    for (int from = 0, width = 0; from < bits; from += width) {
      width = qkernels::plane_width(bits, from);
      visit(i, block + kChunk * (from + chunk % width) + t, width * (chunk / width), from, (1 << width) - 1);
    }
  }
}

Codes pack(const Codes& codes, int bits) {
  check_bits(bits);
  Codes packed(qkernels::packed_bytes(codes.size(), bits));
  const uint8_t* in = codes.data();
  uint8_t* out = packed.mutable_data();
  std::memset(out, 0, packed.nbytes());
  visit_codes(codes.size(), bits, [&](int64_t i, int64_t byte, int shift, int from, int mask) {
    out[byte] |= ((in[i] >> from) & mask) << shift;
  });
  return packed;
}

Codes unpack(const Codes& packed, int bits, int64_t count) {
  check_bits(bits);
  // The division bounds `count` before any size is computed from it.
  if (count < 0 || count / 8 > packed.size() || qkernels::packed_bytes(count, bits) != packed.size())
    throw py::value_error(
        std::to_string(packed.size()) + " packed bytes do not hold " + std::to_string(count) + " codes of " +
        std::to_string(bits) + " bits");
  Codes codes(count);
  const uint8_t* in = packed.data();
  uint8_t* out = codes.mutable_data();
  std::memset(out, 0, count);
  visit_codes(count, bits, [&](int64_t i, int64_t byte, int shift, int from, int mask) {
    out[i] |= ((in[byte] >> shift) & mask) << from;
  });
  return codes;
}

}  // namespace

PYBIND11_MODULE(_codec, m) {
  m.doc() = "Bit codec for numpy arrays.";
  m.def(
      "pack", &pack, py::arg("codes"), py::arg("bits"),
      "Pack the low `bits` (2..8) bits of a C-contiguous uint8 array into bit planes: uint8 [bytes].");
  m.def(
      "unpack", &unpack, py::arg("packed"), py::arg("bits"), py::arg("count"),
      "The `count` codes that `pack` packed: uint8 [count]. ValueError if the bytes do not hold that many.");
}
