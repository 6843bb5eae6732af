#!/usr/bin/env bash
# What needs a GPU, in phases of minutes each, from the repository root; no network needed.
#
#   benchmarks/gpu.sh test  [OUT]   build with CUDA, then the tests marked gpu
#   benchmarks/gpu.sh bench [OUT]   every benchmark suite; JSON under benchmarks/results/DEVICE/
#   benchmarks/gpu.sh tune  [OUT]   block sizes of the Triton kernels against the bandwidth limit
#   benchmarks/gpu.sh 7b    [OUT]   a PPO update of a 7B by each preset, in the memory that it is for
#   benchmarks/gpu.sh rollout [OUT] sampling from a 7B: the phase, its parts, with and without adapters
#
# Logs and results are copied to OUT (default: build/gpu). The last lines are a short table.
set -euo pipefail
cd "$(dirname "$0")/.."
phase=${1:?phase: test, bench, tune, 7b or rollout}
out=${2:-build/gpu}
mkdir -p "$out"
export PYTHONUNBUFFERED=1

build() {
  PPO_FAST_CUDA=1 python3 -m pip install -q --no-build-isolation --no-deps --no-warn-script-location -e .
  python3 -m ppo_fast.cli doctor
}

# leg PRESET GIB SECONDS [OPTION ...]: updates of one epoch, or the reason why not.
leg() {
  local name=$1-$2
  echo "== $1 in $2 GiB"
  timeout "$3" python3 -m benchmarks.bench_7b --preset "$1" --cap "$2" --model "${PPO_FAST_7B:-qwen2.5-7b}" --out "$out" \
    --set optim.epochs=1 "${@:4}" 2>&1 | tee "$out/$name.log" | tail -n 9 || echo "exit status ${PIPESTATUS[0]}"
}

case $phase in
  test)
    build
    set +e
    timeout 480 python3 -m pytest -q -p no:benchmark -n 6 -m "gpu and not slow" tests 2>&1 | tee "$out/test.log" | tail -n 40
    exit "${PIPESTATUS[0]}"
    ;;
  bench)
    build >/dev/null
    timeout 500 python3 -m benchmarks.run 2>&1 | tee "$out/bench.log" | tail -n 5 || true
    cp benchmarks/results/*H*/*.json "$out"/ 2>/dev/null || cp benchmarks/results/*/*.json "$out"/
    python3 benchmarks/tables.py --print "$out"/*.json
    ;;
  tune)
    build >/dev/null
    timeout 500 python3 -m benchmarks.tune --json "$out/tune.json"
    ;;
  7b)
    build >/dev/null
    leg 7b-80g-lora 80 230
    leg 7b-24g 24 140 --updates 1
    leg 7b-80g-full 80 150
    ;;
  rollout)
    build >/dev/null
    timeout 110 python3 -m benchmarks.bench_rollout --scale 7b --rounds 2 --out "$out" 2>&1 | tee "$out/rollout.log" | tail -n 4
    ;;
  *)
    echo "phase: expected test, bench, tune, 7b or rollout, got $phase" >&2
    exit 2
    ;;
esac
