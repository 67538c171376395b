"""ASAM, ESAM, LookSAM, GSAM, SAF and MESA against plain PyTorch loops.

The loops were written from the specification without sight of the implementation."""
import gc
import io
import math
import random
import warnings
from contextlib import contextmanager
from copy import deepcopy
from fractions import Fraction
from functools import partial
from itertools import product

import pytest
import torch
from conftest import batches, flat, learner, mlp
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos, combined_cos
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from fastai.optimizer import SGD, Adam, OptimWrapper
from torch import nn

from sadt_nb.methods.asam import ASAM, asam_step
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.gsam import GSAM, gsam_step
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM

CE = nn.CrossEntropyLoss()
# the Learner's optimizer, and the torch optimizer that does the same
momentum = dict(momentum=.9, weight_decay=.01)
torch_sgd = partial(torch.optim.SGD, lr=.1)
torch_adam = partial(torch.optim.Adam, lr=.1, betas=(.9, .99), eps=1e-5)
OPTS = {'plain': (SGD, torch_sgd),
        'momentum': (partial(SGD, mom=.9, wd=.01, decouple_wd=False), partial(torch_sgd, **momentum)),
        'torch': (partial(OptimWrapper, opt=torch.optim.SGD, **momentum), partial(torch_sgd, **momentum)),
        'adam': (partial(Adam, wd=0.), torch_adam)}


class Net(nn.Module):
    "BatchNorm and dense layers, a matrix without 'weight' in its name, and a parameter without a gradient."
    def __init__(self, bn=True):
        super().__init__()
        self.body = mlp(bn=bn)
        self.gain = nn.Parameter(torch.linspace(-1, 1.5, 15, dtype=torch.float64).view(5, 3))
        self.idle_weight = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, x): return self.body(x) + x @ self.gain


# The oracles. A rule returns the gradient of one (micro-)batch, `train` is the loop around it.
def grad(net, loss):
    "Return the gradients of the trainable parameters that have one, by name."
    named = {n: p for n, p in net.named_parameters() if p.requires_grad}
    gs = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, gs) if g is not None}


def dot(a, b): return sum((a[n] * b[n]).sum() for n in a)

def norm(a): return dot(a, a).sqrt()


def kl(teacher, student):
    "Return KL(teacher || student) of each row of logits, in nats."
    p = teacher.exp() / teacher.exp().sum(-1, keepdim=True)
    q = student.exp() / student.exp().sum(-1, keepdim=True)
    return (p * (p.log() - q.log())).sum(-1)


@contextmanager
def moved(net, e, bn='update', dropout=None):
    "Move `net` to w + e for a while; `dropout` is a state of the generator to start from."
    old = {n: t.clone() for n, t in net.state_dict().items()}
    buffers = {n for n, _ in net.named_buffers()}
    with torch.no_grad():
        for n, p in net.named_parameters():
            if n in e: p += e[n]
    if dropout is not None: torch.set_rng_state(dropout)
    yield
    with torch.no_grad():
        for n, t in net.state_dict().items():
            if n not in buffers or bn == 'keep': t.copy_(old[n])


def train(net, epochs, rule, opt='momentum', acc=1, lrs=None, after=lambda: None):
    """Train on the batches of each epoch, with the gradients of `rule`. Return the network.

    `acc` batches make a step, `lrs` has one learning rate per step, `after` is called after each step."""
    net.train()
    optimizer = OPTS[opt][1](net.parameters())
    params = dict(net.named_parameters())
    step, micro = 0, 0
    for epoch, data in enumerate(epochs):
        for x, y in data:
            for n, g in rule(net, x, y, step, epoch).items():
                before = 0 if params[n].grad is None else params[n].grad
                params[n].grad = g / acc + before
            micro += 1
            if micro % acc: continue
            if lrs: optimizer.param_groups[0]['lr'] = lrs[step]
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            after()
    return net


def base(net, x, y, step, epoch): return grad(net, CE(net(x), y))


