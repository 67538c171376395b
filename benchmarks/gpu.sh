#!/usr/bin/env bash
# What only a GPU can answer, step by step; the results lie in the folder OUT.
#
#   SADT_DATA=cifar10.tgz bash benchmarks/gpu.sh OUT [STEP ...]
#
# STEP is one or more of these, all of them in this order if none is given; the minutes are those of one H100.
#   tests     tests/test_gpu.py: mixed precision, torch.compile, CUDA graphs (2 minutes)
#   table1    how long all 42 CIFAR-10 runs of SADT's Table 1 take side by side (5 minutes)
#   full      the seven runs of that table with Simple CNN in batches of 2,048, to their end; called again, it goes on where it stopped
#   overhead  milliseconds of a step, with and without CUDA graphs, against the sum of its kernels
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1"
out=$(realpath "$1"); shift
cd "$(dirname "$0")/.."
export SADT_DATA=$(realpath "${SADT_DATA:?set it to cifar10.tgz or a folder of images}") PYTHONPATH=$PWD PYTHONWARNINGS=ignore
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo 'no GPU that torch can use'; exit 2; }

# Kernels of several processes run at the same time only under NVIDIA's multi-process service, where there is one
side_by_side() {
    local mps=0
    nvidia-cuda-mps-control -d 2>/dev/null && mps=1
    OMP_NUM_THREADS=1 "$@" || { [ $mps = 0 ] || echo quit | nvidia-cuda-mps-control; return 1; }
    [ $mps = 0 ] || echo quit | nvidia-cuda-mps-control
}

for step in "${@:-tests table1 full overhead}"; do for s in $step; do
    echo "== $s"
    case $s in
        tests) python -m pytest -q tests/test_gpu.py | tee "$out/tests.log" ;;
        table1) side_by_side python -m benchmarks.table1 --workers 14 --scale .045 --amp bf16 --out "$out/table1.json" ;;
        full) side_by_side python -c 'from sadt_nb.experiments.cli import sadt_grid; sadt_grid()' sadt/table1 --root "$out/table1_bf16" --only 'cifar10 simple_cnn 2048' --amp bf16 --workers 7 ;;
        overhead) python -m benchmarks.throughput --part overhead --repeats 3 --device cuda --out "$out/throughput.json" ;;
        *) echo "unknown step $s: tests, table1, full or overhead"; exit 2 ;;
    esac
done; done
