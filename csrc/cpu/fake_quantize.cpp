// fake_quantize and fake_quantize_multi, forward and backward, for CPU tensors.
//
// Forward reads x and writes y once; backward reads grad and x and writes grad_x once, with the sums for scale and
// offset taken in the same pass. A single tensor is a list of one.

#include "../arguments.h"
#include "../numerics.h"
#include "huge_pages.h"
#include "vectorized.h"
#include "work.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>
#include <type_traits>

namespace qkernels {
namespace {

constexpr int64_t kStreamedBytes = 16 << 20;
constexpr int64_t kLargeLayer = 2 * kHugePage;  // of a list of tensors: large enough to hold a huge page for sure

template <class X, class Y>
QK_VECTORIZED void quantize_row(const X* x, Y* y, int64_t n, Quantizer q, bool streaming) {
  alignas(64) Y buffer[kLaneBlock];
  for (int64_t begin = 0; begin < n; begin += kLaneBlock) {
    const int64_t m = begin + kLaneBlock < n ? kLaneBlock : n - begin;
    Y* out = streaming ? buffer : y + begin;
#pragma omp simd
    for (int64_t i = 0; i < m; ++i) store(out + i, q.fake_quantize(load(x[begin + i])));
    if (streaming) stream(y + begin, buffer, m * sizeof(Y));
  }
}

template <class X, class Y>
QK_VECTORIZED void quantize_columns(
    const X* x, Y* y, int64_t n, const float* scale, const float* offset, float qmin, float qmax) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    store(y + i, Quantizer{scale[i], offset[i], qmin, qmax}.fake_quantize(load(x[i])));
}

template <bool AtenEdge, class X, class G>
QK_VECTORIZED void gradient_row(
    const G* grad, const X* x, X* grad_x, int64_t n, Quantizer q, bool streaming, double* scale_sum,
    double* offset_sum) {
  alignas(64) X buffer[kLaneBlock];
  double scale_total = 0, offset_total = 0;
  for (int64_t begin = 0; begin < n; begin += kLaneBlock) {
    const int64_t m = begin + kLaneBlock < n ? kLaneBlock : n - begin;
    X* out = streaming ? buffer : grad_x + begin;
    float scale_lane = 0, offset_lane = 0;
#pragma omp simd reduction(+ : scale_lane, offset_lane)
    for (int64_t i = 0; i < m; ++i) {
      const Gradient g = gradient<AtenEdge>(q, load(x[begin + i]), load(grad[begin + i]));
      store(out + i, g.x);
      scale_lane += g.scale;
      offset_lane += g.offset;
    }
    if (streaming) stream(grad_x + begin, buffer, m * sizeof(X));
    scale_total += scale_lane;
    offset_total += offset_lane;
  }
  *scale_sum = scale_total;
  *offset_sum = offset_total;
}

template <bool AtenEdge, class X, class G>
QK_VECTORIZED void gradient_columns(
    const G* grad, const X* x, X* grad_x, int64_t n, const float* scale, const float* offset, float qmin, float qmax,
    double* scale_sums, double* offset_sums) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Gradient g = gradient<AtenEdge>(Quantizer{scale[i], offset[i], qmin, qmax}, load(x[i]), load(grad[i]));
    store(grad_x + i, g.x);
    scale_sums[i] += g.scale;
    offset_sums[i] += g.offset;
  }
}

// One tensor of a list: its data (dense, all laid out alike), its quantizers, and how it is walked.
struct Job {
  Walk walk;
  const void* x;
  const void* grad;  // backward only
  void* out;         // y, or grad_x
  const float* scale;
  const float* offset;  // may be null
  float qmin, qmax;

  Quantizer quantizer(int64_t channel) const {
    return {valid_scale(scale[channel]), offset ? offset[channel] : 0.0f, qmin, qmax};
  }
};

// Scale and offset of every column, for a walk by columns.
struct ColumnQuantizers {
  std::vector<float> scale, offset;

  explicit ColumnQuantizers(const Job& job) {
    if (job.walk.by_rows) return;
    for (int64_t i = 0; i < job.walk.columns(); ++i) {
      const Quantizer q = job.quantizer(i / job.walk.e.inner);
      scale.push_back(q.scale);
      offset.push_back(q.offset);
    }
  }
};

std::vector<Walk> walks(const std::vector<Job>& jobs) {
  std::vector<Walk> result;
  for (const Job& job : jobs) result.push_back(job.walk);
  return result;
}

std::vector<ColumnQuantizers> column_quantizers(const std::vector<Job>& jobs) {
  return {jobs.begin(), jobs.end()};
}

// Whether the results of all jobs together outgrow the caches.
bool too_large_to_cache(const std::vector<Job>& jobs, int64_t element_bytes) {
  int64_t bytes = 0;
  for (const Job& job : jobs) bytes += job.walk.units() * job.walk.unit_elements() * element_bytes;
  return bytes > kStreamedBytes;
}