def asam(rho=.5, eta=.01, T=None, bn='update', rng='fresh'):
    """`T(name, parameter)` is the diagonal of the normalisation operator.

    By default it is the paper's: `|w| + eta` for weights, and 1 for biases, the only other parameters here.
    'name': the authors' code, where weights are those with "weight" in their name."""
    def by_role(n, p): return torch.ones_like(p) if n.endswith('.bias') else p.detach().abs() + eta
    def by_name(n, p): return p.detach().abs() + eta if 'weight' in n else torch.ones_like(p)
    if T is None: T = by_role
    elif T == 'name': T = by_name
    def rule(net, x, y, step, epoch):
        state = torch.get_rng_state()
        g, params = grad(net, CE(net(x), y)), dict(net.named_parameters())
        length = norm({n: T(n, params[n]) * g[n] for n in g}) + 1e-16
        e = {n: rho * T(n, params[n])**2 * g[n] / length for n in g}
        rule.g = g
        with moved(net, e, bn, state if rng == 'replay' else None): return grad(net, CE(net(x), y))
    return rule


def ones(n, p): return torch.ones_like(p)


def absolute(n, p): return p.detach().abs()


def sam(rho=.05, **kw): return asam(rho, T=ones, **kw)


def esam(rho=.05, beta=.6, gamma=.5, seed=0, bn='update', rng='fresh'):
    gen = torch.Generator().manual_seed(seed)
    each = nn.CrossEntropyLoss(reduction='none')
    def rule(net, x, y, step, epoch):
        state = torch.get_rng_state()
        before = each(net(x), y)
        g = grad(net, before.mean())
        k = math.ceil(Fraction(str(gamma)) * len(x))
        keep = torch.rand(len(g), generator=gen) < beta
        assert keep.any() or k == len(x), 'no perturbation, so no order among the samples: take another seed'
        e = {n: rho / beta * g[n] / (norm(g) + 1e-12) for n, on in zip(g, keep) if on}
        chosen = list(range(len(x)))
        if k < len(x):
            with moved(net, e, 'keep'), torch.no_grad(): rise = each(net(x), y) - before
            chosen = sorted(chosen, key=lambda i: -rise[i].item())[:k]
        with moved(net, e, bn, state if rng == 'replay' else None):
            return grad(net, CE(net(x[chosen]), y[chosen]))
    return rule


def looksam(rho=.05, alpha=.7, k=5, **kw):
    inner, last = sam(rho, **kw), {}
    def rule(net, x, y, step, epoch):
        if step % k == 0:
            g_s, g = inner(net, x, y, step, epoch), inner.g
            last.update({n: g_s[n] - dot(g_s, g) / dot(g, g) * g[n] for n in g})
            return g_s
        g = base(net, x, y, step, epoch)
        return {n: g[n] + alpha * norm(g) / norm(last) * last[n] for n in g}
    return rule


def gsam(rho=.05, alpha=.4, adaptive=False, **kw):
    "`rho` is a number, or a function of the step."
    def rule(net, x, y, step, epoch):
        inner = asam(rho(step) if callable(rho) else rho, T=absolute if adaptive else ones, **kw)
        g_p, g = inner(net, x, y, step, epoch), inner.g
        return {n: g_p[n] - alpha * (g[n] - dot(g, g_p) / dot(g_p, g_p) * g_p[n]) for n in g}
    return rule


def saf(lam=.3, tau=5., lag=3, start_epoch=5, half=torch.float16):
    "Return SAF's rule, which identifies a sample by the bytes of its input."
    def rule(net, x, y, step, epoch):
        z, extra = net(x), torch.zeros((), dtype=x.dtype)
        for row, now in zip(x, z):
            key = row.numpy().tobytes()
            rule.records[epoch, key] = now.detach().to(half)
            past = rule.records.get((epoch - lag, key))
            if past is None or epoch < start_epoch: continue
            extra = extra + kl(past.to(now.dtype) / tau, now / tau)
        return grad(net, CE(z, y) + lam * extra / len(x))
    rule.records = {}
    return rule


