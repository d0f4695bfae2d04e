#!/usr/bin/env bash
# Builds, tests and measures the CUDA kernels on a machine with a GPU:
#
#     scripts/gpu_check.sh [--dry-run] [build] [test] [sanitize] [bench]
#
# All stages without one named. A stage that fails does not keep the next from running; the exit status says whether
# all that ran passed. Takes some minutes, and of Python packages nothing but torch, pytest and setuptools (ninja makes
# the build parallel); no network. Of the environment:
#
#     OUT      where logs, CSV and JSON files go (default: gpu_check_results)
#     PYTHON   the interpreter (default: python3)
#     LIMIT    seconds that all of it may take (default: 530)
#
# --dry-run prints the commands only.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly ALL_STAGES=(build test sanitize bench)
readonly MISSING=77 # exit status of a stage that lacks what it works with

python=${PYTHON:-python3}
out=${OUT:-gpu_check_results}
limit=${LIMIT:-530}
dry_run=false
stages=()

usage() {
    echo "usage: scripts/gpu_check.sh [--dry-run] [${ALL_STAGES[*]}]" >&2
    exit 2
}

for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=true ;;
        build | test | sanitize | bench) stages+=("$argument") ;;
        *) echo "gpu_check: no stage or option '$argument'" >&2 && usage ;;
    esac
done
[[ ${#stages[@]} -gt 0 ]] || stages=("${ALL_STAGES[@]}")

say() { printf 'gpu_check: %s\n' "$*"; }

# run SECONDS COMMAND...: prints the command and, unless told not to, runs it that long at most, within the limit.
run() {
    local seconds=$1 left=$((limit - SECONDS))
    shift
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    if $dry_run; then
        return
    elif ((left <= 0)); then
        say "no time left: LIMIT=$limit"
        return 124
    fi
    timeout --kill-after=10 "$((seconds < left ? seconds : left))" "$@"
}

has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

# In a dry run everything is there.
have() { $dry_run || "$@"; }

# The tests below skip what cannot run; here, that is a failure.
require_cuda_kernels() {
    run 60 "$python" -c "import torch; from gam_fused import kernels; kernels.resolve('native', torch.device('cuda', 0))
print(torch.__version__, torch.cuda.get_device_name())"
}

# Deprecations in a PyTorch newer than this checkout are no failure of the kernels.
pytest_options=(-p no:cacheprovider -o minversion=7 -W default)

# pytest SECONDS ARGUMENT...
pytest() {
    local seconds=$1
    shift
    run "$seconds" env PYTHONUNBUFFERED=1 "$python" -m pytest "${pytest_options[@]}" "$@"
}

# In place, so that nothing has to be writable but this folder. Without GAM_FUSED_NATIVE=1: calls past the dispatcher
# are for the CPU, and a PyTorch that they do not compile with is no reason to stop.
stage_build() {
    local architectures # of this machine only
    architectures=$("$python" -c "import torch
print(';'.join(sorted({'%d.%d' % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})))") ||
        architectures=
    run 240 env GAM_FUSED_CUDA=1 ${architectures:+"TORCH_CUDA_ARCH_LIST=$architectures"} \
        "$python" setup.py build_ext --inplace
    require_cuda_kernels
}

stage_test() {
    local failed=false with_cuda_tests
    require_cuda_kernels
    # Up to here and no further for a conftest.py: that of all tests takes packages that may not be there.
    pytest 180 --confcutdir=tests/gpu tests/gpu -m cuda || failed=true
    if have has_module hypothesis; then
        mapfile -t with_cuda_tests < <(grep -rl 'mark\.cuda' tests --include='*.py' --exclude-dir=gpu |
            sed 's|/conftest\.py$||' | sort)
        pytest 180 "${with_cuda_tests[@]}" -m cuda || failed=true
    else
        say "hypothesis is not installed: of the tests, only those in tests/gpu were run"
    fi
    ! $failed
}

# Without the caching allocator, every tensor is an allocation of its own, whose bounds memcheck knows.
stage_sanitize() {
    local failed=false tool
    if ! have command -v compute-sanitizer >/dev/null; then
        say "compute-sanitizer is not on PATH"
        return $MISSING
    fi
    require_cuda_kernels
    for tool in memcheck racecheck; do
        run 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest "${pytest_options[@]}" --confcutdir=tests/gpu tests/gpu \
            -m cuda -k "misaligned_tensors and (fp32 or bf16)" || failed=true
    done
    ! $failed
}

stage_bench() {
    local failed=false
    require_cuda_kernels
    run 180 "$python" -m benchmarks.bench_kernels --device cuda --dtype fp32,bf16 --repeats 9 \
        --csv "$out/bench_kernels.csv" --json "$out/bench_kernels.json" || failed=true
    run 90 "$python" -m benchmarks.bench_second_order --device cuda --dtype fp32,bf16 --repeats 9 \
        --json "$out/bench_second_order.json" || failed=true
    if [[ -e benchmarks/bench_step.py ]]; then
        run 120 "$python" -m benchmarks.bench_step --device cuda --csv "$out/bench_step.csv" || failed=true
    else
        say "there is no benchmarks/bench_step.py"
    fi
    ! $failed
}

$dry_run || mkdir -p "$out"
declare -A results
failed=false
for stage in "${stages[@]}"; do
    say "$stage"
    # As the condition of an `if`, the stage would run with `set -e` off.
    set +e
    if $dry_run; then
        (set -e; "stage_$stage")
        status=$?
    else
        (set -e; "stage_$stage") 2>&1 | tee "$out/$stage.log"
        status=${PIPESTATUS[0]}
    fi
    set -e
    case $status in
        0) results[$stage]=passed ;;
        "$MISSING") results[$stage]="not run: something is missing" ;;
        *) results[$stage]="FAILED with status $status" && failed=true ;;
    esac
done

$dry_run && exit
say "summary, logs in $out"
for stage in "${stages[@]}"; do
    printf '  %-10s%s\n' "$stage" "${results[$stage]}"
done | tee "$out/summary.txt"
! $failed
