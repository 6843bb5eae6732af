#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

namespace ppo_fast {
namespace {

// The entry point of a parallel region, in libgomp and in the OpenMP runtimes of LLVM and Intel.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The runtime that torch has loaded under whatever name, so that both share one pool of threads: linked to
// libgomp.so.1, this module would load a second one where torch's has another name.
Parallel find_runtime() {
  if (void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel")) return reinterpret_cast<Parallel>(found);
  void* library = dlopen("libgomp.so.1", RTLD_LAZY);
  return library ? reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel")) : nullptr;
}

Parallel runtime() {
  static const Parallel found = find_runtime();
  return found;
}

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void run_on_threads(void (*run)(void*), void* data, unsigned threads) { runtime()(run, data, threads, 0); }

bool has_threads() { return !forked && registered == 0 && runtime(); }

}  // namespace ppo_fast
