// The row kernels of one instruction set, and the choice among those that this machine has.
#pragma once

#include <string>
#include <vector>

#include "rows.h"

namespace ppo_fast::cpu {

// Each works on rows [first, last). Results do not depend on how rows are divided among calls.
struct Kernels {
  void (*token_stats)(const TokenStatsArguments& args, int64_t first, int64_t last);
  void (*token_stats_backward)(const TokenStatsBackwardArguments& args, int64_t first, int64_t last);
  PolicySums (*policy_loss)(const PolicyLossArguments& args, int64_t first, int64_t last);
  ValueSums (*value_loss)(const ValueLossArguments& args, int64_t first, int64_t last);
  // For tests: y[i] = f(x[i]) by the vector function f: one of "exp2", "exp", "exp_excess", "log".
  void (*elementary)(const char* f, const float* x, float* y, int64_t n);
};

namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}

// The instruction sets that this machine has and the module was built for: of "avx512", "avx2", "baseline".
std::vector<std::string> isas();

// The one in use: at first PPO_FAST_ISA of the environment, else the first of isas(). Throws
// std::invalid_argument where it is none of them, as does set_isa.
std::string isa();
void set_isa(const std::string& name);
const Kernels& kernels();

}  // namespace ppo_fast::cpu
