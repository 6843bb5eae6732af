// The backward pass over rows of logits. With the gradients g (logprob), gH (entropy), gK (KL) of the loss, u = log
// softmax, p = exp(u) and w = u of the reference,
//
//     dlogits[j] = (g * [j = target] + p[j] * (a + b * u[j] + c * w[j])) / temperature
//     a = -g - gH * H - gK * KL        b = gK - gH        c = -gK
//
// which is exp(d / T) * (constant + slope * d + ref_slope * e) in the numbers d and e of forward.h.
#pragma once

#include "cpu/rows/forward.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

// Turns the logits of each row of a group into log-probabilities: u = (x - max) / temperature - log_sum.
struct Normalizers {
  Vec max{}, sum{}, log_sum{};
  Vec ref_max{}, ref_log_sum{};
};

// A row that is entirely -inf has no distribution: its statistics are NaN.
inline Normalizers normalizers(const RowSums& sums, bool has_ref) {
  Normalizers out;
  out.max = sums.max;
  out.sum = sums.max == -kInfinity ? set(kNan) : sums.sum;
  out.log_sum = log(out.sum);
  if (has_ref) {
    out.ref_max = sums.ref_max;
    out.ref_log_sum = log(sums.ref_max == -kInfinity ? set(kNan) : sums.ref_sum);
  }
  return out;
}

// log sum exp of each row of a group: all that a backward needs of the forward. In float64, since its error is
// the relative error of every probability made from it.
struct LogSumExps {
  double lse[kWidth] = {}, ref_lse[kWidth] = {};
};

inline double log_sum_exp(float max, float log_sum, double t) {
  const double top = max;
  return max == -kInfinity ? top : top / t + static_cast<double>(log_sum);  // log_sum is NaN there
}

inline LogSumExps log_sum_exps(const Normalizers& norm, float temperature) {
  LogSumExps out;
  for (int i = 0; i < kWidth; ++i) {
    out.lse[i] = log_sum_exp(norm.max[i], norm.log_sum[i], temperature);
    out.ref_lse[i] = log_sum_exp(norm.ref_max[i], norm.ref_log_sum[i], temperature);
  }
  return out;
}

// The float32 nearest to temperature * lse in place of the maximum, and the rest in place of the sum. A gradient
// has these bits whether it is written in the forward pass or afterwards.
inline Normalizers gradient_normalizers(const LogSumExps& sums, float temperature) {
  const double t = temperature;
  Normalizers out;
  for (int i = 0; i < kWidth; ++i) {
    const double max = sums.lse[i] * t, ref_max = sums.ref_lse[i] * t;
    out.max[i] = static_cast<float>(max);
    out.log_sum[i] = static_cast<float>((max - static_cast<double>(out.max[i])) / t);
    out.ref_max[i] = static_cast<float>(ref_max);
    out.ref_log_sum[i] = static_cast<float>((ref_max - static_cast<double>(out.ref_max[i])) / t);
  }
  out.sum = exp(out.log_sum);
  return out;
}

// The logits at the targets: of the policy and, where there is one, of the reference.
struct TargetLogits {
  int64_t column[kWidth];  // -1 where there is no target, or none in the vocabulary
  Vec x = set(kNan), y = set(kNan);

  TargetLogits() {
    for (int64_t& none : column) none = -1;
  }
};

template <class T, class Ref>
TargetLogits target_logits(const Rows& in, const Group& group, Ints unread = Ints{}) {
  TargetLogits out;
  for (int i = 0; i < group.size; ++i) {
    if (unread[i]) continue;
    const int64_t target = out.column[i] = target_of(in, group.row[i]);
    if (target < 0) continue;
    out.x[i] = load(logits_row<T>(in, group.row[i]) + target, 1, 0.0f)[0];
    if constexpr (!is_absent<Ref>) out.y[i] = load(ref_row<Ref>(in, group.row[i]) + target, 1, 0.0f)[0];
  }
  return out;
}

// The gradients of the loss in the statistics of a group, 0 where the loss does not use one, and two of the statistics.
struct RowGrads {
  Vec grad_logprobs{}, grad_entropy{}, grad_kl{};
  Vec entropy{}, kl{};

  Ints all_zero() const { return (grad_logprobs == 0.0f) & (grad_entropy == 0.0f) & (grad_kl == 0.0f); }
};

// The coefficients of each row of a group, and the gradient in its target's column.
struct GradientCoefficients {
  Vec constant, slope, ref_slope, at_target;
};