template <class X, class Y>
void forward(const std::vector<Job>& jobs) {
  const bool streaming = too_large_to_cache(jobs, sizeof(Y));
  const std::vector<Block> blocks = cut(walks(jobs));
  const std::vector<ColumnQuantizers> columns = column_quantizers(jobs);
  run_blocks(blocks, [&](int64_t i) {
    const Job& job = jobs[blocks[i].job];
    const ColumnQuantizers& column = columns[blocks[i].job];
    for (int64_t unit = blocks[i].first_unit; unit < blocks[i].last_unit; ++unit) {
      const X* x = static_cast<const X*>(job.x) + job.walk.begin(unit);
      Y* y = static_cast<Y*>(job.out) + job.walk.begin(unit);
      const int64_t n = job.walk.length(unit);
      if (job.walk.by_rows)
        quantize_row(x, y, n, job.quantizer(job.walk.channel(unit)), streaming);
      else
        quantize_columns(x, y, n, column.scale.data(), column.offset.data(), job.qmin, job.qmax);
    }
  });
}

struct Sums {
  Partials scale, offset;
};

template <bool AtenEdge, class X, class G>
std::vector<Sums> backward(const std::vector<Job>& jobs) {
  const bool streaming = too_large_to_cache(jobs, sizeof(X));
  const std::vector<Block> blocks = cut(walks(jobs));
  const std::vector<ColumnQuantizers> columns = column_quantizers(jobs);
  std::vector<int64_t> first_block(jobs.size(), 0), block_count(jobs.size(), 0);
  for (int64_t i = static_cast<int64_t>(blocks.size()) - 1; i >= 0; --i) {
    first_block[blocks[i].job] = i;
    ++block_count[blocks[i].job];
  }
  std::vector<Sums> sums;
  for (size_t j = 0; j < jobs.size(); ++j)
    sums.push_back({Partials(jobs[j].walk, block_count[j]), Partials(jobs[j].walk, block_count[j])});

  run_blocks(blocks, [&](int64_t i) {
    const int64_t j = blocks[i].job;
    const Job& job = jobs[j];
    for (int64_t unit = blocks[i].first_unit; unit < blocks[i].last_unit; ++unit) {
      const int64_t begin = job.walk.begin(unit), n = job.walk.length(unit);
      const X* x = static_cast<const X*>(job.x) + begin;
      const G* grad = static_cast<const G*>(job.grad) + begin;
      X* grad_x = static_cast<X*>(job.out) + begin;
      if (job.walk.by_rows)
        gradient_row<AtenEdge>(
            grad, x, grad_x, n, job.quantizer(job.walk.channel(unit)), streaming, &sums[j].scale.unit(unit),
            &sums[j].offset.unit(unit));
      else
        gradient_columns<AtenEdge>(
            grad, x, grad_x, n, columns[j].scale.data(), columns[j].offset.data(), job.qmin, job.qmax,
            sums[j].scale.block(i - first_block[j]), sums[j].offset.block(i - first_block[j]));
    }
  });
  return sums;
}

const float* data(const Tensor& t) { return static_cast<const float*>(t.data_ptr()); }

// `x` and the per-scale vectors must be dense, and outlive the job.
Job make_job(
    const Tensor& x, const Tensor& out, const Tensor& scale, const std::optional<Tensor>& offset, int64_t qmin,
    int64_t qmax, std::optional<int64_t> axis) {
  const Walk walk(extents(x, axis));
  return {
      walk, x.data_ptr(), nullptr, out.data_ptr(), data(scale), offset ? data(*offset) : nullptr,
      static_cast<float>(qmin), static_cast<float>(qmax)};
}

void run_forward(const std::vector<Job>& jobs, ScalarType x_dtype, ScalarType y_dtype) {
  with_type(x_dtype, [&]<class X>(Type<X>) {
    with_type(y_dtype, [&]<class Y>(Type<Y>) { forward<X, Y>(jobs); });
  });
}

std::vector<Sums> run_backward(const std::vector<Job>& jobs, ScalarType x_dtype, ScalarType grad_dtype, bool aten_edge) {
  return with_type(x_dtype, [&]<class X>(Type<X>) {
    return with_type(grad_dtype, [&]<class G>(Type<G>) {
      return aten_edge ? backward<true, X, G>(jobs) : backward<false, X, G>(jobs);
    });
  });
}

Tensor fake_quantize(
    Tensor x, Tensor scale, std::optional<Tensor> offset, int64_t qmin, int64_t qmax, std::optional<int64_t> axis,
    double /*grad_factor*/, bool /*aten_edge*/, ScalarType out_dtype) {
  const Op op{"fake_quantize"};
  check_quantizer(op, x, scale, offset, qmin, qmax, axis);
  check_element(op, "out_dtype", out_dtype);
  x = dense(x);
  scale = dense(scale);
  if (offset) offset = dense(*offset);
  Tensor y = empty_as(x, out_dtype);
  prefer_huge_pages(y);
  run_forward({make_job(x, y, scale, offset, qmin, qmax, axis)}, x.scalar_type(), out_dtype);
  return y;
}

