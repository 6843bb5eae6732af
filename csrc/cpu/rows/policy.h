// The policy loss of a group of tokens from their statistics, and its gradient with respect to them.
#pragma once

#include "cpu/rows/backward.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

constexpr float kMaxLogRatio = 20.0f;

struct TokenStatistics {
  Vec logprob, entropy, kl;
};

struct TokenLoss {
  Vec loss;         // weighted, all terms
  Vec policy_loss;  // weighted, the objective only
  Vec kl, approx_kl, ratio;
  Ints clipped, dual_clipped;
  RowGrads grads;
};

inline Vec clamp_log_ratio(Vec x) { return min(set(kMaxLogRatio), max(set(-kMaxLogRatio), x)); }

// `slope` where the clamp let x through; a NaN goes through, so that it reaches the gradient.
inline Vec inside_clamp(Vec x, Vec slope) { return (x < -kMaxLogRatio) | (x > kMaxLogRatio) ? Vec{} : slope; }

struct KlTerm {
  Vec value, slope;  // slope: the derivative in the logprob
};

// delta = logprob - ref_logprob. Source: Schulman 2020, "Approximating KL Divergence".
inline KlTerm kl_term(Vec delta, KlEstimator estimator) {
  if (estimator == KlEstimator::kK1) return {delta, set(1.0f)};
  if (estimator == KlEstimator::kK2) return {delta * delta * 0.5f, delta};
  const Vec clamped = clamp_log_ratio(-delta);
  const Vec excess = exp_excess(clamped, exp(clamped));
  return {excess, inside_clamp(delta, -(excess + clamped))};
}

struct Objective {
  Vec loss, d_log_ratio;  // -importance * objective, and its derivative
  Vec d_logprob;          // its derivative at a constant ratio
  Ints clipped, dual_clipped;
};

// min(r*A, clip(r)*A), and at least dual_clip*A where A < 0.
inline Objective clip_objective(const PolicyLossArguments& args, Vec ratio, Vec advantage, Vec importance) {
  const Vec unclipped = ratio * advantage;
  const Vec clipped = min(set(args.high), max(set(args.low), ratio)) * advantage;
  Objective out{};
  out.clipped = clipped < unclipped;
  Vec value = min(clipped, unclipped);
  const Vec bound = advantage < 0.0f ? args.dual_clip * advantage : set(-kInfinity);
  out.dual_clipped = bound > value;
  value = max(bound, value);
  out.loss = -importance * value;
  out.d_log_ratio = -importance * (out.clipped | out.dual_clipped ? Vec{} : unclipped);
  return out;
}

// clip(r)*A*logprob, where clip(r) is a constant. Where a factor is 0, so is the product: logprob may be -inf.
inline Objective cispo_objective(const PolicyLossArguments& args, Vec ratio, Vec advantage, Vec importance,
                                 Vec logprob) {
  Objective out{};
  out.clipped = (ratio < args.low) | (ratio > args.high);
  out.d_logprob = -importance * (min(set(args.high), max(set(args.low), ratio)) * advantage);
  out.loss = out.d_logprob == 0.0f ? Vec{} : out.d_logprob * logprob;
  return out;
}

// The loss of each token of a group, with the token's own ratio.
inline TokenLoss token_loss(const PolicyLossArguments& args, const Group& group, const TokenStatistics& token) {
  const Vec old = args.old_logprobs == nullptr ? token.logprob : group.load(args.old_logprobs);
  const Vec raw = token.logprob - old;
  const Vec log_ratio = clamp_log_ratio(raw);
  const Vec weight = group.load(args.token_weights, args.weight);
  const Vec importance = group.load(args.importance_weights, 1.0f);
  TokenLoss out;
  out.ratio = exp(log_ratio);
  out.approx_kl = exp_excess(log_ratio, out.ratio);
  const Vec advantage = group.load(args.advantages);
  const Objective objective = args.objective == PolicyObjective::kClip
                                  ? clip_objective(args, out.ratio, advantage, importance)
                                  : cispo_objective(args, out.ratio, advantage, importance, token.logprob);
  out.clipped = objective.clipped;
  out.dual_clipped = objective.dual_clipped;
  out.policy_loss = weight * objective.loss;

  Vec loss = objective.loss, d_log_ratio = objective.d_log_ratio;
  if (args.penalty_coef.has_value()) {
    loss += *args.penalty_coef * out.approx_kl;
    d_log_ratio += *args.penalty_coef * (out.approx_kl + log_ratio);
  }
  out.grads.grad_logprobs = weight * (inside_clamp(raw, d_log_ratio) + objective.d_logprob);
  out.grads.entropy = token.entropy;
  out.grads.kl = out.kl = token.kl;
  if (args.ref_logprobs != nullptr) {
    const KlTerm term = kl_term(token.logprob - group.load(args.ref_logprobs), args.kl_estimator);
    out.kl = term.value;
    if (args.kl_coef.has_value()) out.grads.grad_logprobs += weight * *args.kl_coef * term.slope;
  } else if (args.kl_coef.has_value()) {
    out.grads.grad_kl = weight * *args.kl_coef;
  }
  if (args.kl_coef.has_value()) loss += *args.kl_coef * out.kl;
  if (args.ent_coef.has_value()) {
    loss -= *args.ent_coef * token.entropy;
    out.grads.grad_entropy = -weight * *args.ent_coef;
  }
  out.loss = weight * loss;
  return out;
}

// Sums of a chunk's terms, lane by lane; few enough rows that float32 lanes lose nothing that matters.
struct PolicyLaneSums {
  Vec loss{}, policy_loss{}, entropy{}, kl{}, approx_kl{}, clipped{}, dual_clipped{}, ratio{}, ratio_max{};

  void add(const TokenLoss& terms, const TokenStatistics& token, Ints active) {
    const auto counted = [&](Vec x) { return active ? x : Vec{}; };
    loss += counted(terms.loss);
    policy_loss += counted(terms.policy_loss);
    entropy += counted(token.entropy);
    kl += counted(terms.kl);
    approx_kl += counted(terms.approx_kl);
    clipped += active & terms.clipped ? set(1.0f) : Vec{};
    dual_clipped += active & terms.dual_clipped ? set(1.0f) : Vec{};
    ratio += counted(terms.ratio);
    ratio_max = max(ratio_max, counted(terms.ratio));
  }

  PolicySums total() const {
    return {lane_total(loss),         lane_total(policy_loss), lane_total(entropy),
            lane_total(kl),           lane_total(approx_kl),   lane_total(clipped),
            lane_total(dual_clipped), lane_total(ratio),       combine_lanes(ratio_max, Max())};
  }
};

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
