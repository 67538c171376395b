"""How long all 42 CIFAR-10 runs of SADT's Table 1 take at their published lengths on this machine.

    SADT_DATA=cifar10.tgz python -m benchmarks.table1
        [--workers 12] [--scale .03] [--amp bf16] [--compile default] [--only sadt1 ...] [--out FILE]

All runs are trained for a share of their epochs, `--workers` of them at the same time, the longest first. The
seconds of a whole run are its published epochs times the median over its epochs at that concurrency, without
the first epoch. The time of the table is the sum of these seconds divided by the number of workers.

`busy` is the share of the measurement in which a worker was training; `minutes_at_full_concurrency` is the
time in which all workers were training."""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from sadt_nb.experiments.cost import run_cost
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.run_folder import provenance, write_json
from sadt_nb.papers.grids import paper_grid, scaled


def timeline(runs, root):
    "Return when each run began and ended, in seconds since the epoch, from its stored result."
    spans = []
    for cfg in runs:
        file = Path(root) / cfg.name / 'result.json'
        end = file.stat().st_mtime
        spans.append((end - json.loads(file.read_text())['wall_seconds'], end))
    return spans


def at_full_concurrency(spans, workers):
    "Return the seconds in which at least `workers` runs were trained at the same time."
    starts = [(begin, 1) for begin, _ in spans]
    ends = [(end, -1) for _, end in spans]
    total = 0.
    running = 0
    since = None
    for t, change in sorted(starts + ends):
        if running >= workers: total += t - since
        running += change
        since = t
    return total


def share_busy(spans, workers):
    "Return the share of the time from the first start to the last end in which a worker was training."
    begins, ends = zip(*spans)
    trained = sum(end - begin for begin, end in spans)
    return trained / workers / (max(ends) - min(begins))


def projected(cfg, short, root):
    "Return the seconds of a whole run, from the median epoch of its short form."
    history = json.loads((Path(root) / short.name / 'history.json').read_text())
    epochs = [row['seconds'] for row in history]
    seconds = statistics.median(epochs[1:] or epochs)
    whole = cfg.epochs * seconds
    return dict(epochs=cfg.epochs, measured=len(epochs), seconds_per_epoch=seconds, seconds=whole)


def measure(workers, scale, only=(), **changes):
    cells = [c for c in paper_grid('sadt/table1') if c.run.data == 'cifar10']
    whole = [c.run.but(**changes) for c in cells if not only or c.run.method in only]
    whole.sort(key=lambda r: -run_cost(r).flops)
    short = {r: scaled(r, scale) for r in whole}
    rows = {}
    with tempfile.TemporaryDirectory() as root:
        start = time.time()
        results = run_grid(short.values(), root, workers)
        elapsed = time.time() - start
        failed = [r for r in results if isinstance(r, Exception)]
        if failed: raise failed[0]
        spans = timeline(short.values(), root)
        for r, s in short.items(): rows[f'{r.method} · {r.model} · {r.bs}'] = projected(r, s, root)
    total = sum(row['seconds'] for row in rows.values())
    full = at_full_concurrency(spans, workers)
    found = dict(runs=len(rows), elapsed=elapsed, minutes_at_full_concurrency=full / 60,
                 busy=share_busy(spans, workers), minutes=total / workers / 60)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    return dict(workers=workers, scale=scale, **changes, **found, rows=rows, **provenance(device))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--workers', type=int, default=12)
    p.add_argument('--scale', type=float, default=.03)
    p.add_argument('--amp', default='')
    p.add_argument('--compile', default='')
    p.add_argument('--only', nargs='+', default=())
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    r = measure(a.workers, a.scale, a.only, amp=a.amp, compile=a.compile)
    print(f'{r["runs"]} runs, {r["workers"]} at a time: {r["minutes"]:.0f} min at the published lengths; '
          f'measured for {r["elapsed"]:.0f} s, {r["minutes_at_full_concurrency"]:.1f} min of it '
          'with all workers training')
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, r)


if __name__ == '__main__': main()
