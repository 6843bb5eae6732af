// kLanes sequences are walked abreast, from their last step to their first, one tile at a time: a tile is
// transposed into scratch memory and the recursion runs on whole rows of it. Its latency is so shared by kLanes
// sequences, and the strides of the inputs do not matter. Compiled with -ffp-contract=off: the results are
// those of the plain recursion to the last bit.
#include "gae/gae.h"

#include "cpu/parallel.h"
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

template <class T, bool kMask, bool kDones>
void advance_row(Tiles<T>& tiles, LaneStates<T>& states, int64_t i, gae::Discounts<T> discounts, bool carry) {
  using Values = typename Vector<T>::Values;
  using Flags = typename Vector<T>::Flags;
  Flags row_counted[sizeof(T)], row_done[sizeof(T)];
  if constexpr (kMask) widen<T>(tiles.counted.at[i], row_counted);
  if constexpr (kDones) widen<T>(tiles.done.at[i], row_done);
  for (int64_t part = 0; part < int64_t(sizeof(T)); ++part) {
    const int64_t lane = part * Vector<T>::kWidth;
    Flags counted = Flags{} == 0, done = {}, pass = {};
    if constexpr (kMask) counted = row_counted[part];
    if constexpr (kMask) pass = ~counted & ((Flags{} + carry) != 0);
    if constexpr (kDones) done = row_done[part];
    const Values reward = counted ? read<Values>(&tiles.rewards.at[i][lane]) : Values{};
    const Values value = counted ? read<Values>(&tiles.values.at[i][lane]) : Values{};
    gae::State<Values> state = {read<Values>(&states.advantage[lane]), read<Values>(&states.next_value[lane])};
    state = gae::advance(state, reward, value, done, pass, discounts);
    write(&states.advantage[lane], state.advantage);
    write(&states.next_value[lane], state.next_value);
    write<Values>(&tiles.rewards.at[i][lane], counted ? state.advantage : Values{});
    write<Values>(&tiles.values.at[i][lane], counted ? state.advantage + value : Values{});
  }
}

template <class T, bool kMask, bool kDones>
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
    if constexpr (kMask) load(tiles.counted, block.mask, args.mask, window);
    if constexpr (kDones) load(tiles.done, block.dones, args.dones, window);
    for (int64_t i = window.rows - 1; i >= 0; --i) {
      advance_row<T, kMask, kDones>(tiles, states, i, discounts, args.carry);
    }
    store(block.advantages, tiles.rewards, window);
    store(block.returns, tiles.values, window);
  }
}

template <class T>
void gae_blocks(const GaeArguments& args, int threads) {
  const int64_t total = args.cu_seqlens == nullptr ? args.sequences * args.steps : args.steps;
  const int64_t useful = std::min<int64_t>(threads, 1 + total / kStepsPerThread);
  const bool mask = args.mask.data != nullptr;
  const bool dones = args.dones.data != nullptr;
  const auto block = mask ? (dones ? gae_block<T, true, true> : gae_block<T, true, false>)
                          : (dones ? gae_block<T, false, true> : gae_block<T, false, false>);
  parallel_for((args.sequences + kLanes - 1) / kLanes, static_cast<int>(useful),
               [&](int64_t i) { block(args, i * kLanes); });
}

}  // namespace

void gae(const GaeArguments& args, Dtype dtype, int threads) {
  if (dtype == Dtype::kFloat64) {
    gae_blocks<double>(args, threads);
  } else {
    gae_blocks<float>(args, threads);
  }
}

}  // namespace ppo_fast::cpu