def mesa(net, lam=.8, tau=5., beta=.9995, start_epoch=5):
    "Return the rule, the function to call after each step, and the teacher."
    teacher = deepcopy(net).eval()
    def rule(net, x, y, step, epoch):
        z = net(x)
        extra = kl(teacher(x).detach() / tau, z / tau).mean() if epoch >= start_epoch else 0.
        return grad(net, CE(z, y) + lam * extra)
    def after():
        for v, w in zip(teacher.state_dict().values(), net.state_dict().values()):
            v.copy_(beta * v + (1 - beta) * w if v.is_floating_point() else w)
    return rule, after, teacher


# The library's side, and comparisons
class Spy(Callback):
    "Keeps the batches of each epoch, and how far the shown and the trained loss are from the plain loss."
    run_valid = False
    def __init__(self):
        self.seen = []
        self.off, self.added = 0., 0.
    def plain_loss(self): return CE(self.learn.pred, self.learn.yb[0])
    def before_train(self): self.seen.append([])
    def before_batch(self): self.seen[-1].append((self.learn.xb[0].clone(), self.learn.yb[0].clone()))
    def before_backward(self):
        self.added = max(self.added, abs(self.learn.loss_grad - self.plain_loss()).item())
    def after_batch(self):
        self.off = max(self.off, abs(self.learn.loss - self.plain_loss()).item())


def fit(cbs, net, data=None, epochs=2, opt='momentum', lr=.1, fit_cbs=None, **kw):
    "Train with one callback or a list of them. Return the network."
    cbs = cbs if isinstance(cbs, list) else [cbs]
    learn = learner(net, cbs, data=data, opt_func=OPTS[opt][0], lr=lr, wd_bn_bias=True, **kw)
    learn.fit(epochs, cbs=fit_cbs)
    return learn.model


def assert_same(a, b, tol=1e-10):
    gap = difference(a, b, buffers=True)
    assert gap < tol, f'largest difference {gap}'


def twice(n=24, bs=8): return [batches(n, bs)] * 2


def difference(a, b, buffers=False):
    "Return the largest difference of two networks' parameters (and buffers)."
    return (flat(a, buffers=buffers) - flat(b, buffers=buffers)).abs().max().item()


def indexed(n=24, bs=8, **kw):
    "Return a fastai DataLoader over the samples of `batches`, which knows their ids."
    (x, y), = batches(n, n)
    dl = DataLoader(list(zip(x, y)), bs=bs, **kw)
    dl.rng = random.Random(3)
    return dl


def forward_sizes(net):
    "Return a list that collects the number of samples of every forward in training mode."
    sizes = []
    def record(m, args):
        if m.training: sizes.append(len(args[0]))
    net.register_forward_pre_hook(record)
    return sizes


# The SAM family: the callback, and its oracle
FAMILY = {'asam': (partial(ASAM, .5, .1), partial(asam, .5, .1)),
          'asam by name': (partial(ASAM, .5, .1, weights='name'), partial(asam, .5, .1, 'name')),
          'esam': (partial(ESAM, .2, .6, .5, seed=3), partial(esam, .2, .6, .5, 3)),
          'esam gamma=1': (partial(ESAM, .2, .4, 1., seed=1), partial(esam, .2, .4, 1., 1)),
          'looksam': (partial(LookSAM, .2, .7, 4), partial(looksam, .2, .7, 4)),
          'gsam': (partial(GSAM, .2, .2, .4), partial(gsam, .2, .4)),
          'gsam adaptive': (partial(GSAM, 1., 1., .4, adaptive=True), partial(gsam, 1., .4, True))}


@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('kw', [{}, {'bn': 'keep'}], ids=['default', 'bn=keep'])
@pytest.mark.parametrize('name', FAMILY)
def test_agrees_with_the_oracle(name, kw, opt):
    callback, oracle = FAMILY[name]
    assert_same(fit(callback(**kw), Net(), opt=opt), train(Net(), twice(), oracle(**kw), opt))


