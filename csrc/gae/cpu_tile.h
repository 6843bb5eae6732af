// A tile: kSteps time steps of kLanes sequences, transposed so that the lanes of a step lie side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "gae/arguments.h"

namespace ppo_fast::cpu {

constexpr int64_t kLanes = 16;    // a row of a float32 tile is one cache line
constexpr int64_t kSteps = 1024;  // short runs of many rows outrun the hardware's prefetchers

template <class T>
struct alignas(64) Tile {
  T at[kSteps][kLanes];
};

// A 16-byte vector, which every target has, and flags of its width.
template <class T>
struct Vector {
  using Flag = std::conditional_t<sizeof(T) == 8, int64_t, std::conditional_t<sizeof(T) == 4, int32_t, int8_t>>;
  typedef T Values __attribute__((vector_size(16)));
  typedef Flag Flags __attribute__((vector_size(16)));
  static constexpr int kWidth = 16 / sizeof(T);
};

template <class V, class T>
V read(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(V));
  return vector;
}

template <class V, class T>
void write(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

// a[i], b[i], a[i + 1], b[i + 1], ... over the lower or the upper halves of a and b.
template <class T, bool kUpper, int... kIndex>
typename Vector<T>::Values interleave(typename Vector<T>::Values a, typename Vector<T>::Values b,
                                      std::integer_sequence<int, kIndex...>) {
  constexpr int kWidth = Vector<T>::kWidth;
  constexpr int kFrom = kUpper ? kWidth / 2 : 0;
#ifdef __clang__
  return __builtin_shufflevector(a, b, (kFrom + kIndex / 2 + kIndex % 2 * kWidth)...);
#else
  return __builtin_shuffle(a, b, typename Vector<T>::Flags{(kFrom + kIndex / 2 + kIndex % 2 * kWidth)...});
#endif
}

// Whether each of `count` bool bytes is 1.
inline bool all_set(const uint8_t* bytes, int64_t count = kLanes) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  uint64_t common = kOnes;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) common &= read<uint64_t>(bytes + i);
  for (; i < count; ++i) common &= bytes[i] * kOnes;
  return common == kOnes;
}

// The lanes of a row of kLanes bool bytes that are set, or that are not: every byte is repeated until it is as wide
// as T.
template <class T, bool kSet>
void widen(const uint8_t* row, typename Vector<T>::Flags (&flags)[sizeof(T)]) {
  static_assert(kLanes == 16, "a row of bool bytes is one vector");
  constexpr std::make_integer_sequence<int, 16> kIndices;
  Vector<uint8_t>::Values bytes[sizeof(T)] = {read<Vector<uint8_t>::Values>(row)};
  for (int count = 1; count < int(sizeof(T)); count *= 2) {
    for (int i = count - 1; i >= 0; --i) {
      bytes[2 * i + 1] = interleave<uint8_t, true>(bytes[i], bytes[i], kIndices);
      bytes[2 * i] = interleave<uint8_t, false>(bytes[i], bytes[i], kIndices);
    }
  }
  for (int i = 0; i < int(sizeof(T)); ++i) {
    const auto wide = read<typename Vector<T>::Flags>(&bytes[i]);
    if constexpr (kSet) {
      flags[i] = wide != 0;
    } else {
      flags[i] = wide == 0;
    }
  }
}

// kWidth rows of kWidth elements become its columns: log2(kWidth) perfect shuffles of the rows.
template <class T>
void transpose(typename Vector<T>::Values (&rows)[Vector<T>::kWidth]) {
  constexpr int kWidth = Vector<T>::kWidth;
  constexpr std::make_integer_sequence<int, kWidth> kIndices;
  for (int round = 1; round < kWidth; round *= 2) {
    typename Vector<T>::Values shuffled[kWidth];
    for (int i = 0; i < kWidth / 2; ++i) {
      shuffled[2 * i] = interleave<T, false>(rows[i], rows[i + kWidth / 2], kIndices);
      shuffled[2 * i + 1] = interleave<T, true>(rows[i], rows[i + kWidth / 2], kIndices);
    }
    std::copy_n(shuffled, kWidth, rows);
  }
}

// to(i)[j] = from(j)[i] for kWidth rows of kWidth elements each.
template <class T, class From, class To>
void transpose_square(const From& from, const To& to) {
  constexpr int kWidth = Vector<T>::kWidth;
  typename Vector<T>::Values square[kWidth];
  for (int i = 0; i < kWidth; ++i) square[i] = read<typename Vector<T>::Values>(from(i));
  transpose<T>(square);
  for (int i = 0; i < kWidth; ++i) write(to(i), square[i]);
}

// The steps of a tile that are loaded or stored: row i, of `rows`, is step start[lane] + i of a lane's sequence.
struct Window {
  int64_t rows;
  int64_t start[kLanes];  // negative where a sequence is shorter than the others
  bool whole = true;      // no start is negative

