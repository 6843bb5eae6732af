// exp2, exp and log of a vector within 2 units in the last place, and exp(x) - 1 - x within 4.
#pragma once

#include "cpu/simd/vec.h"

namespace ppo_fast::cpu::ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// At and below this exponent 2^t is exactly 0 here: a float32 softmax has no use for subnormal probabilities.
constexpr float kMinExponent = -127.0f;

// 2^(i / 2^kTableBits) for the low bits i of k, less i in the place where exp2 adds k.
#if defined(__AVX512F__)
constexpr int kTableBits = 5;
alignas(64) constexpr int32_t kTable[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
inline Ints table(Ints k) {
  return reinterpret_cast<Ints>(_mm512_permutex2var_epi32(_mm512_load_si512(kTable), reinterpret_cast<__m512i>(k),
                                                          _mm512_load_si512(kTable + 16)));
}
#elif defined(__AVX2__)
constexpr int kTableBits = 3;
alignas(32) constexpr int32_t kTable[8] = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7,
                                           0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
inline Ints table(Ints k) {
  return reinterpret_cast<Ints>(_mm256_permutevar8x32_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(kTable)),
                                                            reinterpret_cast<__m256i>(k)));
}
#else
constexpr int kTableBits = 0;
inline Ints table(Ints) { return Ints{} + 0x3f800000; }
#endif

// 2^f - 1 for |f| <= 2^-(kTableBits + 1): minimax in the relative error of 2^f, which is 5e-8, 3e-8, 3e-9.
inline Vec exp2_fraction(Vec f) {
  if constexpr (kTableBits == 5) {
    return f * fma(f, set(0.24022648f), set(0.6931573f));
  } else if constexpr (kTableBits == 3) {
    return f * fma(f, fma(f, set(0.055489004f), set(0.24025752f)), set(0.69314724f));
  } else {
    Vec y = fma(f, set(0.00015326469f), set(0.0013390807f));
    y = fma(f, y, set(0.009618506f));
    y = fma(f, y, set(0.0555036f));
    y = fma(f, y, set(0.24022648f));
    return f * fma(f, y, set(0.6931472f));
  }
}

// 2^(c * d) for kMinExponent <= c * d <= 127 (or NaN); exactly 0 at kMinExponent, exactly 1 at 0.
inline Vec exp2(Vec d, Vec c) {
  // Adding 1.5 * 2^23 units of 2^-kTableBits leaves the exponent, rounded to units, in the low bits of the
  // sum.
  constexpr float kShifter = 1.5f * (1 << (23 - kTableBits));
  const Vec shifted = fma(d, c, set(kShifter));
  const Vec fraction = exp2_fraction(fma(d, c, kShifter - shifted));
  const Ints k = bits(shifted);
  const Vec power = from_bits(table(k) + (k << (23 - kTableBits)));
  return fma(power, fraction, power);
}

// Natural logarithm of a positive normal number (or NaN): x = m * 2^n with m in [sqrt(1/2), sqrt(2)); exactly
// 0 at 1. Source of the coefficients: Moshier, Cephes, logf.
inline Vec log(Vec x) {
  const Ints n = (bits(x) - 0x3f3504f3) >> 23;
  const Vec f = from_bits(bits(x) - (n << 23)) - 1.0f;
  const Vec exponent = __builtin_convertvector(n, Vec);
  Vec y = fma(f, set(7.0376836292e-2f), set(-1.1514610310e-1f));
  y = fma(f, y, set(1.1676998740e-1f));
  y = fma(f, y, set(-1.2420140846e-1f));
  y = fma(f, y, set(1.4249322787e-1f));
  y = fma(f, y, set(-1.6668057665e-1f));
  y = fma(f, y, set(2.0000714765e-1f));
  y = fma(f, y, set(-2.4999993993e-1f));
  y = fma(f, y, set(3.3333331174e-1f));
  const Vec square = f * f;
  y = fma(exponent, set(-2.12194440e-4f), y * f * square);
  y = f + fma(square, set(-0.5f), y);
  y = fma(exponent, set(0.693359375f), y);
  return x == x ? y : x;
}

// e^x for |x| <= 80 (or NaN), ln 2 being split in two so that the reduction is exact to the last place.
inline Vec exp(Vec x) {
  const Vec t = x * kLog2E;
  const Vec n = (t + 12582912.0f) - 12582912.0f;
  const Vec rest = fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), x));
  Vec y = fma(rest, set(1.9875691500e-4f), set(1.3981999507e-3f));
  y = fma(rest, y, set(8.3334519073e-3f));
  y = fma(rest, y, set(4.1665795894e-2f));
  y = fma(rest, y, set(1.6666665459e-1f));
  y = fma(rest, y, set(5.0000001201e-1f));
  y = fma(rest * rest, y, rest) + 1.0f;
  return y * from_bits((__builtin_convertvector(n, Ints) + 127) << 23);
}

// e^x - 1 - x for |x| <= 80, without the cancellation near 0: there x^2 (1/2! + x/3! + x^2/4! + ...).
inline Vec exp_excess(Vec x, Vec exp_x) {
  Vec y = fma(x, set(1.0f / 3628800), set(1.0f / 362880));
  y = fma(x, y, set(1.0f / 40320));
  y = fma(x, y, set(1.0f / 5040));
  y = fma(x, y, set(1.0f / 720));
  y = fma(x, y, set(1.0f / 120));
  y = fma(x, y, set(1.0f / 24));
  y = fma(x, y, set(1.0f / 6));
  y = fma(x, y, set(0.5f));
  return (x > -1.0f) & (x < 1.0f) ? x * x * y : exp_x - 1.0f - x;
}

}  // namespace
}  // namespace ppo_fast::cpu::ISA_NAMESPACE
