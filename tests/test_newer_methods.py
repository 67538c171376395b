"""FriendlySAM and WSAM against plain loops, which were written from the definitions in the papers.

The loops have their own SGD: `v = .9 v + g + 1e-3 w`, then `w -= .1 v`."""
import copy
import math
import pickle
import sys
import types
from functools import partial

import pytest
import torch
from conftest import Overflow, as_loader, flat, learner
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD, OptimWrapper
from sadt_nb.core.checkpoint import Checkpoint
from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM, wsam_step
from torch import nn
from torch.nn import functional as F

torch_sgd = partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=1e-3)
OPTS = {'torch': partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, weight_decay=1e-3),
        'fastai': partial(SGD, mom=.9, wd=1e-3, decouple_wd=False)}


def batches(sizes=(8,) * 6, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(sum(sizes), 1, 6, 6, generator=gen, dtype=dtype)
    y = torch.randint(0, 3, (sum(sizes),), generator=gen)
    return list(zip(x.split(sizes), y.split(sizes)))


def no_norm(channels): return nn.Identity()


NORMS = {'batch norm': nn.BatchNorm2d, 'group norm': partial(nn.GroupNorm, 2), 'no norm': no_norm}


def network(norm='batch norm'):
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), NORMS[norm](4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers).double().train()


# The oracles: functions of a network and its steps, each a list of micro-batches. They return all values.
def gradient(net, params, x, y):
    gs = torch.autograd.grad(F.cross_entropy(net(x), y), params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, gs)]


def gradient_at(net, params, delta, x, y):
    with torch.no_grad():
        old = [p.clone() for p in params]
        for p, d in zip(params, delta): p += d
    g = gradient(net, params, x, y)
    with torch.no_grad():
        for p, o in zip(params, old): p.copy_(o)
    return g


def climb(d, rho):
    length = math.sqrt(sum(float(v.square().sum()) for v in d))
    return [rho * v / (length + 1e-12) for v in d]


def mean_of(parts, sizes): return [sum(n * t for n, t in zip(sizes, ts)) / sum(sizes) for ts in zip(*parts)]


def sgd_step(params, g, v, lr=.1):
    with torch.no_grad():
        for i, (p, d) in enumerate(zip(params, g)):
            d = d + 1e-3 * p
            v[i] = d if v[i] is None else .9 * v[i] + d
            p -= lr * v[i]


def friendly_oracle(net, steps, rho=.05, sigma=1., decay=.9, skip=()):
    params, m = [p for p in net.parameters() if p.requires_grad], None
    v = [None] * len(params)
    for i, step in enumerate(steps):
        gs, ups = [], []
        for x, y in step:
            gs.append(gradient(net, params, x, y))
            d = gs[-1] if m is None else [a - sigma * b for a, b in zip(gs[-1], m)]
            ups.append(gradient_at(net, params, climb(d, rho), x, y))
        if i in skip: continue
        sizes = [len(x) for x, _ in step]
        g = mean_of(gs, sizes)
        m = g if m is None else [decay * b + (1 - decay) * a for a, b in zip(g, m)]
        sgd_step(params, mean_of(ups, sizes), v)
    return values(net)


def wsam_oracle(net, steps, rho=.05, gamma=.9, decouple=True, skip=(), lrs=None):
    params, alpha = [p for p in net.parameters() if p.requires_grad], gamma / (1 - gamma)
    v = [None] * len(params)
    for i, step in enumerate(steps):
        gs, ups = [], []
        for x, y in step:
            gs.append(gradient(net, params, x, y))
            ups.append(gradient_at(net, params, climb(gs[-1], rho), x, y))
        if i in skip: continue
        sizes, lr = [len(x) for x, _ in step], lrs[i] if lrs else .1
        g, g_p = mean_of(gs, sizes), mean_of(ups, sizes)
        sgd_step(params, g if decouple else [a + alpha * (b - a) for a, b in zip(g, g_p)], v, lr)
        with torch.no_grad():
            for p, a, b in zip(params, g, g_p): p -= lr * alpha * (b - a) * decouple
    return values(net)


