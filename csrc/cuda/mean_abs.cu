// qkernels::mean_abs on CUDA devices. Its definition is qkernels/ops/reference.py.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "columns.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace qkernels::cuda {
namespace {

constexpr int kVectorsInFlight = 4;

// `sums`: one a unit of work; the means themselves where a channel is one unit.
template <typename Cut>
struct Magnitudes {
  const void* x;
  float* sums;
  Cut cut;
  double factor;
  bool aligned;

  __device__ __forceinline__ void write_sum(int64_t at, float sum, bool complete) const {
    sums[at] = complete ? static_cast<float>(sum * factor) : sum;
  }
};

// |x| of the vectors at first, first + step, ... goes to accumulate(k, magnitude).
template <int kVectors, bool kWhole, typename X, typename A>
__device__ __forceinline__ void magnitudes(
    const void* base, int64_t first, int64_t step, const Span& span, A&& accumulate) {
  constexpr int N = kWidth<X>;
  Vector<X, N> x[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) x[v] = load<kWhole, N>(static_cast<const X*>(base), first + v * step, span);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int k = 0; k < N; ++k) accumulate(k, fabsf(to_float(x[v].at[k])));
}

// Reads 4 bytes an element in float32, 2 in bfloat16 and float16.
template <typename X>
__global__ __launch_bounds__(kThreads) void mean_abs_rows(const __grid_constant__ Magnitudes<Rows> m) {
  const Unit unit = find_unit(m.cut, blockIdx.x);
  float sum[1] = {0.0f};
  walk_rows<kWidth<X>, kVectorsInFlight>(
      m.cut, unit, m.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        magnitudes<kVectors, kWhole, X>(m.x, first, step, row, [&](int, float magnitude) { sum[0] += magnitude; });
      });
  group_sum(sum, m.cut.group());
  if (unit.any() && m.cut.lane() == 0) m.write_sum(unit.index, sum[0], m.cut.units_per_channel == 1);
}

// Traffic as mean_abs_rows.
template <typename X>
__global__ __launch_bounds__(kThreads) void mean_abs_columns(const __grid_constant__ Magnitudes<Columns> m) {
  constexpr int N = kWidth<X>;
  const ColumnUnit unit = find_columns<N>(m.cut);
  float sums[1][N] = {};
  walk_columns<N, kVectorsInFlight>(
      m.cut, unit, m.aligned, [&]<int kVectors, bool kWhole>(int64_t first, int64_t step, const Span& row) {
        magnitudes<kVectors, kWhole, X>(
            m.x, first, step, row, [&](int k, float magnitude) { sums[0][k] += magnitude; });
      });
  sum_columns(m.cut, unit, sums, [&](int, int64_t column, float sum) {
    m.write_sum(partial_of(m.cut, unit, column), sum, m.cut.sums_per_channel() == 1);
  });
}

template <typename Cut>
void launch_mean(
    const Context& context, const char* name, void (*kernel)(Magnitudes<Cut>), int64_t blocks, const Cut& cut,
    int64_t sums_per_channel, const Tensor& x, const Tensor& means) {
  const int64_t channels = means.numel();
  const double factor = 1.0 / static_cast<double>(x.numel() / channels);
  float* const results = static_cast<float*>(means.data_ptr());
  std::optional<Tensor> partials;
  if (sums_per_channel > 1) partials = empty_vector(checked_product({channels, sums_per_channel}), ScalarType::Float, x);
  float* const sums = partials ? static_cast<float*>(partials->data_ptr()) : results;
  context.launch(name, kernel, blocks, Magnitudes<Cut>{x.data_ptr(), sums, cut, factor, is_aligned({x.data_ptr()})});
  const Folds<1> fold{{{sums, results, channels, sums_per_channel, factor}}};
  if (partials) launch_folds(context, "mean_abs, fold", fold, 1);
}

Tensor mean_abs(const Tensor& any_x, std::optional<int64_t> axis) {
  check_x({"mean_abs"}, any_x, axis);
  const Context context(any_x);
  const Tensor x = dense(any_x);
  const int64_t channels = axis ? x.size(*axis) : 1;
  const Tensor means =
      axis ? empty_vector(channels, ScalarType::Float, x) : empty_strided({}, {}, ScalarType::Float, x);
  if (x.numel() == 0) {
    context.zero(means);
    return means;
  }
  const Extents e = extents(x, axis);
  with_type(x.scalar_type(), [&]<typename X>(Type<X>) {
    if (prefer_columns(e)) {
      const Columns cut = cut_into_columns<kWidth<X>, kVectorsInFlight>(e, context.resident_threads);
      launch_mean(context, "mean_abs by columns", mean_abs_columns<X>, blocks_of<kWidth<X>>(cut), cut,
                  cut.sums_per_channel(), x, means);
    } else {
      const Rows cut = cut_into_rows<kWidth<X>, kVectorsInFlight>(e, filling_units(e, context.resident_threads));
      launch_mean(context, "mean_abs by rows", mean_abs_rows<X>, cut.blocks(), cut, cut.units_per_channel, x, means);
    }
  });
  return means;
}

}  // namespace
}  // namespace qkernels::cuda

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("mean_abs", TORCH_BOX(&qkernels::cuda::mean_abs));
}
