"""What a training step of each method costs, as a ratio to the plain step of the same Learner.

    python -m benchmarks.step_cost [--model simple_cnn] [--bs 512] [--repeats 9] [--only sam esam ...] [--out sadt_nb/published/step_cost/simple_cnn_512.json]

All cases take turns within one process, round after round, so that a machine whose speed drifts is equally slow for all;
the first round is not counted. Printed and stored: median, smallest and largest ratio over the rounds, passes per step, and
memory beyond the plain step, as multiples of the weights: what lives from step to step, and the peak within a step (from the
allocator on a GPU, from a count of living tensors on a CPU). LookSAM's figure is the mean over the five steps of its cycle. Besides the methods: a bare PyTorch loop with the same network, batch and optimizer,
and, where it is installed, SAM of pytorch_optimizer in such a loop."""
import argparse
import inspect
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
from sadt_nb.experiments.runner import keep_pages, provenance, write_json
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.registry import MODELS, make_model
try: from pytorch_optimizer import SAM as PeerSAM
except ImportError: PeerSAM = None

READY = dict(saf=dict(start_epoch=0), mesa=dict(start_epoch=0)) # measured with the term at work
CASES = {name: (name, READY.get(name, {})) for name in METHODS} | {'sadt2 (code)': ('sadt2', dict(spec='code')), 'sadt2, two full passes': ('sadt2', dict(share_trunk=False))}
CYCLE = dict(looksam=5) # steps after which the cost repeats


def network(model, device, classes=10):
    torch.manual_seed(0)
    return make_model(model, classes, **(dict(init='keras') if 'init' in inspect.signature(MODELS[model]).parameters else {})).to(device, memory_format=torch.channels_last)


def loader(bs, device, classes=10):
    g = torch.Generator().manual_seed(0)
    data = ImageData(torch.randint(0, 256, (bs, 32, 32, 3), generator=g, dtype=torch.uint8), torch.randint(0, classes, (bs,), generator=g), [str(i) for i in range(classes)])
    return TensorDL(data, bs=bs, device=device)


class Living(TorchDispatchMode):
    "The largest number of bytes in tensors that were made inside and lived at the same time."
    def __init__(self): super().__init__(); self.live, self.peak = {}, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)} # views and in-place results are not new
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        new = [s for s in made if s._cdata not in given and (s._cdata not in self.live or self.live[s._cdata][0].expired())]
        if new:
            self.live = {k: v for k, v in self.live.items() if not v[0].expired()} | {s._cdata: (StorageWeakRef(s), s.nbytes()) for s in new}
            self.peak = max(self.peak, sum(n for _, n in self.live.values()))
        return out


def peak_bytes(step, steps):
    "Peak of the memory allocated within some steps."
    with Living() as living:
        for _ in range(steps): step()
    return living.peak


def persistent(learn):
    "Bytes of the tensors that the method's callbacks hold between steps, the model's and the batch's excluded."
    known = {t.data_ptr() for t in [*learn.model.parameters(), *learn.model.buffers(), *learn.xb, *learn.yb, learn.pred, learn.loss]}
    seen = {}
    def walk(o, depth=0):
        if isinstance(o, torch.Tensor): seen.setdefault(o.data_ptr(), o.nbytes) if o.data_ptr() not in known else None
        elif isinstance(o, torch.nn.Module): [walk(t) for t in [*o.parameters(), *o.buffers()]]
        elif isinstance(o, dict): [walk(v, depth + 1) for v in o.values()]
        elif isinstance(o, (list, tuple)) and depth < 3: [walk(v, depth + 1) for v in o]
        elif type(o).__module__.startswith('sadt_nb.'): walk(vars(o)) # SAF's records
    for cb in learn.cbs: walk({k: v for k, v in vars(cb).items() if k not in ('learn', 'grads')})
    return sum(seen.values())


def stepper(method, options, model, bs, device, classes=10, compile=''):
    "A function that makes one training step of a Learner in the middle of a fit, and the Learner."
    dl = loader(bs, device, classes)
    if METHODS[method].taught: options = dict(options, teacher=network(model, device, classes))
    net = network(model, device, classes)
    if compile: net = torch.compile(net, mode=compile)
    learn = Learner(DataLoaders(dl, dl), net, loss_func=torch.nn.CrossEntropyLoss(), opt_func=keras_adam, lr=1e-4, default_cbs=False,
                    cbs=[TrainEvalCallback(), *make_method(method, **options)])
    learn.create_opt()
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, learn.dls.train, 10**9
    batch = next(iter(dl))
    for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
    learn.dl.get_idxs() # those who listen for sample ids hear them here
    return lambda: learn.one_batch(0, batch), learn


