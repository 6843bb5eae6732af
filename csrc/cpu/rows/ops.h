// The ops on rows of logits, and the value loss, on the CPU: rows divided among threads, sums added in a fixed order.
#pragma once

#include "cpu/rows/arguments.h"

namespace ppo_fast::cpu {

// Log-probability, entropy and KL, and their backward. The results of a row depend neither on the number of threads nor
// on the other rows.
void token_stats(const TokenStatsArguments& args, int threads);
void token_stats_backward(const TokenStatsBackwardArguments& args, int threads);

// Whether the target of every counted row is a word of the vocabulary.
bool targets_fit(const Rows& in);

// The policy loss with each token's own ratio: statistics, loss and gradient while a row is in the cache.
void policy_loss(PolicyLossArguments args, int threads);

// A token drawn from each row and its log-probability.
void sample_tokens(const SampleArguments& args, int threads);

// The clipped squared error of values, with its gradient, in one pass.
void value_loss(ValueLossArguments args, int threads);

}  // namespace ppo_fast::cpu