@pytest.mark.parametrize('rng', ['fresh', 'replay'])
@pytest.mark.parametrize('name', [n for n in FAMILY if n != 'esam'])
def test_dropout_masks_of_the_second_pass(name, rng):
    "Also fails if a method's own noise is drawn from the global generator."
    callback, oracle = FAMILY[name]
    net = fit(callback(rng=rng), mlp(dropout=.4))  # mlp() seeds the global generator
    assert_same(net, train(mlp(dropout=.4), twice(), oracle(rng=rng)))


@pytest.mark.parametrize('name', FAMILY)
def test_weights_come_back_bit_for_bit(name):
    net = fit(FAMILY[name][0](), Net(), opt='plain', lr=0.)
    assert torch.equal(flat(net), flat(Net()))
    assert not torch.equal(flat(net, buffers=True), flat(Net(), buffers=True))  # it did run


ZERO_GRADIENT = {'asam': ASAM, 'esam': partial(ESAM, gamma=1.), 'looksam': partial(LookSAM, k=2),
                 'gsam': GSAM, 'gsam adaptive': partial(GSAM, adaptive=True)}


@pytest.mark.parametrize('cb', ZERO_GRADIENT.values(), ids=ZERO_GRADIENT)
def test_zero_gradient_moves_nothing(cb):
    net = fit(cb(), mlp(), opt='plain', loss_func=lambda p, y: 0 * p.sum())
    assert torch.equal(flat(net), flat(mlp()))


OF_RHO = {'asam': ASAM, 'esam': partial(ESAM, gamma=1.), 'looksam': partial(LookSAM, k=1),
          'gsam': lambda rho: GSAM(rho, rho)}


@pytest.mark.parametrize('cb', OF_RHO.values(), ids=OF_RHO)
def test_small_rho_is_the_base_step(cb):
    plain = train(mlp(), twice(), base)
    assert_same(fit(cb(1e-9), mlp()), plain, 1e-7)
    assert difference(fit(cb(.5), mlp()), plain) > 1e-3


SAM_LIMITS = {'esam': partial(ESAM, .2, beta=1., gamma=1.), 'looksam': partial(LookSAM, .2, k=1)}


@pytest.mark.parametrize('cb', SAM_LIMITS.values(), ids=SAM_LIMITS)
@pytest.mark.parametrize('opt', ['momentum', 'adam'])
def test_limits_equal_sam_bit_for_bit(cb, opt):
    limit = fit(cb(), mlp(bn=True, dropout=.4), opt=opt)
    sam = fit(SAM(.2), mlp(bn=True, dropout=.4), opt=opt)
    assert torch.equal(flat(limit, buffers=True), flat(sam, buffers=True))


def test_gsam_and_looksam_with_alpha_zero_make_sam_steps():
    assert_same(fit(GSAM(.2, .2, alpha=0.), mlp()), train(mlp(), twice(), sam(.2)))
    inner = sam(.2)
    def sam_every_fourth_step(net, x, y, step, epoch):
        rule = base if step % 4 else inner
        return rule(net, x, y, step, epoch)
    assert_same(fit(LookSAM(.2, alpha=0., k=4), mlp()), train(mlp(), twice(), sam_every_fourth_step))


ACCUMULATED = {'asam': (partial(ASAM, .5, .1), partial(asam, .5, .1)),
               'gsam': (partial(GSAM, .2, .2), partial(gsam, .2)),
               'looksam': (partial(LookSAM, .2, k=1), partial(looksam, .2, k=1)),
               # LookSAM counts optimizer steps
               'looksam k=3': (partial(LookSAM, .2, alpha=0., k=3), partial(looksam, .2, 0., 3))}


