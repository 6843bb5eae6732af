#include "cpu/parallel.h"

#include <pthread.h>

namespace ppo_fast {
namespace {

bool forked = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

bool in_forked_child() { return forked || registered != 0; }

}  // namespace ppo_fast
