// One token drawn from each row of logits x. With T the temperature, p = exp((x - max x) / T) and e exponential
// noise, the token is argmax p / e over the words that the filters keep.
//
// A row is read once: its sums and the leader of the race are kept against the maximum so far. With a filter it is read
// three times more: for its sums, for a bound below which no word is kept, and for the words above the bound.
#pragma once

#include "cpu/rows/forward.h"
#include "cpu/simd/philox.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

constexpr int64_t kOnce = 4 * kWidth;  // words that one call of philox serves
static_assert(kBlock % kOnce == 0);

// Words of a row with the largest p / e so far, one per lane.
struct Race {
  Vec p{}, e = set(1.0f);
  Ints word{};

  void offer(Vec new_p, Vec new_e, Ints new_word) {
    const Ints wins = new_p * e > p * new_e;
    p = wins ? new_p : p;
    e = wins ? new_e : e;
    word = wins ? new_word : word;
  }

  // The largest p / e.
  float lead() const { return combine_lanes(p / e, Max()); }

  // The smallest word among those that lead.
  int64_t winner() const {
    const Vec ratio = p / e;
    const float best = lead();
    int64_t found = INT32_MAX;
    for (int i = 0; i < kWidth; ++i) {
      if (ratio[i] == best && word[i] < found) found = word[i];
    }
    return found;
  }
};

// kWidth words from i on, of n; those beyond have a logit of -inf.
template <class T>
Vec load_within(const T* x, int64_t i, int64_t n) {
  if (i + kWidth <= n) return load(x + i);
  return i < n ? load(x + i, n - i, -kInfinity) : set(-kInfinity);
}

// Adds up the n words from `begin` on; those of at least `low` take part in the race.
template <class T>
Vec race_block(const T* x, int64_t begin, int64_t n, float low, float shift, const Exponential& exponential,
               const Philox& philox, Race& race) {
  const Exponential local = exponential;  // in registers
  Race leaders = race;
  Vec sum{};
  for (int64_t i = 0; i < n; i += kOnce) {
    Vec noise[4];
    philox.exponentials(static_cast<uint32_t>((begin + i) / 4), noise);
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + j * kWidth;
      const Vec logit = load_within(x + begin, at, n);
      prefetch(x + begin + at, kAhead);
      const Vec p = local(local.bounded(logit - shift));
      sum += p;
      leaders.offer(logit >= low ? p : Vec{}, noise[j], lane_numbers() + static_cast<int32_t>(begin + at));
    }
  }
  race = leaders;
  return sum;
}

// Whether a word whose logit is at most `highest` could lead: the smallest noise is 2^-32. Twice that for rounding.
inline bool can_lead(float highest, float low, float shift, const Exponential& exponential, const Race& race) {
  const Vec p = exponential(exponential.bounded(set(highest - shift)));
  return highest >= low && !(p[0] * 0x1p33f < race.lead());
}

// The token of a row without NaN and +inf, and the row's sum against its maximum.
template <class T>
int64_t race_row(const T* x, int64_t vocab, float low, const Exponential& exponential, const Philox& philox,
                 RunningSums<false, false>& row) {
  Race race;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    const float highest = combine_lanes(lane_max(x + begin, n), Max());
    if (highest > row.max) {
      if (row.max != -kInfinity) race.p *= exponential(exponential.bounded(set(row.max - highest)));
      row.raise(highest, exponential);
    }
    const float shift = finite_shift(row.max);
    if (can_lead(highest, low, shift, exponential, race)) {
      row.sums.sum += race_block(x, begin, n, low, shift, exponential, philox, race);
    } else {
      row.fold(sums_of<T, Absent, false>(x + begin, nullptr, n, shift, 0.0f, exponential, kAhead));
    }
  }
  return race.winner();
}

struct Count {
  double operator()(const float*, int64_t n) const { return static_cast<double>(n); }
};

// The sum of p.
struct Mass {
  float max;
  const Exponential& exponential;

  double operator()(const float* x, int64_t n) const {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      const int64_t size = n - begin < kBlock ? n - begin : kBlock;
      const LaneSums sums = sums_of<float, Absent, false>(x + begin, nullptr, size, max, 0.0f, exponential, 0);
      total += lane_total(sums.sum);
    }
    return total;
  }
};

inline void swap(float& a, float& b) {
  const float kept = a;
  a = b;
  b = kept;
}

inline float median(float a, float b, float c) {
  if (a > b) swap(a, b);
  return c < a ? a : c > b ? b : c;
}