def values(net): return torch.cat([v.flatten().double() for v in net.state_dict().values()]).detach()


CASES = {'friendly': (FriendlySAM, friendly_oracle, {}),
         'friendly, other values': (FriendlySAM, friendly_oracle, dict(rho=.2, sigma=.6, decay=.5)),
         'wsam': (WSAM, wsam_oracle, {}),
         'wsam, other values': (WSAM, wsam_oracle, dict(rho=.2, gamma=.7)),
         'wsam, coupled': (WSAM, wsam_oracle, dict(decouple=False))}
EACH = pytest.mark.parametrize('case', CASES)
STATEFUL = pytest.mark.parametrize('case', ['friendly', 'wsam'])
EXACT = dict(rtol=1e-11, atol=1e-13)


def make(case): return CASES[case][0](**CASES[case][2])
def expected(case, net, steps, **kw): return CASES[case][1](net, steps, **CASES[case][2], **kw)
def single(data): return [[batch] for batch in data]


def by_learner(method, net, data, *cbs, opt='torch', **kw):
    learn = learner(net, [method, *cbs], data, opt_func=OPTS[opt], wd_bn_bias=True, wd=1e-3, **kw)
    learn.fit(1)
    return values(net)


def by_optimizer(method, net, data, scaler=None, micro=1):
    opt = MethodOptimizer(method, torch_sgd(net.parameters()), net, scaler)
    for i, (x, y) in enumerate(data):
        opt.backward(lambda x=x, y=y: F.cross_entropy(net(x), y) / micro)
        if (i + 1) % micro: continue
        opt.step()
        opt.zero_grad()
        if scaler: scaler.update()
    return values(net)


@EACH
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('opt', OPTS)
def test_six_batches_in_a_learner(case, norm, opt):
    got = by_learner(make(case), network(norm), batches(), opt=opt)
    torch.testing.assert_close(got, expected(case, network(norm), single(batches())), **EXACT)
    assert (got - by_learner(SAM(), network(norm), batches(), opt=opt)).abs().max() > 1e-6


@EACH
@pytest.mark.parametrize('norm', ['batch norm', 'no norm'])
def test_six_batches_in_a_plain_loop(case, norm):
    got = by_optimizer(make(case), network(norm), batches())
    torch.testing.assert_close(got, expected(case, network(norm), single(batches())), **EXACT)


def test_the_function_makes_the_same_steps():
    net = network()
    opt = torch_sgd(net.parameters())
    for x, y in batches(): wsam_step(net, lambda x=x, y=y: F.cross_entropy(net(x), y), opt)
    torch.testing.assert_close(values(net), wsam_oracle(network(), single(batches())), **EXACT)


def test_limits_hold_to_the_bit():
    def fit(method): return by_learner(method, network(), batches())
    plain = learner(network(), (), batches(), opt_func=OPTS['torch'], wd_bn_bias=True, wd=1e-3)
    plain.fit(1)
    assert torch.equal(fit(WSAM(gamma=.5, decouple=False)), fit(SAM()))
    assert torch.equal(fit(FriendlySAM(sigma=0.)), fit(SAM()))
    for decouple in (True, False):
        assert torch.equal(fit(WSAM(gamma=0., decouple=decouple)), values(plain.model)), 'BatchNorm, too'


# Micro-batches
@EACH
def test_unequal_micro_batches_in_a_learner(case):
    "The share of a micro-batch is a factor of its gradient, which the mean of FriendlySAM must not see."
    data = batches((8, 4, 4, 10, 2, 4, 12, 4))
    steps = [data[0:3], data[3:6], data[6:8]] # 16 samples each
    got = by_learner(make(case), network('no norm'), data, GradientAccumulation(16))
    torch.testing.assert_close(got, expected(case, network('no norm'), steps), **EXACT)


