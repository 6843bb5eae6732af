// The policy loss on the CPU, with each token's own ratio: statistics, loss and gradient while a row is in the cache.
#pragma once

#include "rows.h"

namespace ppo_fast::cpu {

void policy_loss(PolicyLossArguments args, int threads);

}  // namespace ppo_fast::cpu
