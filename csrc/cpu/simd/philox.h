// Counter-based random words: Philox4x32-10 of Salmon et al. 2011, as in Random123; and exponential noise of them.
#pragma once

#include "cpu/simd/math.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * kWidth)));

// The halves of the 64-bit product of each lane.
struct Product {
  Words high, low;
};

#if defined(__AVX512F__)
inline Product multiply(Words a, uint32_t b) {
  const __m512i x = reinterpret_cast<__m512i>(a), y = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  return {reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd)),
          reinterpret_cast<Words>(_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)))};
}
#elif defined(__AVX2__)
inline Product multiply(Words a, uint32_t b) {
  const __m256i x = reinterpret_cast<__m256i>(a), y = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  return {reinterpret_cast<Words>(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa)),
          reinterpret_cast<Words>(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa))};
}
#else
inline Product multiply(Words a, uint32_t b) {
  Product product;
  for (int i = 0; i < kWidth; ++i) {
    const uint64_t whole = static_cast<uint64_t>(a[i]) * b;
    product.high[i] = static_cast<uint32_t>(whole >> 32);
    product.low[i] = static_cast<uint32_t>(whole);
  }
  return product;
}
#endif

// -log(1 - x) with x = (k + 1/2) / 2^31, k the upper 31 bits of a word: between 2^-32 and 32 ln 2.
inline Vec exponential_noise(Words words) {
  const Ints k = reinterpret_cast<Ints>(words >> 1);
  const Vec x = (__builtin_convertvector(k, Vec) + 0.5f) * 0x1p-31f;
  const Vec rest = (__builtin_convertvector(0x7fffffff - k, Vec) + 0.5f) * 0x1p-31f;
  // Below 1/32 the series keeps the digits that 1 - x loses; what is left out is below 2^-27 of it.
  Vec y = fma(x, set(0.2f), set(0.25f));
  y = fma(x, y, set(1.0f / 3));
  y = fma(x, y, set(0.5f));
  return k < (1 << 26) ? fma(x * x, y, x) : -log(rest);
}

template <int... kLane>
Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return shuffle<(kLane / 2 + kLane % 2 * kWidth)...>(a, b);
}

template <int... kLane>
Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return shuffle<(kWidth / 2 + kLane / 2 + kLane % 2 * kWidth)...>(a, b);
}

// The noise of one key [3]: seed, row, step.
class Philox {
 public:
  explicit Philox(const int64_t* key)
      : seed_(static_cast<uint64_t>(key[0])),
        row_(static_cast<uint64_t>(key[1])),
        step_(static_cast<uint32_t>(key[2])) {}

  // Of 4 * kWidth words in order, from word 4 * first on.
  void exponentials(uint32_t first, Vec out[4]) const {
    Words c0 = reinterpret_cast<Words>(lane_numbers()) + first, c1 = Words{} + step_,
          c2 = Words{} + static_cast<uint32_t>(row_), c3 = Words{} + static_cast<uint32_t>(row_ >> 32);
    uint32_t k0 = static_cast<uint32_t>(seed_), k1 = static_cast<uint32_t>(seed_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const Product a = multiply(c0, 0xd2511f53), b = multiply(c2, 0xcd9e8d57);
      c0 = b.high ^ c1 ^ k0, c1 = b.low, c2 = a.high ^ c3 ^ k1, c3 = a.low;
      k0 += 0x9e3779b9, k1 += 0xbb67ae85;
    }
    const auto lanes = std::make_integer_sequence<int, kWidth>();
    const Vec e0 = exponential_noise(c0), e1 = exponential_noise(c1), e2 = exponential_noise(c2),
              e3 = exponential_noise(c3);
    const Vec low02 = interleave_low(e0, e2, lanes), low13 = interleave_low(e1, e3, lanes);
    const Vec high02 = interleave_high(e0, e2, lanes), high13 = interleave_high(e1, e3, lanes);
    out[0] = interleave_low(low02, low13, lanes), out[1] = interleave_high(low02, low13, lanes);
    out[2] = interleave_low(high02, high13, lanes), out[3] = interleave_high(high02, high13, lanes);
  }

 private:
  uint64_t seed_, row_;
  uint32_t step_;
};

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
