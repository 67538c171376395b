#!/usr/bin/env bash
# A queue of what only a GPU can answer; small results are put into the folder OUT.
#
#   SADT_DATA=cifar10.tgz bash benchmarks/gpu.sh OUT [JOB ...]
#   MINUTES=9 RUNS=scratch BEFORE=earlier SADT_DATA=cifar10.tgz bash benchmarks/gpu.sh OUT
#
# Without a JOB, all that OUT/done.txt does not name, in this order: most claims a minute first. Claims are
# rows of a table that are compared with plain training, or limits of a benchmark. The minutes are those of
# one H100. E: an estimate, from floating point operations. M: measured, but on an H200.
#
#   job          minutes  claims  a minute  what
#   tests          2 E       -       -      tests/test_gpu.py; everything else relies on what it tests
#   fast           9 E      26     2.9      grid fast/94, 81 runs (27 rows, 3 seeds), 8 at a time
#   noise          9 E      26     2.9      grid fast/94_noise40, 81 runs, 8 at a time
#   small          9 E      26     2.9      grid fast/small, 81 runs, 14 at a time
#   quarter        9 E      26     2.9      grid fast/quarter_noise40, 81 runs, 14 at a time
#   rounds         3 E       6     2.0      grid fast/94_rounds, 20 runs: 5 chains side by side, then 30 ensembles
#   fastbench      5 E       7     1.4      benchmarks.fast: Learner and bare loop, steps, whole runs
#   full           5.5 M     6     1.1      SADT's Table 1, Simple CNN in batches of 2,048, 7 at a time
#   overhead       3 E       2     0.7      milliseconds of a step, of its kernels, and with CUDA graphs
#   controls      27 E      18     0.7      the controls of that table on CIFAR-10 in bfloat16, 18 runs, 14 at a time
#   seeds         29 E      18     0.6      Simple CNN of that table and its controls, three seeds, 60 runs, 14 at a time
#   table1_rest   80 M      30     0.4      all 42 CIFAR-10 runs of that table in bfloat16, 14 at a time
#   fast96        83 E      26     0.3      grid fast/96, 81 runs, 6 at a time
#   table1         4.5 M     1     0.2      how long those 42 runs take, projected from 4.5% of their epochs
#   sam_study     26 E       3     0.1      grids sam_study/a_code and c_code, 6 and 11 runs
#   saf_table3   260 E       3     0.01     'cifar10 resnet18' of saf/table3_code, 12 runs; with AMP=bf16 160 E
#   saf_paper    260 E       3     0.01     the same rows of saf/table3, 12 runs; with AMP=bf16 160 E
#   distill     1460 E       6     0.004    'resnet18 0.5' of distill/table2, 24 runs; with AMP=bf16 900 E
#
# full, controls, seeds and table1_rest share one folder, so a run of several of them is trained once. The
# baselines with which controls and seeds are compared are in it, too: those of full, seeds and table1_rest.
# rounds compares three students with their teacher, and three ensembles of rounds with independent ones. An
# ensemble needs the weights of its networks; if RUNS was lost between two calls, some are left out.
#
# MINUTES  No job begins after so many minutes, and what is under way is interrupted then. Runs continue from
#          their last checkpoint, half a minute or an epoch old. Leave a minute for the packing.
# RUNS     Folder of the runs with weights and checkpoints; OUT if it is not set. OUT gets one small file of
#          finished runs from each grid, such as fast_94.tar.gz (benchmarks.pack_runs), and a later call reads it.
# BEFORE   OUT of an earlier call, on another machine perhaps: what is finished there is not done again.
# AMP      Mixed precision of sam_study, saf_table3, saf_paper and distill, bf16 or fp16. Without it, these
#          jobs train in the precision of their presets; the presets `_code` have that of the authors' programs.
#
# A grid of which some runs failed counts as done. Name the job to try them again, or to train the rows that a
# preset has got since the job was done.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 2; }
queue='tests fast noise small quarter rounds fastbench full overhead controls seeds table1_rest fast96 table1'
queue+=' sam_study saf_table3 saf_paper distill'
mkdir -p "$1"
out=$(realpath "$1"); shift
runs=$(realpath -m "${RUNS:-$out}")
before=${BEFORE:+$(realpath "$BEFORE")}
[ -z "$before" ] || [ -d "$before" ] || { echo "BEFORE must be a folder, got $BEFORE"; exit 2; }
limit=0
if [ -n "${MINUTES:-}" ]; then
    limit=$(awk -v m="$MINUTES" 'BEGIN { printf "%d", 60 * m }')
    [ "$limit" -gt 0 ] || { echo "MINUTES must be a positive number, got $MINUTES"; exit 2; }
fi
for job in $*; do
    [[ " $queue " == *" $job "* ]] || { echo "unknown job $job; the jobs are: $queue"; exit 2; }
done
cd "$(dirname "$0")/.."
SADT_DATA=$(realpath "${SADT_DATA:?set it to cifar10.tgz or a folder of images}") # `export` would hide a failure
export SADT_DATA
export PYTHONPATH=$PWD PYTHONWARNINGS=ignore
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo 'no GPU that torch can use'
    exit 2
