"""Images per second of training.

    SADT_DATA=cifar10.tgz python -m benchmarks.throughput [--part recipe|curves|overhead] [--repeats 5] [--out FILE] [--device cuda]

recipe    Epochs of simple_cnn over CIFAR-10 images in files and in memory, evaluation left out: the naive recipe (fastai's folder loader with
          two workers, float32, NCHW, PyTorch's allocator as it comes) against what `run` does, with the steps between them. Every measurement is a
          process of its own, for an allocator cannot be changed back; the cases take turns.
curves    Images per second against the batch size, the network and the number of classes: plain training, SAM, SADT-1, LookSAM, SAF and
          MESA in a Learner, and without one a bare loop, torchvision's kind of loop and SAM of pytorch_optimizer.
overhead  Milliseconds per step of a Learner and of the bare loop at small batches, where Python is what costs; on a GPU also the sum of
          its kernels and the network compiled with CUDA graphs.

All cases of a part take turns within it; the first round is not counted. FILE keeps the results of the parts that did not run."""
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
from sadt_nb.experiments.runner import keep_pages, provenance, write_json
from sadt_nb.models.registry import make_model
from .data_throughput import write_folder
from .step_cost import CASES, PeerSAM, bare, stepper

RECIPES = {'naive recipe': 'folder', 'TensorDL, NCHW': 'tensors', 'TensorDL, NCHW, pages kept': 'tensors pages', 'TensorDL, channels_last': 'tensors last', 'as `run` trains': 'tensors last pages'}
SHOWN = ('baseline', 'sam', 'sadt1', 'looksam', 'saf', 'mesa')
BATCHES, NETWORKS, CLASSES = (8, 32, 128, 512, 2048), ('resnet20', 'simple_cnn', 'resnet18', 'vgg16_slim'), (10, 100, 1000)


def train_once(kind, folder, images, bs):
    "Images per second of one epoch after a short one."
    if 'pages' in kind: keep_pages()
    device = torch.device('cpu')
    if kind == 'folder': dls = ImageDataLoaders.from_folder(folder, valid='test', bs=bs, num_workers=2, device=device)
    else:
        train = load_data('cifar10')[0].subset(slice(0, images))
        dl = TensorDL(train, bs=bs, shuffle=True, drop_last=True, device=device, channels_last='last' in kind)
        dls = DataLoaders(dl, dl)
    net = make_model('simple_cnn', 10)
    if 'last' in kind: net = net.to(memory_format=torch.channels_last)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=keras_adam, lr=1e-3, default_cbs=False, cbs=TrainEvalCallback())
    learn.dls.loaders[1] = []
    learn.fit(1)
    start = time.perf_counter()
    learn.fit(1)
    print(len(learn.dls.train) * bs / (time.perf_counter() - start))


def recipe(repeats, images=10_000, bs=512):
    with tempfile.TemporaryDirectory() as folder:
        train, test = load_data('cifar10')
        write_folder(Path(folder), (train.subset(slice(0, images)), test.subset(slice(0, 100))))
        rates = {name: [] for name in RECIPES}
        for r in range(repeats):
            for name, kind in RECIPES.items():
                out = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'benchmarks.throughput', '--once', kind, folder, str(images), str(bs)], capture_output=True, text=True, env={**os.environ, 'TQDM_DISABLE': '1'})
                if out.returncode: raise RuntimeError(out.stderr[-2000:])
                rates[name].append(float(out.stdout.split()[-1]))
            print(f'round {r + 1}: ' + ', '.join(f'{n} {v[-1]:,.0f}' for n, v in rates.items()), flush=True)
    first = rates['naive recipe']
    return dict(images=images, bs=bs, repeats=repeats, rows={n: dict(images_per_second=statistics.median(v), ratio=statistics.median(a / b for a, b in zip(v, first)), low=min(a / b for a, b in zip(v, first)),
                                                                   high=max(a / b for a, b in zip(v, first))) for n, v in rates.items()})


def in_turn(steps, repeats, device, least=.2):
    "Median seconds per step of each; a measurement lasts at least `least` seconds."
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    times = {}
    for r in range(repeats + 1):
        for name, (step, cycle) in steps.items():
            n, start = 0, time.perf_counter()
            while time.perf_counter() - start < least or n % cycle or not n:
                step()
                n += 1
                if n % 16 == 0: wait()
            wait()
            if r: times.setdefault(name, []).append((time.perf_counter() - start) / n)
    return {k: statistics.median(v) for k, v in times.items()}


