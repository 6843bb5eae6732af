#include "cpu/rows/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace ppo_fast::cpu {
namespace {

struct Variant {
  std::string name;
  const Kernels* kernels;
};

// Widest first.
std::vector<Variant> variants() {
  std::vector<Variant> found;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back({"avx512", &avx512::kernels});
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back({"avx2", &avx2::kernels});
#endif
  found.push_back({"baseline", &baseline::kernels});
  return found;
}

Variant find(const std::string& name) {
  std::string choices;
  for (const Variant& variant : variants()) {
    if (variant.name == name) return variant;
    choices += (choices.empty() ? "" : ", ") + variant.name;
  }
  throw std::invalid_argument("PPO_FAST_ISA: expected an instruction set of this machine (" + choices + "), got " +
                              name);
}

Variant& current() {
  static Variant variant = [] {
    const char* forced = std::getenv("PPO_FAST_ISA");
    return forced != nullptr && *forced != '\0' ? find(forced) : variants().front();
  }();
  return variant;
}

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) names.push_back(variant.name);
  return names;
}

std::string isa() { return current().name; }

void set_isa(const std::string& name) { current() = find(name); }

const Kernels& kernels() { return *current().kernels; }

}  // namespace ppo_fast::cpu
