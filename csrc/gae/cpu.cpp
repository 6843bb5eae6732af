// kLanes sequences are walked abreast, from their last step to their first, one tile at a time: a tile is
// transposed into scratch memory and the recursion runs on whole rows of it. Its latency is so shared by kLanes
// sequences, and the strides of the inputs do not matter. Compiled with -ffp-contract=off: the results are
// those of the plain recursion to the last bit.
#include "gae/gae.h"

#include "cpu/parallel.h"
#include "cpu/rows/dispatch.h"
#include "gae/cpu_tile.h"
#include "gae/recursion.h"

namespace ppo_fast::cpu {
namespace {

constexpr int64_t kStepsPerThread = 1 << 14;  // fewer do not repay waking another thread

// The sequences of one block, aligned at their last steps. Lanes beyond the last sequence have length 0.
template <class T>
struct Block {
  int64_t lanes;
  int64_t longest = 0;
  int64_t length[kLanes] = {};
  const T* rewards[kLanes] = {};
  const T* values[kLanes] = {};
  const uint8_t* mask[kLanes] = {};
  const uint8_t* dones[kLanes] = {};
  T* advantages[kLanes] = {};
  T* returns[kLanes] = {};

  Block(const GaeArguments& args, int64_t first) : lanes(std::min(kLanes, args.sequences - first)) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t sequence = first + lane;
      const Span span = sequence_span(args, sequence);
      length[lane] = span.length;
      longest = std::max(longest, span.length);
      rewards[lane] = row_of<T>(args, args.rewards, sequence, span);
      values[lane] = row_of<T>(args, args.values, sequence, span);
      mask[lane] = row_of<uint8_t>(args, args.mask, sequence, span);
      dones[lane] = row_of<uint8_t>(args, args.dones, sequence, span);
      advantages[lane] = static_cast<T*>(args.advantages) + span.begin;
      returns[lane] = static_cast<T*>(args.returns) + span.begin;
    }
  }
};

template <class T>
struct Tiles {
  Tile<T> rewards;  // the advantages, once advanced
  Tile<T> values;   // the returns, once advanced
  Tile<uint8_t> counted;
  Tile<uint8_t> done;
};

// State that each lane hands to its next tile.
template <class T>
struct alignas(64) LaneStates {
  T advantage[kLanes] = {};
  T next_value[kLanes] = {};
};

enum class Mask { kNone, kZero, kCarry };

// One step of kLanes sequences. A step that does not count is computed from whatever is there and dropped.
template <class T, Mask kMask, bool kDones>
void advance_row(Tiles<T>& tiles, LaneStates<T>& states, int64_t i, gae::Discounts<T> discounts) {
  using Values = typename Vector<T>::Values;
  using Flags = typename Vector<T>::Flags;
  Flags row_masked[sizeof(T)], row_done[sizeof(T)];
  if constexpr (kMask != Mask::kNone) widen<T, false>(tiles.counted.at[i], row_masked);
  if constexpr (kDones) widen<T, true>(tiles.done.at[i], row_done);
  for (int64_t part = 0; part < int64_t(sizeof(T)); ++part) {
    const int64_t lane = part * Vector<T>::kWidth;
    Flags masked = {}, pass = {}, done = {};
    if constexpr (kMask != Mask::kNone) masked = row_masked[part];
    if constexpr (kMask == Mask::kCarry) pass = masked;
    if constexpr (kDones) done = row_done[part];
    Values reward = read<Values>(&tiles.rewards.at[i][lane]);
    Values value = read<Values>(&tiles.values.at[i][lane]);
    if constexpr (kMask == Mask::kZero) {
      reward = masked ? Values{} : reward;
      value = masked ? Values{} : value;
    }
    gae::State<Values> state = {read<Values>(&states.advantage[lane]), read<Values>(&states.next_value[lane])};
    state = gae::advance(state, reward, value, done, pass, discounts);
    write(&states.advantage[lane], state.advantage);
    write(&states.next_value[lane], state.next_value);
    const Values returns = state.advantage + value;
    write<Values>(&tiles.rewards.at[i][lane], masked ? Values{} : state.advantage);
    write<Values>(&tiles.values.at[i][lane], masked ? Values{} : returns);
  }
}

