"""What the fast CIFAR-10 recipe costs in a Learner, against a bare PyTorch loop of the same recipe.

    SADT_DATA=cifar10.tgz python -m benchmarks.fast [--part overhead|loader|methods|parts|formats|seconds]
        [--repeats 9] [--widths 64 256 256] [--bs 1024] [--steps N] [--device cuda] [--out FILE]

overhead  Seconds per step of an epoch of N steps, the loader included: a Learner of `make_learner`, the same
          with the recorder that `run` adds, and the bare loop; on a GPU also with CUDA graphs. Limits for
          the Learner: 1.05 times the bare loop on a CPU, 1.10 on a GPU, 1.03 if both have CUDA graphs.
loader    The training loader alone, as a share of an epoch of training. Limit: 0.05.
methods   A step of every method in a Learner, as a ratio to the plain step. Limits: SAM 2.05, SADT-1 2.08,
          MESA 1.40. The terms of MESA and SAF act from the start, and distillation has a teacher of the same
          network. LookSAM's ratio is the mean over five steps.
parts     A step of each row of `fast/steps`, which adds the parts of the recipe one by one, as a ratio to the
          first row, with the widths and the batch of these rows.
formats   On a CPU: images per second of the bare step by precision, memory format, batch, and with
          torch.compile where there is a compiler; and the kernels in which the fastest one spends its time.
seconds   On a GPU: seconds of a whole run of the recipe, with `run` and with the bare loop, and the accuracy
          of both.

With SADT_DATA the images are CIFAR-10's, else they are random. N is 48 on a GPU, which is all of CIFAR-10,
and 5 on a CPU. All cases of a part take turns, round after round, and the first round is
not counted; ratios are taken within a round. FILE keeps the results of the parts that did not run."""
import argparse
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path

warnings.filterwarnings('ignore')

import torch
import torch.nn.functional as F
from sadt_nb.data.datasets import DATASETS
from sadt_nb.data.loader import ImageData
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.results import RunRecorder, evaluate
from sadt_nb.experiments.run_folder import provenance, write_json
from sadt_nb.experiments.runner import keep_pages, run
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.fast_cnn import fast_cnn
from sadt_nb.papers.grids import paper_grid
from .step_cost import CASES, CYCLE

LIMITS = {'overhead, CPU': 1.05, 'overhead, GPU': 1.10, 'overhead, CUDA graphs': 1.03, 'loader': .05,
          'sam': 2.05, 'sadt1': 2.08, 'mesa': 1.40}
SHIFT = 2            # pixels
SMOOTHING = .2       # share of a label that is spread over all classes
MOMENTUM = .85       # Nesterov's
LR = 11.5            # per kilostep, for a loss that is summed
DECAY = .0153        # per kilostep, independent of the rate
BIAS_SCALE = 64      # learning rate of the biases of BatchNorm, as a multiple of the rate of the weights
PULL = 5             # steps between two pulls to the slow weights
KEPT = .95           # share of the slow weights that a step keeps, at the end of training
BIAS_EPOCHS = 3      # epochs in which the bias of the whitening layer is trained


def random_images(n=50_000):
    "Return noise as training and test images."
    g = torch.Generator().manual_seed(0)
    vocab = list('0123456789')
    sets = []
    for size in (n, 1000):
        x = torch.randint(0, 256, (size, 32, 32, 3), generator=g, dtype=torch.uint8)
        y = torch.arange(size) % 10
        sets.append(ImageData(x, y, vocab))
    return tuple(sets)


DATASETS['random_images'] = random_images # in this process only


def recipe(widths, bs, images, **changes):
    "Return one epoch of the run `fast/94` with other widths, on `images` training images."
    plain = paper_grid('fast/94')[0].run
    if os.environ.get('SADT_DATA'):
        data = dict(data='cifar10', n_train=images)
    else:
        data = dict(data='random_images', data_args=dict(n=images))
    short = dict(model_args=dict(widths=widths), bs=bs, epochs=1, views=0)
    return plain.but(**{**data, **short, **changes})


def factor(done):
    "Return the factor of the learning rate when the share `done` of training is over."
    if done < .23:
        return .2 + .8 * done / .23
    return 1 - .93 * (done - .23) / .77


