// Generalized advantage estimation on a CUDA device.
#pragma once

#include <cstdint>

#include "../gae.h"

namespace ppo_fast::cuda {

// Starts the scan on `stream` of `device` and returns at once. Rewards and values are float32, float16 or
// bfloat16; bootstrap and results are float32. Throws std::runtime_error when the launch is refused.
void gae(const GaeArguments& args, Dtype rewards, Dtype values, int device, std::uintptr_t stream);

}  // namespace ppo_fast::cuda
