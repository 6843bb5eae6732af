// The backward pass over rows of logits. With upstream gradients g (logprob), gH (entropy), gK (KL), u = log softmax,
// p = exp(u) and w = u of the reference,
//
//     dlogits[j] = (g * [j = target] + p[j] * (a + b * u[j] + c * w[j])) / temperature
//     a = -g - gH * H - gK * KL        b = gK - gH        c = -gK
//
// which is 2^t * (constant + slope * t + ref_slope * w) in the numbers t and w of row_sums.h.
#pragma once

#include "row_sums.h"

namespace ppo_fast::cpu::PPO_FAST_ISA {
namespace {

// What turns the logits of each row of a group into log-probabilities: u = (x - max) / temperature - log_sum.
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

// The logits at the targets: of the policy and, where there is one, of the reference.
struct TargetLogits {
  int64_t column[kWidth];  // -1 where the target is not a word of the vocabulary
  Vec x = set(kNan), y = set(kNan);
};

template <class T, class Ref>
TargetLogits target_logits(const Rows& in, const Group& group) {
  TargetLogits out;
  for (int i = 0; i < group.size; ++i) {
    const int64_t target = out.column[i] = target_of(in, group.row[i]);
    if (target < 0) continue;
    out.x[i] = load(logits_row<T>(in, group.row[i]) + target, 1, 0.0f)[0];
    if constexpr (!is_absent<Ref>) out.y[i] = load(ref_row<Ref>(in, group.row[i]) + target, 1, 0.0f)[0];
  }
  return out;
}

// Upstream gradients of a group and the statistics that they multiply; those that a loss does not use are 0.
struct Upstream {
  Vec g{}, g_entropy{}, g_kl{};
  Vec entropy{}, kl{};

  Ints all_zero() const { return (g == 0.0f) & (g_entropy == 0.0f) & (g_kl == 0.0f); }
};

// The coefficients of each row of a group, and the gradient in its target's column.
struct GradientCoefficients {
  Vec constant, slope, ref_slope, at_target;
};

inline GradientCoefficients gradient_coefficients(const Upstream& up, const Normalizers& norm,
                                                  const TargetLogits& target, float temperature) {
  const float c = kLog2E / temperature;
  const auto kl_part = [&](Vec x) { return up.g_kl == 0.0f ? Vec{} : up.g_kl * x; };  // unused, x may be infinite
  const Vec a = -up.g - up.g_entropy * up.entropy - kl_part(up.kl);
  const Vec b = up.g_kl - up.g_entropy;
  const Vec scale = 1.0f / (norm.sum * temperature);
  GradientCoefficients out;
  out.constant = (a - b * norm.log_sum + kl_part(norm.ref_log_sum)) * scale;
  out.slope = b * kLn2 * scale;
  out.ref_slope = -up.g_kl * kLn2 * scale;

  const Vec t = max(set(kMinExponent), (target.x - norm.max) * c);
  const Vec p = exp2(t);
  const Vec w = (target.y - norm.ref_max) * c;
  const Vec inner = fma(out.slope, t, out.constant) - kl_part(w) * kLn2 * scale;
  const Vec rest = p == 0.0f ? Vec{} : p * inner;
  out.at_target = up.g / temperature + rest;
  return out;
}

struct RowGradient {
  float c, max, ref_max, constant, slope, ref_slope;
};

template <bool kSlope, bool kRef>
Vec gradient_of(Vec x, Vec y, const RowGradient& row) {
  const Vec t = max(set(kMinExponent), (x - row.max) * row.c);
  const Vec p = exp2(t);
  if constexpr (kRef) {
    const Vec w = (y - row.ref_max) * row.c;
    return p == 0.0f ? Vec{} : p * fma(set(row.ref_slope), w, fma(set(row.slope), t, set(row.constant)));
  } else if constexpr (kSlope) {
    return p * fma(set(row.slope), t, set(row.constant));
  } else {
    return p * row.constant;
  }
}

// Streamed stores bypass the cache, where a gradient larger than it would be read before it is written.
template <class T, class Ref, bool kSlope, bool kStream>
void gradient_row(const T* x, const Ref* y, T* out, int64_t vocab, const RowGradient& row) {
  constexpr bool kRef = !is_absent<Ref>;
  constexpr int64_t kBytes = kWidth * sizeof(T);
  const auto some = [&](int64_t i, int64_t n) {
    store(out + i, gradient_of<kSlope, kRef>(load(x + i, n, 0.0f), load_if(y, i, n, 0.0f), row), n);
  };
  int64_t i = 0;
  if constexpr (kStream) {
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kBytes);
    i = misaligned == 0 ? 0 : (kBytes - misaligned) / static_cast<int64_t>(sizeof(T));
    if (i > vocab) i = vocab;
    some(0, i);
  }
  for (; i + kWidth <= vocab; i += kWidth) {
    prefetch(x + i);
    if constexpr (kRef) prefetch(y + i);
    const Vec gradient = gradient_of<kSlope, kRef>(load(x + i), load_if(y, i), row);
    if constexpr (kStream) {
      stream(out + i, gradient);
    } else {
      store(out + i, gradient);
    }
  }
  if (i < vocab) some(i, vocab - i);
}

template <class T>
void zero_row(const LogitsView& out, const Rows& in, int64_t row) {
  std::memset(row_of<T>(out, row, in.steps), 0, static_cast<size_t>(in.vocab) * sizeof(T));
}

// Writes the rows of a group. One whose upstream gradients are all 0 is zeros and is not read.
template <class T, class Ref, bool kSlope>
void gradient_rows(const Rows& in, const Group& group, const Upstream& up, const Normalizers& norm,
                   const TargetLogits& target, const LogitsView& out) {
  const GradientCoefficients k = gradient_coefficients(up, norm, target, in.temperature);
  const Ints zero = up.all_zero();
  for (int i = 0; i < group.size; ++i) {
    if (zero[i]) {
      zero_row<T>(out, in, group.row[i]);
      continue;
    }
    const RowGradient row = {kLog2E / in.temperature, norm.max[i],  norm.ref_max[i],
                             k.constant[i],           k.slope[i],   k.ref_slope[i]};
    T* const to = row_of<T>(out, group.row[i], in.steps);
    const T* const x = logits_row<T>(in, group.row[i]);
    const Ref* const y = ref_row<Ref>(in, group.row[i]);
    if (out.streamed) {
      gradient_row<T, Ref, kSlope, true>(x, y, to, in.vocab, row);
    } else {
      gradient_row<T, Ref, kSlope, false>(x, y, to, in.vocab, row);
    }
    if (target.column[i] >= 0) store(to + target.column[i], set(k.at_target[i]), 1);
  }
}

}  // namespace
}  // namespace ppo_fast::cpu::PPO_FAST_ISA