// The smallest of x for which measure(those larger) < limit, by partitions around a pivot; x is reordered. The largest
// qualifies: n >= 1, limit > 0.
template <class Measure>
float smallest_within(float* x, int64_t n, double limit, const Measure& measure) {
  double above = 0;
  for (;;) {
    const float pivot = median(x[0], x[n / 2], x[n - 1]);
    int64_t larger = 0, smaller = n;  // x[0, larger) > pivot, x[smaller, n) < pivot
    for (int64_t i = 0; i < smaller;) {
      if (x[i] > pivot) {
        swap(x[i++], x[larger++]);
      } else if (x[i] < pivot) {
        swap(x[i], x[--smaller]);
      } else {
        ++i;
      }
    }
    const double before = above + measure(x, larger);
    if (larger > 0 && before >= limit) {
      n = larger;
      continue;
    }
    above = before + measure(x + larger, smaller - larger);
    if (smaller == n || above >= limit) return pivot;
    x += smaller;
    n -= smaller;
  }
}

constexpr int64_t kStretch = 64;  // words of which the largest is one candidate for a bound

// A logit that at least k words reach: the k-th largest of the stretches' maxima. -inf of too few stretches.
template <class T>
float reached_by(const T* x, int64_t vocab, int64_t k, float* scratch) {
  const int64_t stretches = vocab / kStretch;
  if (stretches < k) return -kInfinity;
  for (int64_t i = 0; i < stretches; ++i) {
    scratch[i] = combine_lanes(lane_max(x + i * kStretch, kStretch), Max());
  }
  return smallest_within(scratch, stretches, static_cast<double>(k), Count());
}

// Copies the words of at least `bound` and returns their number.
template <class T>
int64_t gather(const T* x, int64_t vocab, float bound, float* to) {
  int64_t count = 0;
  for (int64_t i = 0; i < vocab; i += kWidth) {
    const Vec logits = load_within(x, i, vocab);
    if (bound > -kInfinity && !(combine_lanes(logits, Max()) >= bound)) continue;
    for (int lane = 0; lane < kWidth && i + lane < vocab; ++lane) {
      if (logits[lane] >= bound) to[count++] = logits[lane];
    }
  }
  return count;
}

// The smallest logit that the filters keep, of a row with this maximum and this sum of p. Words below
// (1 - top_p) * sum / V have less than 1 - top_p together, so each is behind at least top_p; half of it for rounding.
template <class T>
float smallest_kept(const SampleArguments& args, const T* x, float max, double sum, const Exponential& exponential,
                    float* scratch) {
  const int64_t vocab = args.in.vocab, k = args.top_k;
  float bound = -kInfinity;
  if (k > 0) {
    bound = reached_by(x, vocab, k, scratch);
  } else {
    const float p = static_cast<float>(0.5 * (1 - args.top_p) * sum / static_cast<double>(vocab));
    if (p > 0x1p-120f) bound = max + args.in.temperature * log(set(p))[0];
  }
  int64_t n = gather(x, vocab, bound, scratch);
  float low = -kInfinity;
  if (k > 0) {
    low = smallest_within(scratch, n, static_cast<double>(k), Count());
    if (args.top_p == 0) return low;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (scratch[i] >= low) scratch[kept++] = scratch[i];
    }
    n = kept;
  }
  const Mass mass{max, exponential};
  return smallest_within(scratch, n, args.top_p * (k > 0 ? mass(scratch, n) : sum), mass);
}

template <class T>
void sample_row(const SampleArguments& args, int64_t row, const Exponential& exponential, float* scratch) {
  const Rows& in = args.in;
  const T* x = logits_row<T>(in, row);
  args.tokens[row] = 0;
  args.logprobs[row] = kNan;
  float low = -kInfinity;
  if (scratch != nullptr) {
    const auto sums = wide_row<T, Absent, false>(x, nullptr, in.vocab, exponential);
    const double sum = lane_total(sums.sums.sum);
    if (!(sum > 0)) return;
    low = smallest_kept(args, x, sums.max, sum, exponential, scratch);
  }
  RunningSums<false, false> sums;
  const int64_t token = race_row(x, in.vocab, low, exponential, Philox(args.keys + 3 * row), sums);
  const double sum = lane_total(sums.sums.sum);
  if (!(sum > 0)) return;
  const float log_sum = log(set(static_cast<float>(sum)))[0];
  args.tokens[row] = token;
  args.logprobs[row] = (load(x + token, 1, 0.0f)[0] - sums.max) / in.temperature - log_sum;
}

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