// The steps of a tile from its last to its first. Most rows of a mask count in every lane.
template <class T, Mask kMask, bool kDones>
void advance_tile(Tiles<T>& tiles, LaneStates<T>& states, int64_t rows, gae::Discounts<T> discounts) {
  for (int64_t i = rows - 1; i >= 0; --i) {
    if (kMask == Mask::kNone || all_set(tiles.counted.at[i])) {
      advance_row<T, Mask::kNone, kDones>(tiles, states, i, discounts);
    } else {
      advance_row<T, kMask, kDones>(tiles, states, i, discounts);
    }
  }
}

// Whether every step of the window counts, so that its mask need not be transposed.
template <class T>
bool counts_whole(const Block<T>& block, const MatrixView& mask, const Window& window) {
  if (!window.whole || block.lanes < kLanes || mask.stride_t != 1) return false;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (!all_set(block.mask[lane] + window.start[lane], window.rows)) return false;
  }
  return true;
}

template <class T, Mask kMask, bool kDones>
void gae_block(const GaeArguments& args, int64_t first) {
  const Block<T> block(args, first);
  const gae::Discounts<T> discounts = gae::discounts_of<T>(args);
  Tiles<T> tiles;
  LaneStates<T> states;
  if (args.bootstrap != nullptr) {
    std::copy_n(static_cast<const T*>(args.bootstrap) + first, block.lanes, states.next_value);
  }
  for (int64_t behind = 0; behind < block.longest; behind += kSteps) {
    const Window window(block.length, behind);
    load(tiles.rewards, block.rewards, args.rewards, window);
    load(tiles.values, block.values, args.values, window);
    if constexpr (kDones) load(tiles.done, block.dones, args.dones, window);
    if (kMask == Mask::kNone || counts_whole(block, args.mask, window)) {
      advance_tile<T, Mask::kNone, kDones>(tiles, states, window.rows, discounts);
    } else {
      load(tiles.counted, block.mask, args.mask, window);
      advance_tile<T, kMask, kDones>(tiles, states, window.rows, discounts);
    }
    store(block.advantages, tiles.rewards, window);
    store(block.returns, tiles.values, window);
  }
}

// The same in the instructions of AVX-512, which select by a mask at once. Everything is inlined: no function of these
// instructions is left for others to call.
#ifdef __x86_64__
template <class T, Mask kMask, bool kDones>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl"), gnu::flatten]] void gae_block_avx512(const GaeArguments& args,
                                                                                          int64_t first) {
  gae_block<T, kMask, kDones>(args, first);
}
#endif

template <class T, Mask kMask, bool kDones>
auto best_gae_block() {
#ifdef __x86_64__
  if (isa() == "avx512") return gae_block_avx512<T, kMask, kDones>;
#endif
  return gae_block<T, kMask, kDones>;
}

template <class T, Mask kMask>
void gae_blocks(const GaeArguments& args, int threads) {
  const int64_t total = args.cu_seqlens == nullptr ? args.sequences * args.steps : args.steps;
  const int64_t useful = std::min<int64_t>(threads, 1 + total / kStepsPerThread);
  const auto block = args.dones.data != nullptr ? best_gae_block<T, kMask, true>() : best_gae_block<T, kMask, false>();
  parallel_for((args.sequences + kLanes - 1) / kLanes, static_cast<int>(useful),
               [&](int64_t i) { block(args, i * kLanes); });
}

template <class T>
void gae_of(const GaeArguments& args, int threads) {
  if (args.mask.data == nullptr) return gae_blocks<T, Mask::kNone>(args, threads);
  if (args.carry) return gae_blocks<T, Mask::kCarry>(args, threads);
  return gae_blocks<T, Mask::kZero>(args, threads);
}

}  // namespace

void gae(const GaeArguments& args, Dtype dtype, int threads) {
  if (dtype == Dtype::kFloat64) {
    gae_of<double>(args, threads);
  } else {
    gae_of<float>(args, threads);
  }
}

}  // namespace ppo_fast::cpu
