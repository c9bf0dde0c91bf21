// qkernels::pack, unpack, quantize and dequantize_packed on CUDA devices. Their definition is qkernels/ops/reference.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "packed_codes.cuh"
#include "packed_memory.cuh"
#include "quantize_columns.cuh"
#include "quantize_rows.cuh"

namespace qkernels::cuda {
namespace {

// pack --------------------------------------------------------------------------------------------------------------

constexpr int kPackedAtOnce = 16;  // codes of each chunk: 16 bytes of each row of the block

// A thread packs 16 codes of each of a block's chunks. Reads 1 byte a code and writes kBits / 8; about 0.4 operations
// a code and plane.
template <int kBits>
__global__ __launch_bounds__(kThreads) void pack_kernel(
    const uint8_t* codes, uint8_t* packed, int64_t count, int64_t blocks) {
  constexpr int kColumns = kChunkCodes / kPackedAtOnce;
  for (int64_t unit = first_unit(); unit < blocks * kColumns; unit += unit_step()) {
    const int64_t block = unit / kColumns;
    const int column = static_cast<int>(unit % kColumns) * kPackedAtOnce;
    Words<4> chunks[kChunks];
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
      chunks[chunk] = load_bytes(codes, block * kBlockCodes + chunk * kChunkCodes + column, count);
#pragma unroll
    for (int row = 0; row < kBits; ++row) {
      Words<4> words;
#pragma unroll
      for (int w = 0; w < 4; ++w)
        words.at[w] = packed_word<kBits>([&](int chunk) { return chunks[chunk].at[w]; }, row);
      store_words(packed + (block * kBits + row) * kChunkCodes + column, words);
    }
  }
}

Tensor pack(const Tensor& any_codes, int64_t bits) {
  check_pack(any_codes, bits);
  const Context context(any_codes);
  const Tensor codes = torch::stable::contiguous(any_codes);
  const int64_t count = codes.numel();
  const Tensor packed = empty_vector(packed_bytes(count, static_cast<int>(bits)), ScalarType::Byte, codes);
  const int64_t blocks = ceil_div(count, kBlockCodes);
  with_bits(bits, [&]<int kBits>(Bits<kBits>) {
    context.launch("pack", pack_kernel<kBits>, striding_blocks(context, blocks * (kChunkCodes / kPackedAtOnce)),
                   static_cast<const uint8_t*>(codes.data_ptr()), static_cast<uint8_t*>(packed.data_ptr()), count,
                   blocks);
  });
  return packed;
}

// unpack, dequantize_packed -----------------------------------------------------------------------------------------

// Members of `count` codes in `blocks` blocks each.
struct Members {
  const uint8_t* packed;
  int64_t members, count, blocks;
};

// A thread unpacks kWidth<Out> codes of each of a block's chunks, 16 bytes of results at a time: result(member, first,
// words) gives those of the codes from `first` on.
template <int kBits, typename Out, typename Result>
__device__ __forceinline__ void unpack_all(const Members& m, const Sign<kBits>& sign, Out* out, Result&& result) {
  constexpr int N = kWidth<Out>, kColumns = kChunkCodes / N;
  for (int64_t unit = first_unit(); unit < m.members * m.blocks * kColumns; unit += unit_step()) {
    const int64_t any_block = unit / kColumns, member = any_block / m.blocks;
    const int column = static_cast<int>(unit % kColumns) * N;
    Words<N / 4> rows[kBits];
#pragma unroll
    for (int row = 0; row < kBits; ++row)
      rows[row] = load_words<N / 4>(m.packed + (any_block * kBits + row) * kChunkCodes + column);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int64_t first = (any_block - member * m.blocks) * kBlockCodes + chunk * kChunkCodes + column;
      if (first >= m.count) break;
      Words<N / 4> words;
#pragma unroll
      for (int w = 0; w < N / 4; ++w)
        words.at[w] = sign.extend(codes_of<kBits>([&](int row) { return rows[row].at[w]; }, chunk));
      store_up_to(out + member * m.count + first, result(member, first, words), m.count - first);
    }
  }
}

// Reads kBits / 8 bytes a code and writes 1; about one operation a code.
template <int kBits>
__global__ __launch_bounds__(kThreads) void unpack_kernel(
    const __grid_constant__ Members m, uint8_t* out, bool is_signed) {
  unpack_all<kBits>(m, Sign<kBits>(is_signed), out, [](int64_t, int64_t, const Words<4>& words) {
    Vector<uint8_t, 16> codes;
#pragma unroll
    for (int k = 0; k < 16; ++k) codes.at[k] = static_cast<uint8_t>(words.at[k / 4] >> (8 * (k % 4)));
    return codes;
  });
}

// Reads kBits / 8 bytes a code and writes 4 or 2; about ten operations a code, most of them to find its channel.
template <int kBits, typename Out>
__global__ __launch_bounds__(kThreads) void dequantize_packed_kernel(
    const __grid_constant__ Members m, const float* scale, int64_t channels, Out* out) {
  constexpr int N = kWidth<Out>;
  const int64_t inner = m.count / channels;
  const auto result = [&](int64_t member, int64_t first, const Words<N / 4>& words) {
    const int64_t channel = first / inner;
    int64_t left = inner - (first - channel * inner);
    const float* of_channel = scale + member * channels + channel;
    float s = *of_channel;
    Vector<Out, N> values;
#pragma unroll
    for (int k = 0; k < N; ++k, --left) {
      if (left == 0 && first + k < m.count) {
        s = *++of_channel;
        left = inner;
      }
      values.at[k] = from_float<Out>(static_cast<int8_t>(words.at[k / 4] >> (8 * (k % 4))) * s);
    }
    return values;
  };
  unpack_all<kBits>(m, Sign<kBits>(true), out, result);
}

// Packed tensors of `count` codes each, where their bytes stand in the last dimension.
Members members_of(const Tensor& packed, int64_t bits, int64_t count) {
  const int64_t nbytes = packed_bytes(count, static_cast<int>(bits));
  return {static_cast<const uint8_t*>(packed.data_ptr()), nbytes == 0 ? 0 : packed.numel() / nbytes, count,
          ceil_div(count, kBlockCodes)};
}

template <typename Out>
int64_t unpacking_blocks(const Context& context, const Members& m) {
  return striding_blocks(context, m.members * m.blocks * (kChunkCodes / kWidth<Out>));
}

Tensor unpack(const Tensor& any_packed, int64_t bits, int64_t count, bool is_signed) {
  check_packed({"unpack"}, any_packed, bits, count);
  const Context context(any_packed);
  const Tensor packed = aligned_contiguous(any_packed);
  std::vector<int64_t> sizes(packed.sizes().begin(), packed.sizes().end());
  sizes.back() = count;
  const Tensor codes = empty_contiguous(sizes, code_dtype(is_signed), packed);
  const Members m = members_of(packed, bits, count);
  with_bits(bits, [&]<int kBits>(Bits<kBits>) {
    context.launch("unpack", unpack_kernel<kBits>, unpacking_blocks<uint8_t>(context, m), m,
                   static_cast<uint8_t*>(codes.data_ptr()), is_signed);
  });
  return codes;
}

Tensor dequantize_packed(
    const Tensor& any_packed, const Tensor& any_scale, int64_t bits, int64_t count, ScalarType out_dtype) {
  check_dequantize_packed(any_packed, any_scale, bits, count, out_dtype);
  const Context context(any_packed);
  const Tensor packed = aligned_contiguous(any_packed), scale = torch::stable::contiguous(any_scale);
  const int64_t channels = scale.size(1);
  const Tensor values = empty_contiguous({scale.size(0), channels, count / channels}, out_dtype, packed);
  const Members m = members_of(packed, bits, count);
  with_type(out_dtype, [&]<typename Out>(Type<Out>) {
    with_bits(bits, [&]<int kBits>(Bits<kBits>) {
      context.launch("dequantize_packed", dequantize_packed_kernel<kBits, Out>, unpacking_blocks<Out>(context, m), m,
                     static_cast<const float*>(scale.data_ptr()), channels, static_cast<Out*>(values.data_ptr()));
    });
  });
  return values;
}

// quantize ----------------------------------------------------------------------------------------------------------

constexpr int kVectorsOfCodes = 2;  // in flight, each 16 codes

// The codes of the vectors at first, first + step, ...; scale(k) is that of each vector's k-th element.
template <int kVectors, bool kWhole, typename X, typename S>
__device__ __forceinline__ void code_vectors(
    const Arguments& a, int64_t first, int64_t step, const Span& span, S&& scale) {
  constexpr int N = kWidth<X, uint8_t>;
  const float code_of_nan = clamp(0.0f, a.qmin, a.qmax);
  Vector<X, N> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) x[v] = load<kWhole, N>(static_cast<const X*>(a.x), first + v * step, span);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    Vector<uint8_t, N> codes;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const Quantizer quantizer{scale(k), 0.0f, a.qmin, a.qmax};
      const float code = quantizer.code(quantizer.grid(to_float(x[v].at[k])));
      codes.at[k] = static_cast<uint8_t>(static_cast<int32_t>(code == code ? code : code_of_nan));
    }
    store<kWhole, N>(static_cast<uint8_t*>(a.out), first + v * step, span, codes);
  }
}

