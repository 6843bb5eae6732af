// Threads for the CPU kernels: those of the process' OpenMP runtime, dynamic schedule, serial in a forked child.
#pragma once

#include <atomic>
#include <cstdint>

namespace ppo_fast {

// The threads of a parallel region: run(data) on each of `threads` of them, this one included.
void run_on_threads(void (*run)(void*), void* data, unsigned threads);

// Whether run_on_threads has threads. Not in a process that was forked from one with this module loaded: the workers of
// libgomp do not survive a fork, and its next parallel region would wait for them for ever.
bool has_threads();

// Calls body(i) for i in [0, n), from up to `threads` threads. Each i runs once, whole, on one thread.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1 || !has_threads()) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  struct Loop {
    const Body& body;
    const int64_t n;
    std::atomic<int64_t> next{0};
  } loop{body, n};
  auto run = [](void* data) {
    auto& loop = *static_cast<Loop*>(data);
    for (int64_t i; (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.n;) loop.body(i);
  };
  run_on_threads(run, &loop, static_cast<unsigned>(n < threads ? n : threads));
}

}  // namespace ppo_fast
