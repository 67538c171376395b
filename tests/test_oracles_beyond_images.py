"""Methods against loops written from the formulas, for numbers, labels, text, pixels and several outputs.

All at once: groups with rates of their own, one cycle, weight decay in the gradient, accumulation with a
smaller last batch, clipping, BatchNorm, dropout, and shared, frozen and unused layers."""
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from sadt_nb.methods.agc import AGC
from sadt_nb.methods.controls import RepeatBatch, RepeatStep
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gradient_centralization import GradientCentralization
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM
from torch import nn
from torch.nn import functional as F

N, EPOCHS, SIZE, STEP, CLIP, DECAY = 23, 4, 5, 10, .5, .05


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0, low=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


class Dense(nn.Module):
    "BatchNorm, dropout, a layer that is used twice, a frozen and an unused one."
    def __init__(self, inputs, outputs, dropout):
        super().__init__()
        self.first, self.norm, self.twice = nn.Linear(inputs, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.frozen, self.unused = nn.Linear(6, 6).requires_grad_(False), nn.Linear(3, 3)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(6, outputs)
    def forward(self, *inputs):
        x = self.twice(self.norm(self.first(torch.cat(inputs, 1)))).tanh()
        x = self.dropout(self.twice(x).tanh())
        return self.last(self.frozen(x).tanh() + x)


class Heads(Dense):
    def forward(self, x):
        z = super().forward(x)
        return dict(kind=z[:, :3], size=z[:, 3:])


class Text(nn.Module):
    "Input and output share the embedding."
    def __init__(self, dropout):
        super().__init__()
        self.first, self.dense = nn.Embedding(7, 5, padding_idx=0), nn.Linear(5, 5)
        self.norm, self.dropout, self.out = nn.LayerNorm(5), nn.Dropout(dropout), nn.Linear(5, 7)
        self.out.weight = self.first.weight
        self.position, self.unused = nn.Parameter(.1 * torch.ones(4, 5), requires_grad=False), nn.Linear(2, 2)
    def forward(self, x):
        x = self.norm(self.dense(self.first(x) + self.position))
        return self.out(self.dropout(x.tanh()))


class Pixels(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.frozen = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.dropout, self.last = nn.Dropout2d(dropout), nn.Conv2d(4, 3, 1)
    def forward(self, x):
        x = self.twice(self.norm(self.first(x)).relu()).relu()
        return self.last(self.dropout(self.twice(x).relu() + self.frozen(x)))


class DoubleFlat(CrossEntropyLossFlat):
    "fastai's own converts to single precision."
    def _contiguous(self, x): return x.transpose(self.axis, -1).contiguous()


def weighted_mean(losses, weights): return (losses * weights).sum() / weights.sum()


def cross_entropy(z, y, axis, weights, ignored):
    counted = y != ignored
    y = y.where(counted, 1)
    losses = -z.log_softmax(axis).gather(axis, y.unsqueeze(axis)).squeeze(axis)
    return weighted_mean(losses, weights[y] * counted)


def of_labels(z, y):
    return -(RARE * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean()


def of_heads(z, kind, size): return F.cross_entropy(z['kind'], kind) + .5 * F.mse_loss(z['size'], size)


def categorical(t, s, axis):
    p, log_q = t.softmax(axis), s.log_softmax(axis)
    return (p * (p.log() - log_q)).sum(axis)


def bernoulli(t, s):
    p, q = t.sigmoid(), s.sigmoid()
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


RARE = torch.tensor([1., 2., .5]).double()
WORDS = torch.tensor([1., .5, 2., 1., 3., .2, 1.]).double()
KINDS = torch.tensor([1., .5, 2.]).double()
NEXT = integers(7, N, 4, seed=3, low=1)
NEXT[::2, 2:] = 0
NEXT[1] = 0
MASK = integers(3, N, 4, 4, seed=5)
MASK[:, 0] = 255
MASK[3] = 255

TASKS = { # network, inputs, targets, loss of the Learner, loss by hand, divergence of each prediction by hand
    'numbers': (partial(Dense, 5, 2), (normal(N, 2), normal(N, 3, seed=1)), (normal(N, 2, seed=2),),
                nn.MSELoss(), lambda z, y: (z - y).square().mean(), lambda t, s: (t - s).square()),
    'labels': (partial(Dense, 4, 3), (normal(N, 4),), (integers(2, N, 3).double(),),
               nn.BCEWithLogitsLoss(pos_weight=RARE), of_labels, bernoulli),
    'text': (Text, (integers(7, N, 4, seed=4),), (NEXT,), DoubleFlat(ignore_index=0, weight=WORDS),
             partial(cross_entropy, axis=-1, weights=WORDS, ignored=0), partial(categorical, axis=-1)),
    'segmentation': (Pixels, (normal(N, 2, 4, 4),), (MASK,), nn.CrossEntropyLoss(KINDS, ignore_index=255),
                     partial(cross_entropy, axis=1, weights=KINDS, ignored=255),
                     partial(categorical, axis=1)),
    'heads': (partial(Heads, 4, 5), (normal(N, 4),), (integers(3, N, seed=6), normal(N, 2, seed=7)), of_heads,
              of_heads, None)}
IGNORED = dict(text=0, segmentation=255)


def network(name, dropout=.2, seed=0):
    torch.manual_seed(seed)
    return TASKS[name][0](dropout).double()


def norm(g): return math.sqrt(sum(t.square().sum().item() for t in g.values()))
def dot(a, b): return sum((a[k] * b[k]).sum().item() for k in a)
def scaled(g, factor): return {k: factor * t for k, t in g.items()}
def plus(a, b, factor=1.): return {k: t + factor * b[k] if k in b else t for k, t in a.items()}


class Loop:
    "Plain training; subclasses change the gradient of a micro-batch, or the step."
    term = None # of the loss: `term(loop, micro-batch, outputs, loss) -> loss`

    def __init__(self, name):
        self.name, self.momenta, self.steps, self.teachers = name, {}, 0, teachers(name)
        self.n_inputs, self.loss, self.each = len(TASKS[name][1]), *TASKS[name][4:]

    def params(self): return {k: p for k, p in self.net.named_parameters() if p.requires_grad}

    def divergence(self, teacher, student, y, has=None):
        "The mean over the predictions that count; a sample without a record adds zero."
        values = self.each(teacher, student)
        counted = y != IGNORED[self.name] if self.name in IGNORED else torch.ones_like(values)
        shares = counted if has is None else counted * has.view(-1, *[1] * (values.ndim - 1))
        return (values * shares).sum() / max(counted.sum(), 1)

    def gradient(self, loss):
        ps = self.params()
        gs = torch.autograd.grad(loss, list(ps.values()), allow_unused=True)
        return {k: g for k, g in zip(ps, gs) if g is not None}

    def full_loss(self):
        out = self.net(*self.x)
        self.outputs = out if isinstance(out, dict) else out.detach()
        loss = self.loss(out, *self.y)
        return loss if self.term is None else self.term(out, loss)

    def there(self, deltas, loss=None):
        "Return the gradient at other weights."
        with torch.no_grad():
            kept = {k: p.clone() for k, p in self.params().items()}
            for k, d in deltas.items(): self.params()[k].add_(d)
        g = self.gradient((loss or self.full_loss)())
        with torch.no_grad():
            for k, p in self.params().items(): p.copy_(kept[k])
        return g

    def uphill(self, d): return scaled(d, .3 / norm(d))
    def micro_gradient(self): return self.gradient(self.full_loss())
    def transformed(self, g): return g

    def clipped(self, g):
        g = self.transformed(g)
        return scaled(g, min(1., CLIP / (norm(g) + 1e-6)))

    @torch.no_grad()
    def step(self, g):
        for k, p in self.params().items():
            if k not in g: continue
            lr, momentum, decays = self.row[k]
            d = g[k] + DECAY * p if decays else g[k]
            self.momenta[k] = momentum * self.momenta[k] + d if k in self.momenta else d
            p -= lr * self.momenta[k]

    def whole_step(self, micros, g): self.step(self.clipped(g))
    def begin_epoch(self, epoch): self.epoch = epoch

    def train(self, net, batches, rows):
        self.net, rows, total, micros = net, iter(rows), {}, []
        for epoch in range(EPOCHS):
            self.begin_epoch(epoch)
            for i, batch in enumerate(batches):
                self.row, self.x, self.y = next(rows), batch[:self.n_inputs], batch[self.n_inputs:]
                self.ids = range(i * SIZE, i * SIZE + len(self.x[0]))
                self.share = len(self.ids) / STEP
                total = plus(scaled(self.micro_gradient(), self.share), total)
                micros.append((self.x, self.y, self.outputs, self.share))
                if sum(len(x[0]) for x, *_ in micros) < STEP: continue # goes on in the next epoch
                self.whole_step(micros, total)
                self.steps += 1
                total, micros = {}, []


class Sam(Loop):
    def micro_gradient(self): return self.there(self.uphill(self.gradient(self.full_loss())))


class Gsam(Loop):
    def uphill(self, d):
        lr = list(self.row.values())[-1][0]
        return scaled(d, (.1 + .2 * lr / .08) / norm(d))
    def micro_gradient(self):
        g = self.gradient(self.full_loss())
        g_p = self.there(self.uphill(g))
        across = plus(g, g_p, -dot(g, g_p) / norm(g_p)**2)
        return plus(g_p, across, -.4)


class Wsam(Loop):
    def __init__(self, name, decouple=True):
        super().__init__(name)
        self.decouple, self.apart = decouple, {}
    def micro_gradient(self):
        g = self.gradient(self.full_loss())
        rise = plus(self.there(self.uphill(g)), g, -1)
        if not self.decouple: return plus(g, rise, 4.)
        self.apart = plus(scaled(rise, self.share), self.apart)
        return g
    def whole_step(self, micros, g):
        super().whole_step(micros, g)
        with torch.no_grad():
            for k, d in self.apart.items(): self.params()[k].sub_(self.row[k][0] * 4. * d)
        self.apart = {}


class Look(Loop):
    new = ()
    def micro_gradient(self):
        g = self.gradient(self.full_loss())
        if self.steps % 3: return plus(g, self.g_v, .7 * norm(g) / norm(self.g_v))
        g_s = self.there(self.uphill(g))
        self.new = plus(scaled(plus(g_s, g, -dot(g_s, g) / norm(g)**2), self.share), self.new)
        return g_s
    def whole_step(self, micros, g):
        if self.new: self.g_v, self.new = self.new, ()
        super().whole_step(micros, g)


class Friendly(Loop):
    m, new = {}, {}
    def micro_gradient(self):
        g = self.gradient(self.full_loss())
        self.new = plus(scaled(g, self.share), self.new)
        return self.there(self.uphill(plus(g, self.m, -.8)))
    def whole_step(self, micros, g):
        mean = scaled(self.new, 1 / sum(m[-1] for m in micros))
        self.m, self.new = plus(scaled(mean, .3), self.m, .7) if self.m else mean, {}
        super().whole_step(micros, g)


class Msam(Loop):
    def moved(self): return scaled(self.momenta, -.3 / norm(self.momenta)) if self.momenta else {}
    def micro_gradient(self): return self.there(self.moved())
    def whole_step(self, micros, g):
        decaying = {k: d for k, d in self.moved().items() if self.row[k][-1]}
        self.step(plus(self.clipped(g), decaying, DECAY)) # the decay of the moved weights


class Esam(Loop):
    def micro_gradient(self):
        with torch.no_grad(): kept = deepcopy(self.net.state_dict())
        g = self.gradient(self.full_loss())
        def rises():
            with torch.no_grad(): return self.sample_losses()
        statistics = deepcopy(self.net.state_dict())
        self.net.load_state_dict(kept)
        before = rises()
        self.net.load_state_dict(statistics)
        chosen = []
        def loss():
            statistics = {k: b.clone() for k, b in self.net.named_buffers()}
            order = (rises() - before).argsort(descending=True)
            for k, b in self.net.named_buffers(): b.copy_(statistics[k])
            chosen.extend(order[:math.ceil(len(order) / 2)].sort().values.tolist())
            return self.loss(self.net(*(x[chosen] for x in self.x)), *(y[chosen] for y in self.y))
        return self.there(self.uphill(g), loss)
    def sample_losses(self):
        z, y = self.net(*self.x), self.y[0]
        if self.name == 'text':
            losses = F.cross_entropy(z.transpose(1, 2), y, WORDS, ignore_index=0, reduction='none')
        elif self.name == 'segmentation':
            losses = F.cross_entropy(z, y, KINDS, ignore_index=255, reduction='none')
        elif self.name == 'labels': losses = -(RARE * y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z))
        else: losses = (z - y).square()
        return losses.flatten(1).mean(1)


class Repeat(Loop):
    def whole_step(self, micros, g):
        g = self.clipped(g)
        for _ in range(3): self.step(g)


class Again(Loop):
    def whole_step(self, micros, g):
        g, new = self.clipped(g), {}
        self.step(g)
        for self.x, self.y, _, share in micros:
            new = plus(scaled(self.gradient(self.full_loss()), share), new)
        self.step(plus(scaled(new, 1.5), g, -.5)) # the change of the gradient counts one and a half times


class Centralized(Loop):
    def transformed(self, g):
        def mean(t): return t.flatten(1).mean(1).view(-1, *[1] * (t.ndim - 1))
        return {k: t - mean(t) if t.ndim > 1 else t for k, t in g.items()}


class Agc(Loop):
    def transformed(self, g):
        def units(t):
            if t.ndim < 2: return t.norm()
            return t.flatten(1).norm(dim=1).view(-1, *[1] * (t.ndim - 1))
        bounds = {k: .02 * units(self.params()[k].detach()).clamp(min=.01) for k in g}
        return {k: torch.where(units(t) > bounds[k], t * bounds[k] / units(t).clamp(min=1e-6), t)
                for k, t in g.items()}


class Kd:
    def term(self, out, loss):
        with torch.no_grad(): z = sum(t.eval()(*self.x) for t in self.teachers) / 2
        return .3 * loss + .7 * 4. * self.divergence(z / 2, out / 2, self.y[0])
class KdLoop(Kd, Loop): pass
class KdSam(Kd, Sam): pass


class Mesa:
    def begin_epoch(self, epoch):
        super().begin_epoch(epoch)
        if epoch == 0: self.teacher = deepcopy(self.net).eval()
    def whole_step(self, micros, g):
        super().whole_step(micros, g)
        with torch.no_grad():
            for v, w in zip(self.teacher.parameters(), self.net.parameters()): v.copy_(.8 * v + .2 * w)
            for v, w in zip(self.teacher.buffers(), self.net.buffers()):
                v.copy_(.8 * v + .2 * w if v.is_floating_point() else w)
    def term(self, out, loss):
        if self.epoch < 1: return loss
        with torch.no_grad(): z = self.teacher(*self.x)
        return loss + .8 * self.divergence(z / 2, out / 2, self.y[0])
class MesaLoop(Mesa, Loop): pass
class MesaFriendly(Mesa, Friendly): pass
class MesaRepeat(Mesa, Repeat): pass


class SafLoop(Loop):
    def term(self, out, loss):
        records = self.__dict__.setdefault('records', {})
        for i, z in zip(self.ids, out): records[self.epoch, i] = z.detach().half().double()
        if self.epoch < 2: return loss
        old = torch.stack([records[self.epoch - 2, i] for i in self.ids])
        return loss + 3. * self.divergence(old / 2, out / 2, self.y[0])


def waves(params, grads, generator=None):
    def wave(p): return .05 * torch.arange(p.numel()).double().sin().view_as(p)
    return {k: wave(p) for k, p in params.items() if p.ndim > 1}


def ascent(params, grads, generator=None): return scaled(grads, .3)


class Sadt(Loop):
    def __init__(self, name, fns, kl, first_step=True):
        super().__init__(name)
        self.fns, self.kl, self.first_step = fns, kl, first_step
    def aux_loss(self, x, y, q):
        a = self.net(*x)
        return self.divergence(*((q, a) if self.kl == 'clean_to_aux' else (a, q)), y)
    def whole_step(self, micros, g):
        g = self.clipped(g)
        if self.first_step: self.step(g)
        total = g
        for fn in self.fns:
            deltas = fn(self.params(), g)
            for x, y, q, share in micros:
                statistics = {k: b.clone() for k, b in self.net.named_buffers()}
                total = plus(total, self.there(deltas, partial(self.aux_loss, x, y[0], q)), share)
                for k, b in self.net.named_buffers(): b.copy_(statistics[k])
        self.step(total)
class KdSadt(Kd, Sadt): pass


def teachers(name): return [network(name, seed=7), network(name, seed=8)]
def mesa(): return MESA(.8, 2., .8, 1)


ANY = { # callbacks, loop
    'plain': (lambda name: [], Loop), 'sam': (lambda name: [SAM(.3)], Sam),
    'gsam': (lambda name: [GSAM(.3, .1, .4)], Gsam), 'wsam': (lambda name: [WSAM(.3, .8)], Wsam),
    'coupled wsam': (lambda name: [WSAM(.3, .8, False)], partial(Wsam, decouple=False)),
    'looksam': (lambda name: [LookSAM(.3, .7, 3)], Look),
    'friendly_sam': (lambda name: [FriendlySAM(.3, .8, .7)], Friendly),
    'msam': (lambda name: [MSAM(.3)], Msam),
    'repeat_step': (lambda name: [RepeatStep(3)], Repeat),
    'repeat_batch': (lambda name: [RepeatBatch(1.5)], Again), 'agc': (lambda name: [AGC(.02, .01)], Agc),
    'gc': (lambda name: [GradientCentralization()], Centralized)}
OF_LOGITS = {
    'esam': (lambda name: [ESAM(.3, 1., .5)], Esam),
    'distillation': (lambda name: [Distillation(teachers(name), .3, 2.)], KdLoop),
    'distilled sam': (lambda name: [SAM(.3), Distillation(teachers(name), .3, 2.)], KdSam),
    'mesa': (lambda name: [mesa()], MesaLoop), 'saf': (lambda name: [SAF(3., 2., 2, 2)], SafLoop),
    'mesa and friendly_sam': (lambda name: [mesa(), FriendlySAM(.3, .8, .7)], MesaFriendly),
    'mesa and repeat_step': (lambda name: [mesa(), RepeatStep(3)], MesaRepeat),
    'sadt': (lambda name: [SADT(perturb=[waves, ascent], kl='aux_to_clean')],
             partial(Sadt, fns=[waves, ascent], kl='aux_to_clean')),
    'one step of sadt': (lambda name: [SADT(perturb=[waves], first_step=False)],
                         partial(Sadt, fns=[waves], kl='clean_to_aux', first_step=False)),
    'distilled sadt': (lambda name: [SADT(perturb=[waves]), Distillation(teachers(name), .3, 2.)],
                       partial(KdSadt, fns=[waves], kl='clean_to_aux'))}
CASES = [(t, m) for t in TASKS for m in (ANY if t == 'heads' else ANY | OF_LOGITS)]


class Rows(Callback):
    "Keeps rate, momentum and whether the weight decays, of every parameter in every batch."
    order, run_valid = 90, False # after the schedule
    def __init__(self): self.rows = []
    def before_batch(self):
        names = {p: k for k, p in self.model.named_parameters()}
        groups = zip(self.opt.param_lists, self.opt.hypers)
        self.rows.append({names[p]: (h['lr'], h['mom'], self.opt.state[p].get('do_wd', True))
                          for ps, h in groups for p in ps})


def two_groups(net):
    first = list(net.first.parameters())
    return [first, [p for p in net.parameters() if not any(p is q for q in first)]]


@pytest.mark.parametrize('name,method', CASES)
def test_a_method_is_its_formula(name, method):
    make, loop = (ANY | OF_LOGITS)[method]
    # a loader of fastai, which SAF needs, draws a random number, and ESAM's passes have other masks
    dropout = 0. if method in ('saf', 'esam') else .2
    columns = (*TASKS[name][1], *TASKS[name][2])
    batches = [tuple(t[i:i + SIZE] for t in columns) for i in range(0, N, SIZE)]
    data = DataLoader(list(zip(*columns)), bs=SIZE) if method == 'saf' else batches
    dls, rows = DataLoaders(data, data), Rows()
    dls.n_inp = len(TASKS[name][1])
    cbs = [TrainEvalCallback(), rows, *make(name), GradientAccumulation(STEP), GradientClip(CLIP)]
    learn = Learner(dls, network(name, dropout), loss_func=TASKS[name][3], splitter=two_groups, wd=DECAY,
                    opt_func=partial(SGD, mom=.9, decouple_wd=False), default_cbs=False, cbs=cbs)
    torch.manual_seed(5)
    learn.fit_one_cycle(EPOCHS, slice(.02, .08))
    net, by_hand = network(name, dropout), loop(name)
    torch.manual_seed(5)
    by_hand.train(net, batches, rows.rows)
    torch.testing.assert_close(learn.model.state_dict(), net.state_dict(), rtol=1e-7, atol=1e-8)
