// One step of generalized advantage estimation, on scalars or on vectors of sequences.
#pragma once

#include "gae/arguments.h"

namespace ppo_fast::gae {

template <class T>
struct Discounts {
  T gamma;
  T gamma_lam;  // the product is taken in double and rounded once
};

template <class T>
Discounts<T> discounts_of(const GaeArguments& args) {
  return {static_cast<T>(args.gamma), static_cast<T>(args.gamma * args.lam)};
}

// State that a step hands to the step before it.
template <class T>
struct State {
  T advantage;
  T next_value;
};

// One step of the recursion, without a branch. `done` cuts the state off; `pass` hands it on unchanged.
// T is float or double. V and Flag are T and bool, or vectors of T and of integer masks of its width.
template <class V, class Flag, class T>
PPO_FAST_HOST_DEVICE State<V> advance(State<V> after, V reward, V value, Flag done, Flag pass, Discounts<T> discounts) {
  const V next_value = done ? V{} : after.next_value;
  const V next_advantage = done ? V{} : after.advantage;
  const V delta = (reward + discounts.gamma * next_value) - value;
  const V advantage = delta + discounts.gamma_lam * next_advantage;
  return {pass ? after.advantage : advantage, pass ? after.next_value : value};
}

}  // namespace ppo_fast::gae
