#include "token_stats.h"

#include "chunks.h"
#include "dispatch.h"

namespace ppo_fast::cpu {

void token_stats(const TokenStatsArguments& args, int threads) {
  const Kernels& kernel = kernels();
  const Chunks chunks(args.in.rows, args.in.vocab);
  parallel_for(chunks.count, threads, [&](int64_t i) { kernel.token_stats(args, chunks.begin(i), chunks.end(i)); });
}

void token_stats_backward(const TokenStatsBackwardArguments& args, int threads) {
  const Kernels& kernel = kernels();
  const Chunks chunks(args.in.rows, args.in.vocab);
  parallel_for(chunks.count, threads,
               [&](int64_t i) { kernel.token_stats_backward(args, chunks.begin(i), chunks.end(i)); });
}

}  // namespace ppo_fast::cpu