def loops(model, bs, device, classes=10, methods=SHOWN):
    "Everything that can train this network, ready to step."
    steps = {m: (stepper(*CASES[m], model, bs, device, classes)[0], 5 if m == 'looksam' else 1) for m in methods}
    steps['bare loop'] = bare(model, bs, device, classes=classes), 1
    steps['loop as in torchvision'] = bare(model, bs, device, classes=classes, reports=True), 1
    if PeerSAM: steps['SAM of pytorch_optimizer'] = bare(model, bs, device, peer=True, classes=classes), 1
    return steps


def curves(repeats, device):
    if device.type == 'cpu': keep_pages()
    rows = []
    for axis, cases in (('batch size', [('simple_cnn', b, 10) for b in BATCHES]), ('network', [(m, 32, 10) for m in NETWORKS]), ('classes', [('simple_cnn', 128, c) for c in CLASSES])):
        for model, bs, classes in cases:
            for name, s in in_turn(loops(model, bs, device, classes), repeats, device).items():
                rows.append(dict(axis=axis, model=model, bs=bs, classes=classes, loop=name, images_per_second=bs / s))
            last = {r['loop']: r['images_per_second'] for r in rows if (r['axis'], r['model'], r['bs'], r['classes']) == (axis, model, bs, classes)}
            print(f'{axis}: {model}, batch {bs}, {classes} classes: ' + ', '.join(f'{n} {v:,.0f}' for n, v in last.items()), flush=True)
    return dict(repeats=repeats, rows=rows)


def kernel_seconds(step, n=20):
    "Seconds per step that kernels of the GPU take, added up."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
        for _ in range(n): step()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in p.key_averages()) / n / 1e6


def overhead(repeats, device):
    if device.type == 'cpu': keep_pages()
    rows = []
    cases = (('resnet20', 2), ('resnet20', 128), ('simple_cnn', 2), ('simple_cnn', 128)) if device.type == 'cpu' else (('resnet20', 128), ('simple_cnn', 128), ('simple_cnn', 2048))
    for model, bs in cases:
        steps = {m: (stepper(*CASES[m], model, bs, device)[0], 1) for m in ('baseline', 'sam', 'sadt1')}
        steps['bare loop'] = bare(model, bs, device), 1
        if PeerSAM: steps['SAM of pytorch_optimizer'] = bare(model, bs, device, peer=True), 1
        if device.type == 'cuda':
            for m in ('baseline', 'sam', 'sadt1'): steps[f'{m}, CUDA graphs'] = stepper(*CASES[m], model, bs, device, compile='reduce-overhead')[0], 1
        for name, s in in_turn(steps, repeats, device).items():
            rows.append(dict(model=model, bs=bs, loop=name, milliseconds=1000 * s, **(dict(kernels=1000 * kernel_seconds(steps[name][0])) if device.type == 'cuda' else {})))
        print(f'{model}, batch {bs}: ' + ', '.join(f'{r["loop"]} {r["milliseconds"]:.2f} ms' + (f' (kernels {r["kernels"]:.2f})' if 'kernels' in r else '') for r in rows if (r['model'], r['bs']) == (model, bs)), flush=True)
    return dict(repeats=repeats, rows=rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--part', choices=['recipe', 'curves', 'overhead']); p.add_argument('--repeats', type=int, default=5); p.add_argument('--out', type=Path)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--once', nargs=4, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.once: return train_once(a.once[0], a.once[1], *map(int, a.once[2:]))
    device = torch.device(a.device)
    out = json.loads(a.out.read_text()) if a.out and a.out.exists() else {}
    for part, f in (('recipe', lambda: recipe(a.repeats)), ('curves', lambda: curves(a.repeats, device)), ('overhead', lambda: overhead(a.repeats, device))):
        if part == 'recipe' and device.type != 'cpu' or a.part not in (None, part): continue
        out[part] = dict(f(), **provenance(device))
        if a.out:
            a.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(a.out, out)


if __name__ == '__main__': main()
