// Generalized advantage estimation, on the CPU and on a CUDA device.
#pragma once

#include <cstdint>

#include "gae/arguments.h"

namespace ppo_fast::cpu {

// Rewards, values, bootstrap and results are all float32 or all float64. Serial in time, parallel over
// sequences: the results are those of the plain recursion, to the last bit, for any number of threads.
void gae(const GaeArguments& args, Dtype dtype, int threads);

}  // namespace ppo_fast::cpu

namespace ppo_fast::cuda {

// Starts the scan on `stream` of `device` and returns at once. Rewards and values are float32, float16 or
// bfloat16; bootstrap and results are float32. Throws std::runtime_error when the launch is refused.
void gae(const GaeArguments& args, Dtype rewards, Dtype values, int device, std::uintptr_t stream);

}  // namespace ppo_fast::cuda
