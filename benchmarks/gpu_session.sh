#!/usr/bin/env bash
# One session on a machine with an NVIDIA GPU, in at most nine minutes: build, test, measure, profile, short table last.
#
#     bash benchmarks/gpu_session.sh [folder for logs and figures; default: $OUT, else benchmarks/results/gpu]
#
# Needs: Python with torch (CUDA) and triton, pybind11, pytest, a C++ compiler; no network. Nothing stops at a part that
# fails; the summary says how each one ended. Knobs: PYTHON, MODEL_SHAPES, RANKS, DTYPES, SECONDS_PER_CASE.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${1:-${OUT:-benchmarks/results/gpu}}
MODEL_SHAPES=${MODEL_SHAPES:-minilm,roberta-base,llama-1b,llama3-8b}
RANKS=${RANKS:-16,64}
DTYPES=${DTYPES:-float32,bfloat16}
SECONDS_PER_CASE=${SECONDS_PER_CASE:-1.5}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 LOWRANK_KERNELS_REQUIRE_NATIVE=1
summary=()

part() {  # part NAME SECONDS COMMAND...: run with a time limit, log to $OUT/NAME.log, note how it ended
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  tail -n 8 "$OUT/$name.log"
  case $code in 0) code=ok ;; 124 | 137) code="out of time" ;; *) code="failed ($code)" ;; esac
  summary+=("$(printf '%-10s %-14s %4d s  %s' "$name" "$code" $((SECONDS - start)) "$(tail -n 1 "$OUT/$name.log" | cut -c1-90)")")
}

{
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$PYTHON" -c 'import sys, torch, triton; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)'
} 2>&1 | tee "$OUT/machine.txt"

part build 90 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --force-reinstall .
# The tests and benchmarks must run what was installed, with its compiled part, not the sources beside them.
export PYTHONSAFEPATH=1
elsewhere=$(mktemp -d)
for entry in *; do
  [ "$entry" = lowrank_kernels ] || cp -r "$entry" "$elsewhere"
done
case $OUT in /*) ;; *) OUT=$PWD/$OUT ;; esac
cd "$elsewhere" || exit 1
export PYTHONPATH=$elsewhere

part tests 240 "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider tests
part bench 140 "$PYTHON" -m benchmarks --device cuda --model-shapes "$MODEL_SHAPES" --rank "$RANKS" --dtype "$DTYPES" \
  --seconds "$SECONDS_PER_CASE" --out "$OUT/cuda.csv"
if command -v ncu >/dev/null; then
  # Our kernels by exclusion of torch's: Triton names them after their functions.
  part profile 60 ncu --clock-control none --kill yes --launch-count 12 \
    --kernel-name 'regex:^(?!.*(elementwise|reduce|distribution|gemm|cutlass|nvjet|fill|copy|spin)).*_kernel$' \
    --section SpeedOfLight --section LaunchStats --section MemoryWorkloadAnalysis \
    "$PYTHON" -m benchmarks --device cuda --model-shapes llama3-8b --rank 16 --seconds 0 --provider ours-triton --out "$elsewhere/profile.csv"
else
  summary+=("profile    no ncu here")
fi

echo
grep -h "┃\|│" "$OUT/bench.log" | cut -c1-150 | tail -n 60
echo
cat "$OUT/machine.txt"
printf '%s\n' "${summary[@]}"
