// The choice among the row kernels.
#pragma once

#include <string>
#include <vector>

#include "cpu/rows/kernels.h"

namespace ppo_fast::cpu {

// The instruction sets that this machine has and the module was built for: of "avx512", "avx2", "baseline".
std::vector<std::string> isas();

// The one in use: at first PPO_FAST_ISA of the environment, the first of isas() where that is unset or empty. Throws
// std::invalid_argument where it is none of them, as does set_isa.
std::string isa();
void set_isa(const std::string& name);
const Kernels& kernels();

}  // namespace ppo_fast::cpu
