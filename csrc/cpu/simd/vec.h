// A vector of floats as wide as the instruction set of this translation unit, on GCC vector extensions: operators and
// `condition ? a : b` work lane by lane. ISA_NAMESPACE names the unit's namespace; everything has internal linkage, so
// that the linker cannot mix code of different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu/rows/arguments.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

inline Vec set(float x) { return x - Vec{}; }

inline Ints bits(Vec x) { return reinterpret_cast<Ints>(x); }
inline Vec from_bits(Ints x) { return reinterpret_cast<Vec>(x); }

template <int... kLane>
Ints lane_numbers(std::integer_sequence<int, kLane...>) {
  return Ints{kLane...};
}

// 0, 1, 2, ...
inline Ints lane_numbers() { return lane_numbers(std::make_integer_sequence<int, kWidth>()); }

template <int... kIndex>
Vec shuffle(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kIndex...);
#else
  return __builtin_shuffle(a, b, Ints{kIndex...});
#endif
}

// a * b + c; min and max return b where either is NaN.
#if defined(__AVX512F__)
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
inline void stream(float* to, Vec x) { _mm512_stream_ps(to, x); }
inline void stream_bytes(BFloat16* to, Halves x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(x));
}
#elif defined(__AVX2__)
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline bool any_greater(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0; }
inline void stream(float* to, Vec x) { _mm256_stream_ps(to, x); }
inline void stream_bytes(BFloat16* to, Halves x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), reinterpret_cast<__m128i>(x));
}
#else
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline bool any_greater(Vec a, Vec b) {
  const Ints greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}
inline void stream(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }
inline void stream_bytes(BFloat16* to, Halves x) { std::memcpy(to, &x, sizeof x); }
#endif

// Orders streamed stores before whatever tells another thread that they are done.
inline void end_stream() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

inline Vec load(const float* from) {
  Vec x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vec load(const BFloat16* from) {
  Halves x;
  std::memcpy(&x, from, sizeof x);
  return from_bits(__builtin_convertvector(x, Ints) << 16);
}

// The first n lanes from memory, the others `fill`, which bfloat16 holds exactly.
inline Vec load(const float* from, int64_t n, float fill) {
#ifdef __AVX512F__
  return _mm512_mask_loadu_ps(set(fill), static_cast<__mmask16>((1u << n) - 1), from);
#else
  Vec x = set(fill);
  std::memcpy(&x, from, static_cast<size_t>(n) * sizeof *from);
  return x;
#endif
}

inline Vec load(const BFloat16* from, int64_t n, float fill) {
  Halves x = __builtin_convertvector(bits(set(fill)) >> 16, Halves);
  std::memcpy(&x, from, static_cast<size_t>(n) * sizeof *from);
  return from_bits(__builtin_convertvector(x, Ints) << 16);
}

// float32 to bfloat16, to nearest even. By integers: the instruction for it flushes subnormals.
inline Halves round_to_bfloat16(Vec x) {
  const Ints b = bits(x);
  const Ints rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (Ints{} + 0x7fc0), Halves);
}

inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

inline void store(BFloat16* to, Vec x) {
  const Halves half = round_to_bfloat16(x);
  std::memcpy(to, &half, sizeof half);
}

// The first n lanes.
inline void store(float* to, Vec x, int64_t n) { std::memcpy(to, &x, static_cast<size_t>(n) * sizeof *to); }

inline void store(BFloat16* to, Vec x, int64_t n) {
  const Halves half = round_to_bfloat16(x);
  std::memcpy(to, &half, static_cast<size_t>(n) * sizeof *to);
}

inline void stream(BFloat16* to, Vec x) { stream_bytes(to, round_to_bfloat16(x)); }

// The sum of all lanes, in float64.
inline double lane_total(Vec x) {
  double total = 0;
  for (int i = 0; i < kWidth; ++i) total += static_cast<double>(x[i]);
  return total;
}

struct Add {
  Vec operator()(Vec a, Vec b) const { return a + b; }
};
struct Max {
  Vec operator()(Vec a, Vec b) const { return max(a, b); }
};

// Lane i: of a and its neighbor kDistance away where bit kDistance of i is 0, else of b and its neighbor.
template <int kDistance, class Combine, int... kLane>
Vec combine_pair(Vec a, Vec b, Combine combine, std::integer_sequence<int, kLane...>) {
  return combine(shuffle<((kLane & kDistance) != 0 ? kLane + kWidth : kLane)...>(a, b),
                 shuffle<((kLane & kDistance) != 0 ? (kLane ^ kDistance) + kWidth : (kLane ^ kDistance))...>(a, b));
}

template <int kDistance, class Combine>
Vec combine_tree(Vec* rows, Combine combine) {
  if constexpr (kDistance < kWidth) {
    for (int i = 0; i < kWidth / kDistance / 2; ++i) {
      rows[i] =
          combine_pair<kDistance>(rows[2 * i], rows[2 * i + 1], combine, std::make_integer_sequence<int, kWidth>());
    }
    return combine_tree<2 * kDistance>(rows, combine);
  } else {
    return rows[0];
  }
}

// Lane i of the result combines all lanes of rows[i], for kWidth rows; they are overwritten.
template <class Combine>
Vec combine_rows(Vec* rows, Combine combine) {
  return combine_tree<1>(rows, combine);
}

// All lanes combined, in every lane.
template <class Combine, int kDistance = kWidth / 2, int... kLane>
Vec combine_lanes(Vec x, Combine combine, std::integer_sequence<int, kLane...> lanes) {
  x = combine(x, shuffle<(kLane ^ kDistance)...>(x, x));
  if constexpr (kDistance > 1) {
    return combine_lanes<Combine, kDistance / 2>(x, combine, lanes);
  } else {
    return x;
  }
}

template <class Combine>
float combine_lanes(Vec x, Combine combine) {
  return combine_lanes(x, combine, std::make_integer_sequence<int, kWidth>())[0];
}

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
