// Generalized advantage estimation as an associative scan.
//
// A step takes the state (advantage, value) of the step after it to its own. A run of steps is an affine map
// of the state, and two maps compose to a map, so a sequence is scanned from its end by any number of
// threads. Plain C++ on scalars: the CUDA kernel and its host tests compile this file.
#pragma once

#include <cstring>

#include "gae/recursion.h"

namespace ppo_fast::gae {

// A run of steps: advantage' = a * advantage + b * next_value + c;  next_value' = p * next_value + v.
// Where every step passes its state on, p is 1 and v is 0; else p is 0 and v the first value of the run. Only
// finite inputs are safe: an infinity times the 0 of a done is NaN.
template <class T>
struct Map {
  T a;
  T b;
  T c;
  T p;
  T v;
};

template <class T>
PPO_FAST_HOST_DEVICE Map<T> step_map(T reward, T value, bool done, bool pass, Discounts<T> discounts) {
  if (pass) return {T(1), T(0), T(0), T(1), T(0)};
  return {done ? T(0) : discounts.gamma_lam, done ? T(0) : discounts.gamma, reward - value, T(0), value};
}

template <class T>
PPO_FAST_HOST_DEVICE State<T> apply(const Map<T>& map, const State<T>& after) {
  return {map.a * after.advantage + (map.b * after.next_value + map.c), map.p * after.next_value + map.v};
}

// The map of `later` steps followed, towards the start, by `earlier` ones.
template <class T>
PPO_FAST_HOST_DEVICE Map<T> compose(const Map<T>& earlier, const Map<T>& later) {
  return {earlier.a * later.a, earlier.a * later.b + earlier.b * later.p,
          earlier.a * later.c + (earlier.b * later.v + earlier.c), earlier.p * later.p,
          earlier.p * later.v + earlier.v};
}

// Below, a group of threads scans a sequence from its end, a tile at a time. Thread i of the group holds
// kItems steps in a row; a warp combines its threads' maps by a shuffle scan, a block its warps' through
// shared memory.

constexpr int kItems = 8;
constexpr int kWarpSize = 32;
constexpr int kWarps = 4;  // of a block

template <class In>
struct Row {
  const In* data;  // step 0; null where the argument was not given
  int64_t stride;
};

template <class R, class V>
struct Sequence {
  int64_t length;
  int64_t begin;  // of step 0 in the results
  Row<R> rewards;
  Row<V> values;
  Row<uint8_t> mask;
  Row<uint8_t> dones;
};

template <class R, class V>
PPO_FAST_HOST_DEVICE Sequence<R, V> sequence_of(const GaeArguments& args, int64_t index) {
  const Span span = sequence_span(args, index);
  return {span.length,
          span.begin,
          {row_of<R>(args, args.rewards, index, span), args.rewards.stride_t},
          {row_of<V>(args, args.values, index, span), args.values.stride_t},
          {row_of<uint8_t>(args, args.mask, index, span), args.mask.stride_t},
          {row_of<uint8_t>(args, args.dones, index, span), args.dones.stride_t}};
}

// Tiles begin where the results are aligned to kItems, so the first one may reach back before the sequence.
struct Tiling {
  int before;  // steps between the first tile's begin and the sequence's
  int size;
  int64_t count;

  PPO_FAST_HOST_DEVICE Tiling(int64_t begin, int64_t length, int threads)
      : before(static_cast<int>(begin % kItems)), size(threads * kItems), count((before + length + size - 1) / size) {}

  // The first step of a thread's items; negative before the sequence.
  PPO_FAST_HOST_DEVICE int64_t first_step(int64_t tile, int thread) const {
    return tile * size + (thread * kItems - before);
  }
};

// The kItems steps of one thread, of which [low, high) lie in the sequence.
struct Window {
  int64_t first;
  int low;
  int high;

  PPO_FAST_HOST_DEVICE Window(int64_t first_step, int64_t length)
      : first(first_step),
        low(static_cast<int>(clamp_index(-first_step, 0, kItems))),
        high(static_cast<int>(clamp_index(length - first_step, 0, kItems))) {}

  PPO_FAST_HOST_DEVICE bool holds(int i) const { return i >= low && i < high; }
  PPO_FAST_HOST_DEVICE bool whole() const { return high - low == kItems; }
  PPO_FAST_HOST_DEVICE uint32_t flags() const { return (1u << high) - (1u << low); }
};

// kItems elements in a row, moved by one or two instructions where they are aligned.
template <class In>
struct alignas(sizeof(In) * kItems < 16 ? sizeof(In) * kItems : 16) Pack {
  In item[kItems];
};

template <class In>
PPO_FAST_HOST_DEVICE bool aligned(const In* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Pack<In>) == 0;
}

// The steps of a window; those outside of the sequence are In{}.
template <class In>
PPO_FAST_HOST_DEVICE Pack<In> load_pack(const Row<In>& row, const Window& window) {
  const In* data = row.data + window.first * row.stride;
  if (row.stride == 1 && window.whole() && aligned(data)) return *reinterpret_cast<const Pack<In>*>(data);
  Pack<In> pack;
  PPO_FAST_UNROLL
  for (int i = 0; i < kItems; ++i, data += row.stride) pack.item[i] = window.holds(i) ? *data : In{};
  return pack;
}

