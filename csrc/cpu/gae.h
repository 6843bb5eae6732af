// Generalized advantage estimation on the CPU.
#pragma once

#include "../gae.h"

namespace ppo_fast::cpu {

// Rewards, values, bootstrap and results are all float32 or all float64. Serial in time, parallel over
// sequences: the results are those of the plain recursion, to the last bit, for any number of threads.
void gae(const GaeArguments& args, Dtype dtype, int threads);

}  // namespace ppo_fast::cpu