fi
if [ -n "$before" ]; then
    for f in done.txt fast.json throughput.json; do # those that grow
        [ -e "$out/$f" ] || [ ! -e "$before/$f" ] || cp "$before/$f" "$out"
    done
fi
touch "$out/done.txt"
# Decoded once, not by every worker
python -c 'from sadt_nb.data.datasets import load_data; load_data("cifar10")'

# A command for the rest of the time: then SIGINT, and 25 seconds later SIGKILL
limited() {
    [ "$limit" -gt 0 ] || { "$@"; return; }
    local left=$((limit - SECONDS))
    [ $left -gt 0 ] || return 124 # for `timeout` 0 would be no limit
    timeout --foreground -s INT -k 25 $left "$@"
}

# Kernels of several processes run at the same time only under NVIDIA's multi-process service, if it is there
side_by_side() {
    local mps=0 status=0
    nvidia-cuda-mps-control -d 2>/dev/null && mps=1
    OMP_NUM_THREADS=1 "$@" || status=$?
    [ $mps = 0 ] || echo quit | timeout 20 nvidia-cuda-mps-control || true
    return $status
}

# grid NAME FOLDER WORKERS [OPTION ...]: the rest of a grid, in RUNS/FOLDER; then OUT/FOLDER.tar.gz
grid() {
    local name=$1 folder=$2 workers=$3 status=0 pack
    shift 3
    for pack in ${before:+"$before/$folder.tar.gz"} "$out/$folder.tar.gz"; do
        [ ! -e "$pack" ] || python -m benchmarks.pack_runs unpack "$pack" "$runs/$folder" || return
    done
    side_by_side limited python -c "$sadt_grid" "$name" --root "$runs/$folder" --workers "$workers" \
        --minutes .5 "$@" || status=$?
    python -m benchmarks.pack_runs pack "$runs/$folder" "$out/$folder.tar.gz" || return
    return $status
}
# A shell that was started in the background makes its children deaf to SIGINT
sadt_grid='import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from sadt_nb.commands.cli import sadt_grid; sadt_grid()'

# The parts of benchmarks.fast that OUT/fast.json does not have yet
fastbench() {
    local part repeats
    for part in overhead loader methods seconds; do
        ! grep -qs "^ \"$part\":" "$out/fast.json" || continue
        repeats=9
        [ $part != seconds ] || repeats=3
        limited python -m benchmarks.fast --part $part --repeats $repeats --device cuda \
            --out "$out/fast.json" || return
    done
}

# The second grid is trained even if the first one failed
sam_study() {
    local status=0
    grid sam_study/a_code sam_study_a_code 6 "$@" || status=$?
    grid sam_study/c_code sam_study_c_code 11 "$@" || status=$?
    return $status
}

run_job() {
    local amp=${AMP:+--amp $AMP}
    case $1 in
        tests) limited python -m pytest -q tests/test_gpu.py | tee "$out/tests.log" ;;
        fast) grid fast/94 fast_94 8 ;;
        noise) grid fast/94_noise40 fast_94_noise40 8 ;;
        small) grid fast/small fast_small 14 ;;
        quarter) grid fast/quarter_noise40 fast_quarter_noise40 14 ;;
        rounds) grid fast/94_rounds fast_94_rounds 5 ;;
        fastbench) fastbench ;;
        full) grid sadt/table1 table1_bf16 7 --only 'cifar10 simple_cnn 2048' --amp bf16 ;;
        overhead) limited python -m benchmarks.throughput --part overhead --repeats 3 --device cuda \
            --out "$out/throughput.json" ;;
        controls) grid sadt/table1_controls table1_bf16 14 --only cifar10 --amp bf16 ;;
        seeds) grid sadt/table1_seeds table1_bf16 14 --amp bf16 ;;
        table1_rest) grid sadt/table1 table1_bf16 14 --only cifar10 --amp bf16 ;;
        fast96) grid fast/96 fast_96 6 ;;
        table1) side_by_side limited python -m benchmarks.table1 --workers 14 --scale .045 --amp bf16 \
            --out "$out/table1.json" ;;
        sam_study) sam_study $amp ;;
        saf_table3) grid saf/table3_code saf_table3_code 12 --only 'cifar10 resnet18' $amp ;;
        saf_paper) grid saf/table3 saf_table3_paper 12 --only 'cifar10 resnet18' $amp ;;
        distill) grid distill/table2 distill_table2 6 --only 'resnet18 0.5' $amp ;;
    esac
}

failed=''
for job in ${*:-$queue}; do
    [ $# -gt 0 ] || ! grep -qx "$job" "$out/done.txt" || continue # a job that is named is done again
    if [ "$limit" -gt 0 ] && [ $SECONDS -ge "$limit" ]; then
        echo "== the time is over; $job and what follows it are left for the next call"
        break
    fi
    echo "== $job, after $SECONDS s"
    status=0
    run_job "$job" || status=$?
    case $status in
        0) grep -qx "$job" "$out/done.txt" || echo "$job" >> "$out/done.txt" ;;
        124 | 137) echo "== $job was interrupted after $SECONDS s; called again, it goes on" ;;
        *) echo "== $job failed with status $status"; failed+=" $job" ;;
    esac
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
