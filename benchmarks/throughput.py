"""Images per second of training.

    SADT_DATA=cifar10.tgz python -m benchmarks.throughput
        [--part recipe|curves|overhead|records] [--repeats 5] [--out FILE] [--device cuda]
        [--records cifar10|cifar100|imagenet] [--model resnet18] [--bs 128]

recipe    Epochs of simple_cnn over CIFAR-10 images in files and in memory, without evaluation: the naive
          recipe (fastai's folder loader with two workers, float32, NCHW, PyTorch's default allocator) against
          what `run` does, with the steps between them. Every measurement is a process of its own, because a
          process cannot change its allocator back. On a CPU only.
curves    Images per second against the batch size, the network and the number of classes: plain training,
          SAM, SADT-1, LookSAM, SAF and MESA in a Learner, and without one a bare loop, torchvision's kind of
          loop and SAM of pytorch_optimizer.
overhead  Milliseconds per step of a Learner and of the bare loop at small batches, where the cost of Python
          dominates; on a GPU also the sum of its kernels and the network compiled with CUDA graphs.
records   Images per second of plain training, SAM and SAF. SAF has the records of a whole data set, and each
          step reads and writes the records of other samples, as in training: 50,000 samples with 10 or 100
          classes, or 1,281,167 with 1,000 (7.7 GB, with --records imagenet). The images are 32 pixels wide.

All cases of a part take turns; except in recipe, the first round is not counted. FILE keeps the results
of the parts that did not run."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.data import ImageDataLoaders
from sadt_nb.core.optim import keras_adam
from sadt_nb.data.datasets import load_data
from sadt_nb.data.loader import TensorDL
from sadt_nb.experiments.run_folder import provenance, write_json
from sadt_nb.experiments.runner import keep_pages
from sadt_nb.methods.saf import SAF
from sadt_nb.models.registry import make_model
from .data_throughput import write_folder
from .step_cost import CASES, CYCLE, PeerSAM, bare, stepper

RECIPES = {'naive recipe': 'folder',
           'TensorDL, NCHW': 'tensors',
           'TensorDL, NCHW, pages kept': 'tensors pages',
           'TensorDL, channels_last': 'tensors last',
           'as `run` trains': 'tensors last pages'}
SHOWN = ('baseline', 'sam', 'sadt1', 'looksam', 'saf', 'mesa')
AXES = {'batch size': [('simple_cnn', bs, 10) for bs in (8, 32, 128, 512, 2048)],
        'network': [(model, 32, 10) for model in ('resnet20', 'simple_cnn', 'resnet18', 'vgg16_slim')],
        'classes': [('simple_cnn', 128, classes) for classes in (10, 100, 1000)]}
SMALL_BATCHES = {'cpu': (('resnet20', 2), ('resnet20', 128), ('simple_cnn', 2), ('simple_cnn', 128)),
                 'cuda': (('resnet20', 128), ('simple_cnn', 128), ('simple_cnn', 2048))}

RECORDS = dict(cifar10=(50_000, 10), cifar100=(50_000, 100), imagenet=(1_281_167, 1000)) # samples, classes


def recipe_loaders(kind, folder, images, bs):
    "Return the DataLoaders of one kind of recipe."
    device = torch.device('cpu')
    if kind == 'folder':
        return ImageDataLoaders.from_folder(folder, valid='test', bs=bs, num_workers=2, device=device)
    train = load_data('cifar10')[0].subset(slice(0, images))
    dl = TensorDL(train, bs=bs, shuffle=True, drop_last=True, device=device, channels_last='last' in kind)
    return DataLoaders(dl, dl)


def train_once(kind, folder, images, bs):
    "Print the images per second of one epoch, after an epoch that is not counted."
    if 'pages' in kind: keep_pages()
    dls = recipe_loaders(kind, folder, images, bs)
    net = make_model('simple_cnn', 10)
    if 'last' in kind: net = net.to(memory_format=torch.channels_last)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=keras_adam, lr=1e-3,
                    default_cbs=False, cbs=TrainEvalCallback())
    learn.dls.loaders[1] = []
    learn.fit(1)
    start = time.perf_counter()
    learn.fit(1)
    print(len(learn.dls.train) * bs / (time.perf_counter() - start))


def in_a_process(kind, folder, images, bs):
    "Return the result of `train_once` in a process of its own."
    args = ['--once', kind, folder, str(images), str(bs)]
    command = [sys.executable, '-W', 'ignore', '-m', 'benchmarks.throughput', *args]
    env = {**os.environ, 'TQDM_DISABLE': '1'}
    out = subprocess.run(command, capture_output=True, text=True, env=env)
    if out.returncode: raise RuntimeError(out.stderr[-2000:])
    return float(out.stdout.split()[-1])


def recipe(repeats, images=10_000, bs=512):
    rates = {name: [] for name in RECIPES}
    with tempfile.TemporaryDirectory() as folder:
        train, test = load_data('cifar10')
        write_folder(Path(folder), (train.subset(slice(0, images)), test.subset(slice(0, 100))))
        for r in range(repeats):
            for name, kind in RECIPES.items(): rates[name].append(in_a_process(kind, folder, images, bs))
            speeds = ', '.join(f'{name} {v[-1]:,.0f}' for name, v in rates.items())
            print(f'round {r + 1}: {speeds}', flush=True)
    rows = {}
    for name, speeds in rates.items():
        ratios = [a / b for a, b in zip(speeds, rates['naive recipe'])]
        rows[name] = dict(images_per_second=statistics.median(speeds), ratio=statistics.median(ratios),
                          low=min(ratios), high=max(ratios))
    return dict(images=images, bs=bs, repeats=repeats, rows=rows)


def no_wait(): pass # on a CPU, work is done when a call returns


def timed(step, cycle, wait, least):
    "Return the mean seconds of a step, over whole cycles that last at least `least` seconds."
    n = 0
    start = time.perf_counter()
    while time.perf_counter() - start < least or n % cycle or not n:
        step()
        n += 1
        if n % 16 == 0: wait()
    wait()
    return (time.perf_counter() - start) / n


def in_turn(steps, repeats, device, least=.2):
    "Return the median seconds per step of each; a measurement lasts at least `least` seconds."
    wait = torch.cuda.synchronize if device.type == 'cuda' else no_wait
    times = {name: [] for name in steps}
    for r in range(repeats + 1):
        for name, step in steps.items():
            seconds = timed(step, CYCLE.get(name, 1), wait, least)
            if r: times[name].append(seconds)
    return {name: statistics.median(v) for name, v in times.items()}


def loops(model, bs, device, classes=10, methods=SHOWN):
    "Return a function that makes a step, for each loop that can train this network."
    steps = {m: stepper(*CASES[m], model, bs, device, classes)[0] for m in methods}
    steps['bare loop'] = bare(model, bs, device, classes=classes)
    steps['loop as in torchvision'] = bare(model, bs, device, classes=classes, reports=True)
    if PeerSAM: steps['SAM of pytorch_optimizer'] = bare(model, bs, device, peer=True, classes=classes)
    return steps


def curves(repeats, device):
    if device.type == 'cpu': keep_pages()
    rows = []
    for axis, cases in AXES.items():
        for model, bs, classes in cases:
            seconds = in_turn(loops(model, bs, device, classes), repeats, device)
            speeds = {name: bs / s for name, s in seconds.items()}
            for name, speed in speeds.items():
                rows.append(dict(axis=axis, model=model, bs=bs, classes=classes, loop=name,
                                 images_per_second=speed))
            shown = ', '.join(f'{name} {speed:,.0f}' for name, speed in speeds.items())
            print(f'{axis}: {model}, batch {bs}, {classes} classes: {shown}', flush=True)
    return dict(repeats=repeats, rows=rows)


def kernel_seconds(step, n=20):
    "Return the sum of the seconds per step that kernels of the GPU take."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(n): step()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in p.key_averages()) / n / 1e6


def overhead_steps(model, bs, device):
    "Return a function that makes a step, for each loop whose overhead is measured."
    methods = ('baseline', 'sam', 'sadt1')
    steps = {m: stepper(*CASES[m], model, bs, device)[0] for m in methods}
    steps['bare loop'] = bare(model, bs, device)
    if PeerSAM: steps['SAM of pytorch_optimizer'] = bare(model, bs, device, peer=True)
    if device.type == 'cuda':
        for m in methods:
            graphs = stepper(*CASES[m], model, bs, device, compile='reduce-overhead')[0]
            steps[f'{m}, CUDA graphs'] = graphs
    return steps


def overhead(repeats, device):
    if device.type == 'cpu': keep_pages()
    rows = []
    for model, bs in SMALL_BATCHES['cpu' if device.type == 'cpu' else 'cuda']:
        steps = overhead_steps(model, bs, device)
        shown = []
        for name, s in in_turn(steps, repeats, device).items():
            row = dict(model=model, bs=bs, loop=name, milliseconds=1000 * s)
            text = f'{name} {row["milliseconds"]:.2f} ms'
            if device.type == 'cuda':
                row['kernels'] = 1000 * kernel_seconds(steps[name])
                text += f' (kernels {row["kernels"]:.2f})'
            rows.append(row)
            shown.append(text)
        print(f'{model}, batch {bs}: {", ".join(shown)}', flush=True)
    return dict(repeats=repeats, rows=rows)


def records(repeats, device, data, model, bs, least=.2):
    "Print and return the images per second with SAF's records of a data set: a name in `RECORDS`."
    if device.type == 'cpu': keep_pages()
    samples, classes = RECORDS[data]
    steps, learners = {}, {}
    for m in ('baseline', 'sam', 'saf'):
        steps[m], learners[m] = stepper(*CASES[m], model, bs, device, classes, samples=samples)
    speeds = {m: bs / s for m, s in in_turn(steps, repeats, device, least).items()}
    size = next(cb.records.nbytes for cb in learners['saf'].cbs if isinstance(cb, SAF))
    shown = ', '.join(f'{m} {speed:,.0f} ({speed / speeds["baseline"]:.1%})' for m, speed in speeds.items())
    print(f'{data}, {model}, batch {bs}, records of {samples:,} x {classes}, {size / 2**20:,.0f} MB: '
          f'images/s: {shown}', flush=True)
    return dict(data=data, model=model, bs=bs, samples=samples, classes=classes, record_bytes=size,
                repeats=repeats, images_per_second=speeds)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--part', choices=['recipe', 'curves', 'overhead', 'records'])
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--out', type=Path)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--records', choices=[*RECORDS], default='cifar10', help='size of the records')
    p.add_argument('--model', default='resnet18', help='network of the part records')
    p.add_argument('--bs', type=int, default=128, help='batch size of the part records')
    p.add_argument('--once', nargs=4, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.once:
        kind, folder, images, bs = a.once
        return train_once(kind, folder, int(images), int(bs))
    device = torch.device(a.device)
    out = json.loads(a.out.read_text()) if a.out and a.out.exists() else {}
    parts = dict(recipe=lambda: recipe(a.repeats),
                 curves=lambda: curves(a.repeats, device),
                 overhead=lambda: overhead(a.repeats, device),
                 records=lambda: records(a.repeats, device, a.records, a.model, a.bs))
    for part, measure in parts.items():
        if a.part not in (None, part): continue
        if part == 'recipe' and device.type != 'cpu': continue
        out[part] = dict(measure(), **provenance(device))
        if a.out:
            a.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(a.out, out)


if __name__ == '__main__': main()
