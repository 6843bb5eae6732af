// Where there are many sequences, a warp scans one and a block of kWarps warps takes kWarps of them; its long
// ones, and every one where there are few, are scanned by the whole block. Lengths are read on the device.
#include "gae/gae.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gae/scan.h"

namespace ppo_fast::cuda {
namespace {

constexpr int kBlocksPerProcessor = 5;  // leaves a thread 102 registers: no spills
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kManyPerProcessor = 16;  // sequences that keep a multiprocessor busy, a warp each
constexpr int64_t kWarpSteps = 4096;       // the longest sequence that one warp scans when there are many

using gae::kWarps;
using gae::Map;
using gae::State;

struct Work {
  GaeArguments args;
  gae::Discounts<float> discounts;
  int64_t per_block;
  int64_t warp_steps;
};

// The maps of a tile's warps. Two of them, for even and odd tiles, need one barrier a tile.
using WarpMaps = Map<float>[2][kWarps];

__device__ Map<float> shift_down(const Map<float>& map, int distance) {
  return {__shfl_down_sync(kAllLanes, map.a, distance), __shfl_down_sync(kAllLanes, map.b, distance),
          __shfl_down_sync(kAllLanes, map.c, distance), __shfl_down_sync(kAllLanes, map.p, distance),
          __shfl_down_sync(kAllLanes, map.v, distance)};
}

// The map of a lane's steps and all later ones of its warp.
__device__ Map<float> scan_warp(Map<float> map, int lane) {
#pragma unroll
  for (int distance = 1; distance < gae::kWarpSize; distance *= 2) {
    map = gae::scan_level(map, shift_down(map, distance), lane, distance);
  }
  return map;
}

__device__ State<float> broadcast_first(const State<float>& state) {
  return {__shfl_sync(kAllLanes, state.advantage, 0), __shfl_sync(kAllLanes, state.next_value, 0)};
}

// Scans one sequence: with the caller's warp (warps = 1) or with the whole block (warps = kWarps).
template <class R, class V>
__device__ void scan(const Work& work, int64_t index, const gae::Sequence<R, V>& sequence, int warps,
                     WarpMaps& totals) {
  const int lane = threadIdx.x % gae::kWarpSize;
  const int warp = warps == 1 ? 0 : threadIdx.x / gae::kWarpSize;
  const gae::Tiling tiling(sequence.begin, sequence.length, warps * gae::kWarpSize);
  const float* bootstrap = static_cast<const float*>(work.args.bootstrap);
  State<float> carried = {0.0f, bootstrap == nullptr ? 0.0f : bootstrap[index]};
  for (int64_t tile = tiling.count - 1; tile >= 0; --tile) {
    const gae::Window window(tiling.first_step(tile, warp * gae::kWarpSize + lane), sequence.length);
    gae::Items<float> items = gae::load_items<float>(sequence, window, work.args.carry);
    const Map<float> map = scan_warp(gae::summarize(items, work.discounts), lane);
    gae::Passage<float> passage;
    if (warps == 1) {
      passage = {carried, broadcast_first(gae::apply(map, carried))};
    } else {
      if (lane == 0) totals[tile % 2][warp] = map;
      __syncthreads();
      passage = gae::pass_warps(totals[tile % 2], warp, carried);
    }
    const Map<float> later = shift_down(map, 1);
    const State<float> state = lane + 1 < gae::kWarpSize ? gae::apply(later, passage.entering) : passage.entering;
    gae::advance_items(items, state, work.discounts);
    gae::store_pack(static_cast<float*>(work.args.advantages) + sequence.begin, items.reward, window);
    gae::store_pack(static_cast<float*>(work.args.returns) + sequence.begin, items.value, window);
    carried = passage.leaving;
  }
}

// First every warp scans a short sequence of its own, then the block its long ones, one after the other.
template <class R, class V>
__global__ void __launch_bounds__(kWarps* gae::kWarpSize, kBlocksPerProcessor) gae_kernel(const Work work) {
  __shared__ WarpMaps totals;
  const int64_t first = blockIdx.x * work.per_block;
  const int64_t last = min(first + work.per_block, work.args.sequences);
  for (int64_t round = -1; round < work.per_block; ++round) {
    const int64_t index = round < 0 ? first + threadIdx.x / gae::kWarpSize : first + round;
    if (index >= last) continue;
    const auto sequence = gae::sequence_of<R, V>(work.args, index);
    const int warps = sequence.length > work.warp_steps ? kWarps : 1;
    if (warps != (round < 0 ? 1 : kWarps)) continue;
    scan(work, index, sequence, warps, totals);
    if (round >= 0) __syncthreads();  // the next sequence writes the maps that this one reads
  }
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("gae: CUDA: ") + cudaGetErrorString(error));
}

// Makes a device current, and the one before it again when it goes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_));
    check(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

template <class R, class V>
void launch(const Work& work, cudaStream_t stream) {
  const int64_t blocks = (work.args.sequences + work.per_block - 1) / work.per_block;
  gae_kernel<R, V><<<static_cast<unsigned>(blocks), kWarps * gae::kWarpSize, 0, stream>>>(work);
}

template <class R>
void launch(const Work& work, Dtype values, cudaStream_t stream) {
  if (values == Dtype::kFloat16) return launch<R, __half>(work, stream);
  if (values == Dtype::kBFloat16) return launch<R, __nv_bfloat16>(work, stream);
  launch<R, float>(work, stream);
}

}  // namespace

void gae(const GaeArguments& args, Dtype rewards, Dtype values, int device, std::uintptr_t stream) {
  if (args.sequences == 0 || args.steps == 0) return;
  const DeviceGuard guard(device);
  int processors = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const bool many = args.sequences >= kManyPerProcessor * processors;
  const Work work = {args, gae::discounts_of<float>(args), many ? kWarps : 1,
                     many ? kWarpSteps : gae::kItems * gae::kWarpSize};
  const auto handle = reinterpret_cast<cudaStream_t>(stream);
  if (rewards == Dtype::kFloat16) {
    launch<__half>(work, values, handle);
  } else if (rewards == Dtype::kBFloat16) {
    launch<__nv_bfloat16>(work, values, handle);
  } else {
    launch<float>(work, values, handle);
  }
  check(cudaGetLastError());
}

}  // namespace ppo_fast::cuda
