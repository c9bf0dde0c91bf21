// packed_network for CPU tensors: successive layers in one call, one parallel region and one arena.
//
// What the op is told, a table of numbers, is checked row by row before anything runs: a row may read what an input, an
// earlier row or a constant has, no more, and each row's result is written in whole.

#include "arena.h"
#include "packed_network.h"
#include "packed_table.h"

#include <torch/csrc/stable/library.h>

#include <iterator>
#include <string>
#include <vector>

namespace qkernels {
namespace {

class Network {
 public:
  Network(const std::vector<Tensor>& inputs, const std::vector<Tensor>& constants, const Tensor& steps, Arena& arena)
      : constants_(constants), arena_(arena), inputs_(static_cast<int64_t>(inputs.size())), rows_(steps.size(0)) {
    for (const Tensor& x : inputs)
      values_.push_back(
          {static_cast<char*>(x.data_ptr()), x.scalar_type(), x.size(0), x.size(1), x.size(2), x.size(3), rows_});
    const int64_t* numbers = static_cast<const int64_t*>(steps.data_ptr());
    for (int64_t i = 0; i < rows_; ++i) table_.emplace_back(numbers + i * kFields, i);
    find_last_uses();
  }

  // The stages of all rows; the last one's result is y.
  std::vector<Stage> stages(const Tensor& y) {
    std::vector<Stage> stages;
    for (int64_t i = 0; i < rows_; ++i) {
      const Row& row = table_[i];
      if (row[Field::part] == 0) begin_result(row, y);
      Borrowed memory(arena_);
      add_stages(row, memory, stages);
      for (Value& value : values_)
        if (value.last_use == i) arena_.give_back(value.data), value.last_use = -1;
    }
    STD_TORCH_CHECK(complete_, kNetworkOp, ": the last result lacks images");
    return stages;
  }

 private:
  // What a row's stages hand on among themselves.
  class Borrowed : public Memory {
   public:
    explicit Borrowed(Arena& arena) : arena_(arena) {}
    ~Borrowed() override {
      for (void* at : taken_) arena_.give_back(at);
    }
    void* take(int64_t bytes) override { return taken_.emplace_back(arena_.take(bytes)); }

   private:
    Arena& arena_;
    std::vector<void*> taken_;
  };

  void find_last_uses() {
    last_uses_.assign(inputs_ + rows_, -1);
    for (int64_t i = 0; i < rows_; ++i)
      for (Field field : {Field::x, Field::residual, Field::result})
        if (const int64_t value = table_[i][field]; value >= inputs_ && value < inputs_ + rows_) last_uses_[value] = i;
  }

  void begin_result(const Row& row, const Tensor& y) {
    row.check(
        row[Field::result] == static_cast<int64_t>(values_.size()) && complete_,
        "begins a result that is not the next");
    Value value{
        nullptr, dtype_of(row, Field::dtype), row.at_least(1, Field::images), row.at_least(1, Field::channels),
        row.at_least(1, Field::height), row.at_least(1, Field::width), last_uses_[row[Field::result]]};
    const int64_t bytes = checked_product({value.images, value.height, value.width, value.pixel_bytes()});
    const bool is_last = table_.back()[Field::result] == row[Field::result];
    if (is_last) {
      const auto sizes = y.sizes();
      const int64_t shape[] = {value.images, value.channels, value.height, value.width};
      row.check(
          y.scalar_type() == value.dtype && std::equal(sizes.begin(), sizes.end(), std::begin(shape), std::end(shape)),
          "ends with another result than the op is told to give");
      value.data = static_cast<char*>(y.data_ptr());
      value.last_use = rows_;
    } else {
      value.data = static_cast<char*>(arena_.take(bytes));
    }
    values_.push_back(value);
    complete_ = false;
    written_ = 0;
  }

  const Value& value(const Row& row, Field field) const {
    const int64_t index = row[field];
    row.check(index >= 0 && index < static_cast<int64_t>(values_.size()) - 1, "takes what is not there");
    return values_[index];
  }