// Reads x, writes a byte: 5 bytes an element in float32, 3 in bfloat16 and float16.
template <typename X>
__global__ __launch_bounds__(kThreads) void quantize_rows(const __grid_constant__ Layer layer) {
  const Unit unit = find_unit(layer.rows, blockIdx.x);
  if (!unit.any()) return;
  const float scale = valid_scale(layer.scale[unit.channel]);
  walk_rows<kWidth<X, uint8_t>, kVectorsOfCodes>(
      layer.rows, unit, layer.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        code_vectors<kVectors, kWhole, X>(layer, first, step, row, [&](int) { return scale; });
      });
}

// Traffic as quantize_rows.
template <typename X>
__global__ __launch_bounds__(kThreads) void quantize_columns(const __grid_constant__ Matrix m) {
  constexpr int N = kWidth<X, uint8_t>;
  const ColumnUnit unit = find_columns<N>(m.columns);
  float scales[N];
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int64_t column = min(unit.column + k, m.columns.columns() - 1);
    scales[k] = valid_scale(m.scale[column / m.columns.inner]);
  }
  walk_columns<N, kVectorsOfCodes>(
      m.columns, unit, m.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        code_vectors<kVectors, kWhole, X>(m, first, step, row, [&](int k) { return scales[k]; });
      });
}

