// The row kernels, compiled once for each instruction set with ISA_NAMESPACE naming it.
#include "cpu/rows/kernels.h"
#include "cpu/rows/policy.h"
#include "cpu/rows/sample.h"
#include "cpu/rows/value.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

template <class T>
struct Type {
  using type = T;
};

// body(Type<logits>, Type<reference logits>).
template <class Body>
auto with_types(const Rows& in, const Body& body) {
  const auto with_ref = [&](auto logits) {
    if (in.ref_logits.data == nullptr) return body(logits, Type<Absent>());
    return in.ref_logits.bfloat16 ? body(logits, Type<BFloat16>()) : body(logits, Type<float>());
  };
  return in.logits.bfloat16 ? with_ref(Type<BFloat16>()) : with_ref(Type<float>());
}

// Halved, since a difference of two float32 may overflow.
Vec logprobs_of(const Normalizers& norm, const TargetLogits& target, float temperature) {
  return (target.x * 0.5f - norm.max * 0.5f) / (temperature * 0.5f) - norm.log_sum;
}

TokenStatistics statistics(const Normalizers& norm, const RowSums& sums, Vec logprob, bool has_ref, float temperature) {
  const Vec entropy = norm.log_sum - sums.weighted / (norm.sum * temperature);
  const Vec kl = has_ref ? sums.cross / (norm.sum * temperature) - norm.log_sum + norm.ref_log_sum : Vec{};
  return {logprob, entropy, kl};
}

void store_statistics(const TokenStatsArguments& args, const Group& group, const TokenStatistics& token,
                      const LogSumExps& sums) {
  group.store(args.logprobs, token.logprob);
  group.store(args.entropy, token.entropy);
  group.store(args.kl, token.kl);
  for (int i = 0; i < group.size; ++i) {
    args.lse[group.row[i]] = sums.lse[i];
    if (args.ref_lse != nullptr) args.ref_lse[group.row[i]] = sums.ref_lse[i];
  }
}

template <class Float>
void zero(Float* per_row, int64_t row) {
  if (per_row != nullptr) per_row[row] = 0;
}

void zero_statistics(const TokenStatsArguments& args, int64_t row) {
  for (float* out : {args.logprobs, args.entropy, args.kl}) zero(out, row);
  for (double* out : {args.lse, args.ref_lse}) zero(out, row);
}

template <class T, class Ref, bool kEntropy>
void token_stats_rows(const TokenStatsArguments& args, int64_t first, int64_t last) {
  constexpr bool kRef = !is_absent<Ref>;
  const auto skip = [&](int64_t row) { zero_statistics(args, row); };
  for (Groups groups(args.in, first, last, skip); !groups.done(); groups.advance()) {
    const Group& group = groups.group();
    const RowSums sums = row_sums<T, Ref, kEntropy>(args.in, group);
    const Normalizers norm = normalizers(sums, kRef);
    Vec logprob{};
    if (args.logprobs != nullptr) {
      logprob = logprobs_of(norm, target_logits<T, Absent>(args.in, group), args.in.temperature);
    }
    const TokenStatistics token = statistics(norm, sums, logprob, kRef, args.in.temperature);
    store_statistics(args, group, token, log_sum_exps(norm, args.in.temperature));
  }
}

void token_stats(const TokenStatsArguments& args, int64_t first, int64_t last) {
  with_types(args.in, [&](auto logits, auto ref) {
    using T = typename decltype(logits)::type;
    using Ref = typename decltype(ref)::type;
    if constexpr (is_absent<Ref>) {
      if (args.entropy == nullptr) return token_stats_rows<T, Ref, false>(args, first, last);
    }
    return token_stats_rows<T, Ref, true>(args, first, last);
  });
}

LogSumExps saved_lse(const TokenStatsBackwardArguments& args, const Group& group, bool has_ref) {
  LogSumExps out;
  for (int i = 0; i < group.size; ++i) {
    out.lse[i] = args.lse[group.row[i]];
    if (has_ref) out.ref_lse[i] = args.ref_lse[group.row[i]];
  }
  return out;
}

template <class T, class Ref>
void token_stats_backward_rows(const TokenStatsBackwardArguments& args, int64_t first, int64_t last) {
  const auto skip = [&](int64_t row) { zero_row<T>(args.out, args.in, row); };
  for (Groups groups(args.in, first, last, skip); !groups.done(); groups.advance()) {
    const Group& group = groups.group();
    const RowGrads grads = {group.load(args.grad_logprobs), group.load(args.grad_entropy), group.load(args.grad_kl),
                            group.load(args.entropy), group.load(args.kl)};
    TargetLogits target;
    if (args.in.targets.data != nullptr) {
      target = target_logits<T, Ref>(args.in, group, grads.all_zero());
    }
    const LogSumExps lse = saved_lse(args, group, !is_absent<Ref>);
    const Normalizers norm = gradient_normalizers(lse, args.in.temperature);
    if (!is_absent<Ref> || args.grad_entropy != nullptr) {
      gradient_rows<T, Ref, true>(args.in, group, grads, norm, target, args.out);
    } else {
      gradient_rows<T, Ref, false>(args.in, group, grads, norm, target, args.out);
    }
  }
  end_stream();
}

