#!/usr/bin/env bash
# Everything that needs a GPU, in phases, from the repository root; no network needed.
#
#   benchmarks/gpu.sh PHASE [PHASE ...]      any number of phases that fit nine minutes together
#
#   test     1 min    the tests marked gpu
#   ops      3 min    the ops against their peers and the card's limits
#   tiles    2 min    block sizes of the Triton kernels against the bandwidth limit
#   rollout  2 min    tokens per second of the rollout engines
#   7b       2 min    PPO updates of a 7B, in the memory that its preset is for
#   profile  2 min    the kernels of an update
#   trl      1 min    an iteration of TRL and ours, 0.5 billion weights
#   sharded  1 min    a world of one by the path of several GPUs: the bits of the plain one, and the ratio of their time
#
# First it builds for this card's architecture. Results go to benchmarks/results/DEVICE/, logs and copies of the results
# to $OUT (default: build/gpu). A phase that runs past its minutes is stopped. The last lines are a short table.
set -uo pipefail
cd "$(dirname "$0")/.."
phases="test ops tiles rollout 7b profile trl sharded"
out=${OUT:-build/gpu}
export PYTHONUNBUFFERED=1

minutes() {
  case $1 in
    test | trl | sharded) echo 1 ;;
    ops) echo 3 ;;
    *) echo 2 ;;
  esac
}

start() {
  case $1 in
    test) python3 -m pytest -q -p no:benchmark -n 6 -m "gpu and not slow" tests ;;
    ops) python3 -m benchmarks.ops ;;
    tiles) python3 -m benchmarks.tune --json "$out/tiles.json" ;;
    rollout) python3 -m benchmarks.bench_rollout --scale 7b --rounds 2 --out "$out" ;;
    7b) python3 -m benchmarks.bench_7b --preset "${PPO_FAST_PRESET:-7b-80g-lora}" --cap 80 --set optim.epochs=1 \
      --model "${PPO_FAST_7B:-qwen2.5-7b}" --out "$out" ;;
    profile) python3 -m benchmarks.profile_update --size mid ;;
    trl) python3 -m benchmarks.trl_at_size --out "$out" ;;
    sharded) python3 -m benchmarks.sharded --json "$out/sharded.json" ;;
  esac
}

for phase in "$@"; do
  if [[ " $phases " != *" $phase "* ]]; then
    echo "phase: expected one of $phases, got $phase" >&2
    exit 2
  fi
done
if [[ $# == 0 ]]; then
  echo "phase: expected one of $phases, got none" >&2
  exit 2
fi

mkdir -p "$out"
out=$(realpath "$out")
export out
export -f start
PPO_FAST_CUDA_ARCHS=$(python3 -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') &&
  export PPO_FAST_CUDA_ARCHS &&
  PPO_FAST_CUDA=1 python3 -m pip install -q --no-build-isolation --no-deps --no-warn-script-location -e . || exit 1
python3 -m ppo_fast.cli doctor >"$out/doctor.log"

table=()
failed=0
for phase in "$@"; do
  echo "== $phase"
  begin=$SECONDS
  timeout $(($(minutes "$phase") * 60)) bash -c "start $phase" >"$out/$phase.log" 2>&1
  status=$?
  tail -n 80 "$out/$phase.log"
  [[ $status == 0 ]] || failed=1
  table+=("$(printf '%-8s %4d s  exit status %-3d  %s' "$phase" $((SECONDS - begin)) $status "$(tail -n 1 "$out/$phase.log" | cut -c 1-100)")")
done
cp benchmarks/results/*H[0-9]*/*.json "$out"/ 2>/dev/null
echo "== all"
printf '%s\n' "${table[@]}"
exit $failed