Tensor quantize(
    const Tensor& any_x, const Tensor& any_scale, int64_t qmin, int64_t qmax, std::optional<int64_t> axis) {
  check_quantize(any_x, any_scale, qmin, qmax, axis);
  const Context context(any_x);
  const Tensor x = dense(any_x);
  const ScaleAndOffset per_channel(any_scale, std::nullopt);
  const Tensor codes = empty_as(x, code_dtype(qmin < 0));
  if (x.numel() == 0) return codes;

  const Extents e = extents(x, axis);
  Arguments a = per_channel.arguments(qmin, qmax);
  a.x = x.data_ptr();
  a.out = codes.data_ptr();
  a.aligned = is_aligned({a.x, a.out});
  with_type(x.scalar_type(), [&]<typename X>(Type<X>) {
    constexpr int N = kWidth<X, uint8_t>;
    if (prefer_columns(e)) {
      const Matrix m{a, cut_into_columns<N, kVectorsOfCodes>(e, context.resident_threads)};
      context.launch("quantize by columns", quantize_columns<X>, blocks_of<N>(m.columns), m);
    } else {
      const Layer layer{a, cut_into_rows<N, kVectorsOfCodes>(e, filling_units(e, context.resident_threads))};
      context.launch("quantize by rows", quantize_rows<X>, layer.rows.blocks(), layer);
    }
  });
  return codes;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("pack", TORCH_BOX(&qkernels::cuda::pack));
  m.impl("unpack", TORCH_BOX(&qkernels::cuda::unpack));
  m.impl("quantize", TORCH_BOX(&qkernels::cuda::quantize));
  m.impl("dequantize_packed", TORCH_BOX(&qkernels::cuda::dequantize_packed));
}