void token_stats_backward(const TokenStatsBackwardArguments& args, int64_t first, int64_t last) {
  with_types(args.in, [&](auto logits, auto ref) {
    token_stats_backward_rows<typename decltype(logits)::type, typename decltype(ref)::type>(args, first, last);
  });
}

void store_gradients(const PolicyLossArguments& args, const Group& group, const TokenLoss& terms) {
  if (args.stats.kl != nullptr) group.store(args.stats.kl, terms.kl);
  group.store(args.grad_logprobs, terms.grads.grad_logprobs);
  group.store(args.grad_entropy, terms.grads.grad_entropy);
  group.store(args.grad_kl, terms.grads.grad_kl);
}

template <class T>
void skip_policy_row(const PolicyLossArguments& args, int64_t row) {
  zero_statistics(args.stats, row);
  for (float* out : {args.grad_logprobs, args.grad_entropy, args.grad_kl}) zero(out, row);
  if (args.gradient.data != nullptr) zero_row<T>(args.gradient, args.stats.in, row);
}

template <class T, class Ref>
void policy_gradient(const PolicyLossArguments& args, const Group& group, const TokenLoss& terms,
                     const Normalizers& norm, const TargetLogits& target) {
  const Rows& in = args.stats.in;
  if constexpr (!is_absent<Ref>) {
    if (args.kl_coef.has_value()) {
      return gradient_rows<T, Ref, true>(in, group, terms.grads, norm, target, args.gradient);
    }
  }
  if (args.ent_coef.has_value()) {
    gradient_rows<T, Absent, true>(in, group, terms.grads, norm, target, args.gradient);
  } else {
    gradient_rows<T, Absent, false>(in, group, terms.grads, norm, target, args.gradient);
  }
}

template <class T, class Ref>
PolicySums policy_loss_rows(const PolicyLossArguments& args, int64_t first, int64_t last) {
  constexpr bool kRef = !is_absent<Ref>;
  const Rows& in = args.stats.in;
  const auto skip = [&](int64_t row) { skip_policy_row<T>(args, row); };
  PolicyLaneSums total;
  for (Groups groups(in, first, last, skip); !groups.done(); groups.advance()) {
    const Group& group = groups.group();
    const RowSums sums = row_sums<T, Ref, true>(in, group);
    const Normalizers norm = normalizers(sums, kRef);
    const TargetLogits target = target_logits<T, Ref>(in, group);
    const TokenStatistics token =
        statistics(norm, sums, logprobs_of(norm, target, in.temperature), kRef, in.temperature);
    const TokenLoss terms = token_loss(args, group, token);
    total.add(terms, token, group.active());
    const LogSumExps lse = log_sum_exps(norm, in.temperature);
    store_statistics(args.stats, group, token, lse);
    store_gradients(args, group, terms);
    if (args.gradient.data != nullptr) {
      policy_gradient<T, Ref>(args, group, terms, gradient_normalizers(lse, in.temperature), target);
    }
  }
  end_stream();
  return total.total();
}

bool targets_fit(const Rows& in) {
  for (int64_t row = 0; row < in.rows; ++row) {
    if ((in.mask == nullptr || in.mask[row] != 0) && target_of(in, row) < 0) return false;
  }
  return true;
}

PolicySums policy_loss(const PolicyLossArguments& args, int64_t first, int64_t last) {
  return with_types(args.stats.in, [&](auto logits, auto ref) {
    return policy_loss_rows<typename decltype(logits)::type, typename decltype(ref)::type>(args, first, last);
  });
}

ValueSums value_loss(const ValueLossArguments& args, int64_t first, int64_t last) {
  return args.bfloat16 ? value_rows<BFloat16>(args, first, last) : value_rows<float>(args, first, last);
}

void sample_tokens(const SampleArguments& args, int64_t first, int64_t last, float* scratch) {
  const Exponential exponential(args.in.temperature);
  for (int64_t row = first; row < last; ++row) {
    if (args.in.logits.bfloat16) {
      sample_row<BFloat16>(args, row, exponential, scratch);
    } else {
      sample_row<float>(args, row, exponential, scratch);
    }
  }
}

void elementary(const char* f, const float* x, float* y, int64_t n) {
  const auto apply = [f](Vec v) {
    if (std::strcmp(f, "exp2") == 0) return exp2(max(set(kMinExponent), v), set(1.0f));
    if (std::strcmp(f, "exp") == 0) return exp(v);
    if (std::strcmp(f, "exp_excess") == 0) return exp_excess(v, exp(v));
    return log(v);
  };
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t lanes = n - i < kWidth ? n - i : kWidth;
    store(y + i, apply(load(x + i, lanes, 1.0f)), lanes);
  }
}

}  // namespace

const Kernels kernels = {token_stats, token_stats_backward, targets_fit, policy_loss,
                         value_loss,  sample_tokens,        elementary};

}  // namespace ppo_fast::cpu::ISA_NAMESPACE
