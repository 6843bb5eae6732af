// Threads for the CPU kernels: OpenMP, dynamic schedule, serial in a forked child.
#pragma once

#include <cstdint>

namespace ppo_fast {

// True in a process that was forked from one with this module loaded. libgomp's workers do not survive a fork
// and its next parallel region would wait for them for ever.
bool in_forked_child();

// Calls body(i) for i in [0, n), from up to `threads` threads. Each i runs once, whole, on one thread.
template <class Body>
void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1 || in_forked_child()) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < n; ++i) body(i);
}

}  // namespace ppo_fast
