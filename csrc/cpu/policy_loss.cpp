#include "policy_loss.h"

#include <cmath>
#include <vector>

#include "chunks.h"
#include "dispatch.h"

namespace ppo_fast::cpu {
namespace {

PolicySums operator+(const PolicySums& a, const PolicySums& b) {
  return {a.loss + b.loss,
          a.policy_loss + b.policy_loss,
          a.entropy + b.entropy,
          a.kl + b.kl,
          a.approx_kl + b.approx_kl,
          a.clipped + b.clipped,
          a.dual_clipped + b.dual_clipped,
          a.ratio + b.ratio,
          std::max(a.ratio_max, b.ratio_max)};
}

void write_results(const PolicyLossArguments& args, const PolicySums& sums, int64_t tokens) {
  const double n = static_cast<double>(std::max<int64_t>(tokens, 1));
  const double ratio_max = std::isnan(sums.ratio) ? sums.ratio : sums.ratio_max;
  const double metrics[] = {sums.policy_loss,   sums.entropy / n, sums.kl / n,
                            sums.approx_kl / n, sums.clipped / n, sums.dual_clipped / n,
                            sums.ratio / n,     ratio_max,        static_cast<double>(tokens)};
  std::transform(std::begin(metrics), std::end(metrics), args.metrics, [](double x) { return static_cast<float>(x); });
  *args.loss = static_cast<float>(sums.loss);
}

}  // namespace

void policy_loss(PolicyLossArguments args, int threads) {
  const Kernels& kernel = kernels();
  const Rows& in = args.stats.in;
  const int64_t tokens = count_rows(in.mask, in.rows);
  args.weight = 1.0f / (args.denominator != nullptr ? *args.denominator : static_cast<float>(tokens));
  const Chunks chunks(in.rows, in.vocab);
  std::vector<PolicySums> sums(static_cast<size_t>(chunks.count));
  parallel_for(chunks.count, threads, [&](int64_t i) {
    sums[static_cast<size_t>(i)] = kernel.policy_loss(args, chunks.begin(i), chunks.end(i));
  });
  PolicySums total;
  for (const PolicySums& part : sums) total = total + part;
  write_results(args, total, tokens);
}

}  // namespace ppo_fast::cpu