@EACH
def test_micro_batches_in_a_plain_loop(case):
    got = by_optimizer(make(case), network('no norm'), batches(), micro=2)
    steps = [batches()[i:i + 2] for i in (0, 2, 4)]
    torch.testing.assert_close(got, expected(case, network('no norm'), steps), **EXACT)


@EACH
def test_a_closure_that_zeroes_begins_a_new_sum(case):
    net, data = network('no norm'), batches()
    method = make(case)
    opt = MethodOptimizer(method, torch_sgd(net.parameters()), net)
    opt.backward(lambda: F.cross_entropy(net(data[5][0]), data[5][1])) # forgotten: the closures below zero
    for x, y in data:
        def closure(x=x, y=y):
            opt.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss
        opt.step(closure)
    torch.testing.assert_close(values(net), expected(case, network('no norm'), single(data)), **EXACT)


@EACH
def test_gradients_left_by_an_error_begin_a_new_sum(case):
    class Fail(nn.CrossEntropyLoss):
        calls = 0
        def forward(self, p, y):
            self.calls += 1
            if self.calls == 4: raise RuntimeError('on purpose') # the second pass of the second micro-batch
            return super().forward(p, y)
    net = network('no norm')
    learn = learner(net, [make(case), GradientAccumulation(16)], batches(), opt_func=OPTS['torch'],
                    wd_bn_bias=True, wd=1e-3, loss_func=Fail())
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    for p in net.parameters(): p.grad = None
    learn.fit(1)
    steps = [batches()[i:i + 2] for i in (0, 2, 4)]
    torch.testing.assert_close(values(net), expected(case, network('no norm'), steps), **EXACT)


def test_the_steps_of_accelerate_add_up_over_micro_batches():
    "With accelerate, `closure_step` makes a new loop for each micro-batch; the sum must survive it."
    class Prepared(torch.optim.SGD): # what `closure_step` reads of accelerate's optimizer
        scaler, step_was_skipped = None, False
        gradient_state = types.SimpleNamespace(sync_gradients=False)
        def step(self):
            if self.gradient_state.sync_gradients: super().step()
        def zero_grad(self, set_to_none=True):
            if self.gradient_state.sync_gradients: super().zero_grad(set_to_none)
    for case in ('friendly', 'wsam'):
        net, method = network('no norm'), make(case)
        opt = Prepared(net.parameters(), lr=.1, momentum=.9, weight_decay=1e-3)
        for i, (x, y) in enumerate(batches()):
            opt.gradient_state.sync_gradients = i % 2 == 1
            closure_step(method, net, lambda x=x, y=y, net=net: F.cross_entropy(net(x), y) / 2, opt)
        steps = [batches()[i:i + 2] for i in (0, 2, 4)]
        torch.testing.assert_close(values(net), expected(case, network('no norm'), steps), **EXACT)


