#include "value_loss.h"

#include <vector>

#include "chunks.h"
#include "dispatch.h"

namespace ppo_fast::cpu {

void value_loss(ValueLossArguments args, int threads) {
  const Kernels& kernel = kernels();
  const int64_t tokens = count_rows(args.mask, args.rows);
  args.weight = 1.0f / (args.denominator != nullptr ? *args.denominator : static_cast<float>(tokens));
  const Chunks chunks(args.rows, 16);
  std::vector<ValueSums> sums(static_cast<size_t>(chunks.count));
  parallel_for(chunks.count, threads, [&](int64_t i) {
    sums[static_cast<size_t>(i)] = kernel.value_loss(args, chunks.begin(i), chunks.end(i));
  });
  ValueSums total;
  for (const ValueSums& part : sums) total = {total.loss + part.loss, total.clipped + part.clipped};
  args.metrics[0] = *args.loss = static_cast<float>(total.loss);
  args.metrics[1] = static_cast<float>(total.clipped / static_cast<double>(std::max<int64_t>(tokens, 1)));
  args.metrics[2] = static_cast<float>(tokens);
}

}  // namespace ppo_fast::cpu
