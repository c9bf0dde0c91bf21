// pack, unpack, quantize and dequantize_packed for CPU tensors.
//
// Bytes a code, each moved once: pack reads 1 and writes bits / 8, unpack the reverse; quantize reads an element and
// writes 1; dequantize_packed reads bits / 8 and writes an element.

#include "../arguments.h"
#include "packed_network.h"
#include "packed_weights.h"
#include "vectorized.h"
#include "work.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>

namespace qkernels {
namespace {

constexpr int64_t kGrainBlocks = kSerialElements / kBlockCodes;

// Calls work(row, block, begin of its codes, how many) for every block of `rows` packed tensors of `count` codes each.
template <class Work>
void for_each_block(int64_t rows, int64_t count, const Work& work) {
  const int64_t blocks = (count + kBlockCodes - 1) / kBlockCodes;
  torch::stable::parallel_for(0, rows * blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * kBlockCodes;
      work(i / blocks, i % blocks, first, std::min<int64_t>(kBlockCodes, count - first));
    }
  });
}

// The plane of `width` bits from bit `from` upward of a block of codes: `width` rows of 32 bytes.
QK_VECTORIZED void pack_plane(const uint8_t* codes, int from, int width, uint8_t* plane) {
  const int mask = (1 << width) - 1;
  for (int row = 0; row < width; ++row) {
    uint8_t bytes[kChunkCodes] = {};
    for (int chunk = row, shift = 0; chunk < 8; chunk += width, shift += width)
      for (int t = 0; t < kChunkCodes; ++t)
        bytes[t] |= static_cast<uint8_t>(((codes[chunk * kChunkCodes + t] >> from) & mask) << shift);
    std::memcpy(plane + row * kChunkCodes, bytes, kChunkCodes);
  }
}

Tensor pack(Tensor codes, int64_t bits) {
  check_pack(codes, bits);
  const int64_t count = codes.numel();
  codes = torch::stable::contiguous(codes);
  Tensor packed = empty_vector(packed_bytes(count, bits), ScalarType::Byte, codes);
  const uint8_t* in = static_cast<const uint8_t*>(codes.data_ptr());
  uint8_t* out = static_cast<uint8_t*>(packed.data_ptr());
  for_each_block(1, count, [&](int64_t, int64_t block, int64_t begin, int64_t n) {
    uint8_t padded[kBlockCodes] = {};
    if (n < kBlockCodes) std::memcpy(padded, in + begin, n);
    uint8_t* planes = out + block * kChunkCodes * bits;
    for (int from = 0, width = 0; from < bits; from += width) {
      width = plane_width(bits, from);
      pack_plane(n < kBlockCodes ? padded : in + begin, from, width, planes + kChunkCodes * from);
    }
  });
  return packed;
}

Tensor unpack(Tensor packed, int64_t bits, int64_t count, bool is_signed) {
  check_packed({"unpack"}, packed, bits, count);
  packed = torch::stable::contiguous(packed);
  std::vector<int64_t> sizes(packed.sizes().begin(), packed.sizes().end()), strides(sizes.size(), 1);
  sizes.back() = count;
  for (int64_t d = packed.dim() - 2; d >= 0; --d)
    strides[d] = checked_product({strides[d + 1], std::max<int64_t>(1, sizes[d + 1])});
  Tensor codes = empty_strided(sizes, strides, code_dtype(is_signed), packed);
  const uint8_t* in = static_cast<const uint8_t*>(packed.data_ptr());
  uint8_t* out = static_cast<uint8_t*>(codes.data_ptr());
  const Isa isa = cpu_isa();
  const int64_t row_bytes = packed_bytes(count, bits), rows = row_bytes ? packed.numel() / row_bytes : 0;
  for_each_block(rows, count, [&](int64_t row, int64_t block, int64_t begin, int64_t n) {
    const uint8_t* bytes = in + row * row_bytes + block * kChunkCodes * bits;
    if (n == kBlockCodes) return unpack_blocks(bytes, bits, is_signed, 1, isa, out + row * count + begin);
    uint8_t last[kBlockCodes];
    unpack_blocks(bytes, bits, is_signed, 1, isa, last);
    std::memcpy(out + row * count + begin, last, n);
  });
  return codes;
}

template <class Y>
QK_VECTORIZED void dequantize(const uint8_t* codes, float scale, int64_t n, Y* y) {
  for (int64_t i = 0; i < n; ++i) store(y + i, static_cast<float>(static_cast<int8_t>(codes[i])) * scale);
}

template <class Y>
void dequantize_rows(const uint8_t* packed, const float* scale, int64_t members, int64_t channels, int64_t bits,
                     int64_t count, Y* y) {
  const int64_t depth = count / channels;
  const Isa isa = cpu_isa();
  for_each_block(members, count, [&](int64_t member, int64_t block, int64_t begin, int64_t n) {
    uint8_t codes[kBlockCodes];
    unpack_blocks(packed + member * packed_bytes(count, bits) + block * kChunkCodes * bits, bits, true, 1, isa, codes);
    for (int64_t i = begin; i < begin + n;) {  // channel by channel
      const int64_t channel = i / depth, end = std::min(begin + n, (channel + 1) * depth);
      dequantize(codes + i - begin, scale[member * channels + channel], end - i, y + member * count + i);
      i = end;
    }
  });
}

