// The forward pass over rows of logits x, and of reference logits y where there are any. With T the
// temperature,
//
//     d = x - max x    p = exp(d / T)    sum = sum p    weighted = sum p * d
//     e = y - max y    q = exp(e / T)    ref_sum = sum q    cross = sum p * (d - e)
//
// A row is read once. Up to kNarrow words it is held in the L1 cache: its maximum is found first, and the
// lanes of kWidth rows are combined together. A longer row is streamed in blocks, whose sums are taken
// against the maximum so far; only a block that raises it costs a rescaling.
#pragma once

#include "cpu/rows/group.h"
#include "cpu/simd/math.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

constexpr int64_t kNarrow = 256;
constexpr int64_t kBlock = 512;  // folding sums once a block keeps their rounding error that of short sums
constexpr int64_t kAhead = 256;  // words between what is worked on and what is fetched: half a block was quickest

// Lane i is that of row i of a group.
struct RowSums {
  Vec max = set(-kInfinity), sum{}, weighted{};
  Vec ref_max = set(-kInfinity), ref_sum{}, cross{};
};

// Sums of one row, to be combined over lanes.
struct LaneSums {
  Vec sum{}, weighted{}, ref_sum{}, cross{};
};

// -inf - -inf is NaN; against 0 a row of -inf so far has sums of 0.
inline float finite_shift(float max) { return max == -kInfinity ? 0.0f : max; }

template <class T>
[[gnu::always_inline]] inline Vec lane_max(const T* x, int64_t n) {
  Vec max0 = set(-kInfinity), max1 = max0;
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    max0 = max(max0, load(x + i));
    max1 = max(max1, load(x + i + kWidth));
  }
  for (; i < n; i += kWidth) max0 = max(max0, n - i < kWidth ? load(x + i, n - i, -kInfinity) : load(x + i));
  return max(max0, max1);
}

// Fetches what is wanted `words` after x into the L2 cache.
template <class T>
void prefetch(const T* x, int64_t words) {
  if constexpr (!is_absent<T>) {
    const auto address = reinterpret_cast<uintptr_t>(x) + static_cast<uintptr_t>(words) * sizeof(T);
    __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2);
  }
}

// Words from a row to the one that the next group has in its lane.
inline int64_t words_to_next(const Rows& in, const Group& group, int i) { return group.step[i] * in.logits.stride_t; }

// exp(d / temperature) as a power of 2. The exponent is bounded below, where p is 0, so that p * d is 0 for d
// = -inf.
struct Exponential {
  Vec scale, lowest;

  explicit Exponential(float temperature)
      : scale(set(kLog2E / temperature)), lowest(set(kMinExponent * kLn2 * temperature)) {}

  Vec bounded(Vec d) const { return max(lowest, d); }
  Vec operator()(Vec bounded_d) const { return exp2(bounded_d, scale); }
};

// One vector's share of the sums. A word of probability 0 adds 0, whatever its logit and reference.
template <bool kEntropy, bool kRef>
void add(LaneSums& sums, Vec x, Vec y, float shift, float ref_shift, const Exponential& exponential) {
  const Vec d = exponential.bounded(x - shift);
  const Vec p = exponential(d);
  sums.sum += p;
  if constexpr (kEntropy) sums.weighted = fma(p, d, sums.weighted);
  if constexpr (kRef) {
    const Vec e = y - ref_shift;
    sums.ref_sum += exponential(exponential.bounded(e));
    sums.cross += p == 0.0f ? Vec{} : p * (d - e);
  }
}

template <class T, class Ref, bool kEntropy>
[[gnu::always_inline]] inline LaneSums sums_of(const T* x, const Ref* y, int64_t n, float shift, float ref_shift,
                                               const Exponential& exponential, int64_t ahead) {
  constexpr bool kRef = !is_absent<Ref>;
  const Exponential local = exponential;  // in registers
  LaneSums sums;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    prefetch(x + i, ahead);
    prefetch(y + i, ahead);
    add<kEntropy, kRef>(sums, load(x + i), load_if(y, i), shift, ref_shift, local);
  }
  if (i < n) {
    const Vec rest = load(x + i, n - i, -kInfinity);
    add<kEntropy, kRef>(sums, rest, load_if(y, i, n - i, -kInfinity), shift, ref_shift, local);
  }
  return sums;
}

// The sums of a row so far, against its maximum so far.
template <bool kEntropy, bool kRef>
struct RunningSums {
  float max = -kInfinity, ref_max = -kInfinity;
  LaneSums sums;