def bare(model, bs, device, peer=False, classes=10, reports=False):
    "The same step without a Learner; with `peer`, SAM of pytorch_optimizer; with `reports`, as torchvision's reference training has it: top-1 and top-5 accuracy and the loss as numbers after every step."
    net, (x, y) = network(model, device, classes).train(), next(iter(loader(bs, device, classes)))
    groups = list(net.parameters())
    opt = keras_adam(groups, lr=1e-4)
    loss_of = lambda: torch.nn.functional.cross_entropy(net(x), y)
    def step():
        opt.zero_grad(); loss_of().backward(); opt.step()
    def reported():
        out = net(x)
        loss = torch.nn.functional.cross_entropy(out, y)
        opt.zero_grad(); loss.backward(); opt.step()
        right = out.topk(5, 1)[1] == y[:, None]
        return [t.item() for t in (right[:, :1].float().sum() * (100 / len(y)), right.float().sum() * (100 / len(y)), loss)]
    if not peer: return reported if reports else step
    sam = PeerSAM(groups, torch.optim.Adam, rho=.05, lr=1e-4)
    def two_passes():
        loss_of().backward(); sam.first_step(zero_grad=True)
        loss_of().backward(); sam.second_step(zero_grad=True)
    return two_passes


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='simple_cnn'); p.add_argument('--bs', type=int, default=512)
    p.add_argument('--repeats', type=int, default=9); p.add_argument('--out', type=Path)
    p.add_argument('--only', nargs='+', choices=[*CASES, 'bare loop', 'SAM of pytorch_optimizer'], help='these besides the plain step; more rounds in the same time')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = p.parse_args()
    device = torch.device(a.device)
    if device.type == 'cpu': keep_pages()
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    made = {}
    wanted = {'baseline', *(a.only or [*CASES, 'bare loop', 'SAM of pytorch_optimizer'])}
    for name, (m, o) in CASES.items():
        if name not in wanted: continue
        try: made[name] = stepper(m, o, a.model, a.bs, device)
        except ValueError as e: print(f'{name}: not for this network ({str(e).splitlines()[-1].strip()})')
    steps, learners = {n: s for n, (s, _) in made.items()}, {n: l for n, (_, l) in made.items()}
    if 'bare loop' in wanted: steps['bare loop'] = bare(a.model, a.bs, device)
    if PeerSAM and 'SAM of pytorch_optimizer' in wanted: steps['SAM of pytorch_optimizer'] = bare(a.model, a.bs, device, peer=True)
    times, peaks = {name: [] for name in steps}, {}
    for r in range(a.repeats + 1):
        for name, step in steps.items():
            if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
            n = CYCLE.get(name, 1)
            start = time.perf_counter()
            for _ in range(n): step()
            wait()
            if r: times[name].append((time.perf_counter() - start) / n)
            if r and device.type == 'cuda': peaks[name] = torch.cuda.max_memory_allocated() - resident
    if device.type == 'cpu': peaks = {name: peak_bytes(step, CYCLE.get(name, 1)) for name, step in steps.items()}
    weights = sum(q.nbytes for q in learners['baseline'].model.parameters())
    plain_memory = persistent(learners['baseline'])
    rows = {}
    for name in steps:
        ratio = [t / b for t, b in zip(times[name], times['baseline'])]
        row = rows[name] = dict(ratio=statistics.median(ratio), low=min(ratio), high=max(ratio), seconds=statistics.median(times[name]))
        if name in CASES:
            row.update(passes=METHODS[CASES[name][0]].passes, copies_of_weights=(persistent(learners[name]) - plain_memory) / weights)
        if name in peaks: row['peak_copies_of_weights'] = (peaks[name] - peaks['baseline']) / weights
        print(f'{name:26} {row["ratio"]:.3f}  ({row["low"]:.2f} to {row["high"]:.2f})' + (f'   passes {row["passes"]:.2f}   kept {row["copies_of_weights"]:.2f} x weights' if name in CASES else '')
              + (f'   peak {row["peak_copies_of_weights"]:+.2f}' if name in peaks else ''), flush=True)
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, dict(model=a.model, bs=a.bs, repeats=a.repeats, rows=rows, **provenance(device)))


if __name__ == '__main__': main()