# Loss scales and skipped steps
@EACH
@pytest.mark.parametrize('micro', [1, 2])
def test_a_changing_loss_scale_changes_nothing(case, micro):
    scaler = torch.amp.GradScaler('cpu', init_scale=4., growth_interval=1)
    got = by_optimizer(make(case), network('no norm'), batches(), scaler, micro)
    assert scaler.get_scale() == 4 * 2**(6 // micro)
    steps = [batches()[i:i + micro] for i in range(0, 6, micro)]
    # the 1e-12 in the divisor counts for less under a scale
    torch.testing.assert_close(got, expected(case, network('no norm'), steps), rtol=1e-8, atol=1e-10)


@EACH
@pytest.mark.parametrize('bad', [3, 4], ids=['first pass', 'second pass'])
def test_a_step_skipped_by_a_scaler_leaves_no_trace(case, bad):
    scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    got = by_optimizer(make(case), Overflow(network('no norm'), bad), batches(), scaler)
    assert scaler.get_scale() == 4., 'the second batch was skipped'
    steps = expected(case, network('no norm'), single(batches()), skip=[1])
    torch.testing.assert_close(got, steps, rtol=1e-8, atol=1e-10)


@EACH
@pytest.mark.parametrize('bad', [3, 4], ids=['first pass', 'second pass'])
def test_a_step_skipped_by_mixed_precision_leaves_no_trace(case, bad):
    "fastai turns the logits into float32, whose rounding is the tolerance."
    class Float32(DeviceMixedPrecision): # the scaler, without the cast
        def before_fit(self):
            super().before_fit()
            self.autocast = torch.autocast('cpu', enabled=False)
    net = Overflow(network('no norm'), bad)
    by_learner(make(case), net, batches(), Float32('fp16', init_scale=8.))
    steps = expected(case, network('no norm'), single(batches()), skip=[1])
    torch.testing.assert_close(values(net), steps, rtol=1e-4, atol=1e-6)
    with_it = expected(case, network('no norm'), single(batches()))
    assert (values(net) - with_it).abs().max() > 1e-3


@EACH
def test_a_step_that_another_callback_cancels_leaves_no_trace(case):
    class Cancel(Callback):
        run_valid = False
        def before_step(self):
            if self.iter == 2: raise CancelStepException()
    got = by_learner(make(case), network('no norm'), batches(), Cancel())
    steps = expected(case, network('no norm'), single(batches()), skip=[2])
    torch.testing.assert_close(got, steps, **EXACT)


def test_a_step_that_accelerate_skips_has_no_decoupled_part():
    class Skips(torch.optim.SGD):
        step_was_skipped = True
        def step(self, closure=None): pass
    net = network('no norm')
    before = values(net)
    x, y = batches()[0]
    wsam_step(net, lambda: F.cross_entropy(net(x), y), Skips(net.parameters(), lr=.1))
    assert torch.equal(values(net), before)


@STATEFUL
def test_a_loss_scale_that_nobody_tells_is_refused(case, monkeypatch):
    shared = types.SimpleNamespace(_shared_state=dict(_mixed_precision='fp16'))
    state = types.SimpleNamespace(AcceleratorState=shared)
    monkeypatch.setitem(sys.modules, 'accelerate', types.SimpleNamespace(state=state))
    net = network()
    x, y = batches()[0]
    def backward():
        loss = F.cross_entropy(net(x), y)
        (loss * 1024).backward()
        return loss
    with pytest.raises(ValueError, match='bf16'):
        MethodOptimizer(make(case), torch_sgd(net.parameters()), net).step(backward)
    MethodOptimizer(SAM(), torch_sgd(net.parameters()), net).step(backward) # its direction has no size


# Parameters
def test_groups_move_with_their_own_rates():
    net, oracle = network('no norm'), network('no norm')
    def groups(m): return [list(m[:3].parameters()), list(m[3:].parameters())]
    x, y = batches()[0]
    plain = partial(SGD, mom=0.)
    learner(net, [WSAM()], [(x, y)], opt_func=plain, splitter=groups, lr=slice(.01, .1)).fit(1)
    params = list(oracle.parameters())
    g = gradient(oracle, params, x, y)
    g_p = gradient_at(oracle, params, climb(g, .05), x, y)
    rates = [.01] * 2 + [.1] * 2
    moved = [p - lr * (a + 9 * (b - a)) for p, lr, a, b in zip(params, rates, g, g_p)]
    torch.testing.assert_close(flat(net), torch.cat([p.flatten() for p in moved]).detach(), **EXACT)


def test_a_schedule_gives_the_rate_of_the_step():
    "The rate changes just before the step, and again right after it."
    lrs = [.1, .05, .2, .1, .02, .1]
    class Rate(Callback):
        run_valid = False
        def before_batch(self): self.opt.set_hyper('lr', lrs[self.iter])
        def after_step(self): self.opt.set_hyper('lr', 77.)
    Rate.order = -60 # before the method
    got = by_learner(WSAM(), network(), batches(), Rate())
    torch.testing.assert_close(got, wsam_oracle(network(), single(batches()), lrs=lrs), **EXACT)


def test_lightning_steps_its_schedule_before_the_batch_ends():
    lightning = pytest.importorskip('lightning', reason='pip install sadt_nb[integrations]')
    from sadt_nb.core.lightning import MethodCallback
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network('no norm')
        def training_step(self, batch): return F.cross_entropy(self.net(batch[0][0]), batch[1][0])
        def configure_optimizers(self):
            opt = torch_sgd(self.parameters())
            schedule = torch.optim.lr_scheduler.ExponentialLR(opt, .5)
            return dict(optimizer=opt, lr_scheduler=dict(scheduler=schedule, interval='step'))
    quiet = dict(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False)
    for case, kw in (('wsam', dict(lrs=[.1 * .5**i for i in range(6)])), ('friendly', {})):
        module = Module()
        if not kw: module.configure_optimizers = lambda module=module: torch_sgd(module.parameters())
        callbacks = [MethodCallback(make(case))]
        trainer = lightning.Trainer(max_epochs=1, precision='64-true', callbacks=callbacks, **quiet)
        trainer.fit(module, torch.utils.data.DataLoader(batches(), 1))
        steps = expected(case, network('no norm'), single(batches()), **kw)
        torch.testing.assert_close(values(module.net), steps, **EXACT)


@EACH
def test_frozen_parameters_stay(case):
    net, oracle = network(), network()
    for n in (net, oracle): n[0].requires_grad_(False)
    before = net[0].weight.clone()
    got = by_learner(make(case), net, batches())
    assert torch.equal(net[0].weight, before)
    torch.testing.assert_close(got, expected(case, oracle, single(batches())), **EXACT)


class Switch(nn.Module):
    "A network with a second head; `uses` says for each pass whether the head takes part."
    def __init__(self, uses):
        super().__init__()
        self.net, self.uses, self.calls = network('no norm'), uses, 0
        self.head = nn.Linear(36, 3).double()
        with torch.no_grad():
            self.head.weight.fill_(.1)
            self.head.bias.fill_(0.)
    def forward(self, x):
        self.calls += 1
        out = self.net(x)
        return out + self.head(x.flatten(1)) if self.uses[self.calls - 1] else out


def test_a_layer_without_a_gradient_keeps_its_mean():
    "Without a gradient in the first pass, FriendlySAM's mean stays, and does not begin."
    uses = [False, False, True, True, True, False, False, True, True, True]
    data = batches()[:5]
    net = Switch(uses)
    method = FriendlySAM()
    opt = MethodOptimizer(method, torch.optim.SGD(net.parameters(), lr=.1), net)
    means = []
    for x, y in data:
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y))
        opt.zero_grad()
        means.append({n: m.clone() for n, m in method.mean.items()})
    assert 'head.weight' not in means[0]
    assert not torch.equal(means[1]['head.weight'], means[2]['head.weight'])
    assert torch.equal(means[2]['head.weight'], means[3]['head.weight'])
    assert not torch.equal(means[2]['net.0.weight'], means[3]['net.0.weight'])