// nvcc 13.0 splits the first half of an assigned pack into words; the intrinsic moves 16 bytes at a time.
template <class T>
PPO_FAST_HOST_DEVICE void copy_pack(T* data, const Pack<T>& pack) {
#ifdef __CUDA_ARCH__
  PPO_FAST_UNROLL
  for (int i = 0; i < kItems; i += 4) {
    __stwb(reinterpret_cast<float4*>(data + i),
           make_float4(pack.item[i], pack.item[i + 1], pack.item[i + 2], pack.item[i + 3]));
  }
#else
  *reinterpret_cast<Pack<T>*>(data) = pack;
#endif
}

template <class T>
PPO_FAST_HOST_DEVICE void store_pack(T* row, const Pack<T>& pack, const Window& window) {
  T* data = row + window.first;
  if (window.whole() && aligned(data)) {
    copy_pack(data, pack);
    return;
  }
  PPO_FAST_UNROLL
  for (int i = 0; i < kItems; ++i) {
    if (window.holds(i)) data[i] = pack.item[i];
  }
}

// One thread's steps of a tile; bit i of a flag set is step i's.
template <class T>
struct Items {
  Pack<T> reward;
  Pack<T> value;
  uint32_t counted;
  uint32_t done;
  uint32_t pass;
};

// The lowest bit of every byte, byte i's at bit i.
PPO_FAST_HOST_DEVICE uint32_t gather_bits(const Pack<uint8_t>& bytes) {
  uint64_t word;
  memcpy(&word, &bytes, sizeof(word));
  return static_cast<uint32_t>(word * 0x0102040810204080u >> 56);
}

// A bool row's flags; where it was not given, all are clear, or all of the window's set.
PPO_FAST_HOST_DEVICE uint32_t load_flags(const Row<uint8_t>& row, const Window& window, bool absent) {
  if (row.data == nullptr) return absent ? window.flags() : 0;
  return gather_bits(load_pack(row, window));
}

template <class T, class R, class V>
PPO_FAST_HOST_DEVICE Items<T> load_items(const Sequence<R, V>& sequence, const Window& window, bool carry) {
  const Pack<R> rewards = load_pack(sequence.rewards, window);
  const Pack<V> values = load_pack(sequence.values, window);
  Items<T> items;
  items.counted = load_flags(sequence.mask, window, true);
  items.done = load_flags(sequence.dones, window, false);
  items.pass = ~(carry ? items.counted : window.flags());
  PPO_FAST_UNROLL
  for (int i = 0; i < kItems; ++i) {
    const bool counted = items.counted >> i & 1;
    items.reward.item[i] = counted ? static_cast<T>(rewards.item[i]) : T(0);
    items.value.item[i] = counted ? static_cast<T>(values.item[i]) : T(0);
  }
  return items;
}

// The map of all of a thread's steps.
template <class T>
PPO_FAST_HOST_DEVICE Map<T> summarize(const Items<T>& items, Discounts<T> discounts) {
  Map<T> map = {T(1), T(0), T(0), T(1), T(0)};
  PPO_FAST_UNROLL
  for (int i = kItems - 1; i >= 0; --i) {
    map = compose(
        step_map<T>(items.reward.item[i], items.value.item[i], items.done >> i & 1, items.pass >> i & 1, discounts),
        map);
  }
  return map;
}

// Runs the recursion over a thread's steps: rewards and values become advantages and returns.
template <class T>
PPO_FAST_HOST_DEVICE void advance_items(Items<T>& items, State<T> state, Discounts<T> discounts) {
  PPO_FAST_UNROLL
  for (int i = kItems - 1; i >= 0; --i) {
    const T value = items.value.item[i];
    const bool counted = items.counted >> i & 1;
    state =
        advance<T, bool, T>(state, items.reward.item[i], value, items.done >> i & 1, items.pass >> i & 1, discounts);
    items.reward.item[i] = counted ? state.advantage : T(0);
    items.value.item[i] = counted ? state.advantage + value : T(0);
  }
}

// One level of a warp's reverse inclusive scan; `other` is the map of the lane `distance` further on.
template <class T>
PPO_FAST_HOST_DEVICE Map<T> scan_level(const Map<T>& own, const Map<T>& other, int lane, int distance) {
  return lane + distance < kWarpSize ? compose(own, other) : own;
}

// The state that enters a warp, and the one that leaves the tile, given the maps of the tile's warps.
template <class T>
struct Passage {
  State<T> entering;
  State<T> leaving;
};

template <class T>
PPO_FAST_HOST_DEVICE Passage<T> pass_warps(const Map<T>* warps, int warp, State<T> carried) {
  Passage<T> passage = {carried, carried};
  PPO_FAST_UNROLL
  for (int k = kWarps - 1; k >= 0; --k) {
    if (k == warp) passage.entering = passage.leaving;
    passage.leaving = apply(warps[k], passage.leaving);
  }
  return passage;
}

}  // namespace ppo_fast::gae
