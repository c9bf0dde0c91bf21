// The emulated device: its threads take turns in one real thread. Each has a stack of its own, which it enters once and
// keeps, block after block; from then on they switch by longjmp, without the system calls of swapcontext.

#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

namespace emulation {

dim3 thread, block, grid;

namespace {

constexpr size_t kStackBytes = 256 << 10;

enum class State { ready, waits_for_warp, waits_for_block, ended };

struct Thread {
  State state;
  jmp_buf at;
  std::unique_ptr<char[]> stack;  // once it has begun
};

std::vector<Thread> threads(kMostThreads);
jmp_buf scheduler;
const std::function<void()>* running_kernel;
std::mt19937 random_order;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s (thread %u of block %u)\n", what, thread.x, block.x);
  std::abort();
}

void wait(State state) {
  Thread& t = threads[thread.x];
  t.state = state;
  if (_setjmp(t.at) == 0) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    (*running_kernel)();
    wait(State::ended);
  }
}

void begin(Thread& t) {
  t.stack.reset(new char[kStackBytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = t.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// Runs the thread with this index until it waits.
void resume(int index) {
  thread.x = index;
  Thread& t = threads[index];
  if (_setjmp(scheduler) == 0) t.stack ? _longjmp(t.at, 1) : begin(t);
}

std::vector<int> shuffled(int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  return order;
}

// Lets the threads [begin, end) go on if all of them are in `state`.
bool release(int begin, int end, State state) {
  for (int i = begin; i < end; ++i)
    if (threads[i].state != state) return false;
  for (int i = begin; i < end; ++i) threads[i].state = State::ready;
  return true;
}

void run_block(int count) {
  for (int i = 0; i < count; ++i) threads[i].state = State::ready;
  for (bool goes_on = true; goes_on;) {
    for (const int i : shuffled(count))
      if (threads[i].state == State::ready) resume(i);
    goes_on = release(0, count, State::waits_for_block);
    for (int i = 0; i < count; i += kWarp) goes_on |= release(i, i + kWarp, State::waits_for_warp);
  }
  for (int i = 0; i < count; ++i) {
    thread.x = i;
    if (threads[i].state == State::waits_for_warp) fail("a lane waits for others of its warp that do not come");
    if (threads[i].state == State::waits_for_block) fail("a thread waits at a barrier that others do not reach");
  }
}

}  // namespace

void wait_for_warp() { wait(State::waits_for_warp); }
void wait_for_block() { wait(State::waits_for_block); }

void run(dim3 blocks, int count, const std::function<void()>& kernel) {
  if (count > kMostThreads || count % kWarp != 0) fail("a block of that size is not for this emulation");
  running_kernel = &kernel;
  grid = blocks;
  for (const int i : shuffled(blocks.x * blocks.y)) {
    block.x = i % blocks.x;
    block.y = i / blocks.x;
    run_block(count);
  }
}

}  // namespace emulation
