// A tile: kSteps time steps of kLanes sequences, transposed so that the lanes of a step lie side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../gae.h"

namespace ppo_fast::cpu {

constexpr int64_t kLanes = 16;  // a row of a float32 tile is one cache line
constexpr int64_t kSteps = 64;  // two float32 tiles take a quarter of a 32 KiB L1 cache

template <class T>
struct alignas(64) Tile {
  T at[kSteps][kLanes] = {};
};

// A 16-byte vector, which every target has, and flags of its width.
template <class T>
struct Vector {
  using Flag = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  typedef T Values __attribute__((vector_size(16)));
  typedef Flag Flags __attribute__((vector_size(16)));
  static constexpr int64_t kWidth = 16 / sizeof(T);
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

// The chosen elements of a and b, counted through both.
template <class T, int... kIndex>
typename Vector<T>::Values shuffle(typename Vector<T>::Values a, typename Vector<T>::Values b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, typename Vector<T>::Flags{kIndex...});
#endif
}

inline void transpose(Vector<double>::Values (&v)[2]) {
  const auto low = shuffle<double, 0, 2>(v[0], v[1]);
  v[1] = shuffle<double, 1, 3>(v[0], v[1]);
  v[0] = low;
}

inline void transpose(Vector<float>::Values (&v)[4]) {
  const auto low01 = shuffle<float, 0, 4, 1, 5>(v[0], v[1]), high01 = shuffle<float, 2, 6, 3, 7>(v[0], v[1]);
  const auto low23 = shuffle<float, 0, 4, 1, 5>(v[2], v[3]), high23 = shuffle<float, 2, 6, 3, 7>(v[2], v[3]);
  v[0] = shuffle<float, 0, 1, 4, 5>(low01, low23);
  v[1] = shuffle<float, 2, 3, 6, 7>(low01, low23);
  v[2] = shuffle<float, 0, 1, 4, 5>(high01, high23);
  v[3] = shuffle<float, 2, 3, 6, 7>(high01, high23);
}

// to(i)[j] = from(j)[i] for kWidth rows of kWidth elements each.
template <class T, class From, class To>
void transpose_square(const From& from, const To& to) {
  constexpr int64_t kWidth = Vector<T>::kWidth;
  typename Vector<T>::Values square[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) square[i] = read<typename Vector<T>::Values>(from(i));
  transpose(square);
  for (int64_t i = 0; i < kWidth; ++i) write(to(i), square[i]);
}

// Row i of a tile is step `start + i` of a lane's sequence. Rows before a sequence's first step are not touched.
inline int64_t first_row(int64_t start) { return std::clamp<int64_t>(-start, 0, kSteps); }

// Reads one lane's steps, of any stride and any type.
template <class T, class In>
void load_lane(Tile<T>& tile, int64_t lane, const In* row, int64_t stride_t, int64_t start) {
  for (int64_t i = first_row(start); i < kSteps; ++i) tile.at[i][lane] = row[(start + i) * stride_t];
}

// Reads all lanes of steps whose lanes are contiguous; `row` points at row 0.
template <class T>
void load_rows(Tile<T>& tile, const T* row, int64_t stride_t) {
  for (int64_t i = 0; i < kSteps; ++i) std::copy_n(row + i * stride_t, kLanes, tile.at[i]);
}

// Reads kWidth lanes whose steps are contiguous; `rows` point at step 0, `starts` are not negative.
template <class T>
void load_lanes(Tile<T>& tile, int64_t lane, const T* const* rows, const int64_t* starts) {
  for (int64_t i = 0; i < kSteps; i += Vector<T>::kWidth) {
    transpose_square<T>([&](int64_t k) { return rows[k] + starts[k] + i; },
                        [&](int64_t k) { return &tile.at[i + k][lane]; });
  }
}

template <class T>
void store_lane(T* row, const Tile<T>& tile, int64_t lane, int64_t start) {
  for (int64_t i = first_row(start); i < kSteps; ++i) row[start + i] = tile.at[i][lane];
}

template <class T>
void store_lanes(T* const* rows, const Tile<T>& tile, int64_t lane, const int64_t* starts) {
  for (int64_t i = 0; i < kSteps; i += Vector<T>::kWidth) {
    transpose_square<T>([&](int64_t k) { return &tile.at[i + k][lane]; },
                        [&](int64_t k) { return rows[k] + starts[k] + i; });
  }
}

}  // namespace ppo_fast::cpu
