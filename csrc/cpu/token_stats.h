// Log-probability, entropy and KL of rows of logits on the CPU, and their backward.
#pragma once

#include "rows.h"

namespace ppo_fast::cpu {

// The results of a row depend neither on the number of threads nor on the other rows.
void token_stats(const TokenStatsArguments& args, int threads);
void token_stats_backward(const TokenStatsBackwardArguments& args, int threads);

}  // namespace ppo_fast::cpu