@pytest.mark.parametrize('callback, oracle', ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulation_perturbs_every_micro_batch_by_its_own_gradient(callback, oracle):
    net = fit([callback(), GradientAccumulation(16)], mlp(), data=batches(32))
    assert_same(net, train(mlp(), twice(32), oracle(), acc=2))
    big_batches = train(mlp(), twice(32, 16), oracle())
    assert difference(net, big_batches) > 1e-5


def test_frozen_parameters_are_neither_perturbed_nor_trained():
    for name in ('asam', 'esam gamma=1', 'looksam', 'gsam'):
        callback, oracle = FAMILY[name]
        a, b = Net(), Net()
        for net in (a, b): net.body[0].requires_grad_(False)
        assert_same(fit(callback(), a), train(b, twice(), oracle()))
        assert torch.equal(a.body[0].weight, Net().body[0].weight)


def test_hyperparameters_are_read_at_every_batch():
    def rho(step): return .1 * (1 + step)
    def eta(step): return .05 * step
    cb = ASAM()
    class Move(Callback):
        run_valid = False
        def before_batch(self):
            cb.rho = rho(self.learn.train_iter)
            cb.eta = eta(self.learn.train_iter)
    def rule(net, x, y, step, epoch): return asam(rho(step), eta(step))(net, x, y, step, epoch)
    assert_same(fit([cb, Move()], mlp()), train(mlp(), twice(), rule))


PLAIN_STEPS = {'asam': (partial(asam_step, rho=.5, eta=.1), asam(.5, .1)),
               'asam by name': (partial(asam_step, rho=.5, eta=.1, weights='name'), asam(.5, .1, 'name')),
               'gsam': (partial(gsam_step, rho=.2, alpha=.4), gsam(.2)),
               'gsam adaptive': (partial(gsam_step, rho=1., alpha=.3, adaptive=True), gsam(1., .3, True))}


@pytest.mark.parametrize('step, oracle', PLAIN_STEPS.values(), ids=PLAIN_STEPS)
def test_plain_pytorch_steps(step, oracle):
    net = Net().train()
    opt = OPTS['momentum'][1](net.parameters())
    for x, y in batches() * 2:
        def loss(x=x, y=y): return CE(net(x), y)
        with moved(net, {}, 'keep'): at_w = loss().item()
        returned = step(net, loss, opt)
        assert not returned.requires_grad
        assert abs(returned.item() - at_w) < 1e-12
    assert_same(net, train(Net(), twice(), oracle))


# ESAM
SELECTIONS = [(.5, 8, 4), (.5, 7, 4), (.1, 30, 3), (.3, 10, 3), (.07, 100, 7), (.28, 25, 7), (.29, 100, 29),
              (.55, 20, 11), (.01, 5, 1), (1e-6, 3, 1), (.9, 3, 3), (1., 6, 6)]


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('gamma, n, k', SELECTIONS)
def test_esam_keeps_exactly_ceil_gamma_n(gamma, n, k, tied):
    (x, y), = batches(n, n)
    if tied: x, y = x[:1].repeat(n, 1), y[:1].repeat(n)
    net = mlp()
    sizes = forward_sizes(net)
    fit(ESAM(.2, beta=1., gamma=gamma), net, data=[(x, y)], epochs=1)
    if gamma == 1: allowed = [[n, k]]
    elif k < n: allowed = [[n, n, k]]
    else: allowed = [[n, k], [n, n, k]]
    assert sizes in allowed
    oracle = sam(.2) if tied else esam(.2, 1., gamma)  # tied samples: any choice gives SAM
    assert_same(net, train(mlp(), [[(x, y)]], oracle))


def test_esam_with_soft_labels():
    g = torch.Generator().manual_seed(2)
    data = [(x, torch.rand(8, 3, generator=g, dtype=torch.float64).softmax(-1)) for x, _ in batches()]
    net = fit(ESAM(.2, .6, .5, seed=3), mlp(), data=data)
    assert_same(net, train(mlp(), [data] * 2, esam(.2, .6, .5, 3)))


# LookSAM
def test_looksam_makes_a_second_pass_in_every_kth_step_only():
    net = mlp()
    sizes = forward_sizes(net)
    fit(LookSAM(k=4), net, epochs=3)  # 9 steps, SAM at 0, 4 and 8
    assert len(sizes) == 9 + 3


# GSAM's schedule: the one of the learning rate, GSAM's options, the rates of the largest and smallest rho
SCHEDULES = {'peak': (SchedCos(.2, .02), {}, .2, 0.),
             'lr_min': (SchedCos(.2, .02), {'lr_min': .02}, .2, .02),
             'lr_max': (SchedCos(.2, .02), {'lr_max': .4, 'lr_min': .01}, .4, .01),
             'warm-up': (combined_cos(.25, .05, .2, .01), {}, .2, 0.)}


@pytest.mark.parametrize('sched, kw, peak, low', SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize('given_to', ['learner', 'fit'])
def test_gsam_rho_follows_the_learning_rate(sched, kw, peak, low, given_to):
    lrs = [float(sched(s / 8)) for s in range(8)]
    gsam_callback, scheduler = GSAM(.5, .05, **kw), ParamScheduler({'lr': sched})
    if given_to == 'learner': net = fit([gsam_callback, scheduler], mlp(), data=batches(32))
    else: net = fit([gsam_callback], mlp(), data=batches(32), fit_cbs=[scheduler])
    def rho(step): return .05 + .45 * (lrs[step] - low) / (peak - low)
    assert_same(net, train(mlp(), twice(32), gsam(rho), lrs=lrs))


CONSTANT_RATES = {'unknown': ({}, .5), '0/0': ({'lr_max': .1, 'lr_min': .1}, .5),
                  'lr_max': ({'lr_max': .4}, .05 + .45 * .25)}


@pytest.mark.parametrize('kw, rho', CONSTANT_RATES.values(), ids=CONSTANT_RATES)
def test_gsam_at_a_constant_rate(kw, rho):
    assert_same(fit(GSAM(.5, .05, **kw), mlp()), train(mlp(), twice(), gsam(rho)))


# SAF
LOADERS = [{}, {'shuffle': True}, {'shuffle': True, 'num_workers': 2}, {'shuffle': True, 'drop_last': True}]


@pytest.mark.parametrize('kw', LOADERS, ids=str)
def test_saf_agrees_with_the_oracle(kw):
    spy, rule = Spy(), saf(.9, 2., 2, 1)
    epochs = 4 if 'num_workers' in kw else 8
    net = fit([SAF(.9, 2., 2, 1), spy], Net(), data=indexed(20, **kw), epochs=epochs)
    assert_same(net, train(Net(), spy.seen, rule))
    assert spy.off < 1e-12
    assert spy.added > 1e-4
    assert len(spy.seen) == epochs
    if 'shuffle' in kw: assert not torch.equal(spy.seen[0][0][0], spy.seen[1][0][0])
    if 'drop_last' in kw:
        # a ring of records would fail for samples absent `lag` epochs ago and present 2 lag epochs ago
        have = rule.records
        assert any(e >= 4 and (e - 2, key) not in have and (e - 4, key) in have for e, key in have)


@pytest.mark.parametrize('lag, start', [(1, 0), (3, 0), (1, 3), (3, 2)])
def test_saf_lag_and_start(lag, start):
    spy = Spy()
    net = fit([SAF(.9, 2., lag, start), spy], mlp(), data=indexed(shuffle=True), epochs=5)
    with_saf = train(mlp(), spy.seen, saf(.9, 2., lag, start))
    assert_same(net, with_saf)
    assert difference(train(mlp(), spy.seen, base), with_saf) > 1e-6


def test_saf_uses_float16_records():
    "The rounding shows: an oracle with exact records differs by more than the tolerance."
    net = fit(SAF(.9, 2., 1, 0), mlp(), data=indexed())
    assert_same(net, train(mlp(), twice(), saf(.9, 2., 1, 0)))
    exact = train(mlp(), twice(), saf(.9, 2., 1, 0, half=torch.float64))
    assert difference(net, exact) > 1e-8


def half_tensors():
    "Return the bytes of every float16 tensor that is alive, by the address of its memory."
    gc.collect()
    found = {}
    for t in gc.get_objects():
        if type(t) is torch.Tensor and t.dtype is torch.float16 and t._base is None:
            found[t.untyped_storage().data_ptr()] = t.nbytes
    return found


def size(o):
    "Return the bytes of all tensors in nested dicts, lists and tuples."
    if isinstance(o, dict): return size(list(o.values()))
    if isinstance(o, (list, tuple)): return sum(map(size, o))
    return getattr(o, 'nbytes', 0)


def test_saf_memory_is_two_bytes_per_logit():
    before = half_tensors()
    n, classes, lag = 200, 3, 4
    cb = SAF(lag=lag, start_epoch=0)
    fit(cb, mlp(), data=indexed(n, 40, shuffle=True), epochs=6)
    new = sum(nbytes for address, nbytes in half_tensors().items() if address not in before)
    assert new <= n * classes * lag * 2
    beyond_logits = size(cb.state_dict()) - n * classes * lag * 2
    assert 0 <= beyond_logits <= 2 * n * lag + 64  # 64: a few counters


@pytest.mark.parametrize('other', [MixUp, CutMix])
def test_saf_refuses_mixed_labels(other):
    with pytest.raises(ValueError, match=other.__name__):
        fit([SAF(start_epoch=0), other()], mlp(), data=indexed(), epochs=1)


def test_saf_refuses_batches_without_sample_ids():
    with pytest.raises(ValueError): fit(SAF(start_epoch=0), mlp(), data=batches(), epochs=1)


def test_saf_refuses_the_state_of_another_data_set():
    cb, new, spy = SAF(lag=1, start_epoch=0), SAF(lag=1, start_epoch=0), Spy()
    fit(cb, mlp(), data=indexed(24))
    new.load_state_dict(cb.state_dict())
    with pytest.raises(ValueError): fit([new, spy], mlp(), data=indexed(32))
    assert not any(spy.seen)


def test_saf_warns_if_start_epoch_is_not_reached():
    with pytest.warns(UserWarning, match='epoch'): fit(SAF(start_epoch=2), mlp(), data=indexed(), epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        fit(SAF(start_epoch=2), mlp(), data=indexed(), epochs=3)
    assert not [w for w in caught if 'epoch' in str(w.message)]


# MESA
@pytest.mark.parametrize('opt', OPTS)
def test_mesa_agrees_with_the_oracle(opt):
    cb, spy, net = MESA(.9, 2., .9, 1), Spy(), Net()
    rule, after, teacher = mesa(net, .9, 2., .9, 1)
    trained = fit([cb, spy], Net(), epochs=4, opt=opt)
    assert_same(trained, train(net, [batches()] * 4, rule, opt, after=after))
    assert_same(cb.teacher, teacher)
    assert not cb.teacher.training
    assert spy.off < 1e-12
    assert spy.added > 1e-4


def test_mesa_teacher_is_in_eval_mode():
    a, b = mlp(dropout=.4), mlp(dropout=.4)
    rule, after, _ = mesa(b, .9, 2., .9, 0)
    torch.manual_seed(5)
    fit(MESA(.9, 2., .9, 0), a)
    torch.manual_seed(5)
    assert_same(a, train(b, twice(), rule, after=after))


ZERO_LAMBDA = {'saf': partial(SAF, 0., lag=1, start_epoch=0), 'mesa': partial(MESA, 0., start_epoch=0)}


@pytest.mark.parametrize('cb', ZERO_LAMBDA.values(), ids=ZERO_LAMBDA)
def test_without_lam_is_the_base_step(cb):
    assert_same(fit(cb(), Net(), data=indexed()), train(Net(), twice(), base))


def test_mesa_teacher_ignores_steps_that_were_cancelled():
    class Cancel(Callback):
        run_valid = False
        def before_step(self):
            if self.learn.train_iter >= 3: raise CancelStepException
    cb, net = MESA(beta=.5, start_epoch=9), mlp()
    fit([cb, Cancel()], mlp())
    rule, after, teacher = mesa(net, beta=.5, start_epoch=9)
    train(net, [batches()], rule, after=after)
    assert_same(cb.teacher, teacher)
    after()
    assert difference(cb.teacher, teacher) > 1e-4


def test_saf_and_mesa_accumulation_equals_the_big_batch():
    big, acc = [batches(32, 16)] * 3, GradientAccumulation(16)
    accumulated = fit([SAF(.9, 2., 1, 0), acc], mlp(), data=indexed(32), epochs=3)
    assert_same(accumulated, train(mlp(), big, saf(.9, 2., 1, 0)))
    cb, net = MESA(.9, 2., .9, 0), mlp()
    rule, after, teacher = mesa(net, .9, 2., .9, 0)
    accumulated = fit([cb, acc], mlp(), data=batches(32), epochs=3)
    assert_same(accumulated, train(net, big, rule, after=after))
    assert_same(cb.teacher, teacher)


# Resumed runs
class Snapshot(Callback):
    "Saves all that a resume needs after the given epoch: network, optimizer, order of the data, method."
    order = 1000
    def __init__(self, method, epoch):
        self.method, self.when = method, epoch
        self.file = io.BytesIO()
    def after_epoch(self):
        if self.learn.epoch != self.when: return
        order = self.learn.dls.train.rng.getstate()
        states = [self.learn.model.state_dict(), self.learn.opt.state_dict(), order, self.method.state_dict()]
        torch.save(states, self.file)


STATEFUL = {'esam': partial(ESAM, .2, .6, .5, seed=3), 'looksam': partial(LookSAM, .2, .7, 4),
            'saf': partial(SAF, .9, 2., 2, 1), 'mesa': partial(MESA, .9, 2., .9, 1)}


@pytest.mark.parametrize('make', STATEFUL.values(), ids=STATEFUL)
def test_resume_between_epochs_is_exact(make):
    cb = make()
    snap = Snapshot(cb, 2)
    full = fit([cb, snap], Net(), data=indexed(shuffle=True), epochs=6)
    def resumed(with_state):
        snap.file.seek(0)
        weights, opt, rng, state = torch.load(snap.file, weights_only=False)
        dl, new = indexed(shuffle=True), make()
        dl.rng.setstate(rng)
        if with_state: new.load_state_dict(state)
        learn = learner(Net(), [new], data=dl, opt_func=OPTS['momentum'][0], wd_bn_bias=True)
        learn.create_opt()
        learn.model.load_state_dict(weights)
        learn.opt.load_state_dict(opt)
        learn.fit(6, start_epoch=3)
        return flat(learn.model, buffers=True)
    assert torch.equal(resumed(True), flat(full, buffers=True))
    assert not torch.equal(resumed(False), flat(full, buffers=True))


# Errors
BAD_VALUES = [*product((ASAM, ESAM, LookSAM), ['rho'], (0., -.1)),
              (ASAM, 'eta', -.1),
              (GSAM, 'rho_max', 0.), (GSAM, 'rho_max', -.1), (GSAM, 'rho_min', -.1),
              *product([ESAM], ('beta', 'gamma'), (0., -.1, 1.1)),
              (LookSAM, 'k', 0), (LookSAM, 'k', -1),
              *product((SAF, MESA), ['lam'], [-.1]),
              *product((SAF, MESA), ['tau'], (0., -1.)),
              (SAF, 'lag', 0),
              *product([MESA], ['beta'], (0., 1., -.1, 1.1))]


@pytest.mark.parametrize('method, name, value', BAD_VALUES)
def test_bad_values_are_refused_by_name(method, name, value):
    with pytest.raises(ValueError, match=rf'\b{name}\b'): method(**{name: value})
