"""What a training step of each method costs, as a ratio to the plain step of the same Learner.

    python -m benchmarks.step_cost [--model simple_cnn] [--bs 512] [--repeats 9] [--out FILE]

All methods take turns within one process, round after round, so that a machine whose speed drifts is equally slow for all;
the first round is not counted. Printed and stored: median, smallest and largest ratio over the rounds, and passes per step."""
import argparse
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)

import torch
from sadt_nb.experiments.runner import _hardware, _versions, keep_pages, write_json
from sadt_nb.core.optim import keras_adam
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.registry import make_model
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner

CASES = {name: (name, {}) for name in METHODS} | {'sadt2 (code)': ('sadt2', dict(spec='code')), 'sadt2, two full passes': ('sadt2', dict(share_trunk=False))}


def stepper(method, options, model, bs):
    "A function that makes one training step of a Learner in the middle of a fit."
    torch.manual_seed(0)
    net = make_model(model, init='keras').to(memory_format=torch.channels_last)
    batch = torch.rand(bs, 3, 32, 32).to(memory_format=torch.channels_last), torch.rand(bs, 10).softmax(1)
    cbs = make_method(method, **options)
    learn = Learner(DataLoaders([batch], [batch]), net, loss_func=torch.nn.CrossEntropyLoss(), opt_func=keras_adam, lr=1e-4, default_cbs=False, cbs=[TrainEvalCallback(), *cbs])
    learn.create_opt()
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, learn.dls.train, 10**9
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    return lambda: learn.one_batch(0, batch)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='simple_cnn'); p.add_argument('--bs', type=int, default=512)
    p.add_argument('--repeats', type=int, default=9); p.add_argument('--out', type=Path)
    a = p.parse_args()
    keep_pages()
    steps = {name: stepper(m, o, a.model, a.bs) for name, (m, o) in CASES.items()}
    times = {name: [] for name in steps}
    for r in range(a.repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter(); step()
            if r: times[name].append(time.perf_counter() - start)
    rows = {}
    for name, (m, _) in CASES.items():
        ratio = [t / b for t, b in zip(times[name], times['baseline'])]
        rows[name] = dict(ratio=statistics.median(ratio), low=min(ratio), high=max(ratio), passes=METHODS[m].passes, seconds=statistics.median(times[name]))
        print(f'{name:24} {rows[name]["ratio"]:.2f}  ({rows[name]["low"]:.2f} to {rows[name]["high"]:.2f})   passes {METHODS[m].passes:g}')
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, dict(model=a.model, bs=a.bs, repeats=a.repeats, rows=rows, versions=_versions(), hardware=_hardware(torch.device('cpu'))))


if __name__ == '__main__': main()