  void add_stages(const Row& row, Memory& memory, std::vector<Stage>& stages) {
    const int64_t last = static_cast<int64_t>(values_.size()) - 1;
    const Value& out = values_.back();
    row.check(
        last >= inputs_ && row[Field::result] == last && dtype_of(row, Field::dtype) == out.dtype &&
            row[Field::images] == out.images && row[Field::channels] == out.channels &&
            row[Field::height] == out.height && row[Field::width] == out.width,
        "goes on with another result");
    const Value& x = value(row, Field::x);
    switch (row[Field::kind]) {
      case kQuantize: return quantize(row, x, out, stages);
      case kConvolve: return convolve(row, x, out, memory, stages);
      case kMaxPool: return pool(row, x, out, stages);
      case kMean: return average(row, x, out, stages);
      case kGate: return multiply(row, x, out, stages);
      case kNorm: return normalize(row, x, out, stages);
      case kAttend: return attend(row, x, out, stages);
      default: row.check(false, "is of an unknown kind");
    }
  }

  // That the images from Field::first on are the next of the result.
  void write(const Row& row, const Value& out, int64_t images) {
    row.check(row[Field::first] == written_, "does not go on where the one before it ended");
    written_ = checked_sum({written_, images});
    row.check(written_ <= out.images, "gives more images than its result has");
    complete_ = written_ == out.images;
  }

  const float* floats(const Row& row, Field field, int64_t begin, int64_t count) const {
    const Tensor& t = constant(row, field);
    row.check(
        t.scalar_type() == ScalarType::Float && begin >= 0 && t.numel() >= checked_sum({begin, count}),
        "takes more of a constant than is there");
    return static_cast<const float*>(t.data_ptr()) + begin;
  }
  const float* optional_floats(const Row& row, Field field, int64_t begin, int64_t count) const {
    return row[field] < 0 ? nullptr : floats(row, field, begin, count);
  }
  const Tensor& constant(const Row& row, Field field) const {
    row.check(
        row[field] >= 0 && row[field] < static_cast<int64_t>(constants_.size()), "takes a constant that is not there");
    return constants_[row[field]];
  }

  void quantize(const Row& row, const Value& x, const Value& out, std::vector<Stage>& stages) {
    const int64_t members = row.at_least(1, Field::members);
    const float* scales = floats(row, Field::out_scale, 0, members);
    const auto [qmin, qmax] = range(row, out.dtype);
    row.check(is_element(x.dtype) && is_code(out.dtype), "quantizes codes, or to floats");
    row.check(
        x.channels == out.channels && x.height == out.height && x.width == out.width &&
            (out.images == x.images || out.images == checked_product({members, x.images})) && out.images % members == 0,
        "quantizes to another shape");
    write(row, out, out.images);
    stages.push_back(quantization(
        x.from(0, x.images), x.image_bytes(), out.images, out.images / members, scales, qmin, qmax, out.data,
        out.image_bytes()));
  }

  void convolve(const Row& row, const Value& x, const Value& out, Memory& memory, std::vector<Stage>& stages) {
    const int64_t members = row.at_least(1, Field::members), before = row.at_least(0, Field::member);
    const Sizes s = sizes(row, x, out, members);
    const int64_t images = checked_product({members, s.images});
    write(row, out, images);
    const int64_t first = row[Field::first];
    row.check(
        s.shared ? x.images == s.images : checked_sum({first, images}) <= x.images, "takes more images than there are");
    const int64_t channels = checked_product({members, s.out_channels}), begin = checked_product({before, s.out_channels});
    Epilogue e{
        .channels = s.out_channels,
        .scale = floats(row, Field::scale, begin, channels),
        .x_scale = optional_floats(row, Field::x_scale, before, members),
        .bias = optional_floats(row, Field::bias, begin, channels),
        .residual_scale = optional_floats(row, Field::residual_scale, before, members),
        .activation = activation_numbered(row),
        .out = out.data + first * out.image_bytes(),
        .out_dtype = out.dtype,
        .out_scale = optional_floats(row, Field::out_scale, before, members)};
    std::tie(e.qmin, e.qmax) = range(row, out.dtype);
    if (row[Field::residual] >= 0) {
      const Value& residual = value(row, Field::residual);
      row.check(
          residual.images == out.images && residual.channels == out.channels && residual.height == out.height &&
              residual.width == out.width,
          "adds a residual of another shape");
      e.residual = residual.data + first * residual.image_bytes();
      e.residual_dtype = residual.dtype;
    }
    check_dtypes(row, x, e);
    const PackedWeights weights = packed(row, x, s, members);
    const Pixels pixels = x.from(s.shared ? 0 : first, s.shared ? s.images : images);
    const auto add = is_code(x.dtype) ? s.depthwise() ? convolve_depthwise_codes : convolve_codes
        : s.depthwise()               ? convolve_depthwise_floats
                                      : convolve_floats;
    add(pixels, s, weights, e, memory, stages);
  }