@pytest.mark.parametrize('decouple', [True, False])
def test_a_gradient_that_only_one_pass_gives_counts_as_zero_in_the_other(decouple):
    x, y = batches()[0]
    def change(uses):
        net = Switch(uses)
        before = net.head.weight.detach().clone()
        opt = MethodOptimizer(WSAM(decouple=decouple), torch.optim.SGD(net.parameters(), lr=1.), net)
        opt.step(lambda: F.cross_entropy(net(x), y))
        return net.head.weight.detach() - before
    alone = Switch([True])
    g = torch.autograd.grad(F.cross_entropy(alone(x), y), alone.head.weight)[0]
    torch.testing.assert_close(change([True, False]), 8 * g, rtol=1e-10, atol=1e-12) # -(g + 9 (0 - g))
    moved = Switch([False, True])
    params = list(moved.net.parameters())
    delta = climb(list(torch.autograd.grad(F.cross_entropy(moved(x), y), params)), .05)
    with torch.no_grad():
        for p, d in zip(params, delta): p += d
    g_p = torch.autograd.grad(F.cross_entropy(moved(x), y), moved.head.weight)[0]
    torch.testing.assert_close(change([False, True]), -9 * g_p, rtol=1e-10, atol=1e-12)


class ScaledLoss(nn.Module):
    "A loss with a parameter of its own."
    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    def forward(self, out, y): return self.s.exp() * F.cross_entropy(out, y) - self.s


