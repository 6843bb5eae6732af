// The row kernels, once for each instruction set. Included by their translation units, and so without the standard
// library: an inline function of it, compiled for AVX-512, could be the one that the linker keeps for all.
#pragma once

#include "cpu/rows/arguments.h"

namespace ppo_fast::cpu {

// Each works on rows [first, last). Results do not depend on how rows are divided among calls.
struct Kernels {
  void (*token_stats)(const TokenStatsArguments& args, int64_t first, int64_t last);
  void (*token_stats_backward)(const TokenStatsBackwardArguments& args, int64_t first, int64_t last);
  bool (*targets_fit)(const Rows& in);
  PolicySums (*policy_loss)(const PolicyLossArguments& args, int64_t first, int64_t last);
  ValueSums (*value_loss)(const ValueLossArguments& args, int64_t first, int64_t last);
  // scratch: room for a row; null without a filter.
  void (*sample_tokens)(const SampleArguments& args, int64_t first, int64_t last, float* scratch);
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

}  // namespace ppo_fast::cpu