  void check_dtypes(const Row& row, const Value& x, const Epilogue& e) const {
    row.check(is_code(x.dtype) == (e.x_scale != nullptr), "has a scale of its input, and that is no codes; or none");
    row.check(
        (e.residual != nullptr && is_code(e.residual_dtype)) == (e.residual_scale != nullptr),
        "has a scale of its residual, and that is no codes; or none");
    row.check(
        is_code(e.out_dtype) == (e.out_scale != nullptr), "has a scale of its result, and that is no codes; or none");
    row.check(is_code(x.dtype) || e.residual == nullptr || e.residual_dtype == x.dtype, "adds a residual of another dtype");
    row.check(is_code(x.dtype) || e.out_dtype == x.dtype, "gives another dtype than it takes");
  }

  Sizes sizes(const Row& row, const Value& x, const Value& out, int64_t members) const {
    const Sizes s{
        .members = members,
        .images = row.at_least(1, Field::images_of_member),
        .in_channels = x.channels,
        .height = x.height,
        .width = x.width,
        .out_channels = out.channels,
        .out_height = out.height,
        .out_width = out.width,
        .kernel_h = row.at_least(1, Field::kernel_h),
        .kernel_w = row.at_least(1, Field::kernel_w),
        .stride_h = row.at_least(1, Field::stride_h),
        .stride_w = row.at_least(1, Field::stride_w),
        .pad_top = row.at_least(0, Field::pad_top),
        .pad_left = row.at_least(0, Field::pad_left),
        .pad_bottom = row.at_least(0, Field::pad_bottom),
        .pad_right = row.at_least(0, Field::pad_right),
        .dilation_h = row.at_least(1, Field::dilation_h),
        .dilation_w = row.at_least(1, Field::dilation_w),
        .groups = row.at_least(1, Field::groups),
        .shared = row[Field::shared] != 0};
    const auto fits = [](int64_t size, int64_t before, int64_t after, int64_t kernel, int64_t stride, int64_t dilation,
                         int64_t outputs) {
      const int64_t last =
          checked_sum({checked_product({outputs - 1, stride}), checked_product({kernel - 1, dilation})});
      return last < checked_sum({size, before, after});
    };
    row.check(
        fits(s.height, s.pad_top, s.pad_bottom, s.kernel_h, s.stride_h, s.dilation_h, s.out_height) &&
            fits(s.width, s.pad_left, s.pad_right, s.kernel_w, s.stride_w, s.dilation_w, s.out_width),
        "has windows that reach behind the image");
    row.check(
        s.in_channels % s.groups == 0 && s.out_channels % s.groups == 0, "has channels that do not divide by its groups");
    return s;
  }

