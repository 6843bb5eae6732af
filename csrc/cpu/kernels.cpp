#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ppo_fast::cpu {
namespace {

bool has_avx512() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_avx2() {
#ifdef __x86_64__
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

const Kernels* find(const std::string& name) {
#ifdef __x86_64__
  if (name == "avx512" && has_avx512()) return &avx512::kernels;
  if (name == "avx2" && has_avx2()) return &avx2::kernels;
#endif
  if (name == "baseline") return &baseline::kernels;
  throw std::invalid_argument("PPO_FAST_ISA: expected an instruction set of this machine (" +
                              std::string(has_avx512() ? "avx512, " : "") + (has_avx2() ? "avx2, " : "") +
                              "baseline), got " + name);
}

const Kernels* initial() {
  const char* forced = std::getenv("PPO_FAST_ISA");
  if (forced != nullptr) return find(forced);
  return find(has_avx512() ? "avx512" : has_avx2() ? "avx2" : "baseline");
}

const Kernels*& current() {
  static const Kernels* table = initial();
  return table;
}

}  // namespace

const Kernels& kernels() { return *current(); }

void set_isa(const char* name) { current() = find(name); }

}  // namespace ppo_fast::cpu
