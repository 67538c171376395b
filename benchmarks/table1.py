"""How long all 42 CIFAR-10 runs of SADT's Table 1 take at their published lengths on this machine.

    SADT_DATA=cifar10.tgz python -m benchmarks.table1 [--workers 12] [--scale .03] [--amp bf16] [--compile default] [--only sadt1 ...] [--out FILE]

All runs are trained for a share of their epochs, `--workers` of them at the same time, the longest first. The seconds of a whole run are its
published epochs times the median over its epochs, the first left out, at that concurrency; the table takes their sum divided by the number of
workers. `busy` is the share of the measurement in which a worker was training, and `minutes_at_full_concurrency` how long all of them were."""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.papers import paper_grid, scaled
from sadt_nb.experiments.cost import run_cost
from sadt_nb.experiments.runner import provenance, write_json


def timeline(runs, root):
    "When each run began and ended, in seconds since the epoch, from its stored result."
    spans = []
    for cfg in runs:
        folder = Path(root) / cfg.name
        r = json.loads((folder / 'result.json').read_text())
        end = (folder / 'result.json').stat().st_mtime
        spans.append((end - r['wall_seconds'], end))
    return spans


def at_full_concurrency(spans, workers):
    "Seconds in which so many runs were under way."
    total, running, since = 0., 0, None
    for t, change in sorted([(a, 1) for a, _ in spans] + [(b, -1) for _, b in spans]):
        if running >= workers: total += t - since
        running, since = running + change, t
    return total


def measure(workers, scale, only=(), **changes):
    whole = [c.run.but(**changes) for c in paper_grid('sadt/table1') if c.run.data == 'cifar10' and (not only or c.run.method in only)]
    whole.sort(key=lambda r: -run_cost(r).flops)
    short = {r: scaled(r, scale) for r in whole}
    with tempfile.TemporaryDirectory() as root:
        start = time.time()
        results = run_grid(short.values(), root, workers)
        elapsed = time.time() - start
        failed = [r for r in results if isinstance(r, Exception)]
        if failed: raise failed[0]
        spans = timeline(short.values(), root)
        rows = {}
        for r, s in short.items():
            epochs = [h['seconds'] for h in json.loads((Path(root) / s.name / 'history.json').read_text())]
            seconds = statistics.median(epochs[1:] or epochs)
            rows[f'{r.method} · {r.model} · {r.bs}'] = dict(epochs=r.epochs, measured=len(epochs), seconds_per_epoch=seconds, seconds=r.epochs * seconds)
    total = sum(r['seconds'] for r in rows.values())
    first = min(a for a, _ in spans)
    return dict(workers=workers, scale=scale, **changes, runs=len(rows), elapsed=elapsed, minutes_at_full_concurrency=at_full_concurrency(spans, workers) / 60,
                busy=sum(b - a for a, b in spans) / workers / (max(b for _, b in spans) - first), minutes=total / workers / 60, rows=rows, **provenance(torch.device('cuda' if torch.cuda.is_available() else 'cpu')))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--workers', type=int, default=12); p.add_argument('--scale', type=float, default=.03); p.add_argument('--amp', default=''); p.add_argument('--compile', default='')
    p.add_argument('--only', nargs='+', default=()); p.add_argument('--out', type=Path)
    a = p.parse_args()
    r = measure(a.workers, a.scale, a.only, amp=a.amp, compile=a.compile)
    print(f'{r["runs"]} runs, {r["workers"]} at a time: {r["minutes"]:.0f} min at the published lengths; measured for {r["elapsed"]:.0f} s, {r["minutes_at_full_concurrency"]:.1f} min of it with all workers training')
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, r)


if __name__ == '__main__': main()
