// qkernels::packed_gemv on CUDA devices. Its definition is qkernels/ops/reference.py.
//
// y^T = codes * x^T on the tensor cores: 16 rows of the weight by 16 codes of each against 8 columns of x at a time
// (mma.m16n8k16 of bfloat16, which holds the codes exactly). What bounds it is reading the weights, so each byte of
// them is loaded once, 16 to a load, straight into the registers of the lane that unpacks all its bits.
//
// A warp's step is 16 rows of the weight by 2 blocks of 256 codes. Of the 4 lanes that hold a row in an mma, one takes
// 16 bytes of each of a block's `bits` rows, which are 16 codes of each of its 8 chunks, two lanes a block; which codes
// stand side by side in an mma does not matter so long as x stands the same.
//
// Instructions of a lane for a code, counted in the machine code of the loop for sm_90, and what 132 multiprocessors at
// 1.7 GHz (2.9e13 instructions of a lane a second, half of them logic, shifts and permutes) can spend on one that comes
// at 4.8 TB/s:
//                               2 bits     3          4          7          8
//   all / budget                1.9 / 1.5  2.3 / 2.2  2.0 / 3.0  2.7 / 5.2  2.9 / 6.0
//   logic and such / budget     1.0 / 0.7  1.4 / 1.1  1.0 / 1.5  1.5 / 2.6  1.9 / 3.0
// So memory bounds 4 bits and more, and instructions 2 and 3 bits, at about 3/4 of the bandwidth. Of the 2.7 for 7 bits
// 1.3 are a shift and a logic operation for each plane of 4 codes, 1.0 a permute and a subtraction for each pair.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <numeric>
#include <optional>
#include <string>

#include "../activation.h"
#include "packed_codes.cuh"
#include "packed_columns.cuh"
#include "packed_memory.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int kTileRows = 16;  // rows of the weight in an mma
constexpr int kTileColumns = 8;  // columns of x in an mma
constexpr int kStepBlocks = 2;

struct Gemv {
  const void* x;
  const uint8_t* packed;
  const float* scale;
  const float* bias;  // nullptr for none
  void* y;
  ScalarType dtype;
  Activation activation;
  bool shared, aligned;  // aligned: x starts at a multiple of 16 bytes
  int64_t member_bytes;
  int rows, in, out;  // rows: of x, for each member

  // Rows o, o + period, o + 2 * period, ... of the weight begin at the same code of a block: a "phase". A tile is 16
  // rows of one phase, so that one column of x serves them all.
  int period, phases;
  int groups;  // of tiles: thread blocks of a phase
  int log2_splits;  // warps that share a tile: they take its steps in turn
  int passes, pass_rows;  // rows of x that a thread block takes
  StagedColumns columns;

  __device__ __forceinline__ int splits() const { return 1 << log2_splits; }
  __device__ __forceinline__ int tiles() const { return kWarps >> log2_splits; }  // of a thread block
};

// What a thread block computes: rows of a phase of one member's weight, with some rows of x.
struct Work {
  int member, phase, shift;  // shift: codes of a row's first block that belong to the row before
  int first_row, rows_of_phase, first_x, rows_of_x;  // first_row: among those of the phase

  static __device__ __forceinline__ Work of_block(const Gemv& g) {
    uint32_t rest = blockIdx.x;
    const auto take = [&](uint32_t n) {
      const uint32_t index = rest % n;
      rest /= n;
      return static_cast<int>(index);
    };
    Work w;
    w.first_x = take(g.passes) * g.pass_rows;
    w.rows_of_x = min(g.pass_rows, g.rows - w.first_x);
    w.first_row = take(g.groups) * g.tiles() * kTileRows;
    w.phase = take(g.phases);
    w.member = static_cast<int>(rest);
    w.rows_of_phase = (g.out - w.phase + g.period - 1) / g.period;
    w.shift = static_cast<int>(static_cast<uint32_t>(w.phase) * g.in % kBlockCodes);
    return w;
  }

  // The first row of x, as a row of the whole tensor.
  __device__ __forceinline__ int64_t row_of_x(const Gemv& g) const {
    return (g.shared ? 0 : int64_t{member} * g.rows) + first_x;
  }
};

// 4 codes as bfloat16: those of the first two bytes, and of the last two.
struct Pairs {
  uint32_t low, high;
};

