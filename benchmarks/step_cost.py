"""What a training step of each method costs, as a ratio to the plain step of the same Learner.

    python -m benchmarks.step_cost
        [--model simple_cnn] [--bs 512] [--repeats 9] [--only sam esam ...] [--device cuda]
        [--out sadt_nb/published/step_cost/simple_cnn_512.json]

All cases take turns within one process, round after round, so that a drift of the machine's speed is the same
for all; the first round is not counted. LookSAM's figure is the mean over the five steps of its cycle. There
are also a bare PyTorch loop with the same network, batch and optimizer, and, where it is installed, SAM of
pytorch_optimizer in such a loop.

With `--only`, a file that exists keeps its other rows; each new row then stores its own rounds, versions and
hardware.

Printed and stored are the median, smallest and largest ratio over the rounds, passes per step, and memory
beyond the plain step, as multiples of the weights: what is kept from step to step, and the peak in a step
(from the allocator on a GPU, from a count of living tensors on a CPU)."""
import argparse
import inspect
import itertools
import json
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sadt_nb.core.optim import keras_adam
from sadt_nb.data.loader import ImageData, TensorDL
from sadt_nb.experiments.run_folder import provenance, write_json
from sadt_nb.experiments.runner import keep_pages
from sadt_nb.methods.registry import METHODS, make_method, passes_of
from sadt_nb.models.registry import MODELS, make_model
from torch.nn.functional import cross_entropy
try: from pytorch_optimizer import SAM as PeerSAM
except ImportError: PeerSAM = None

# what they do is part of every measured step
READY = dict(saf=dict(start_epoch=0), mesa=dict(start_epoch=0), weight_average=dict(start=0))
CASES = {name: (name, READY.get(name, {})) for name in METHODS}
CASES['sadt2 (code)'] = 'sadt2', dict(spec='code')
CASES['sadt2, two full passes'] = 'sadt2', dict(share_trunk=False)
CASES['sam, only the norms'] = 'sam', dict(only='norm')
CASES['esam, whole_norm=False'] = 'esam', dict(whole_norm=False)
CASES['sam, m=32'] = 'sam', dict(m=32)
CASES['sam, m=8'] = 'sam', dict(m=8)
BARE = 'bare loop'
PEER = 'SAM of pytorch_optimizer'
CYCLE = dict(looksam=5) # steps after which the cost repeats


def network(model, device, classes=10):
    torch.manual_seed(0)
    has_init = 'init' in inspect.signature(MODELS[model]).parameters
    options = dict(init='keras') if has_init else {}
    return make_model(model, classes, **options).to(device, memory_format=torch.channels_last)