// The gradient of a scale or offset shaped as `like`, or an empty tensor where it is not wanted.
Tensor folded(const Partials& sums, double grad_factor, const Tensor& like, bool wanted) {
  if (!wanted) return empty_vector(0, ScalarType::Float, like);
  Tensor out = empty_as(like, ScalarType::Float);
  sums.fold(grad_factor, static_cast<float*>(out.data_ptr()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward(
    Tensor grad, Tensor x, Tensor scale, std::optional<Tensor> offset, int64_t qmin, int64_t qmax,
    std::optional<int64_t> axis, double grad_factor, bool aten_edge, bool param_grads) {
  const Op op{"fake_quantize_backward"};
  check_quantizer(op, x, scale, offset, qmin, qmax, axis);
  check_grad(op, grad, x);
  x = dense(x);
  grad = laid_out_as(grad, x);
  scale = dense(scale);
  if (offset) offset = dense(*offset);
  Tensor grad_x = empty_as(x, x.scalar_type());
  prefer_huge_pages(grad_x);
  Job job = make_job(x, grad_x, scale, offset, qmin, qmax, axis);
  job.grad = grad.data_ptr();
  const std::vector<Sums> sums = run_backward({job}, x.scalar_type(), grad.scalar_type(), aten_edge);
  return {
      grad_x, folded(sums[0].scale, grad_factor, scale, param_grads),
      folded(sums[0].offset, grad_factor, scale, param_grads && offset.has_value())};
}

std::vector<Tensor> fake_quantize_multi(
    std::vector<Tensor> xs, std::vector<Tensor> scales, std::vector<int64_t> qmins, std::vector<int64_t> qmaxs,
    std::optional<int64_t> axis, std::vector<double> grad_factors, std::optional<ScalarType> out_dtype) {
  const char* op = "fake_quantize_multi";
  check_layers(op, xs, scales, qmins, qmaxs, axis, grad_factors);
  if (out_dtype) check_element({op}, "out_dtype", *out_dtype);
  if (xs.empty()) return {};
  const ScalarType y_dtype = out_dtype.value_or(xs[0].scalar_type());
  std::vector<Tensor> ys;
  std::vector<Job> jobs;
  for (size_t i = 0; i < xs.size(); ++i) {
    xs[i] = dense(xs[i]);
    scales[i] = dense(scales[i]);
    ys.push_back(empty_as(xs[i], y_dtype));
    prefer_huge_pages(ys[i], kLargeLayer);
    jobs.push_back(make_job(xs[i], ys[i], scales[i], std::nullopt, qmins[i], qmaxs[i], axis));
  }
  run_forward(jobs, xs[0].scalar_type(), y_dtype);
  return ys;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> fake_quantize_multi_backward(
    std::vector<Tensor> grads, std::vector<Tensor> xs, std::vector<Tensor> scales, std::vector<int64_t> qmins,
    std::vector<int64_t> qmaxs, std::optional<int64_t> axis, std::vector<double> grad_factors, bool param_grads) {
  const char* op = "fake_quantize_multi_backward";
  check_layers(op, xs, scales, qmins, qmaxs, axis, grad_factors);
  check_grads(op, grads, xs);
  if (xs.empty()) return {};
  std::vector<Tensor> grad_xs, grad_scales;
  std::vector<Job> jobs;
  for (size_t i = 0; i < xs.size(); ++i) {
    xs[i] = dense(xs[i]);
    scales[i] = dense(scales[i]);
    grads[i] = laid_out_as(grads[i], xs[i]);
    grad_xs.push_back(empty_as(xs[i], xs[i].scalar_type()));
    prefer_huge_pages(grad_xs[i], kLargeLayer);
    jobs.push_back(make_job(xs[i], grad_xs[i], scales[i], std::nullopt, qmins[i], qmaxs[i], axis));
    jobs[i].grad = grads[i].data_ptr();
  }
  const std::vector<Sums> sums = run_backward(jobs, xs[0].scalar_type(), grads[0].scalar_type(), false);
  for (size_t i = 0; i < xs.size(); ++i)
    grad_scales.push_back(folded(sums[i].scale, grad_factors[i], scales[i], param_grads));
  return {grad_xs, grad_scales};
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&qkernels::fake_quantize));
  m.impl("fake_quantize_backward", TORCH_BOX(&qkernels::fake_quantize_backward));
  m.impl("fake_quantize_multi", TORCH_BOX(&qkernels::fake_quantize_multi));
  m.impl("fake_quantize_multi_backward", TORCH_BOX(&qkernels::fake_quantize_multi_backward));
}
