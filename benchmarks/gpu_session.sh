#!/usr/bin/env bash
# One session on a machine with an NVIDIA GPU, in at most nine minutes: build, test, measure, profile, short table last.
#
#     bash benchmarks/gpu_session.sh [folder for logs and figures; default: $OUT, else benchmarks/results/gpu]
#
# Needs: Python with torch (CUDA) and triton, pybind11, pytest, a C++ compiler; no network. Nothing stops at a part that
# fails; the summary says how each one ended. Knobs: PYTHON, MODEL_SHAPES, RANKS, DTYPES, SECONDS_PER_CASE, TUNE (1: look for launch
# configurations first, for 80 seconds in place of the other tests, and measure with the table that comes out), and for a rehearsal without a GPU: DEVICE=cpu TESTS=tests/test_benchmarks.py MODEL_SHAPES=minilm BIG_SHAPES=minilm TOKENS=64 RANKS=8 DTYPES=float32
# SECONDS_PER_CASE=0.1 bash benchmarks/gpu_session.sh /tmp/rehearsal
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${1:-${OUT:-benchmarks/results/gpu}}
DEVICE=${DEVICE:-cuda}
MODEL_SHAPES=${MODEL_SHAPES:-roberta-base,llama3-8b}
BIG_SHAPES=${BIG_SHAPES:-llama3-8b}
TOKENS=${TOKENS:-8192}
RANKS=${RANKS:-16,64}
DTYPES=${DTYPES:-float32,bfloat16}
SECONDS_PER_CASE=${SECONDS_PER_CASE:-1}
TESTS=${TESTS:-tests}
# What only a GPU can show: tested first, with time of its own.
GPU_TESTS=${GPU_TESTS:-tests/triton_kernels tests/test_capturable.py}
TUNE=${TUNE:-0}
TEST_SECONDS=80
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
  [ "$DEVICE" = cpu ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
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

# The limits add up to nine minutes: 90 + 75 + 75 + 65 + 80 + 40 + 40 + 35 + 25 + 15. What matters most comes first: each part writes its rows as
# it goes, and one that runs out of time has those before.
bench() {  # bench NAME SECONDS OPTIONS...: some suites, into $OUT/$DEVICE.csv
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$PYTHON" -m benchmarks --device "$DEVICE" --tokens "$TOKENS" --out "$OUT/$DEVICE.csv" "$@"
}
if [ "$TUNE" = 1 ]; then
  part tune 80 "$PYTHON" -m benchmarks.tune --device "$DEVICE" --rank "${RANKS%%,*}" --dtype "${DTYPES##*,}" --tokens "$TOKENS" \
    --seconds 65 --out "$OUT/tuned.json"
  [ -e "$OUT/tuned.json" ] && export LOWRANK_KERNELS_TUNED=$OUT/tuned.json
  TEST_SECONDS=0
fi
bench forward 75 --suite forward --model-shapes "$BIG_SHAPES" --rank 16 --dtype "${DTYPES##*,}" --seconds "$SECONDS_PER_CASE" --compile-seconds 15
# OPLoRA's step keeps S and X of every layer: of 256 tokens, else they alone are 80 GiB. The optimizers come first; loops over SVDs are slow.
bench operations 75 --suite optimizer,linalg --model-shapes "$MODEL_SHAPES" --rank "$RANKS" --dtype "$DTYPES" \
  --seconds "$SECONDS_PER_CASE" --compile-seconds 0 --tokens 256
pytest=("$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider)
# On a fresh machine the tests' time is the compiler's: hundreds of kernels, each on one core.
processes=$(nproc)
"$PYTHON" -c 'import xdist' 2>/dev/null && pytest+=(-n "$((processes < 8 ? processes : 8))" --dist worksteal)
# shellcheck disable=SC2086
part gpu_tests 65 "${pytest[@]}" --ignore=tests/triton_kernels/test_triton_aot.py $GPU_TESTS
if [ "$TEST_SECONDS" != 0 ]; then
  part tests "$TEST_SECONDS" "${pytest[@]}" $(printf -- '--ignore=%s ' $GPU_TESTS) "$TESTS"
fi
bench step 40 --suite step --model-shapes "$BIG_SHAPES" --rank 16 --dtype "${DTYPES##*,}" --seconds "$SECONDS_PER_CASE"
bench scaling 40 --suite scaling,memory --model-shapes "$BIG_SHAPES" --rank 16 --dtype float32 --seconds "$SECONDS_PER_CASE"
bench init 35 --suite init --model-shapes "$BIG_SHAPES" --rank 16 --dtype float32 --seconds "$SECONDS_PER_CASE"
if [ "$DEVICE" = cuda ] && command -v ncu >/dev/null; then
  # Our kernels by exclusion of torch's: Triton names them after their functions.
  part profile 25 ncu --clock-control none --kill yes --launch-count 12 \
    --kernel-name 'regex:^(?!.*(elementwise|reduce|distribution|gemm|cutlass|nvjet|fill|copy|spin)).*_kernel$' \
    --section SpeedOfLight --section LaunchStats --section MemoryWorkloadAnalysis \
    "$PYTHON" -m benchmarks --device cuda --suite forward,linalg,optimizer --model-shapes llama3-8b --rank 16 --dtype bfloat16 \
    --tokens "$TOKENS" --seconds 0 --compile-seconds 0 --provider ours-triton --out "$elsewhere/profile.csv"
else
  summary+=("profile    no ncu here")
fi
part plots 15 "$PYTHON" -m benchmarks plot "$OUT/$DEVICE.csv"

echo
for name in forward operations step scaling init; do
  grep -h "│" "$OUT/$name.log" | grep -E "naive|ours-(triton|native|optimizer|AdamW|SDSLoRA|AltLoRAPlus)|torch-|frozen|peft" | cut -c1-140 | tail -n 24
done
echo
cat "$OUT/machine.txt"
printf '%s\n' "${summary[@]}"
# A device machine may hand back a few files only: the rows, a table that was tuned, and all else in one.
cd "$OUT" && find . -type f ! -name "$DEVICE.csv" ! -name tuned.json ! -name session.tar.gz >"$elsewhere/rest" &&
  tar -czf session.tar.gz -T "$elsewhere/rest" && xargs -d '\n' rm -f <"$elsewhere/rest" && find . -mindepth 1 -type d -empty -delete