  PackedWeights packed(const Row& row, const Value& x, const Sizes& s, int64_t members) const {
    const int64_t bits = row[Field::bits], begin = row.at_least(0, Field::byte);
    check_bits(kNetworkOp, bits);
    const int64_t window = checked_product({s.kernel_h, s.kernel_w, s.depth()});
    row.check(!is_code(x.dtype) || window <= kMostTerms, "has sums that may exceed int32");
    const int64_t codes = checked_product({s.out_channels, window});
    row.check(codes <= kMostSize, "takes more weights than there are");
    const int64_t bytes = packed_bytes(codes, bits);
    const Tensor& t = constant(row, Field::packed);
    row.check(
        t.scalar_type() == ScalarType::Byte && checked_sum({begin, checked_product({members, bytes})}) <= t.numel(),
        "takes more weights than there are");
    PackedWeights weights{static_cast<const uint8_t*>(t.data_ptr()) + begin, bytes, static_cast<int>(bits)};
    if (row[Field::panels] < 0) return weights;
    const Tensor& panels = constant(row, Field::panels);
    const int64_t before = row.at_least(0, Field::member);
    row.check(
        panels.scalar_type() == ScalarType::Byte && panels.dim() == 2 &&
            checked_sum({before, members}) <= panels.size(0),
        "takes more panels than there are");
    if (!is_code(x.dtype)) return weights;
    weights.record_bytes = panels.size(1);
    weights.records = static_cast<const uint8_t*>(panels.data_ptr()) + before * weights.record_bytes;
    return weights;
  }

  void pool(const Row& row, const Value& x, const Value& out, std::vector<Stage>& stages) {
    const Sizes s = sizes(row, x, out, 1);
    row.check(
        is_code(x.dtype) && x.dtype == out.dtype && x.images == out.images && x.channels == out.channels &&
            s.images == x.images && s.pad_top < s.kernel_h && s.pad_left < s.kernel_w && s.pad_bottom < s.kernel_h &&
            s.pad_right < s.kernel_w && s.dilation_h == 1 && s.dilation_w == 1,
        "is no max pool of codes");
    write(row, out, out.images);
    stages.push_back(max_pool(x.from(0, x.images), s, out.data));
  }

  void average(const Row& row, const Value& x, const Value& out, std::vector<Stage>& stages) {
    row.check(
        x.is_float32() && out.is_float32() && out.images == x.images && out.channels == x.channels &&
            out.pixels() == x.images,
        "is no mean of images of float32");
    write(row, out, out.images);
    stages.push_back(mean(x.floats(), x.images, x.height * x.width, x.channels, out.floats()));
  }

  void multiply(const Row& row, const Value& x, const Value& out, std::vector<Stage>& stages) {
    const Value& factors = value(row, Field::residual);
    row.check(x.is_float32() && factors.is_float32() && same(x, out), "is no product of images of float32");
    row.check(
        factors.pixels() == x.images && factors.images == x.images && factors.channels == x.channels,
        "has other factors than one for each channel of an image");
    write(row, out, out.images);
    stages.push_back(gate(x.floats(), factors.floats(), x.images, x.height * x.width, x.channels, out.floats()));
  }

  void normalize(const Row& row, const Value& x, const Value& out, std::vector<Stage>& stages) {
    const int64_t members = row.at_least(1, Field::members), channels = checked_product({members, x.channels});
    row.check(x.is_float32() && same(x, out) && x.images % members == 0, "is no norm of float32");
    write(row, out, out.images);
    const LayerNorm norm{
        x.pixels() / members, x.channels, floats(row, Field::scale, 0, channels), floats(row, Field::bias, 0, channels),
        *floats(row, Field::x_scale, 0, 1)};
    stages.push_back(layer_norm(x.floats(), x.pixels(), norm, out.floats()));
  }

  void attend(const Row& row, const Value& x, const Value& out, std::vector<Stage>& stages) {
    const int64_t heads = row.at_least(1, Field::heads), tokens = row.at_least(1, Field::tokens);
    row.check(
        x.is_float32() && out.is_float32() && out.images == x.images && out.height == x.height &&
            out.width == x.width && x.pixels() % tokens == 0 && out.channels % heads == 0,
        "is no attention of tokens of float32");
    for (Field field : {Field::query, Field::key, Field::value})
      row.check(
          checked_sum({row.at_least(0, field), out.channels}) <= x.channels, "takes channels that are not there");
    write(row, out, out.images);
    const Attention attention{
        x.pixels() / tokens, tokens, x.channels, heads, out.channels / heads, row[Field::query], row[Field::key],
        row[Field::value], *floats(row, Field::scale, 0, 1)};
    stages.push_back(attention_of(x.floats(), attention, out.floats()));
  }