  // d falls by delta, so that p * d becomes exp(-delta / T) * p * (d - delta).
  void raise(float new_max, const Exponential& exponential) {
    if (max != -kInfinity) {
      const float delta = new_max - max;
      const Vec factor = exponential(exponential.bounded(set(-delta)));
      if constexpr (kEntropy) sums.weighted = factor * (sums.weighted - delta * sums.sum);
      if constexpr (kRef) sums.cross = factor * (sums.cross - delta * sums.sum);
      sums.sum *= factor;
    }
    max = new_max;
  }

  void raise_ref(float new_max, const Exponential& exponential) {
    if (ref_max != -kInfinity) {
      const float delta = new_max - ref_max;
      sums.cross += delta * sums.sum;
      sums.ref_sum *= exponential(exponential.bounded(set(-delta)));
    }
    ref_max = new_max;
  }

  void fold(const LaneSums& block) {
    sums.sum += block.sum;
    if constexpr (kEntropy) sums.weighted += block.weighted;
    if constexpr (kRef) sums.ref_sum += block.ref_sum;
    if constexpr (kRef) sums.cross += block.cross;
  }
};

template <class T, class Ref, bool kEntropy>
RunningSums<kEntropy, !is_absent<Ref>> wide_row(const T* x, const Ref* y, int64_t vocab,
                                                const Exponential& exponential) {
  RunningSums<kEntropy, !is_absent<Ref>> row;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    const Vec highest = lane_max(x + begin, n);
    if (any_greater(highest, set(row.max))) row.raise(combine_lanes(highest, Max()), exponential);
    if constexpr (!is_absent<Ref>) {
      const Vec ref_highest = lane_max(y + begin, n);
      if (any_greater(ref_highest, set(row.ref_max))) row.raise_ref(combine_lanes(ref_highest, Max()), exponential);
      row.fold(sums_of<T, Ref, kEntropy>(x + begin, y + begin, n, finite_shift(row.max), finite_shift(row.ref_max),
                                         exponential, kAhead));
    } else {
      row.fold(sums_of<T, Ref, kEntropy>(x + begin, y, n, finite_shift(row.max), 0.0f, exponential, kAhead));
    }
  }
  return row;
}

template <class T, class Ref, bool kEntropy>
RowSums wide_rows(const Rows& in, const Group& group, const Exponential& exponential) {
  RowSums out;
  for (int i = 0; i < group.size; ++i) {
    const auto row = wide_row<T, Ref, kEntropy>(logits_row<T>(in, group.row[i]), ref_row<Ref>(in, group.row[i]),
                                                in.vocab, exponential);
    out.max[i] = row.max;
    out.sum[i] = combine_lanes(row.sums.sum, Add());
    if constexpr (kEntropy) out.weighted[i] = combine_lanes(row.sums.weighted, Add());
    if constexpr (!is_absent<Ref>) {
      out.ref_max[i] = row.ref_max;
      out.ref_sum[i] = combine_lanes(row.sums.ref_sum, Add());
      out.cross[i] = combine_lanes(row.sums.cross, Add());
    }
  }
  return out;
}

template <class T, class Ref, bool kEntropy>
RowSums narrow_rows(const Rows& in, const Group& group, const Exponential& exponential) {
  constexpr bool kRef = !is_absent<Ref>;
  RowSums out;
  Vec a[kWidth] = {}, b[kWidth] = {}, d[kWidth] = {}, e[kWidth] = {};
  for (int i = 0; i < group.size; ++i) {
    a[i] = lane_max(logits_row<T>(in, group.row[i]), in.vocab);
    if constexpr (kRef) b[i] = lane_max(ref_row<Ref>(in, group.row[i]), in.vocab);
  }
  out.max = combine_rows(a, Max());
  if constexpr (kRef) out.ref_max = combine_rows(b, Max());
  for (int i = 0; i < group.size; ++i) {
    const LaneSums sums = sums_of<T, Ref, kEntropy>(logits_row<T>(in, group.row[i]), ref_row<Ref>(in, group.row[i]),
                                                    in.vocab, finite_shift(out.max[i]), finite_shift(out.ref_max[i]),
                                                    exponential, words_to_next(in, group, i));
    a[i] = sums.sum, b[i] = sums.weighted, d[i] = sums.ref_sum, e[i] = sums.cross;
  }
  out.sum = combine_rows(a, Add());
  if constexpr (kEntropy) out.weighted = combine_rows(b, Add());
  if constexpr (kRef) out.ref_sum = combine_rows(d, Add());
  if constexpr (kRef) out.cross = combine_rows(e, Add());
  return out;
}

template <class T, class Ref, bool kEntropy>
RowSums row_sums(const Rows& in, const Group& group) {
  const Exponential exponential(in.temperature);
  return in.vocab <= kNarrow ? narrow_rows<T, Ref, kEntropy>(in, group, exponential)
                             : wide_rows<T, Ref, kEntropy>(in, group, exponential);
}

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