@pytest.mark.parametrize('decouple', [True, False])
def test_parameters_of_the_loss_are_not_perturbed_but_weighted(decouple):
    x, y = batches()[0]
    net, loss = network('no norm'), ScaledLoss()
    opt = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=.1)
    MethodOptimizer(WSAM(decouple=decouple), opt, net).step(lambda: loss(net(x), y))
    oracle, theirs = network('no norm'), ScaledLoss()
    params = [*oracle.parameters(), theirs.s]
    def grads(): return list(torch.autograd.grad(theirs(oracle(x), y), params))
    g = grads()
    with torch.no_grad():
        for p, d in zip(params, climb(g[:-1], .05)): p += d
    g_p = grads()
    with torch.no_grad():
        for p, d, a, b in zip(params, [*climb(g[:-1], .05), 0.], g, g_p): p -= d + .1 * (a + 9 * (b - a))
    torch.testing.assert_close(flat(net), flat(oracle), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.s, theirs.s, rtol=1e-10, atol=1e-12)


def test_a_batch_without_noise_makes_a_plain_step():
    data = batches()[:1] * 2
    class Rate(Callback):
        run_valid = False
        def before_batch(self): self.opt.set_hyper('lr', (0., .1)[self.iter])
    net, oracle = network('no norm'), network('no norm')
    learner(net, [FriendlySAM(), Rate()], data, opt_func=partial(SGD, mom=0.)).fit(1)
    g = gradient(oracle, list(oracle.parameters()), *data[0])
    plain = torch.cat([(p - .1 * d).flatten() for p, d in zip(oracle.parameters(), g)])
    torch.testing.assert_close(flat(net), plain.detach(), rtol=0, atol=1e-15)
    zero = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    learner(zero, [FriendlySAM()], data, loss_func=lambda p, y: 0 * p.sum()).fit(2)
    assert torch.isfinite(flat(zero)).all()


def test_clipping_changes_what_the_optimizer_gets():
    x, y = batches()[0]
    def clipped(g):
        length = math.sqrt(sum(float(v.square().sum()) for v in g))
        return [v * (.01 / (length + 1e-6)) for v in g]
    for decouple in (True, False):
        net = network('no norm')
        params = list(net.parameters())
        g = gradient(net, params, x, y)
        g_p = gradient_at(net, params, climb(g, .05), x, y)
        change = [9 * (b - a) for a, b in zip(g, g_p)]
        if decouple: steps = [c + r for c, r in zip(clipped(g), change)]
        else: steps = clipped([a + r for a, r in zip(g, change)])
        moved = torch.cat([(p - .1 * s).flatten() for p, s in zip(params, steps)]).detach()
        opt = partial(SGD, mom=0.)
        learner(net, [WSAM(decouple=decouple), GradientClip(.01)], [(x, y)], opt_func=opt).fit(1)
        torch.testing.assert_close(flat(net), moved, rtol=1e-10, atol=1e-12)


# State
@EACH
def test_a_run_resumes_in_the_middle_of_an_accumulated_batch(case, tmp_path):
    "Three batches of 8 and steps of 16: after the first epoch half a step is done."
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 3: raise KeyboardInterrupt
    def trained(*more):
        net = network('no norm')
        cbs = [make(case), GradientAccumulation(16)]
        learn = learner(net, cbs, as_loader(batches()[:3]), opt_func=OPTS['torch'])
        learn.fit(4, cbs=[Checkpoint(tmp_path / 'x.pt'), *more])
        return values(net)
    with pytest.raises(KeyboardInterrupt): trained(Stop())
    resumed = trained()
    (tmp_path / 'x.pt').unlink()
    (tmp_path / 'x.pt.previous').unlink()
    assert torch.equal(resumed, trained())


