// What every launch needs: the device and stream of a tensor, error checks, and dtypes as types.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>
#include <limits>
#include <utility>

#include "../arguments.h"
#include "../elements.h"
#include "../tensor_layout.h"
#include "vector_access.cuh"

namespace qkernels::cuda {

constexpr int kLog2Threads = 8;
constexpr int kThreads = 1 << kLog2Threads;  // a block, in every kernel

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// The device and the current stream of a tensor. The device stays current for the life of the object.
class Context {
 public:
  explicit Context(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    int multiprocessors = 0, threads_each = 0;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, t.get_device_index()),
          "multiprocessor count");
    check(cudaDeviceGetAttribute(&threads_each, cudaDevAttrMaxThreadsPerMultiProcessor, t.get_device_index()),
          "threads of a multiprocessor");
    resident_threads = static_cast<int64_t>(multiprocessors) * threads_each;
  }

  // Launches blocks of kThreads; none is no error.
  template <typename... Parameters, typename... Arguments>
  void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, Arguments&&... arguments) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), name, ": too many channels for one launch");
    kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
    check(cudaGetLastError(), name);
  }

  void zero(const Tensor& t) const {
    if (t.numel() > 0)
      check(cudaMemsetAsync(t.mutable_data_ptr(), 0, t.numel() * t.element_size(), stream), "zeroing a gradient");
  }

  cudaStream_t stream;
  int64_t resident_threads;  // that the whole device holds at once

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// Calls f with the element type of a dtype, as Type<T>.
template <typename F>
void with_type(ScalarType dtype, F&& f) {
  with_element<bf16, fp16>(dtype, std::forward<F>(f));
}

inline bool is_aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0; });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace qkernels::cuda
