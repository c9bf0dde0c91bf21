// packed_panels for CPU tensors: weights unpacked once, as packed_network reads them.

#include "../checked.h"
#include "packed_arguments.h"
#include "packed_panels.h"

#include <torch/csrc/stable/library.h>

namespace qkernels {
namespace {

const Op kOp{"packed_panels"};

Tensor packed_panels(
    Tensor packed, int64_t channels, int64_t depth, int64_t bits, std::vector<int64_t> kernel,
    std::vector<int64_t> dilation, int64_t groups) {
  check_bits(kOp, bits);
  STD_TORCH_CHECK(
      packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 2 && packed.size(0) > 0, kOp,
      ": packed must be uint8 [members, bytes] on the CPU");
  STD_TORCH_CHECK(
      kernel.size() == 2 && dilation.size() == 2 && kernel[0] > 0 && kernel[1] > 0 && dilation[0] > 0 &&
          dilation[1] > 0 && channels > 0 && depth > 0 && groups > 0 && channels % groups == 0,
      kOp, ": channels, depth, kernel, dilation and groups must be positive, and channels divide by groups");
  const int64_t window = checked_product({kernel[0], kernel[1], depth});
  STD_TORCH_CHECK(window <= kMostTerms, kOp, ": a sum of ", window, " products may exceed int32");
  STD_TORCH_CHECK(
      packed.size(1) == packed_bytes(checked_product({channels, window}), bits), kOp, ": packed has ", packed.size(1),
      " bytes a member, which are not those of so many codes");
  packed = torch::stable::contiguous(packed);
  const Sizes s{
      .members = packed.size(0),
      .images = 1,
      .in_channels = checked_product({depth, groups}),
      .out_channels = channels,
      .kernel_h = kernel[0],
      .kernel_w = kernel[1],
      .dilation_h = dilation[0],
      .dilation_w = dilation[1],
      .groups = groups};
  const PackedWeights weights = weights_of(packed, bits);
  const int64_t bytes = panel_record_bytes(s, weights), sizes[] = {s.members, bytes}, strides[] = {bytes, 1};
  const Tensor records = empty_strided({sizes, 2}, {strides, 2}, ScalarType::Byte, packed);
  prefer_huge_pages(records);
  std::memset(records.data_ptr(), 0, checked_product({s.members, bytes}));  // what no panel fills
  keep_panels(s, weights, static_cast<uint8_t*>(records.data_ptr()));
  return records;
}

}  // namespace
}  // namespace qkernels

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("packed_panels", TORCH_BOX(&qkernels::packed_panels));
}