def loader(bs, device, classes=10, samples=None):
    """Return a `TensorDL` of one batch of random images.

    With `samples`, the data set has that many, in random order; all of them are one image."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (bs, 32, 32, 3), generator=g, dtype=torch.uint8)
    y = torch.randint(0, classes, (bs,), generator=g)
    vocab = [str(i) for i in range(classes)]
    if samples is None: return TensorDL(ImageData(x, y, vocab), bs=bs, device=device)
    data = ImageData(x[:1].expand(samples, -1, -1, -1), torch.zeros(samples, dtype=torch.long), vocab)
    return TensorDL(data, bs=bs, shuffle=True, drop_last=True, seed=0, device=device)


def storages(tree): return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Living(TorchDispatchMode):
    "The largest number of bytes in tensors that were made inside and lived at the same time."
    def __init__(self):
        super().__init__()
        self.live = {} # address of a storage to a weak reference and its bytes
        self.peak = 0

    def is_living(self, address):
        return address in self.live and not self.live[address][0].expired()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {s._cdata for s in storages((args, kwargs))} # views and in-place results are not new
        new = [s for s in storages(out) if s._cdata not in given and not self.is_living(s._cdata)]
        if new:
            self.live = {address: v for address, v in self.live.items() if not v[0].expired()}
            for s in new: self.live[s._cdata] = StorageWeakRef(s), s.nbytes()
            self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


def peak_bytes(step, steps):
    "Return the peak of the memory allocated within some steps."
    with Living() as living:
        for _ in range(steps): step()
    return living.peak


def tensors_in(o, depth=0):
    "Return all tensors in an object; lists are followed to a depth of three."
    if isinstance(o, torch.Tensor):
        yield o
        return
    children = []
    if isinstance(o, torch.nn.Module): children = [*o.parameters(), *o.buffers()]
    elif isinstance(o, dict): children = o.values()
    elif isinstance(o, (list, tuple)) and depth < 3: children = o
    elif type(o).__module__.startswith('sadt_nb.'): # SAF's records
        children = [vars(o)]
        depth = -1
    for child in children: yield from tensors_in(child, depth + 1)


def persistent(learn):
    "Return the bytes of tensors that callbacks hold between steps, without the model's and the batch's."
    known = [*learn.model.parameters(), *learn.model.buffers(), *learn.xb, *learn.yb, learn.pred, learn.loss]
    addresses = {t.data_ptr() for t in known}
    held = {}
    for cb in learn.cbs:
        state = {k: v for k, v in vars(cb).items() if k not in ('learn', 'grads')}
        for t in tensors_in(state):
            if t.data_ptr() not in addresses: held.setdefault(t.data_ptr(), t.nbytes)
    return sum(held.values())


def stepper(method, options, model, bs, device, classes=10, compile='', samples=None):
    """Return a function that makes one training step in the middle of a fit, and the Learner.

    With `samples`, the data set has that many, and each step has the sample ids of another batch."""
    dl = loader(bs, device, classes, samples)
    if METHODS[method].needs_teacher: options = dict(options, teacher=network(model, device, classes))
    net = network(model, device, classes)
    if compile: net = torch.compile(net, mode=compile)
    cbs = [TrainEvalCallback(), *make_method(method, **options)]
    learn = Learner(DataLoaders(dl, dl), net, loss_func=torch.nn.CrossEntropyLoss(), opt_func=keras_adam,
                    lr=1e-4, default_cbs=False, cbs=cbs)
    learn.create_opt()
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, learn.dls.train, 10**9
    batch = next(iter(dl))
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    learn.dl.get_idxs() # callbacks that need the sample ids get them from this call
    numbers = itertools.cycle(range(len(dl)))
    return lambda: learn.one_batch(next(numbers), batch), learn


def bare(model, bs, device, peer=False, classes=10, reports=False):
    """Return a function that makes the same step without a Learner.

    With `peer`, the step is that of pytorch_optimizer's SAM. With `reports`, it is that of torchvision's
    reference training: top-1 and top-5 accuracy and the loss as Python numbers after every step."""
    net = network(model, device, classes).train()
    x, y = next(iter(loader(bs, device, classes)))
    params = list(net.parameters())
    opt = keras_adam(params, lr=1e-4)
    def step():
        opt.zero_grad()
        cross_entropy(net(x), y).backward()
        opt.step()
    def reported():
        out = net(x)
        loss = cross_entropy(out, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        right = out.topk(5, 1)[1] == y[:, None]
        percent = 100 / len(y)
        top1 = right[:, :1].float().sum() * percent
        top5 = right.float().sum() * percent
        return [t.item() for t in (top1, top5, loss)]
    if reports and not peer: return reported
    if not peer: return step
    sam = PeerSAM(params, torch.optim.Adam, rho=.05, lr=1e-4)
    def two_passes():
        cross_entropy(net(x), y).backward()
        sam.first_step(zero_grad=True)
        cross_entropy(net(x), y).backward()
        sam.second_step(zero_grad=True)
    return two_passes


def make_cases(a, device, wanted):
    "Return the steps by name of the case, and the Learners of the cases that have one."
    steps = {}
    learners = {}
    for name, (method, options) in CASES.items():
        if name not in wanted: continue
        try: steps[name], learners[name] = stepper(method, options, a.model, a.bs, device)
        except ValueError as e:
            reason = str(e).splitlines()[-1].strip()
            print(f'{name}: not for this network ({reason})')
    if BARE in wanted: steps[BARE] = bare(a.model, a.bs, device)
    if PeerSAM and PEER in wanted: steps[PEER] = bare(a.model, a.bs, device, peer=True)
    return steps, learners


def in_rounds(steps, repeats, device):
    "Return the seconds per step of each case in each round, and on a GPU its peak memory in bytes."
    on_gpu = device.type == 'cuda'
    times = {name: [] for name in steps}
    peaks = {}
    for r in range(repeats + 1):
        for name, step in steps.items():
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                resident = torch.cuda.memory_allocated()
            n = CYCLE.get(name, 1)
            start = time.perf_counter()
            for _ in range(n): step()
            if on_gpu: torch.cuda.synchronize()
            seconds = (time.perf_counter() - start) / n
            if r: times[name].append(seconds)
            if r and on_gpu: peaks[name] = torch.cuda.max_memory_allocated() - resident
    return times, peaks


def summary(name, row):
    "Return the line that is printed for a case."
    line = f'{name:26} {row["ratio"]:.3f}  ({row["low"]:.2f} to {row["high"]:.2f})'
    if 'passes' in row:
        line += f'   passes {row["passes"]:.2f}   kept {row["copies_of_weights"]:.2f} x weights'
    if 'peak_copies_of_weights' in row: line += f'   peak {row["peak_copies_of_weights"]:+.2f}'
    return line


def store(a, rows, made_by):
    "Write the rows; with `--only`, into the file that exists, for the same network and batch."
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if not a.only or not a.out.exists():
        return write_json(a.out, dict(model=a.model, bs=a.bs, repeats=a.repeats, rows=rows, **made_by))
    stored = json.loads(a.out.read_text())
    if (stored['model'], stored['bs']) != (a.model, a.bs):
        raise SystemExit(f"{a.out} has {stored['model']} in batches of {stored['bs']}")
    for name, row in rows.items():
        if name != 'baseline': stored['rows'][name] = dict(row, repeats=a.repeats, **made_by)
    write_json(a.out, stored)


def main():
    others = [BARE, PEER]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='simple_cnn')
    p.add_argument('--bs', type=int, default=512)
    p.add_argument('--repeats', type=int, default=9)
    p.add_argument('--out', type=Path)
    p.add_argument('--only', nargs='+', choices=[*CASES, *others],
                   help='these besides the plain step; more rounds in the same time')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args()
    device = torch.device(a.device)
    if device.type == 'cpu': keep_pages()
    wanted = {'baseline', *(a.only or [*CASES, *others])}
    steps, learners = make_cases(a, device, wanted)
    times, peaks = in_rounds(steps, a.repeats, device)
    if device.type == 'cpu':
        for name, step in steps.items(): peaks[name] = peak_bytes(step, CYCLE.get(name, 1))
    weights = sum(q.nbytes for q in learners['baseline'].model.parameters())
    plain_memory = persistent(learners['baseline'])
    rows = {}
    for name in steps:
        ratios = [t / b for t, b in zip(times[name], times['baseline'])]
        row = dict(ratio=statistics.median(ratios), low=min(ratios), high=max(ratios),
                   seconds=statistics.median(times[name]))
        if name in CASES:
            method, options = CASES[name]
            row['passes'] = passes_of(method, **options)
            row['copies_of_weights'] = (persistent(learners[name]) - plain_memory) / weights
        if name in peaks: row['peak_copies_of_weights'] = (peaks[name] - peaks['baseline']) / weights
        rows[name] = row
        print(summary(name, row), flush=True)
    if a.out: store(a, rows, provenance(device))


if __name__ == '__main__': main()