class BareLoop:
    "The recipe as a bare loop, without Learner, callbacks or loader."
    def __init__(self, data, widths, bs, device, epochs=1., amp=True, channels_last=True, compile='', seed=0):
        torch.manual_seed(seed)
        self.bs, self.device, self.epochs = bs, device, epochs
        self.amp, self.channels_last = amp, channels_last
        x = data.x.to(device) / 255
        std, mean = torch.std_mean(x, (0, 1, 2), correction=0)
        x = ((x - mean) / std).permute(0, 3, 1, 2)
        border = (SHIFT,) * 4
        padded = F.pad(x, border, mode='reflect')
        self.padded = padded.permute(0, 2, 3, 1).contiguous() # keeps the colours of a pixel together
        self.labels = data.y.to(device)
        self.mirrored = torch.rand(len(x), device=device) < .5 # in even epochs; the rest in odd ones
        self.side = x.shape[-1]
        self.net = fast_cnn(len(data.vocab), widths).to(device)
        spread = torch.linspace(0, len(x) - 1, min(5000, len(x))).long() # images may be sorted by class
        self.net.init_from_images(x[spread])
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.model = torch.compile(self.net, mode=compile, dynamic=False) if compile else self.net
        self.opt = torch.optim.SGD(self.groups(), momentum=MOMENTUM, nesterov=True)
        self.floats = [t for t in self.net.state_dict().values() if t.is_floating_point()]

    def groups(self):
        "Return decoupled rates and decays, for a loss that is a mean over the batch."
        named = [(name, p) for name, p in self.net.named_parameters() if p.requires_grad]
        kilostep = 1024 * (1 + 1 / (1 - MOMENTUM))
        rate, shrink = LR * self.bs / kilostep, DECAY * self.bs / kilostep
        out = []
        for biases, lr in ((True, BIAS_SCALE * rate), (False, rate)):
            params = [p for name, p in named if ('norm' in name) == biases]
            out.append(dict(params=params, lr=lr, peak=lr, weight_decay=shrink / lr))
        return out

    def augmented(self, ids, epoch):
        "Return images shifted by up to two pixels; every image is mirrored in every other epoch."
        top, left = torch.randint(0, 2 * SHIFT + 1, (2, len(ids), 1), device=self.device)
        pixels = torch.arange(self.side, device=self.device)
        mirrored = self.mirrored[ids, None] ^ bool(epoch % 2)
        rows = top + pixels
        columns = left + torch.where(mirrored, self.side - 1 - pixels, pixels)
        x = self.padded[ids[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        return x if self.channels_last else x.contiguous()

    def batches(self, epoch):
        "Yield whole batches in a new order."
        order = torch.randperm(len(self.labels), device=self.device)
        for ids in order.split(self.bs):
            if len(ids) == self.bs:
                yield self.augmented(ids, epoch), self.labels[ids]

    def step(self, x, y):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.model(x), y, label_smoothing=SMOOTHING)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()

    @torch.no_grad()
    def pull(self, slow, kept):
        "Move the slow average towards weights and buffers, then copy it into them."
        torch._foreach_lerp_(slow, self.floats, 1 - kept)
        torch._foreach_copy_(self.floats, slow)

    def fit(self):
        "Train from here to the end of the schedule."
        total = math.ceil(round(self.epochs * (len(self.labels) // self.bs), 6))
        slow = [t.clone() for t in self.floats]
        done = 0
        self.net.train()
        for epoch in range(math.ceil(self.epochs)):
            self.net.whiten.bias.requires_grad_(epoch < BIAS_EPOCHS)
            for x, y in self.batches(epoch):
                for group in self.opt.param_groups:
                    group['lr'] = group['peak'] * factor(done / total)
                self.step(x, y)
                done += 1
                if done % PULL == 0:
                    self.pull(slow, KEPT**PULL * (done / total)**3)
                if done == total:
                    break
        self.pull(slow, 1.)


def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def in_rounds(cases, repeats, device, least=.2):
    """Return the seconds per step of each case in each round.

    A case is a function and the steps that a call makes; it is called until `least` seconds have passed."""
    times = {name: [] for name in cases}
    for r in range(repeats + 1):
        for name, (call, steps) in cases.items():
            wait(device)
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < least:
                call()
                calls += 1
                if calls % 16 == 0:
                    wait(device) # otherwise the clock would miss kernels that are still in the GPU's queue
            wait(device)
            if r:
                times[name].append((time.perf_counter() - start) / calls / steps)
    return times


def spread(values):
    return dict(median=statistics.median(values), low=min(values), high=max(values))


def against(times, name, plain):
    "Return the ratios to another case, each within its round."
    ratios = [a / b for a, b in zip(times[name], times[plain])]
    return dict(**spread(ratios), seconds=statistics.median(times[name]), against=plain)


def said(row):
    return f'{row["median"]:.3f}  ({row["low"]:.3f} to {row["high"]:.3f})'


def learner_epoch(cfg, device, recorded=False):
    "Return a function that trains a Learner for an epoch, and the Learner."
    cbs = [RunRecorder()] if recorded else []
    learn = make_learner(cfg, device, cbs)
    def fit():
        learn.fit(1)
        for cb in cbs:
            cb.unhook()
    return fit, learn


def overhead(a, device):
    cfg = recipe(a.widths, a.bs, a.steps * a.bs)
    fit, learn = learner_epoch(cfg, device)
    data = learn.dls.train.dataset
    cases = {'bare loop': BareLoop(data, a.widths, a.bs, device).fit,
             'Learner': fit,
             'Learner as `run` has it': learner_epoch(cfg, device, recorded=True)[0]}
    plain = dict.fromkeys(cases, 'bare loop')
    if device.type == 'cuda':
        graphs = 'reduce-overhead'
        cases['bare loop, CUDA graphs'] = BareLoop(data, a.widths, a.bs, device, compile=graphs).fit
        cases['Learner, CUDA graphs'] = learner_epoch(cfg.but(compile=graphs), device)[0]
        plain |= dict.fromkeys(('bare loop, CUDA graphs', 'Learner, CUDA graphs'), 'bare loop, CUDA graphs')
    times = in_rounds({name: (f, a.steps) for name, f in cases.items()}, a.repeats, device)
    rows = {name: against(times, name, plain[name]) for name in cases}
    for name, row in rows.items():
        cost = f'{1000 * row["seconds"]:9.2f} ms a step'
        print(f'overhead: {name:24} {cost}, {said(row)} times {row["against"]}', flush=True)
    return dict(rows=rows)


def loader(a, device):
    fit, learn = learner_epoch(recipe(a.widths, a.bs, a.steps * a.bs), device)
    def batches():
        for _ in learn.dls.train:
            pass
    times = in_rounds({'training': (fit, a.steps), 'loader': (batches, a.steps)}, a.repeats, device)
    row = against(times, 'loader', 'training')
    print(f'loader: {1000 * row["seconds"]:.2f} ms a batch, {said(row)} of the time of training', flush=True)
    return dict(rows=dict(loader=row))


def method_steps(method, options, cfg, device, steps):
    "Return a function that makes `steps` training steps with a method, in the middle of a fit."
    if METHODS[method].needs_teacher:
        options = dict(options, teacher=make_learner(cfg.but(seed=1), device).model)
    learn = make_learner(cfg, device, make_method(method, **options))
    batch = next(iter(learn.dls.train))
    learn.n_epoch, learn.epoch, learn.dl, learn.n_iter = 1, 0, learn.dls.train, 10**9
    for event in ('before_fit', 'before_epoch', 'before_train'):
        learn(event)
    learn.dl.get_idxs() # callbacks that need the sample ids get them from this call
    def call():
        for _ in range(steps):
            learn.one_batch(0, batch)
    return call


def methods(a, device):
    cfg = recipe(a.widths, a.bs, a.steps * a.bs)
    cases = {}
    for name, (method, options) in CASES.items():
        steps = CYCLE.get(name, 1)
        try:
            cases[name] = method_steps(method, options, cfg, device, steps), steps
        except ValueError as e:
            if name == 'baseline':
                raise
            reason = str(e).splitlines()[-1].strip()
            print(f'methods: {name} is not for this network ({reason})')
    times = in_rounds(cases, a.repeats, device)
    rows = {}
    for name in cases:
        passes = METHODS[CASES[name][0]].passes
        rows[name] = dict(against(times, name, 'baseline'), passes=passes)
        print(f'methods: {name:24} {said(rows[name])} times the plain step, {passes:.2f} passes', flush=True)
    return dict(rows=rows)


def parts(a, device):
    data = recipe(a.widths, a.bs, a.bs)
    cases = {}
    for row in paper_grid('fast/steps'):
        label, _, seed = row.label.rpartition(' · ')
        if seed != 'seed 0': continue
        images = a.steps * row.run.bs
        own = dict(n_train=images) if data.data == 'cifar10' else dict(data_args=dict(n=images))
        cfg = row.run.but(data=data.data, epochs=1, views=0, **own)
        cases[label] = learner_epoch(cfg, device)[0], a.steps
    times = in_rounds(cases, a.repeats, device)
    first = next(iter(cases))
    rows = {name: against(times, name, first) for name in cases}
    for name, row in rows.items(): print(f'parts: {name:36} {said(row)} times the first row', flush=True)
    return dict(rows=rows)


def compiles():
    "Return whether torch.compile finds a compiler."
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
        return True
    except Exception as e:
        print(f'formats: torch.compile does not work here ({type(e).__name__})')
        return False


def kernels(step, steps=3, most=8):
    "Return the kernels with the largest shares of self time, by name."
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as p:
        for _ in range(steps):
            step()
    times = {}
    for e in p.key_averages():
        name = e.key
        if 'CompiledFxGraph' in name: name = 'compiled graphs' # their names are hashes
        times[name] = times.get(name, 0) + e.self_cpu_time_total
    total = sum(times.values())
    largest = sorted(times, key=lambda name: -times[name])[:most]
    return {name: times[name] / total for name in largest}


def format_name(bs, amp, channels_last, compile=''):
    precision = 'bfloat16' if amp else 'float32'
    layout = 'channels_last' if channels_last else 'contiguous'
    name = f'batch {bs}, {precision}, {layout}'
    return f'{name}, compiled' if compile else name


def bare_step(data, widths, device, settings):
    "Return a function that makes a step of the bare loop, always on the same batch."
    loop = BareLoop(data, widths, device=device, **settings)
    batch = next(loop.batches(0))
    def step():
        loop.step(*batch)
    return step


def formats(a, device):
    torch._dynamo.config.recompile_limit = 64 # above it, a network is not compiled, and there is no warning
    data = make_learner(recipe(a.widths, a.bs, max(a.bs, 100)), device).dls.train.dataset
    modes = ('', 'default') if compiles() else ('',)
    sizes = (a.bs // 4, a.bs // 2, a.bs)
    settings = {}
    for bs, amp, last, mode in product(sizes, (True, False), (True, False), modes):
        setting = dict(bs=bs, amp=amp, channels_last=last, compile=mode)
        settings[format_name(**setting)] = setting
    cases = {name: bare_step(data, a.widths, device, setting) for name, setting in settings.items()}
    times = in_rounds({name: (step, 1) for name, step in cases.items()}, a.repeats, device)
    plain = format_name(a.bs, amp=True, channels_last=True)
    rows = {}
    plain_rates = [a.bs / seconds for seconds in times[plain]]
    for name, setting in settings.items():
        rates = [setting['bs'] / seconds for seconds in times[name]]
        ratio = spread([rate / plain_rate for rate, plain_rate in zip(rates, plain_rates)])
        speed = statistics.median(rates)
        rows[name] = dict(setting, **ratio, images_per_second=speed, against=plain)
        print(f'formats: {name:48} {speed:7,.0f} images/s, {said(ratio)} times the recipe', flush=True)
    best = max(rows, key=lambda name: rows[name]['images_per_second'])
    profile = kernels(cases[best])
    parts = ', '.join(f'{name} {share:.0%}' for name, share in profile.items())
    print(f'formats: {best} spends its time on {parts}', flush=True)
    return dict(rows=rows, best=best, profile=profile)


def whole_run(cfg, device):
    "Return the seconds of `run`, and its accuracy by level of averaged views."
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        result = run(cfg, root, progress=False, device=device)
        wall = time.perf_counter() - start
    accuracy = {'0': result['accuracy'], **{str(level): v for level, v in result['views'].items()}}
    return dict(wall=wall, train=result['train_seconds'], accuracy=accuracy)


def whole_loop(cfg, device, dls):
    "Return seconds and accuracies of the bare loop; its images are in memory already."
    wait(device)
    start = time.perf_counter()
    widths = dict(cfg.model_args)['widths']
    loop = BareLoop(dls.train.dataset, widths, cfg.bs, device, cfg.epochs, seed=cfg.seed)
    wait(device)
    made = time.perf_counter()
    loop.fit()
    wait(device)
    train = time.perf_counter() - made
    accuracy = {str(level): evaluate(loop.net, dls[2], level)['accuracy'] for level in (0, 1, 2)}
    return dict(wall=time.perf_counter() - start, train=train, accuracy=accuracy)


def seconds(a, device):
    "Time whole runs; each repetition has its own seed, and the first is not counted."
    cfg = recipe(a.widths, a.bs, 50_000, epochs=9.9, views=2)
    dls = make_learner(cfg, device).dls
    found = {'run': [], 'bare loop': []}
    for seed in range(a.repeats + 1):
        runs = whole_run(cfg.but(seed=seed), device), whole_loop(cfg.but(seed=seed), device, dls)
        if seed:
            for kept, one in zip(found.values(), runs):
                kept.append(one)
    rows = {}
    for name, runs in found.items():
        ratios = [one['train'] / bare['train'] for one, bare in zip(runs, found['bare loop'])]
        row = dict(wall=spread([one['wall'] for one in runs]), train=spread([one['train'] for one in runs]),
                   ratio=spread(ratios), accuracy={})
        for level in ('0', '1', '2'): row['accuracy'][level] = [one['accuracy'][level] for one in runs]
        rows[name] = row
        means = ', '.join(f'{100 * statistics.mean(v):.2f}' for v in row['accuracy'].values())
        print(f'seconds: {name:9} {row["wall"]["median"]:.2f} s to the end, '
              f'{row["train"]["median"]:.2f} s of training, '
              f'{said(row["ratio"])} times the bare loop', flush=True)
        print(f'seconds: {name:9} mean accuracy {means} %: plain, mirrored, shifted views', flush=True)
    return dict(rows=rows)


PARTS = dict(overhead=overhead, loader=loader, methods=methods, parts=parts, formats=formats,
             seconds=seconds)
ONLY = dict(formats='cpu', seconds='cuda')


def measured(out, device):
    "Return the results that have a limit, by the name of the limit."
    found = {}
    rows = {part: result['rows'] for part, result in out.items()}
    if 'overhead' in rows:
        where = 'GPU' if device.type == 'cuda' else 'CPU'
        found[f'overhead, {where}'] = rows['overhead']['Learner']['median']
        if 'Learner, CUDA graphs' in rows['overhead']:
            found['overhead, CUDA graphs'] = rows['overhead']['Learner, CUDA graphs']['median']
    if 'loader' in rows:
        found['loader'] = rows['loader']['loader']['median']
    if 'methods' in rows:
        found |= {name: row['median'] for name, row in rows['methods'].items() if name in LIMITS}
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--part', choices=[*PARTS])
    p.add_argument('--repeats', type=int, default=9)
    p.add_argument('--widths', type=int, nargs=3, default=[64, 256, 256])
    p.add_argument('--bs', type=int, default=1024)
    p.add_argument('--steps', type=int, help='of an epoch, at least 5; 48 on a GPU, 5 on a CPU')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    a.widths = tuple(a.widths)
    device = torch.device(a.device)
    a.steps = a.steps or (48 if device.type == 'cuda' else PULL)
    if a.steps < PULL:
        p.error(f'--steps must be at least {PULL}, the steps between two pulls of the recipe, got {a.steps}')
    keep_pages()
    out = json.loads(a.out.read_text()) if a.out and a.out.exists() else {}
    new = {}
    for part, measure in PARTS.items():
        if a.part not in (None, part):
            continue
        if ONLY.get(part, device.type) != device.type:
            print(f'{part}: not measured on {device.type}, only on {ONLY[part]}')
            continue
        settings = dict(widths=a.widths, bs=a.bs, steps=a.steps, repeats=a.repeats,
                        data='CIFAR-10' if os.environ.get('SADT_DATA') else 'random images')
        new[part] = dict(settings, **measure(a, device), **provenance(device))
        if a.out:
            a.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(a.out, {**out, **new})
    held = []
    for name, value in measured(new, device).items():
        verdict = 'holds' if value <= LIMITS[name] else 'DOES NOT HOLD'
        held.append(f'{name} {LIMITS[name]:.2f} {verdict} ({value:.3f})')
    print('limits: ' + ('; '.join(held) or 'none applies to what was measured'))


if __name__ == '__main__':
    main()
