// Rows divided among threads. The division depends on the shape alone, so that sums over chunks do not depend on the
// number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace ppo_fast::cpu {

struct Chunks {
  static constexpr int64_t kWords = 1 << 16;  // fewer do not repay waking another thread

  int64_t rows;
  int64_t each;
  int64_t count;

  Chunks(int64_t rows, int64_t row_words)
      : rows(rows), each(std::max<int64_t>(1, kWords / row_words)), count((rows + each - 1) / each) {}

  int64_t begin(int64_t i) const { return i * each; }
  int64_t end(int64_t i) const { return std::min(rows, begin(i) + each); }
};

// How many rows count.
inline int64_t count_rows(const uint8_t* mask, int64_t rows) {
  if (mask == nullptr) return rows;
  int64_t count = 0;
  for (int64_t i = 0; i < rows; ++i) count += mask[i] != 0;
  return count;
}

}  // namespace ppo_fast::cpu
