// The row kernels of one instruction set, and the choice among those that this machine has.
#pragma once

#include "rows.h"

namespace ppo_fast::cpu {

// Each works on rows [first, last). Results do not depend on how rows are divided among calls.
struct Kernels {
  void (*token_stats)(const TokenStatsArguments& args, int64_t first, int64_t last);
  void (*token_stats_backward)(const TokenStatsBackwardArguments& args, int64_t first, int64_t last);
  PolicySums (*policy_loss)(const PolicyLossArguments& args, int64_t first, int64_t last);
  ValueSums (*value_loss)(const ValueLossArguments& args, int64_t first, int64_t last);
  // For tests: y[i] = f(x[i]) by the vector functions, f one of "exp2", "exp", "exp_excess", "log".
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

// The kernels in use. First use takes PPO_FAST_ISA from the environment, else the widest that the machine has.
// Throws std::invalid_argument where the machine lacks the instruction set asked for.
const Kernels& kernels();

// Uses "avx512", "avx2" or "baseline" from now on. Throws std::invalid_argument like kernels().
void set_isa(const char* name);

}  // namespace ppo_fast::cpu
