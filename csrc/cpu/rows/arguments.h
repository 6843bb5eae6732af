// The arguments of the row kernels: ops on rows of logits, one row per token. Masked rows are not read.
//
// inputs(visit) and results(visit) call visit(name, member) for the fields of the NamedTuples of Python: the bindings
// are made of them.
#pragma once

#include <cstdint>
#include <optional>

namespace ppo_fast::cpu {

struct BFloat16 {
  uint16_t bits;
};

// [B, T, V] in place, unit stride over V, strides in elements. data is null where the argument was not given.
struct LogitsView {
  void* data;
  int64_t stride_b;
  int64_t stride_t;
  bool bfloat16;  // otherwise float32
  bool streamed;  // of a result: its stores bypass the cache
};

struct TargetsView {
  const void* data;
  int64_t stride_b;
  int64_t stride_t;
  bool is_int64;  // otherwise int32
};

// Per-row arrays are contiguous [B, T], float32 except lse; a result that is not asked for is null.
struct Rows {
  LogitsView logits;
  LogitsView ref_logits;
  TargetsView targets;
  const uint8_t* mask;  // 1 = the row counts, null for all
  int64_t rows;         // B * T
  int64_t steps;        // T
  int64_t vocab;        // V
  float temperature;

  template <class Visit>
  static void inputs(Visit visit) {
    visit("ref_logits", &Rows::ref_logits);
    visit("targets", &Rows::targets);
    visit("mask", &Rows::mask);
  }
};

struct TokenStatsArguments {
  Rows in;
  float* logprobs;
  float* entropy;
  float* kl;
  double* lse;
  double* ref_lse;

  template <class Visit>
  static void results(Visit visit) {
    using Self = TokenStatsArguments;
    visit("logprobs", &Self::logprobs);
    visit("entropy", &Self::entropy);
    visit("kl", &Self::kl);
    visit("lse", &Self::lse);
    visit("ref_lse", &Self::ref_lse);
  }
};

struct TokenStatsBackwardArguments {
  Rows in;
  const float* grad_logprobs;  // of the loss in the statistics; null leaves a term out
  const float* grad_entropy;
  const float* grad_kl;
  const double* lse;
  const double* ref_lse;
  const float* entropy;
  const float* kl;
  LogitsView out;  // in the dtype of the logits; may be the logits

  template <class Visit>
  static void grads(Visit visit) {
    using Self = TokenStatsBackwardArguments;
    visit("grad_logprobs", &Self::grad_logprobs);
    visit("grad_entropy", &Self::grad_entropy);
    visit("grad_kl", &Self::grad_kl);
  }

  template <class Visit>
  static void stats(Visit visit) {
    using Self = TokenStatsBackwardArguments;
    visit("lse", &Self::lse);
    visit("ref_lse", &Self::ref_lse);
    visit("entropy", &Self::entropy);
    visit("kl", &Self::kl);
  }
};

enum class PolicyObjective : int { kClip, kCispo };
enum class KlEstimator : int { kK1, kK2, kK3, kFull };

struct PolicyLossArguments {
  TokenStatsArguments stats;
  const float* old_logprobs;  // null: the logprobs themselves
  const float* advantages;
  const float* ref_logprobs;
  const float* importance_weights;
  const float* token_weights;  // null: `weight` for each counted token
  float weight;                // made of the denominator, else of the number of counted tokens
  std::optional<float> denominator;
  std::optional<float> penalty_coef;  // nothing leaves the term out
  std::optional<float> ent_coef;
  std::optional<float> kl_coef;
  double clip_low;
  double clip_high;
  float low;  // the ratio is clipped to [low, high] = [1 - clip_low, 1 + clip_high]
  float high;
  float dual_clip;  // infinite: none
  PolicyObjective objective;
  KlEstimator kl_estimator;
  float* grad_logprobs;  // of the loss in the statistics
  float* grad_entropy;
  float* grad_kl;
  LogitsView gradient;  // of the logits, for a loss gradient of 1; data null: not wanted
  float* loss;          // results: one number
  float* metrics;       // [9]: those of PolicySums from policy_loss on, as means, and the count

  template <class Visit>
  static void inputs(Visit visit) {
    using Self = PolicyLossArguments;
    visit("old_logprobs", &Self::old_logprobs);
    visit("advantages", &Self::advantages);
    visit("ref_logprobs", &Self::ref_logprobs);
    visit("importance_weights", &Self::importance_weights);
    visit("denominator", &Self::denominator);
    visit("penalty_coef", &Self::penalty_coef);
    visit("ent_coef", &Self::ent_coef);
    visit("kl_coef", &Self::kl_coef);
    visit("clip_low", &Self::clip_low);
    visit("clip_high", &Self::clip_high);
    visit("dual_clip", &Self::dual_clip);
    visit("objective", &Self::objective);
    visit("kl_estimator", &Self::kl_estimator);
  }

  template <class Visit>
  static void results(Visit visit) {
    using Self = PolicyLossArguments;
    visit("grad_logprobs", &Self::grad_logprobs);
    visit("grad_entropy", &Self::grad_entropy);
    visit("grad_kl", &Self::grad_kl);
    visit("loss", &Self::loss);
    visit("metrics", &Self::metrics);
  }
};

// Sums over counted tokens, in float64.
struct PolicySums {
  double loss = 0;
  double policy_loss = 0;
  double entropy = 0;
  double kl = 0;
  double approx_kl = 0;
  double clipped = 0;
  double dual_clipped = 0;
  double ratio = 0;
  double ratio_max = 0;
};

struct ValueLossArguments {
  const void* values;  // contiguous, like every array here
  bool bfloat16;       // the values; everything else is float32
  const float* returns;
  const uint8_t* mask;
  const float* old_values;  // null: no clipping
  float clip;
  const float* token_weights;  // as in PolicyLossArguments
  float weight;
  std::optional<float> denominator;
  int64_t rows;
  float* grad_values;  // results
  float* loss;
  float* metrics;  // [3]: value loss, share of clipped tokens, count

  template <class Visit>
  static void inputs(Visit visit) {
    using Self = ValueLossArguments;
    visit("values", &Self::values);
    visit("returns", &Self::returns);
    visit("mask", &Self::mask);
    visit("old_values", &Self::old_values);
    visit("denominator", &Self::denominator);
    visit("clip", &Self::clip);
  }

  template <class Visit>
  static void results(Visit visit) {
    using Self = ValueLossArguments;
    visit("grad_values", &Self::grad_values);
    visit("loss", &Self::loss);
    visit("metrics", &Self::metrics);
  }
};

struct SampleArguments {
  Rows in;              // no reference, targets or mask
  const int64_t* keys;  // [B, T, 3]: seed, row of the global batch, step
  int64_t top_k;        // 0: no filter
  double top_p;         // 0: no filter
  int64_t* tokens;      // results
  float* logprobs;

  template <class Visit>
  static void inputs(Visit visit) {
    using Self = SampleArguments;
    visit("keys", &Self::keys);
    visit("top_k", &Self::top_k);
    visit("top_p", &Self::top_p);
  }

  template <class Visit>
  static void results(Visit visit) {
    using Self = SampleArguments;
    visit("tokens", &Self::tokens);
    visit("logprobs", &Self::logprobs);
  }
};

struct ValueSums {
  double loss = 0;
  double clipped = 0;
};

}  // namespace ppo_fast::cpu