inline GradientCoefficients gradient_coefficients(const RowGrads& grads, const Normalizers& norm,
                                                  const TargetLogits& target, float temperature) {
  const auto kl_part = [&](Vec x) {
    return grads.grad_kl == 0.0f ? Vec{} : grads.grad_kl * x;
  };  // unused, x may be infinite
  const Vec a = -grads.grad_logprobs - grads.grad_entropy * grads.entropy - kl_part(grads.kl);
  const Vec b = grads.grad_kl - grads.grad_entropy;
  const Vec scale = 1.0f / (norm.sum * temperature);
  GradientCoefficients out;
  out.constant = (a - b * norm.log_sum + kl_part(norm.ref_log_sum)) * scale;
  out.slope = b / temperature * scale;
  out.ref_slope = -grads.grad_kl / temperature * scale;

  const Exponential exponential(temperature);
  const Vec d = exponential.bounded(target.x - norm.max);
  const Vec p = exponential(d);
  const Vec inner = fma(out.slope, d, out.constant) - kl_part(target.y - norm.ref_max) / temperature * scale;
  out.at_target = grads.grad_logprobs * (1.0f / temperature) + (p == 0.0f ? Vec{} : p * inner);
  return out;
}

struct RowGradient {
  Exponential exponential;
  float max, ref_max, constant, slope, ref_slope;
  int64_t target;  // -1: none
  float at_target;
};

template <bool kSlope, bool kRef>
Vec gradient_of(Vec x, Vec y, const RowGradient& row) {
  const Vec d = row.exponential.bounded(x - row.max);
  const Vec p = row.exponential(d);
  if constexpr (kRef) {
    const Vec inner = fma(set(row.ref_slope), y - row.ref_max, fma(set(row.slope), d, set(row.constant)));
    return p == 0.0f ? Vec{} : p * inner;
  } else if constexpr (kSlope) {
    return p * fma(set(row.slope), d, set(row.constant));
  } else {
    return p * row.constant;
  }
}

// Streamed stores bypass the cache, where a gradient larger than it would be read before it is written. The
// target's column is set before its vector is stored: afterwards its line would have to be fetched back.
template <class T, class Ref, bool kSlope, bool kStream>
[[gnu::always_inline]] inline void gradient_row(const T* x, const Ref* y, T* out, int64_t vocab, const RowGradient& row,
                                                int64_t ahead) {
  constexpr bool kRef = !is_absent<Ref>;
  constexpr int64_t kBytes = kWidth * sizeof(T);
  int64_t i = 0;
  const auto with_target = [&](Vec gradient) {
    return lane_numbers() == static_cast<int32_t>(row.target - i) ? set(row.at_target) : gradient;
  };
  const auto part = [&](int64_t n) {
    const Vec gradient = gradient_of<kSlope, kRef>(load(x + i, n, 0.0f), load_if(y, i, n, 0.0f), row);
    store(out + i, with_target(gradient), n);
    i += n;
  };
  const auto put = [&](Vec gradient) {
    if constexpr (kStream) {
      stream(out + i, gradient);
    } else {
      store(out + i, gradient);
    }
    i += kWidth;
  };
  const auto gradient = [&] {
    prefetch(x + i, ahead);
    prefetch(y + i, ahead);
    return gradient_of<kSlope, kRef>(load(x + i), load_if(y, i), row);
  };
  if constexpr (kStream) {
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kBytes);
    const int64_t head = (kBytes - misaligned) / static_cast<int64_t>(sizeof(T));
    if (misaligned != 0) part(head < vocab ? head : vocab);
  }
  if (vocab <= kNarrow) {  // loops that end at a random target are mispredicted
    while (i + kWidth <= vocab) put(with_target(gradient()));
  } else {
    const int64_t split = row.target < i ? i : row.target - (row.target - i) % kWidth;
    while (i + kWidth <= split) put(gradient());
    if (i + kWidth <= vocab) put(with_target(gradient()));
    while (i + kWidth <= vocab) put(gradient());
  }
  if (i < vocab) part(vocab - i);
}

template <class T>
void zero_row(const LogitsView& out, const Rows& in, int64_t row) {
  std::memset(row_of<T>(out, row, in.steps), 0, static_cast<size_t>(in.vocab) * sizeof(T));
}

// Writes the rows of a group. A row whose gradients in the statistics are all 0 becomes zeros and is not read.
template <class T, class Ref, bool kSlope>
void gradient_rows(const Rows& in, const Group& group, const RowGrads& grads, const Normalizers& norm,
                   const TargetLogits& target, const LogitsView& out) {
  const GradientCoefficients k = gradient_coefficients(grads, norm, target, in.temperature);
  const Ints zero = grads.all_zero();
  const Exponential exponential(in.temperature);
  for (int i = 0; i < group.size; ++i) {
    if (zero[i]) {
      zero_row<T>(out, in, group.row[i]);
      continue;
    }
    const RowGradient row = {exponential, norm.max[i],    norm.ref_max[i],  k.constant[i],
                             k.slope[i],  k.ref_slope[i], target.column[i], k.at_target[i]};
    T* const to = row_of<T>(out, group.row[i], in.steps);
    const T* const x = logits_row<T>(in, group.row[i]);
    const Ref* const y = ref_row<Ref>(in, group.row[i]);
    const int64_t ahead = words_to_next(in, group, i);
    if (out.streamed) {
      gradient_row<T, Ref, kSlope, true>(x, y, to, in.vocab, row, ahead);
    } else {
      gradient_row<T, Ref, kSlope, false>(x, y, to, in.vocab, row, ahead);
    }
  }
}

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
