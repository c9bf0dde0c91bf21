// Memory for the results of a network's layers, reused within a run and between runs.
#pragma once

#include "packed_conv2d.h"

#include <map>
#include <memory>
#include <vector>

namespace qkernels {

// Chunks of memory with what is free of them. Arenas that runs have given back wait for the next run, as long as all
// that wait take no more than kMostKept bytes.
class Arena : public Memory {
 public:
  ~Arena() override;
  void* take(int64_t bytes) override;  // aligned for vector registers
  void give_back(void* at);

  static std::unique_ptr<Arena> borrow();
  static void give_back(std::unique_ptr<Arena> arena);

 private:
  static constexpr int64_t kMostKept = 256 << 20;

  void forget();  // all that was taken
  int64_t size() const;

  struct Chunk {
    char* bytes;
    int64_t size;
  };
  std::vector<Chunk> chunks_;
  std::map<char*, int64_t> free_, taken_;  // where -> bytes
};

}  // namespace qkernels
