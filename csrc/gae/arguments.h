// The arguments of generalized advantage estimation, shared by the CPU and the CUDA implementation.
#pragma once

#include <cstdint>

namespace ppo_fast {

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A matrix [sequences, steps] in place, strides in elements. Packed rows have no sequence stride: they start
// at offset * stride_t. data is null where the argument was not given.
struct MatrixView {
  const void* data;
  int64_t stride_b;
  int64_t stride_t;
};

struct GaeArguments {
  MatrixView rewards;
  MatrixView values;
  MatrixView mask;           // uint8, 1 = the step counts
  MatrixView dones;          // uint8, 1 = the episode ends after the step
  const void* bootstrap;     // [sequences] in the dtype of the results, or null for zeros
  const void* cu_seqlens;    // [sequences + 1] for packed rows, null for padded ones
  bool cu_seqlens_is_int64;  // otherwise int32
  int64_t sequences;
  int64_t steps;  // T of padded rows; packed: all rows together
  double gamma;
  double lam;
  bool carry;        // mask mode: masked steps pass the state on ("carry"), or count as zeros ("zero")
  void* advantages;  // results, contiguous: float64 if either input is, else float32
  void* returns;

  // Calls visit(name, member) for fields of the NamedTuples of Python: the bindings are made of them.
  template <class Visit>
  static void inputs(Visit visit) {
    using Self = GaeArguments;
    visit("rewards", &Self::rewards);
    visit("values", &Self::values);
    visit("mask", &Self::mask);
    visit("dones", &Self::dones);
    visit("bootstrap", &Self::bootstrap);
    visit("cu_seqlens", &Self::cu_seqlens);
    visit("gamma", &Self::gamma);
    visit("lam", &Self::lam);
  }

  template <class Visit>
  static void results(Visit visit) {
    visit("advantages", &GaeArguments::advantages);
    visit("returns", &GaeArguments::returns);
  }
};

// One sequence: its first step in the contiguous results, and its number of steps.
struct Span {
  int64_t begin;
  int64_t length;
};

#ifdef __CUDACC__
#define PPO_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#define PPO_FAST_UNROLL _Pragma("unroll")
#else
#define PPO_FAST_HOST_DEVICE inline
#define PPO_FAST_UNROLL
#endif

PPO_FAST_HOST_DEVICE int64_t clamp_index(int64_t index, int64_t low, int64_t high) {
  return index < low ? low : (index > high ? high : index);
}

// Offsets outside [0, steps] or decreasing ones are clamped: no offsets make a kernel leave its buffers.
PPO_FAST_HOST_DEVICE Span sequence_span(const GaeArguments& args, int64_t sequence) {
  if (args.cu_seqlens == nullptr) return {sequence * args.steps, args.steps};
  int64_t begin, end;
  if (args.cu_seqlens_is_int64) {
    begin = static_cast<const int64_t*>(args.cu_seqlens)[sequence];
    end = static_cast<const int64_t*>(args.cu_seqlens)[sequence + 1];
  } else {
    begin = static_cast<const int32_t*>(args.cu_seqlens)[sequence];
    end = static_cast<const int32_t*>(args.cu_seqlens)[sequence + 1];
  }
  begin = clamp_index(begin, 0, args.steps);
  return {begin, clamp_index(end, begin, args.steps) - begin};
}

// The first step of a sequence, in place; null where the argument was not given.
template <class In>
PPO_FAST_HOST_DEVICE const In* row_of(const GaeArguments& args, const MatrixView& view, int64_t sequence, Span span) {
  const In* data = static_cast<const In*>(view.data);
  if (data == nullptr) return nullptr;
  return data + (args.cu_seqlens == nullptr ? sequence * view.stride_b : span.begin * view.stride_t);
}

}  // namespace ppo_fast
