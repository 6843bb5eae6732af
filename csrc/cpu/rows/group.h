// Up to kWidth counted rows that are worked on together: row i in lane i of every per-row quantity.
#pragma once

#include "cpu/simd/vec.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

// The type of reference logits that are not there.
struct Absent {};
template <class T>
constexpr bool is_absent = false;
template <>
constexpr bool is_absent<Absent> = true;

template <class T>
Vec load_if(const T* from, int64_t i) {
  if constexpr (is_absent<T>) {
    return Vec{};
  } else {
    return load(from + i);
  }
}

template <class T>
Vec load_if(const T* from, int64_t i, int64_t n, float fill) {
  if constexpr (is_absent<T>) {
    return Vec{};
  } else {
    return load(from + i, n, fill);
  }
}

template <class T>
T* row_of(const LogitsView& view, int64_t row, int64_t steps) {
  T* const data = static_cast<T*>(view.data);
  if (view.stride_b == steps * view.stride_t) return data + row * view.stride_t;  // a division takes 20 cycles
  return data + row / steps * view.stride_b + row % steps * view.stride_t;
}

template <class T>
const T* logits_row(const Rows& in, int64_t row) {
  return row_of<const T>(in.logits, row, in.steps);
}

template <class Ref>
const Ref* ref_row(const Rows& in, int64_t row) {
  if constexpr (is_absent<Ref>) {
    return nullptr;
  } else {
    return row_of<const Ref>(in.ref_logits, row, in.steps);
  }
}

// The target of a row, or -1 where it is not a word of the vocabulary.
inline int64_t target_of(const Rows& in, int64_t row) {
  const TargetsView& view = in.targets;
  const int64_t at = view.stride_b == in.steps * view.stride_t
                         ? row * view.stride_t
                         : row / in.steps * view.stride_b + row % in.steps * view.stride_t;
  const int64_t target =
      view.is_int64 ? static_cast<const int64_t*>(view.data)[at] : static_cast<const int32_t*>(view.data)[at];
  return target >= 0 && target < in.vocab ? target : -1;
}

struct Group {
  int size = 0;
  bool adjacent = false;  // the rows are kWidth consecutive ones
  int64_t row[kWidth] = {};
  int64_t step[kWidth] = {};  // rows from here to the one that the next group has in this lane, to be prefetched

  // One number per row, 0 in lanes without one; `absent` from an array that is not there.
  Vec load(const float* per_row, float absent = 0.0f) const {
    if (per_row == nullptr) return set(absent);
    if (adjacent) return ISA_NAMESPACE::load(per_row + row[0]);
    float lanes[kWidth] = {};
    for (int i = 0; i < size; ++i) lanes[i] = per_row[row[i]];
    return ISA_NAMESPACE::load(lanes);
  }

  void store(float* per_row, Vec x) const {
    if (per_row == nullptr) return;
    if (adjacent) return ISA_NAMESPACE::store(per_row + row[0], x);
    float lanes[kWidth];
    ISA_NAMESPACE::store(lanes, x);
    for (int i = 0; i < size; ++i) per_row[row[i]] = lanes[i];
  }

  Ints active() const { return lane_numbers() < size; }
};

// So many rows that the row kernels find them in the cache a second time. Which rows share a group changes no result.
inline int group_capacity(int64_t vocab) {
  constexpr int64_t kCachedWords = 32768;
  const int64_t rows = kCachedWords / vocab;
  return rows < 1 ? 1 : rows < kWidth ? static_cast<int>(rows) : kWidth;
}

// Walks the counted rows of [next, last) group by group. Calls skip(row) for each uncounted one.
template <class Skip>
class Groups {
 public:
  Groups(const Rows& in, int64_t first, int64_t last, const Skip& skip)
      : in_(in), next_(first), last_(last), skip_(skip), following_(take()) {
    advance();
  }

  bool done() const { return group_.size == 0; }
  const Group& group() const { return group_; }

  void advance() {
    group_ = following_;
    following_ = take();
    const int64_t fallback = group_.size;
    for (int i = 0; i < group_.size; ++i) {
      group_.step[i] = i < following_.size ? following_.row[i] - group_.row[i] : fallback;
    }
  }

 private:
  Group take() {
    const int capacity = group_capacity(in_.vocab);
    Group group;
    for (; next_ < last_ && group.size < capacity; ++next_) {
      if (in_.mask != nullptr && in_.mask[next_] == 0) {
        skip_(next_);
      } else {
        group.row[group.size++] = next_;
      }
    }
    group.adjacent = group.size == kWidth && group.row[kWidth - 1] - group.row[0] == kWidth - 1;
    return group;
  }

  const Rows& in_;
  int64_t next_, last_;
  const Skip& skip_;
  Group group_, following_;
};

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