def through_pickle(learn): return pickle.loads(pickle.dumps(learn))


@STATEFUL
@pytest.mark.parametrize('how', [copy.deepcopy, through_pickle])
def test_a_copied_learner_continues_like_the_original(case, how):
    learn = learner(network(), [make(case)], batches(), opt_func=OPTS['fastai'])
    learn.fit(1)
    other = how(learn)
    learn.fit(1)
    other.fit(1)
    assert torch.equal(values(learn.model), values(other.model))
    if case == 'friendly':
        assert learn.friendly_sam.mean
        assert other.friendly_sam.mean['0.weight'] is not learn.friendly_sam.mean['0.weight']


def test_an_exported_learner_has_no_mean():
    learn = learner(network(), [FriendlySAM()], batches(), opt_func=OPTS['fastai'])
    learn.fit(1)
    learn.opt, kept = None, learn.opt # as `Learner.export` does
    exported = through_pickle(learn)
    learn.opt = kept
    assert not exported.friendly_sam.mean
    assert learn.friendly_sam.mean, 'the Learner itself can train on'


def test_a_mean_of_another_network_is_refused():
    method, other = FriendlySAM(), FriendlySAM()
    by_learner(method, network(), batches())
    other.load_state_dict(method.state_dict())
    wide = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Flatten(), nn.Linear(96, 3)).double()
    with pytest.raises(ValueError, match='mean gradient does not fit'): by_learner(other, wide, batches())


def test_a_state_is_a_copy():
    method = FriendlySAM()
    net = network('no norm')
    opt = MethodOptimizer(method, torch_sgd(net.parameters()), net)
    (x, y), (x2, y2), *_ = batches()
    opt.step(lambda: F.cross_entropy(net(x), y))
    state = opt.state_dict()
    before = state['method']['mean']['0.weight'].clone()
    opt.zero_grad()
    opt.step(lambda: F.cross_entropy(net(x2), y2))
    assert torch.equal(state['method']['mean']['0.weight'], before)
    assert not torch.equal(method.mean['0.weight'], before)


# Errors
BAD = [*((cls, 'rho', v) for cls in (FriendlySAM, WSAM) for v in (0., -.1, math.nan, math.inf)),
       *((FriendlySAM, 'sigma', v) for v in (-1., math.nan, math.inf)),
       *((FriendlySAM, 'decay', v) for v in (-.1, 1., math.nan)),
       *((WSAM, 'gamma', v) for v in (-.1, 1., 1.5, math.nan)),
       *((cls, name, 'other') for cls in (FriendlySAM, WSAM) for name in ('bn', 'rng'))]


@pytest.mark.parametrize('method, name, value', BAD)
def test_bad_values_are_refused_by_name(method, name, value):
    with pytest.raises(ValueError, match=rf'\b{name}\b'): method(**{name: value})


def test_a_group_without_a_rate_is_refused_before_training():
    class NoRate(torch.optim.Optimizer):
        def __init__(self, params): super().__init__(params, {})
        def step(self, closure=None): pass
    net = network()
    base = NoRate(net.parameters())
    with pytest.raises(ValueError, match='decouple=False'): MethodOptimizer(WSAM(), base, net)
    MethodOptimizer(WSAM(decouple=False), base, net)


def test_both_take_the_place_of_each_others_pass():
    for pair in ((SAM(), WSAM()), (FriendlySAM(), WSAM())):
        assert all(isinstance(m, PerturbedPass) for m in pair)
        with pytest.raises(ValueError, match='one method'): learner(network(), pair, batches()).fit(1)