Tensor dequantize_packed(Tensor packed, Tensor scale, int64_t bits, int64_t count, ScalarType out_dtype) {
  check_dequantize_packed(packed, scale, bits, count, out_dtype);
  packed = torch::stable::contiguous(packed);
  scale = torch::stable::contiguous(scale);
  const int64_t members = scale.size(0), channels = scale.size(1), depth = count / channels;
  const int64_t sizes[] = {members, channels, depth};
  const int64_t row = std::max<int64_t>(1, depth), strides[] = {checked_product({channels, row}), row, 1};
  Tensor y = empty_strided({sizes, 3}, {strides, 3}, out_dtype, packed);
  with_type(out_dtype, [&]<class Y>(Type<Y>) {
    dequantize_rows(
        static_cast<const uint8_t*>(packed.data_ptr()), static_cast<const float*>(scale.data_ptr()), members,
        channels, bits, count, static_cast<Y*>(y.data_ptr()));
  });
  return y;
}

// The code of x as an integer, NaN's being `of_nan`.
QK_ALWAYS_INLINE uint8_t code_of(const Quantizer& q, float x, float of_nan) {
  const float code = q.code(q.grid(x));
  return static_cast<uint8_t>(static_cast<int>(code == code ? code : of_nan));
}

template <class X>
QK_VECTORIZED void quantize_row(const X* x, uint8_t* codes, int64_t n, Quantizer q, float of_nan) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = code_of(q, load(x[i]), of_nan);
}

template <class X>
QK_VECTORIZED void quantize_columns(
    const X* x, uint8_t* codes, int64_t n, const float* scale, float qmin, float qmax, float of_nan) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = code_of({scale[i], 0.0f, qmin, qmax}, load(x[i]), of_nan);
}

}  // namespace

Stage quantization(
    const Pixels& x, int64_t image_bytes, int64_t images, int64_t images_of_member, const float* scales, float qmin,
    float qmax, char* codes, int64_t code_bytes) {
  const float of_nan = clamp(0.0f, qmin, qmax);
  return with_type(x.dtype, [&]<class X>(Type<X>) {
    constexpr int64_t piece = 4096;
    const int64_t pieces = (code_bytes + piece - 1) / piece, given = x.images;
    const X* from = static_cast<const X*>(x.data);
    return evenly_cut(images * pieces, images * code_bytes / 4, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / pieces, first = i % pieces * piece;
        quantize_row(
            from + image % given * (image_bytes / static_cast<int64_t>(sizeof(X))) + first,
            reinterpret_cast<uint8_t*>(codes) + image * code_bytes + first, std::min(piece, code_bytes - first),
            {valid_scale(scales[image / images_of_member]), 0.0f, qmin, qmax}, of_nan);
      }
    });
  });
}

namespace {

Tensor quantize(Tensor x, Tensor scale, int64_t qmin, int64_t qmax, std::optional<int64_t> axis) {
  check_quantize(x, scale, qmin, qmax, axis);
  x = dense(x);
  scale = torch::stable::contiguous(scale);
  const Walk walk(extents(x, axis));
  Tensor codes = empty_as(x, code_dtype(qmin < 0));
  uint8_t* out = static_cast<uint8_t*>(codes.data_ptr());
  const float low = static_cast<float>(qmin), high = static_cast<float>(qmax), of_nan = clamp(0.0f, low, high);
  const float* given = static_cast<const float*>(scale.data_ptr());
  std::vector<float> column_scales;
  for (int64_t i = 0; !walk.by_rows && i < walk.columns(); ++i)
    column_scales.push_back(valid_scale(given[i / walk.e.inner]));
  const std::vector<Block> blocks = cut({walk});
  with_type(x.scalar_type(), [&]<class X>(Type<X>) {
    const X* in = static_cast<const X*>(x.data_ptr());
    run_blocks(blocks, [&](int64_t i) {
      for (int64_t unit = blocks[i].first_unit; unit < blocks[i].last_unit; ++unit) {
        const int64_t begin = walk.begin(unit), n = walk.length(unit);
        if (walk.by_rows)
          quantize_row(in + begin, out + begin, n, {valid_scale(given[walk.channel(unit)]), 0.0f, low, high}, of_nan);
        else
          quantize_columns(in + begin, out + begin, n, column_scales.data(), low, high, of_nan);
      }
    });
  });
  return codes;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("pack", TORCH_BOX(&qkernels::pack));
  m.impl("unpack", TORCH_BOX(&qkernels::unpack));
  m.impl("quantize", TORCH_BOX(&qkernels::quantize));
  m.impl("dequantize_packed", TORCH_BOX(&qkernels::dequantize_packed));
}
