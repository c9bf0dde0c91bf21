// The threads of `run_stages`, and their memory.

#include "stages.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qkernels {
namespace {

constexpr int64_t kWorkOfAThread = 1 << 13;  // less is not worth waking a thread for
constexpr int64_t kLeastWork = 1 << 10;      // of a chunk
constexpr int kSpins = 1 << 10;              // some tens of microseconds

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// How far a stage has come; two of them share no cache line.
struct alignas(128) Progress {
  std::atomic<int64_t> taken{0}, done{0};
};

// What the first exception of any thread says. After it the chunks that are left are counted, and not run.
class Failure {
 public:
  bool happened() const { return happened_.load(std::memory_order_relaxed); }
  void keep(const char* what) {
    const std::lock_guard lock(mutex_);
    if (!happened_) what_ = what;
    happened_ = true;
  }
  void check() const { STD_TORCH_CHECK(!happened_, what_); }

 private:
  std::atomic<bool> happened_{false};
  std::mutex mutex_;
  std::string what_;
};

void take_chunks(const Stage& stage, Progress& progress, Failure& failure) {
  for (;;) {
    const int64_t chunk = progress.taken.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= stage.chunks) return;
    try {
      if (!failure.happened()) stage.run(chunk);
    } catch (const std::exception& error) {
      failure.keep(error.what());
    }
    progress.done.fetch_add(1, std::memory_order_release);
  }
}

void wait_for(const Stage& stage, const Progress& progress) {
  for (int spins = 0; progress.done.load(std::memory_order_acquire) < stage.chunks; ++spins)
    spins < kSpins ? pause() : std::this_thread::yield();
}

// Blocks of a thread's memory, in the order in which they are taken; each only grows.
struct Blocks {
  struct Block {
    std::unique_ptr<char[]> bytes;
    int64_t size = 0;
  };
  std::vector<Block> blocks;
  size_t used = 0;
};
thread_local Blocks own;

}  // namespace

int64_t wanted_chunks() { return kChunksOfAThread * static_cast<int64_t>(torch::stable::get_num_threads()); }

Stage evenly_cut(int64_t items, int64_t work, std::function<void(int64_t begin, int64_t end)> run) {
  const int64_t most = std::max<int64_t>(1, items);
  const int64_t chunks = std::clamp<int64_t>(std::min(wanted_chunks(), work / kLeastWork), 1, most);
  return {chunks, work, [=, run = std::move(run)](int64_t chunk) {
            run(items * chunk / chunks, items * (chunk + 1) / chunks);
          }};
}

void run_stages(const std::vector<Stage>& stages) {
  int64_t work = 0;
  bool cut = false;
  for (const Stage& stage : stages) work += stage.work, cut = cut || stage.chunks > 1;
  const int64_t threads =
      cut ? std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / kWorkOfAThread) : 1;
  if (threads == 1) {
    for (const Stage& stage : stages)
      for (int64_t chunk = 0; chunk < stage.chunks; ++chunk) stage.run(chunk);
    return;
  }
  std::vector<Progress> progress(stages.size());
  Failure failure;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = 0; i < stages.size(); ++i) {
      take_chunks(stages[i], progress[i], failure);
      wait_for(stages[i], progress[i]);
    }
  });
  failure.check();
}

Scratch::Scratch() : first_(static_cast<int64_t>(own.used)) {}
Scratch::~Scratch() { own.used = static_cast<size_t>(first_); }

void* Scratch::bytes(int64_t n) {
  constexpr int64_t alignment = 64;
  if (own.used == own.blocks.size()) own.blocks.emplace_back();
  Blocks::Block& block = own.blocks[own.used++];
  if (block.size < n + alignment) {
    block = {};  // before the larger one is there
    block = {std::unique_ptr<char[]>(new char[n + alignment]), n + alignment};
  }
  const uintptr_t at = reinterpret_cast<uintptr_t>(block.bytes.get());
  return reinterpret_cast<void*>((at + alignment - 1) & ~uintptr_t{alignment - 1});
}

}  // namespace qkernels
