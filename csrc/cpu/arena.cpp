// Where an arena's memory comes from, and where it waits.

#include "arena.h"

#include "../checked.h"

#include <algorithm>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qkernels {
namespace {

constexpr int64_t kAlignment = 64;
constexpr std::align_val_t kPage{2 << 20};  // a huge one
constexpr int64_t kLeastChunk = 4 << 20;

std::mutex waiting_mutex;
std::vector<std::unique_ptr<Arena>> waiting;

}  // namespace

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) ::operator delete(chunk.bytes, kPage);
}

void* Arena::take(int64_t bytes) {
  bytes = std::max<int64_t>(kAlignment, checked_sum({bytes, kAlignment - 1}) / kAlignment * kAlignment);
  auto best = free_.end();
  for (auto it = free_.begin(); it != free_.end(); ++it)
    if (it->second >= bytes && (best == free_.end() || it->second < best->second)) best = it;
  if (best == free_.end()) {
    const int64_t page = static_cast<int64_t>(kPage);
    const int64_t size = std::max(kLeastChunk, checked_sum({bytes, page - 1}) / page * page);
    char* chunk = static_cast<char*>(::operator new(size, kPage, std::nothrow));
    STD_TORCH_CHECK(chunk != nullptr, "packed_network: there is no memory for ", size, " bytes");
#if defined(__linux__)
    madvise(chunk, size, MADV_HUGEPAGE);
#endif
    chunks_.push_back({chunk, size});
    best = free_.emplace(chunk, size).first;
  }
  const auto [at, size] = *best;
  free_.erase(best);
  if (size > bytes) free_.emplace(at + bytes, size - bytes);
  taken_.emplace(at, bytes);
  return at;
}

void Arena::give_back(void* at) {
  const auto taken = taken_.find(static_cast<char*>(at));
  auto [begin, size] = *taken;
  taken_.erase(taken);
  const auto in_one_chunk = [&](const char* boundary) {
    return std::none_of(chunks_.begin(), chunks_.end(), [&](const Chunk& c) { return c.bytes == boundary; });
  };
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && begin + size == next->first && in_one_chunk(next->first)) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin() && in_one_chunk(begin)) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      before->second += size;
      return;
    }
  }
  free_.emplace(begin, size);
}

void Arena::forget() {
  taken_.clear();
  free_.clear();
  for (const Chunk& chunk : chunks_) free_.emplace(chunk.bytes, chunk.size);
}

int64_t Arena::size() const {
  int64_t bytes = 0;
  for (const Chunk& chunk : chunks_) bytes += chunk.size;
  return bytes;
}

std::unique_ptr<Arena> Arena::borrow() {
  const std::lock_guard lock(waiting_mutex);
  if (waiting.empty()) return std::make_unique<Arena>();
  std::unique_ptr<Arena> arena = std::move(waiting.back());
  waiting.pop_back();
  return arena;
}

void Arena::give_back(std::unique_ptr<Arena> arena) {
  arena->forget();
  const std::lock_guard lock(waiting_mutex);
  int64_t kept = arena->size();
  for (const auto& other : waiting) kept += other->size();
  if (kept <= kMostKept) waiting.push_back(std::move(arena));
}

}  // namespace qkernels