__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  const __nv_bfloat162 difference =
      __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&difference);
}

// 0x43 before a byte v below 128 makes it the bfloat16 128 + v. So the 128 comes off again, and with it what raised the
// code: its highest bit is flipped. That of 8-bit codes, as it is, goes alone behind 0x43: 128 + 128 is what comes off.
template <int kBits, typename Rows>
__device__ __forceinline__ Pairs code_pairs(const Rows& row, int chunk) {
  constexpr uint32_t kHalf = 1u << (kBits - 1), kMagic = in_every_byte(0x43);
  constexpr unsigned kLow = 0x4140, kHigh = 0x4342;  // bytes 0, 1 and 2, 3, each below a byte of kMagic
  if constexpr (kBits < 8) {
    const uint32_t raised = codes_of<kBits>(row, chunk);
    constexpr uint32_t kZero = (0x4300 + kHalf) * 0x10001u;
    return {subtract_pairs(__byte_perm(raised, kMagic, kLow), kZero),
            subtract_pairs(__byte_perm(raised, kMagic, kHigh), kZero)};
  } else {
    const uint32_t codes = codes_of<kBits>(row, chunk);
    const uint32_t sign = codes & in_every_byte(kHalf), value = codes ^ sign;
    return {subtract_pairs(__byte_perm(value, kMagic, kLow), __byte_perm(sign, kMagic, kLow)),
            subtract_pairs(__byte_perm(value, kMagic, kHigh), __byte_perm(sign, kMagic, kHigh))};
  }
}

// The lane's 16 bytes of each row of a block.
template <int kBits>
struct Weights {
  Words<4> rows[kBits] = {};

  __device__ __forceinline__ void load(const uint8_t* block, bool wanted) {
#pragma unroll
    for (int row = 0; row < kBits; ++row) load_words_once(rows[row].at, block + row * kChunkCodes, wanted);
  }

  // Raises the codes for code_pairs.
  __device__ __forceinline__ void flip_signs() {
#pragma unroll
    for (int row = 0; row < kBits; ++row)
#pragma unroll
      for (int w = 0; w < 4; ++w) rows[row].at[w] ^= kBits < 8 ? sign_bits<kBits>(row) : 0;
  }
};

// One step: the lane's 128 codes of two rows times the same of each column. x: those of the columns, from the lane's
// first. The tensor cores truncate their sums, so only one step's are left to them: 32 in a row.
template <int kBits, int kColumnTiles>
__device__ __forceinline__ void add_products(
    Weights<kBits>& upper, Weights<kBits>& lower, const uint8_t* const (&x)[kColumnTiles],
    float (&sums)[kColumnTiles][4]) {
  upper.flip_signs();
  lower.flip_signs();
  float products[kColumnTiles][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Words<4> b[kColumnTiles];  // 8 values of a column: for 2 words of codes
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t)
        b[t] = load_words<4>(x[t] + (chunk * kChunkCodes + half * 8) * sizeof(bf16));
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const auto word_of = [&](const Weights<kBits>& weights) {
          return [&](int row) { return weights.rows[row].at[half * 2 + w]; };
        };
        const Pairs of_upper = code_pairs<kBits>(word_of(upper), chunk);
        const Pairs of_lower = code_pairs<kBits>(word_of(lower), chunk);
#pragma unroll
        for (int t = 0; t < kColumnTiles; ++t)
          multiply_tiles(
              products[t], {of_upper.low, of_lower.low, of_upper.high, of_lower.high},
              {b[t].at[2 * w], b[t].at[2 * w + 1]});
      }
    }
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[t][i] += products[t][i];
}

