// The clipped squared error of values, and its gradient.
#pragma once

#include "cpu/simd/vec.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

// n <= kWidth tokens; lanes beyond them, and uncounted tokens, are all zeros.
struct ValueLanes {
  Ints counted;
  Vec value{}, target{}, old{}, weight{};
};

template <class T>
ValueLanes value_lanes(const ValueLossArguments& args, int64_t at, int64_t n) {
  Bytes mask{};
  if (args.mask != nullptr) {
    std::memcpy(&mask, args.mask + at, static_cast<size_t>(n));
  } else {
    std::memset(&mask, 1, static_cast<size_t>(n));
  }
  ValueLanes out;
  out.counted = __builtin_convertvector(mask, Ints) != 0;
  const auto read = [&](const auto* from) { return out.counted ? load(from + at, n, 0.0f) : Vec{}; };
  out.value = read(static_cast<const T*>(args.values));
  out.target = read(args.returns);
  if (args.old_values != nullptr) {
    out.old = read(args.old_values);
    out.value = out.old == out.old ? out.value : out.old;  // comparisons would drop a NaN
  }
  out.weight = args.token_weights != nullptr ? read(args.token_weights) : (out.counted ? set(args.weight) : Vec{});
  return out;
}

template <class T>
ValueSums value_rows(const ValueLossArguments& args, int64_t first, int64_t last) {
  Vec loss{}, clipped_count{};
  for (int64_t at = first; at < last; at += kWidth) {
    const int64_t n = last - at < kWidth ? last - at : kWidth;
    const ValueLanes lanes = value_lanes<T>(args, at, n);
    const Vec error = lanes.value - lanes.target;
    Vec square = error * error, slope = error;
    if (args.old_values != nullptr) {
      // Inside the clip this is the value itself; old + clip(value - old) would differ by a rounding, and count.
      const Vec held = min(lanes.old + args.clip, max(lanes.old - args.clip, lanes.value));
      const Vec held_error = held - lanes.target;
      const Ints clipped = held_error * held_error > square;
      square = clipped ? held_error * held_error : square;
      slope = clipped ? Vec{} : error;
      clipped_count += clipped ? set(1.0f) : Vec{};
    }
    loss += lanes.weight * square * 0.5f;
    store(args.grad_values + at, lanes.weight * slope, n);
  }
  return {lane_total(loss), lane_total(clipped_count)};
}

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
