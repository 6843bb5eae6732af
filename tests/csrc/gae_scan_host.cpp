// The CUDA scan on the host: every thread of a block in turn, between the points where the kernel's threads
// wait for each other (shuffles, barriers). Arithmetic, tiles, windows and carries are those of gae/scan.h,
// in float64.
#include "gae/scan.h"

#include <vector>

using namespace ppo_fast;
using namespace ppo_fast::gae;

namespace {

using Sequence64 = Sequence<double, double>;

// scan_warp of the kernel: all lanes read before any of them writes.
void scan_warp(Map<double>* maps) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const std::vector<Map<double>> before(maps, maps + kWarpSize);
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int other = lane + distance < kWarpSize ? lane + distance : lane;  // what a shuffle returns at the edge
      maps[lane] = scan_level(before[lane], before[other], lane, distance);
    }
  }
}

// scan of the kernel, for the `warps` warps that share the sequence. Returns the number of threads whose steps do not
// begin at a multiple of kItems of the results, so that they could not be stored in one piece.
int64_t scan(const GaeArguments& args, int64_t index, const Sequence64& sequence, int warps) {
  const int threads = warps * kWarpSize;
  const Tiling tiling(sequence.begin, sequence.length, threads);
  const Discounts<double> discounts = discounts_of<double>(args);
  const double* bootstrap = static_cast<const double*>(args.bootstrap);
  int64_t misaligned = 0;
  State<double> carried = {0.0, bootstrap == nullptr ? 0.0 : bootstrap[index]};
  for (int64_t tile = tiling.count - 1; tile >= 0; --tile) {
    std::vector<Window> windows;
    std::vector<Items<double>> items;
    std::vector<Map<double>> maps;
    for (int thread = 0; thread < threads; ++thread) {
      windows.emplace_back(tiling.first_step(tile, thread), sequence.length);
      misaligned += (sequence.begin + windows[thread].first) % kItems != 0;
      items.push_back(load_items<double>(sequence, windows[thread], args.carry));
      maps.push_back(summarize(items[thread], discounts));
    }
    Map<double> totals[kWarps] = {};
    for (int warp = 0; warp < warps; ++warp) {
      scan_warp(&maps[warp * kWarpSize]);
      totals[warp] = maps[warp * kWarpSize];
    }
    State<double> leaving = {};
    for (int thread = 0; thread < threads; ++thread) {
      const int lane = thread % kWarpSize;
      const Passage<double> passage = warps == 1 ? Passage<double>{carried, apply(totals[0], carried)}
                                                 : pass_warps(totals, thread / kWarpSize, carried);
      const State<double> state = lane + 1 < kWarpSize ? apply(maps[thread + 1], passage.entering) : passage.entering;
      advance_items(items[thread], state, discounts);
      store_pack(static_cast<double*>(args.advantages) + sequence.begin, items[thread].reward, windows[thread]);
      store_pack(static_cast<double*>(args.returns) + sequence.begin, items[thread].value, windows[thread]);
      leaving = passage.leaving;
    }
    carried = leaving;
  }
  return misaligned;
}

MatrixView view(const void* data, const int64_t* strides) { return {data, strides[0], strides[1]}; }

}  // namespace

// Returns the number of misaligned threads. Strides are two for each of rewards, values, mask, dones. Sequences longer
// than warp_steps are a block's.
extern "C" int64_t gae_scan_host(const double* rewards, const double* values, const uint8_t* mask, const uint8_t* dones,
                                 const int64_t* strides, const double* bootstrap, const int64_t* cu_seqlens,
                                 int64_t sequences, int64_t steps, double gamma, double lam, int carry,
                                 int64_t warp_steps, double* advantages, double* returns) {
  const GaeArguments args = {view(rewards, strides),
                             view(values, strides + 2),
                             view(mask, strides + 4),
                             view(dones, strides + 6),
                             bootstrap,
                             cu_seqlens,
                             true,
                             sequences,
                             steps,
                             gamma,
                             lam,
                             carry != 0,
                             advantages,
                             returns};
  int64_t misaligned = 0;
  for (int64_t index = 0; index < sequences; ++index) {
    const auto sequence = sequence_of<double, double>(args, index);
    misaligned += scan(args, index, sequence, sequence.length > warp_steps ? kWarps : 1);
  }
  return misaligned;
}