// Adds up what warps and parts of x left in `of_warps`, [warp][row of the tile][column], and writes the results. Loops
// stay loops: unrolled, with the activations in them, they take registers that the weights need.
template <typename X, int kColumnTiles>
__device__ __forceinline__ void write_results(const Gemv& g, const Work& work, const float* of_warps) {
  constexpr int kColumns = kColumnTiles * kTileColumns;
  const int rows = g.tiles() * kTileRows;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * work.rows_of_x; i += kThreads) {
    const int n = i / rows, row = i - n * rows;
    if (work.first_row + row >= work.rows_of_phase) continue;
    float sum = 0.0f;
#pragma unroll 1
    for (int split = 0; split < g.splits(); ++split) {
      const int warp = row / kTileRows * g.splits() + split;
      const float* const parts = of_warps + (warp * kTileRows + row % kTileRows) * kColumns + n * kParts<X>;
      float whole = parts[kParts<X> - 1];
#pragma unroll
      for (int part = kParts<X> - 2; part >= 0; --part) whole += parts[part];
      sum += whole;
    }
    const int64_t o = work.phase + (work.first_row + row) * g.period, channel = int64_t{work.member} * g.out + o;
    const float y = g.bias == nullptr ? sum * g.scale[channel]
                                      : multiply_add_unfused(sum, g.scale[channel], g.bias[channel]);
    static_cast<X*>(g.y)[(int64_t{work.member} * g.rows + work.first_x + n) * g.out + o] =
        from_float<X>(activated(y, g.activation));
  }
}

template <typename F>
__device__ __forceinline__ void with_type_of_x(const Gemv& g, F&& f) {
  if (g.dtype == ScalarType::Float) {
    f(Type<float>{});
  } else if (g.dtype == ScalarType::Half) {
    f(Type<fp16>{});
  } else {
    f(Type<bf16>{});
  }
}

// Reads kBits / 8 bytes a code, and x once a thread block.
template <int kBits, int kColumnTiles>
__global__ __launch_bounds__(kThreads, 2) void gemv_kernel(const __grid_constant__ Gemv g) {
  alignas(16) __shared__ uint8_t shared[StagedColumns::kBytes];
  static_assert(sizeof(shared) >= kWarps * kTileRows * kColumnTiles * kTileColumns * sizeof(float));
  __shared__ Work work;
  if (threadIdx.x == 0) work = Work::of_block(g);
  __syncthreads();
  const int warp = threadIdx.x / 32, lane_row = threadIdx.x % 32 / 4, lane_quarter = threadIdx.x % 4;
  const int lane_block = lane_quarter / 2, lane_half = lane_quarter % 2;
  const int blocks = (work.shift + g.in + kBlockCodes - 1) / kBlockCodes, stride = kStepBlocks * g.splits();

  // Lanes without a row take the last one, and those past a row's last block that block again, where x is 0.
  const int tile_row = work.first_row + (warp >> g.log2_splits) * kTileRows + lane_row;
  const auto weights_of = [&](int row) {
    const int64_t o = work.phase + min(row, work.rows_of_phase - 1) * g.period;
    return g.packed + work.member * g.member_bytes + o * g.in / kBlockCodes * (kBits * kChunkCodes) + lane_half * 16;
  };
  const uint8_t *const upper_row = weights_of(tile_row), *const lower_row = weights_of(tile_row + kTileRows / 2);
  Weights<kBits> upper, lower;
  const auto load_step = [&](int block) {
    const int64_t offset = static_cast<int64_t>(min(block + lane_block, blocks - 1)) * (kBits * kChunkCodes);
    upper.load(upper_row + offset, block < blocks);
    lower.load(lower_row + offset, block < blocks);
  };

  int block = kStepBlocks * (warp & (g.splits() - 1));
  load_step(block);  // on its way while x is staged
  float sums[kColumnTiles][4] = {};
  for (int end = g.columns.blocks; end - g.columns.blocks < blocks; end += g.columns.blocks) {
    const int first = end - g.columns.blocks;
    if (first > 0) __syncthreads();
    with_type_of_x(g, [&]<typename X>(Type<X>) {
      stage(g.columns, shared, static_cast<const X*>(g.x), g.aligned, work.row_of_x(g) * g.in, g.in, work.rows_of_x,
            int64_t{first} * kBlockCodes - work.shift);
    });
    __syncthreads();
    for (; block < min(end, blocks); block += stride) {
      const uint8_t* x[kColumnTiles];
#pragma unroll
      for (int t = 0; t < kColumnTiles; ++t) {  // columns past the last repeat it, and nobody reads their sums
        const int column = min(t * kTileColumns + lane_row, g.columns.columns - 1);
        x[t] = g.columns.at(shared, column, block - first + lane_block) + lane_half * 32;
      }
      add_products(upper, lower, x, sums);
      load_step(block + stride);
    }
  }

  __syncthreads();
  float* const of_warps = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int t = 0; t < kColumnTiles; ++t)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp * kTileRows + lane_row + i / 2 * (kTileRows / 2);
      of_warps[(row * kColumnTiles + t) * kTileColumns + 2 * lane_quarter + i % 2] = sums[t][i];
    }
  __syncthreads();
  with_type_of_x(g, [&]<typename X>(Type<X>) { write_results<X, kColumnTiles>(g, work, of_warps); });
}

