#include "cpu/rows/ops.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/rows/dispatch.h"

namespace ppo_fast::cpu {
namespace {

// Rows divided among threads. The division depends only on the shape, so that sums over chunks do not depend on the
// number of threads.
struct Chunks {
  static constexpr int64_t kWords = 1 << 16;  // fewer do not repay waking another thread

  int64_t rows;
  int64_t each;
  int64_t count;

  Chunks(int64_t rows, int64_t row_words)
      : rows(rows), each(std::max<int64_t>(1, kWords / row_words)), count((rows + each - 1) / each) {}

  int64_t begin(int64_t i) const { return i * each; }
  int64_t end(int64_t i) const { return std::min(rows, begin(i) + each); }
};

// Counts the rows that the mask keeps.
int64_t count_rows(const uint8_t* mask, int64_t rows) {
  if (mask == nullptr) return rows;
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += mask[i] != 0;
  return count;
}

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

bool targets_fit(const Rows& in) { return kernels().targets_fit(in); }

void policy_loss(PolicyLossArguments args, int threads) {
  const Kernels& kernel = kernels();
  const Rows& in = args.stats.in;
  const int64_t tokens = count_rows(in.mask, in.rows);
  args.weight = 1.0f / args.denominator.value_or(static_cast<float>(tokens));
  args.low = static_cast<float>(1.0 - args.clip_low);
  args.high = static_cast<float>(1.0 + args.clip_high);
  const Chunks chunks(in.rows, in.vocab);
  std::vector<PolicySums> sums(static_cast<size_t>(chunks.count));
  parallel_for(chunks.count, threads, [&](int64_t i) {
    sums[static_cast<size_t>(i)] = kernel.policy_loss(args, chunks.begin(i), chunks.end(i));
  });
  PolicySums total;
  for (const PolicySums& part : sums) total = total + part;
  write_results(args, total, tokens);
}

void sample_tokens(const SampleArguments& args, int threads) {
  const Kernels& kernel = kernels();
  const bool filters = args.top_k > 0 || args.top_p > 0;
  const Chunks chunks(args.in.rows, args.in.vocab);
  parallel_for(chunks.count, threads, [&](int64_t i) {
    std::vector<float> scratch(static_cast<size_t>(filters ? args.in.vocab : 0));
    kernel.sample_tokens(args, chunks.begin(i), chunks.end(i), filters ? scratch.data() : nullptr);
  });
}

void value_loss(ValueLossArguments args, int threads) {
  const Kernels& kernel = kernels();
  const int64_t tokens = count_rows(args.mask, args.rows);
  args.weight = 1.0f / args.denominator.value_or(static_cast<float>(tokens));
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