  static bool same(const Value& x, const Value& out) {
    return x.dtype == out.dtype && x.images == out.images && x.channels == out.channels && x.height == out.height &&
        x.width == out.width;
  }

  static std::pair<float, float> range(const Row& row, ScalarType dtype) {
    const int64_t qmin = row[Field::qmin], qmax = row[Field::qmax];
    const bool fits = dtype == ScalarType::Char ? qmin >= -128 && qmax <= 127 : qmin >= 0 && qmax <= 255;
    row.check(!is_code(dtype) || (fits && qmin < qmax), "has a range of codes that its dtype does not hold");
    return {static_cast<float>(qmin), static_cast<float>(qmax)};
  }

  static Activation activation_numbered(const Row& row) {
    const int64_t number = row[Field::activation];
    row.check(
        number >= 0 && number < static_cast<int64_t>(std::size(kActivationNames)), "has an unknown activation");
    return static_cast<Activation>(number);
  }

  const std::vector<Tensor>& constants_;
  Arena& arena_;
  int64_t inputs_, rows_;
  std::vector<Row> table_;
  std::vector<Value> values_;
  std::vector<int64_t> last_uses_;
  bool complete_ = true;  // whether the last result has all its images
  int64_t written_ = 0;   // of them
};

// Gives the arena back, whatever happens.
struct BorrowedArena {
  std::unique_ptr<Arena> arena = Arena::borrow();
  ~BorrowedArena() { Arena::give_back(std::move(arena)); }
};

Tensor packed_network(
    std::vector<Tensor> inputs, std::vector<Tensor> constants, Tensor steps, std::vector<int64_t> out_sizes,
    ScalarType out_dtype) {
  STD_TORCH_CHECK(
      steps.scalar_type() == ScalarType::Long && steps.dim() == 2 && steps.size(0) > 0 && steps.size(1) == kFields &&
          steps.is_cpu(),
      kNetworkOp, ": steps must be an int64 table on the CPU, [steps, ", kFields, "]");
  if (!steps.is_contiguous()) steps = torch::stable::contiguous(steps);
  STD_TORCH_CHECK(!inputs.empty(), kNetworkOp, ": there are no inputs");
  for (Tensor& x : inputs) {
    STD_TORCH_CHECK(
        x.is_cpu() && x.dim() == 4 && x.numel() > 0 && (is_code(x.scalar_type()) || is_element(x.scalar_type())), kNetworkOp,
        ": inputs must be codes or floats [images, channels, height, width]");
    x = channels_last(x);
  }
  for (Tensor& t : constants) {
    STD_TORCH_CHECK(t.is_cpu(), kNetworkOp, ": constants must be on the CPU");
    if (!t.is_contiguous()) t = torch::stable::contiguous(t);
  }
  STD_TORCH_CHECK(out_sizes.size() == 4, kNetworkOp, ": out_sizes must be four numbers");
  for (int64_t size : out_sizes) STD_TORCH_CHECK(size > 0, kNetworkOp, ": out_sizes must be positive");
  STD_TORCH_CHECK(is_code(out_dtype) || is_element(out_dtype), kNetworkOp, ": out_dtype must be of codes or floats");
  const int64_t row = checked_product({out_sizes[3], out_sizes[1]});
  const int64_t strides[] = {checked_product({out_sizes[2], row}), 1, row, out_sizes[1]};
  checked_product({strides[0], out_sizes[0]});
  const Tensor y = empty_strided(out_sizes, {strides, 4}, out_dtype, inputs[0]);
  BorrowedArena borrowed;
  run_stages(Network(inputs, constants, steps, *borrowed.arena).stages(y));
  return y;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("packed_network", TORCH_BOX(&qkernels::packed_network));
}
