// Work for torch's threads, in stages: each begins when the one before it has ended.
//
// A stage is cut into chunks, which threads take one after another, so that one that others keep from running (a busy
// neighbor on its core) takes fewer and holds up none but that of its last. All stages run in one parallel region:
// between them threads wait for the last chunk, spinning for a moment and then giving their core away. How many
// threads there are, and whether they come at all, changes nothing but the time.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace qkernels {

struct Stage {
  int64_t chunks;
  int64_t work;  // of all chunks, in about the time of 64 products of codes (one instruction of AVX-512)
  std::function<void(int64_t chunk)> run;
};

void run_stages(const std::vector<Stage>& stages);

constexpr int64_t kChunksOfAThread = 4;

// Into how many chunks a stage should be cut, so that all threads have work to the end.
int64_t wanted_chunks();

// One stage of `items` alike, cut by their work.
Stage evenly_cut(int64_t items, int64_t work, std::function<void(int64_t begin, int64_t end)> run);

// Memory of a thread that stays for whatever it runs next: kernels take what they need, and have it until the Scratch
// that gave it ends. Uninitialized, aligned for vector registers.
class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(bytes(n * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* bytes(int64_t n);
  int64_t first_;
};

}  // namespace qkernels
