// Cutting dense tensors into blocks of work for the threads. The cut depends on the tensors alone, not on the number
// of threads, so sums that are folded in block order come out the same on any of them.
#pragma once

#include "../tensor_layout.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace qkernels {

constexpr int64_t kBlockElements = 16384;
constexpr int64_t kSerialElements = 32768;  // less work than this is not worth waking a thread for
constexpr int64_t kLongRow = 32;

// A tensor is walked by rows (of `inner` elements, in segments, each with one scale) or, where those would be too
// short to vectorize, by columns: `outer` rows of channels * inner elements, each column with its own scale.
struct Walk {
  Extents e;
  bool by_rows;

  explicit Walk(const Extents& extents)
      : e(extents), by_rows(extents.channels == 1 || extents.inner >= kLongRow) {}

  int64_t columns() const { return e.channels * e.inner; }
  int64_t segments() const { return by_rows ? (e.inner + kBlockElements - 1) / kBlockElements : 1; }
  // Units are row segments or whole column rows; their elements lie one after another in memory.
  int64_t units() const { return by_rows ? e.outer * e.channels * segments() : e.outer; }
  int64_t unit_elements() const { return by_rows ? std::min(e.inner, kBlockElements) : columns(); }
  int64_t channel(int64_t unit) const { return unit / segments() % e.channels; }
  int64_t begin(int64_t unit) const {
    return by_rows ? unit / segments() * e.inner + unit % segments() * kBlockElements : unit * columns();
  }
  int64_t length(int64_t unit) const {
    return by_rows ? std::min(kBlockElements, e.inner - unit % segments() * kBlockElements) : columns();
  }
};

struct Block {
  int64_t job, first_unit, last_unit;
};

// Blocks of about kBlockElements elements over all jobs, in order.
inline std::vector<Block> cut(const std::vector<Walk>& walks) {
  std::vector<Block> blocks;
  blocks.reserve(walks.size());
  for (size_t job = 0; job < walks.size(); ++job) {
    const int64_t units = walks[job].units();
    const int64_t step = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, walks[job].unit_elements()));
    if (walks[job].unit_elements() == 0) continue;
    for (int64_t unit = 0; unit < units; unit += step)
      blocks.push_back({static_cast<int64_t>(job), unit, std::min(units, unit + step)});
  }
  return blocks;
}

// Calls work(index of block) for every block, on torch's threads if there is enough to do. Each takes the next few
// blocks whenever it is done with some, so one whose core is busy with something else is not waited for.
template <class Work>
void run_blocks(const std::vector<Block>& blocks, const Work& work) {
  const int64_t n = static_cast<int64_t>(blocks.size());
  constexpr int64_t grain = kSerialElements / kBlockElements;
  if (n <= grain) {
    for (int64_t i = 0; i < n; ++i) work(i);
    return;
  }
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (n + grain - 1) / grain);
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {  // however few of them really run
    for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;)
      for (int64_t i = begin; i < std::min(begin + grain, n); ++i) work(i);
  });
}

// Sums that blocks leave behind, folded into one float a channel in a fixed order.
class Partials {
 public:
  // By rows: one sum a unit. By columns: one a column and block.
  Partials(const Walk& walk, int64_t blocks) : walk_(walk) {
    sums_.resize(walk.by_rows ? walk.units() : blocks * walk.columns());
  }
  double& unit(int64_t unit) { return sums_[unit]; }
  double* block(int64_t block) { return sums_.data() + block * walk_.columns(); }

  void fold(double factor, float* out) const {
    std::vector<double> totals(walk_.e.channels, 0.0);
    if (walk_.by_rows) {
      for (size_t unit = 0; unit < sums_.size(); ++unit) totals[walk_.channel(unit)] += sums_[unit];
    } else {
      for (size_t i = 0; i < sums_.size(); ++i) totals[i % walk_.columns() / walk_.e.inner] += sums_[i];
    }
    for (size_t c = 0; c < totals.size(); ++c) out[c] = static_cast<float>(totals[c] * factor);
  }

 private:
  Walk walk_;
  std::vector<double> sums_;
};

}  // namespace qkernels
