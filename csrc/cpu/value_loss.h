// The clipped squared error of values on the CPU, with its gradient, in one pass.
#pragma once

#include "rows.h"

namespace ppo_fast::cpu {

void value_loss(ValueLossArguments args, int threads);

}  // namespace ppo_fast::cpu
