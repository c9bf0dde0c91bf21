// Included before every file of csrc/cuda: makes its ops those of CPU tensors, in a namespace beside the real one.
#pragma once

#define QK_EMULATED  // for what csrc/numerics.h does on GPUs alone

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda_runtime.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

inline AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream
#define is_cuda is_cpu
#define CUDA CPU
#define qkernels qkernels_emulated