// How the work is cut: tiles enough for two thread blocks on each multiprocessor, if need be by splitting their steps
// among warps. Does not depend on the rows of x, so a row's result does not depend on those beside it.
Gemv plan(const Context& context, int64_t members, int64_t rows, int64_t in, int64_t out, int parts) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kBlockCodes;
  STD_TORCH_CHECK(std::max({members, rows, in, out}) <= kMost, "packed_gemv: more than 2^31 members, rows or features");
  const int64_t period = kBlockCodes / std::gcd(in, int64_t{kBlockCodes});
  const int64_t phases = std::min(period, out), tiles = ceil_div(ceil_div(out, period), kTileRows);
  const int64_t blocks = ceil_div(in + (period - 1) * (kBlockCodes / period), kBlockCodes);
  const int64_t wanted = context.resident_threads / (4 * kThreads), steps = ceil_div(blocks, kStepBlocks);
  int log2_splits = 0;
  const auto groups = [&] { return ceil_div(tiles, kWarps >> log2_splits); };
  while ((1 << log2_splits) < std::min<int64_t>(kWarps, steps) &&
         ((kWarps >> log2_splits) > tiles || members * phases * groups() < wanted))
    ++log2_splits;

  const int64_t passes = ceil_div(rows, StagedColumns::kMaxColumns / parts), pass_rows = ceil_div(rows, passes);
  const auto narrow = [](int64_t n) { return static_cast<int>(n); };
  Gemv g{};
  g.rows = narrow(rows);
  g.in = narrow(in);
  g.out = narrow(out);
  g.period = narrow(period);
  g.phases = narrow(phases);
  g.groups = narrow(groups());
  g.log2_splits = log2_splits;
  g.passes = narrow(passes);
  g.pass_rows = narrow(pass_rows);
  g.columns = StagedColumns::fit(g.pass_rows * parts, blocks);
  return g;
}

Tensor packed_gemv(
    const Tensor& any_x,
    const Tensor& any_packed,
    const Tensor& any_scale,
    const std::optional<Tensor>& any_bias,
    int64_t bits,
    bool shared,
    std::string activation) {
  check_packed_gemv(any_x, any_packed, any_scale, any_bias, bits, shared, activation);
  const Context context(any_x);
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, any_x.get_device_index()), "capability");
  STD_TORCH_CHECK(major >= 8, "packed_gemv needs a GPU of compute capability 8.0 (Ampere) or newer");
  const Tensor x = torch::stable::contiguous(any_x), packed = aligned_contiguous(any_packed);
  const Tensor scale = torch::stable::contiguous(any_scale);
  std::optional<Tensor> bias;
  if (any_bias) bias = torch::stable::contiguous(*any_bias);
  const int64_t members = scale.size(0), out = scale.size(1);
  const int64_t rows = shared ? x.size(0) : x.size(0) / members;
  const Tensor y = empty_contiguous({checked_product({members, rows}), out}, x.scalar_type(), x);
  if (y.numel() == 0) return y;

  int parts = 0;
  with_type(x.scalar_type(), [&]<typename X>(Type<X>) { parts = kParts<X>; });
  Gemv g = plan(context, members, rows, x.size(1), out, parts);
  g.x = x.data_ptr();
  g.packed = static_cast<const uint8_t*>(packed.data_ptr());
  g.scale = static_cast<const float*>(scale.data_ptr());
  g.bias = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  g.y = y.data_ptr();
  g.dtype = x.scalar_type();
  g.activation = activation_named(activation);
  g.shared = shared;
  g.aligned = is_aligned({g.x});
  g.member_bytes = packed.size(1);
  with_bits(bits, [&]<int kBits>(Bits<kBits>) {
    const auto kernel = g.columns.columns <= kTileColumns ? gemv_kernel<kBits, 1> : gemv_kernel<kBits, 2>;
    context.launch("packed_gemv", kernel, checked_product({members, g.phases, g.groups, g.passes}), g);
  });
  return y;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("packed_gemv", TORCH_BOX(&qkernels::cuda::packed_gemv));
}