  // The tile that ends `behind` steps before the ends of the sequences.
  Window(const int64_t (&lengths)[kLanes], int64_t behind)
      : rows(std::min(kSteps, *std::max_element(lengths, lengths + kLanes) - behind)) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      start[lane] = lengths[lane] - behind - rows;
      whole = whole && start[lane] >= 0;
    }
  }

  // The first row that lies in a lane's sequence.
  int64_t first(int64_t lane) const { return std::clamp<int64_t>(-start[lane], 0, rows); }
};

// One lane's rows up to `end`, of any stride. The rows before its sequence are 0.
template <class T>
void load_lane(Tile<T>& tile, int64_t lane, const T* row, int64_t stride_t, const Window& window, int64_t end) {
  const int64_t first = window.first(lane);
  for (int64_t i = 0; i < first; ++i) tile.at[i][lane] = T{};
  for (int64_t i = first; i < end; ++i) tile.at[i][lane] = row[(window.start[lane] + i) * stride_t];
}

// Whole windows of inputs whose lanes are contiguous: rows are copied.
template <class T>
void load_rows(Tile<T>& tile, const T* row, int64_t stride_t, const Window& window) {
  for (int64_t i = 0; i < window.rows; ++i) {
    std::copy_n(row + (window.start[0] + i) * stride_t, kLanes, tile.at[i]);
  }
}

// Squares of kWidth lanes reach from this row to the last one; what lies before it goes lane by lane.
template <class T>
int64_t first_square(const Window& window, int64_t lane) {
  int64_t first = 0;
  for (int64_t k = 0; k < Vector<T>::kWidth; ++k) first = std::max(first, window.first(lane + k));
  return first + (window.rows - first) % Vector<T>::kWidth;
}

// Row 0 of the window in kWidth lanes. Local pointers: a store to a tile may alias those in memory.
template <class T>
struct LaneGroup {
  T* lane[Vector<std::remove_const_t<T>>::kWidth];
  int64_t words_to_next = 0;  // to the same row of the group of lanes after this one

  LaneGroup(T* const* rows, const Window& window, int64_t first) {
    for (int64_t k = 0; k < kWidth; ++k) lane[k] = at(rows[first + k], window.start[first + k]);
    if (rows[1] != nullptr) words_to_next = kWidth * (rows[1] - rows[0]);
  }

  // Fetches into the L2 cache what the next group will touch at row i, a line of one lane at a time. The
  // hardware's prefetchers restart at each page, and a lane may be no longer than one.
  template <bool kWrite>
  void prefetch_next(int64_t i) const {
    __builtin_prefetch(at(lane[static_cast<uint64_t>(i) / kWidth % kWidth], i + words_to_next), kWrite, 2);
  }

 private:
  static constexpr int64_t kWidth = Vector<std::remove_const_t<T>>::kWidth;

  // Any address may be prefetched, and a lane without a sequence has none.
  static T* at(T* from, int64_t words) {
    return reinterpret_cast<T*>(reinterpret_cast<intptr_t>(from) + words * int64_t(sizeof(T)));
  }
};

// Reads inputs whose steps are contiguous; `rows` point at step 0.
template <class T>
void load_lanes(Tile<T>& tile, const T* const* rows, const Window& window) {
  for (int64_t lane = 0; lane < kLanes; lane += Vector<T>::kWidth) {
    const int64_t squares = first_square<T>(window, lane);
    for (int64_t k = lane; k < lane + Vector<T>::kWidth; ++k) load_lane(tile, k, rows[k], 1, window, squares);
    const LaneGroup<const T> from(rows, window, lane);
    for (int64_t i = squares; i < window.rows; i += Vector<T>::kWidth) {
      from.template prefetch_next<false>(i);
      transpose_square<T>([&](int64_t k) { return from.lane[k] + i; },
                          [&](int64_t k) { return &tile.at[i + k][lane]; });
    }
  }
}

template <class T>
void load(Tile<T>& tile, const T* const* rows, const MatrixView& view, const Window& window) {
  if (view.stride_b == 1 && window.whole) {  // never of packed rows: they have no sequence stride
    load_rows(tile, rows[0], view.stride_t, window);
  } else if (view.stride_t == 1) {
    load_lanes(tile, rows, window);
  } else {
    for (int64_t lane = 0; lane < kLanes; ++lane) load_lane(tile, lane, rows[lane], view.stride_t, window, window.rows);
  }
}

template <class T>
void store(T* const* rows, const Tile<T>& tile, const Window& window) {
  for (int64_t lane = 0; lane < kLanes; lane += Vector<T>::kWidth) {
    const int64_t squares = first_square<T>(window, lane);
    for (int64_t k = lane; k < lane + Vector<T>::kWidth; ++k) {
      for (int64_t i = window.first(k); i < squares; ++i) rows[k][window.start[k] + i] = tile.at[i][k];
    }
    const LaneGroup<T> to(rows, window, lane);
    for (int64_t i = squares; i < window.rows; i += Vector<T>::kWidth) {
      to.template prefetch_next<true>(i);
      transpose_square<T>([&](int64_t k) { return &tile.at[i + k][lane]; }, [&](int64_t k) { return to.lane[k] + i; });
    }
  }
}

}  // namespace ppo_fast::cpu
