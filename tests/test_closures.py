"""Methods in plain loops: the wrapper, the functions and the callbacks make the same steps."""
import copy
import gc
import math
import warnings
import weakref
from functools import partial

import pytest
import torch
from conftest import Overflow
from torch import nn
from torch.nn import functional as F
from fastai.callback.core import TrainEvalCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from sadt_nb.core import perturb
from sadt_nb.core.closures import MethodOptimizer, closure_step, load_method_state, method_state
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.methods.asam import ASAM, asam_step
from sadt_nb.methods.esam import ESAM, esam_step
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM, gsam_step
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT, sadt_step, weight_noise
from sadt_nb.methods.sam import SAM, sam_step
from sadt_nb.methods.wsam import WSAM, wsam_step

METHODS = {
    'sam': partial(SAM, .1), 'sam adaptive': partial(SAM, 1., adaptive=True),
    'sam every second': partial(SAM, .1, interval=2), 'sam keep': partial(SAM, .1, bn='keep'),
    'sam replay': partial(SAM, .1, rng='replay'), 'asam': partial(ASAM, .5), 'gsam': partial(GSAM, .1, .1),
    'friendly_sam': partial(FriendlySAM, .1), 'wsam': partial(WSAM, .1),
    'wsam coupled': partial(WSAM, .1, decouple=False), 'wsam replay': partial(WSAM, .1, rng='replay'),
    'looksam': partial(LookSAM, .1, k=3), 'esam': partial(ESAM, .1, gamma=1), 'esam half': partial(ESAM, .1),
    'sadt1': partial(SADT, 1, noise_scale=100), 'sadt2': partial(SADT, 2, noise_scale=100, share_trunk=False),
    'sadt3': partial(SADT, 3, noise_scale=100), 'sadt up': partial(SADT, 1, grad_at='up', noise_scale=100),
    'sadt one step': partial(SADT, 1, first_step=False, noise_scale=100),
}
FIRST_STEP = [name for name in METHODS if not name.startswith(('sadt', 'esam half'))]


def batches(n=6, bs=8, size=6):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n * bs, 1, size, size, generator=gen, dtype=torch.float64)
    y = torch.randint(0, 3, (n * bs,), generator=gen)
    return list(zip(x.split(bs), y.split(bs)))


def network(dropout=0., norm=True):
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Flatten(),
              nn.Dropout(dropout), nn.Linear(64, 3)]
    return nn.Sequential(*layers).double().train()


def sgd(net): return torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=1e-3)


def values(net): return torch.cat([v.flatten().double() for v in net.state_dict().values()]).detach()


def closure_for(method, net, x, y):
    "The closure that this method takes, in the form that returns and does not call backward."
    if isinstance(method, SADT):
        def logits_and_loss():
            logits = net(x)
            return logits, F.cross_entropy(logits, y)
        return logits_and_loss
    if isinstance(method, ESAM):
        def losses(rows):
            part = slice(None) if rows is None else rows
            return F.cross_entropy(net(x[part]), y[part], reduction='none')
        return losses
    return lambda: F.cross_entropy(net(x), y)


def by_callback(method, net, data, *cbs):
    torch.manual_seed(2)
    opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9, weight_decay=1e-3))
    learn = Learner(DataLoaders(data, data), net, loss_func=nn.CrossEntropyLoss(), lr=.1, opt_func=opt_func,
                    wd=1e-3, default_cbs=False, cbs=[TrainEvalCallback, method, *cbs])
    learn.fit(1)
    return values(net)


def by_wrapper(method, net, data, scaler=None, max_norm=None):
    torch.manual_seed(2)
    opt = MethodOptimizer(method, sgd(net), net, scaler, max_norm)
    for x, y in data:
        opt.step(closure_for(method, net, x, y))
        if scaler: scaler.update()
    return values(net)


@pytest.mark.parametrize('name', METHODS)
def test_wrapper_makes_the_steps_of_the_callback(name):
    dropout = .5 if 'replay' in name else 0.
    got = by_wrapper(METHODS[name](), network(dropout), batches())
    expected = by_callback(METHODS[name](), network(dropout), batches())
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    plain = network(dropout)
    opt = sgd(plain)
    torch.manual_seed(2)
    for x, y in batches():
        opt.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        opt.step()
    assert (got - values(plain)).abs().max() > 1e-5


@pytest.mark.parametrize('name', [*METHODS, 'msam'])
def test_a_loop_prints_no_warning(name):
    "fastai warns if a callback and its Learner, or the loop in place of it, have an attribute of one name."
    make = METHODS.get(name, MSAM)
    dropout = .5 if 'replay' in name else 0.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        by_wrapper(make(), network(dropout), batches(3))
        net = network(dropout)
        opt = MethodOptimizer(make(), sgd(net), net)
        for x, y in batches(3): opt.backward(closure_for(opt.method, net, x, y))
        opt.step()
        if name not in FIRST_STEP: return
        for x, y in batches(3):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            if opt.first_step(): F.cross_entropy(net(x), y).backward()
            opt.second_step()


FUNCTIONS = {
    'sam': (partial(sam_step, rho=.1), METHODS['sam']),
    'sam adaptive': (partial(sam_step, rho=1., adaptive=True), METHODS['sam adaptive']),
    'sam keep': (partial(sam_step, rho=.1, bn='keep'), METHODS['sam keep']),
    'asam': (partial(asam_step, rho=.5), METHODS['asam']),
    'gsam': (partial(gsam_step, rho=.1), METHODS['gsam']),
    'wsam': (partial(wsam_step, rho=.1), METHODS['wsam']),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_function_makes_the_steps_of_the_wrapper(name):
    step, method = FUNCTIONS[name]
    net = network()
    opt = sgd(net)
    for x, y in batches(): step(net, closure_for(method(), net, x, y), opt)
    assert torch.equal(values(net), by_wrapper(method(), network(), batches()))


def test_esam_and_sadt_functions_make_the_steps_of_the_wrapper():
    net, generator = network(), torch.Generator().manual_seed(0)
    opt = sgd(net)
    for x, y in batches(): esam_step(net, closure_for(ESAM(), net, x, y), opt, .1, generator=generator)
    assert torch.equal(values(net), by_wrapper(ESAM(.1), network(), batches()))
    net, generator = network(), torch.Generator().manual_seed(0)
    opt = sgd(net)
    perturb = [weight_noise(.01)]
    for x, y in batches():
        sadt_step(net, closure_for(SADT(), net, x, y), opt, perturb, generator=generator, bn='keep')
    assert torch.equal(values(net), by_wrapper(SADT(perturb=perturb), network(), batches()))


@pytest.mark.parametrize('name', FIRST_STEP)
def test_first_and_second_step_are_step(name):
    method, net = METHODS[name](), network(.5 if 'replay' in name else 0.)
    torch.manual_seed(2)
    opt = MethodOptimizer(method, sgd(net), net)
    for x, y in batches():
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if opt.first_step(): F.cross_entropy(net(x), y).backward()
        opt.second_step()
    expected = by_wrapper(METHODS[name](), network(.5 if 'replay' in name else 0.), batches())
    torch.testing.assert_close(values(net), expected, rtol=1e-12, atol=1e-14)


def test_abandoned_first_step_puts_the_weights_back():
    net = network(norm=False)
    opt, before = MethodOptimizer(SAM(.1), sgd(net), net), values(net)
    (x, y), *_ = batches()
    F.cross_entropy(net(x), y).backward()
    assert opt.first_step() and not torch.equal(values(net), before)
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward() # taken at the moved weights, by mistake
    opt.first_step() # begins anew, and first puts the weights back
    opt._abandon()
    assert torch.equal(values(net), before)


def torch_style(net, opt, x, y, zero=True):
    def closure():
        if zero: opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss
    return closure


@pytest.mark.parametrize('zeroed_by', ['wrapper', 'base', 'model', 'nobody'])
def test_closures_that_call_backward(zeroed_by):
    net = network()
    base = sgd(net)
    opt = MethodOptimizer(SAM(.1), base, net)
    zeroing = dict(wrapper=opt, base=base, model=net, nobody=base)[zeroed_by]
    losses = [opt.step(torch_style(net, zeroing, x, y, zeroed_by != 'nobody')) for x, y in batches()]
    assert torch.equal(values(net), by_wrapper(SAM(.1), network(), batches()))
    (x, y), *_ = batches()
    torch.testing.assert_close(losses[0], F.cross_entropy(network()(x), y).detach(), rtol=0, atol=0)


def test_accumulated_gradients_are_added_unless_the_closure_zeroes_them():
    (x, y), *_ = batches()
    extra = [torch.full_like(p, .01) for p in network().parameters()]
    def one_step(closure_style):
        net = network()
        opt = MethodOptimizer(SAM(.1), torch.optim.SGD(net.parameters(), lr=1.), net)
        for p, g in zip(net.parameters(), extra): p.grad = g.clone()
        if closure_style == 'zeroes': opt.step(torch_style(net, opt, x, y))
        else: opt.step(lambda: F.cross_entropy(net(x), y))
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    difference = one_step('zeroes') - one_step('returns')
    torch.testing.assert_close(difference, torch.full_like(difference, .01), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam', 'friendly_sam', 'wsam', 'looksam', 'esam half',
                                  'sadt1', 'sadt3'])
def test_micro_batches_are_those_of_gradient_accumulation(name):
    data = batches(4, 4)
    net, method = network(norm=False), METHODS[name]()
    opt = MethodOptimizer(method, sgd(net), net)
    torch.manual_seed(2)
    for i, (x, y) in enumerate(data):
        closure = closure_for(method, net, x, y)
        if isinstance(method, SADT):
            def halved(closure=closure):
                logits, loss = closure()
                return logits, loss / 2
        elif isinstance(method, ESAM):
            def halved(rows, closure=closure): return closure(rows) / 2
        else:
            def halved(closure=closure): return closure() / 2
        opt.backward(halved)
        if i % 2:
            opt.step()
            opt.zero_grad()
    expected = by_callback(METHODS[name](), network(norm=False), data, GradientAccumulation(8))
    torch.testing.assert_close(values(net), expected, rtol=1e-9, atol=1e-11)


SPLITS = {'equal': [3] * 4, 'unequal': [7, 1, 4], 'one empty': [7, 0, 5], 'single': [12]}
KINDS = { # outputs per sample, and the loss of each sample
    'categorical': (3, lambda z, y: F.cross_entropy(z, y, reduction='none')),
    'bernoulli': (1, lambda z, y: F.softplus(z[:, 0]) - (y > 0) * z[:, 0]),
    'gaussian': (2, lambda z, y: (z - y[:, None]).square().mean(1)),
}


@pytest.mark.parametrize('options', [{}, dict(grad_at='up'), dict(first_step=False), dict(kl='aux_to_clean')])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('split', SPLITS)
def test_sadt_with_micro_batches_of_any_size_is_one_large_batch(split, kind, reduction, options):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=gen, dtype=torch.float64)
    y = torch.randint(0, 3, (12,), generator=gen)
    outputs, of_samples = KINDS[kind]
    def trained(sizes):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
        method = SADT(1, noise_scale=3000, divergence=kind, **options)
        opt = MethodOptimizer(method, sgd(net), net)
        for _ in range(2):
            for xb, yb in zip(x.split(sizes), y.split(sizes)):
                def closure(xb=xb, yb=yb):
                    out = net(xb)
                    total = of_samples(out, yb).sum()
                    return out, total / len(x) if reduction == 'mean' else total
                opt.backward(closure)
            opt.step()
            opt.zero_grad()
        return values(net)
    torch.testing.assert_close(trained(SPLITS[split]), trained([12]), rtol=1e-12, atol=1e-14)


def test_max_norm_clips_the_final_gradient_as_fastai_does():
    got = by_wrapper(SAM(.1), network(norm=False), batches(), max_norm=.01)
    expected = by_callback(SAM(.1), network(norm=False), batches(), GradientClip(.01))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('name', METHODS)
def test_state_resumes_to_the_bit(name):
    data, method = batches(), METHODS[name]()
    whole = by_wrapper(METHODS[name](), network(), data)
    net = network()
    opt = MethodOptimizer(method, sgd(net), net)
    torch.manual_seed(2)
    for x, y in data[:4]: opt.step(closure_for(method, net, x, y))
    state = copy.deepcopy([net.state_dict(), opt.state_dict(), torch.get_rng_state()])
    del net, opt, method
    method, net = METHODS[name](), network()
    opt = MethodOptimizer(method, sgd(net), net)
    net.load_state_dict(state[0])
    opt.load_state_dict(state[1])
    torch.set_rng_state(state[2])
    for x, y in data[4:]: opt.step(closure_for(method, net, x, y))
    assert torch.equal(values(net), whole)


def test_groups_are_shared_and_followed_by_schedulers_and_hooks():
    net = network()
    base = torch.optim.SGD(net[0].parameters(), lr=.1)
    opt = MethodOptimizer(SAM(.1), base, net)
    opt.add_param_group(dict(params=net[5].parameters(), lr=.01))
    assert opt.param_groups is base.param_groups and [g['lr'] for g in base.param_groups] == [.1, .01]
    calls = []
    opt.register_step_pre_hook(lambda *args: calls.append('before'))
    opt.register_step_post_hook(lambda *args: calls.append('after'))
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, .5)
    (x, y), *_ = batches()
    opt.step(lambda: F.cross_entropy(net(x), y))
    schedule.step()
    assert calls == ['before', 'after'] and [g['lr'] for g in base.param_groups] == [.05, .005]
    base.load_state_dict(base.state_dict()) # makes new groups
    assert opt.param_groups is base.param_groups and opt.state is base.state


def test_a_group_has_a_radius_of_its_own():
    (x, y), *_ = batches()
    net = network(norm=False)
    groups = [dict(params=net[0].parameters(), rho=.3), dict(params=net[5].parameters())]
    base = torch.optim.SGD(groups, lr=1.)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    MethodOptimizer(SAM(.1), base, net).step(lambda: F.cross_entropy(net(x), y))
    got = {n: before[n] - p.detach() for n, p in net.named_parameters()}
    oracle = network(norm=False)
    grads = torch.autograd.grad(F.cross_entropy(oracle(x), y), list(oracle.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for (n, p), g in zip(oracle.named_parameters(), grads):
            rho = .3 if n.startswith('0.') else .1
            p += rho * g / norm
    expected = torch.autograd.grad(F.cross_entropy(oracle(x), y), list(oracle.parameters()))
    for n, g in zip(got, expected): torch.testing.assert_close(got[n], g, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('bad', [1, 2])
@pytest.mark.parametrize('name', ['sam', 'gsam', 'friendly_sam', 'wsam', 'wsam coupled', 'looksam', 'sadt1'])
def test_an_overflow_in_either_pass_skips_the_whole_batch(name, bad):
    net = Overflow(network(norm=False), bad)
    method, before = METHODS[name](), values(net)
    scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    opt = MethodOptimizer(method, torch.optim.SGD(net.parameters(), lr=.1), net, scaler)
    (x, y), *rest = batches()
    opt.step(closure_for(method, net, x, y))
    scaler.update()
    if name == 'sadt1' and bad == 2: # the first step has been made by then
        assert not torch.equal(values(net), before) and torch.isfinite(values(net)).all()
    else: assert torch.equal(values(net), before)
    assert scaler.get_scale() == 4.
    opt.zero_grad()
    for x, y in rest:
        opt.step(closure_for(method, net, x, y))
        scaler.update()
    assert torch.isfinite(values(net)).all() and not torch.equal(values(net), before)


@pytest.mark.parametrize('name', [n for n in METHODS if not n.endswith('replay')])
def test_a_loss_scale_changes_no_bit(name):
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    got = by_wrapper(METHODS[name](), network(), batches(), scaler=scaler)
    expected = by_wrapper(METHODS[name](), network(), batches())
    # the 1e-12 that is added to the gradient's norm counts for less under a scale
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


STEPS = {
    'sam': (partial(sam_step, rho=1.), lambda net, x, y: lambda: F.cross_entropy(net(x), y)),
    'asam': (partial(asam_step, rho=1.), lambda net, x, y: lambda: F.cross_entropy(net(x), y)),
    'gsam': (partial(gsam_step, rho=1.), lambda net, x, y: lambda: F.cross_entropy(net(x), y)),
    'esam': (partial(esam_step, rho=1., beta=1., gamma=.5), partial(closure_for, ESAM())),
    'sadt': (partial(sadt_step, perturb=[weight_noise(.1)]), partial(closure_for, SADT())),
}


@pytest.mark.parametrize('name', STEPS)
def test_autocast_around_all_passes_sees_moved_weights(name):
    step, closure = STEPS[name]
    def train(cache_enabled):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).train()
        opt = torch.optim.SGD(net.parameters(), lr=.5)
        x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16, cache_enabled=cache_enabled):
            for _ in range(4): step(net, closure(net, x, y), opt)
            return values(net), F.cross_entropy(net(x), y).item()
    right, loss = train(False) # without the cache every pass casts the weights as they are
    got, there = train(True)
    assert torch.equal(got, right) and there == loss


class Sum(PerturbedPass):
    "Not a known method: two passes, at plus and minus one."
    def extra_pass(self, params, grads):
        for sign in (1, -1):
            with torch.no_grad():
                for p in params.values(): p += sign
            self.second_pass()
            with torch.no_grad():
                for p in params.values(): p -= sign


def test_methods_of_other_packages_that_make_their_own_passes():
    (x, y), *_ = batches()
    net = network(norm=False)
    closure_step(Sum(), net, lambda: F.cross_entropy(net(x), y), torch.optim.SGD(net.parameters(), lr=1.))
    oracle, total = network(norm=False), 0.
    for sign in (1, -1):
        moved = network(norm=False)
        with torch.no_grad():
            for p in moved.parameters(): p += sign
        grads = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
        total = total + torch.cat([g.flatten() for g in grads])
    expected = nn.utils.parameters_to_vector(oracle.parameters()) - total
    got = nn.utils.parameters_to_vector(net.parameters())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def wrapped(method=None, net=None):
    net = net or network()
    return MethodOptimizer(method or SAM(.1), sgd(net), net), net


def no_closure(): wrapped()[0].step(3)
def number(): wrapped()[0].step(lambda: 3.)
def no_graph():
    opt, net = wrapped()
    opt.step(lambda: F.cross_entropy(net(batches()[0][0]), batches()[0][1]).detach())
def other_network():
    opt, other = wrapped()[0], network()
    opt.step(lambda: F.cross_entropy(other(batches()[0][0]), batches()[0][1]))
def no_logits():
    opt, net = wrapped(SADT())
    opt.step(lambda: F.cross_entropy(net(batches()[0][0]), batches()[0][1]))
def no_rows():
    opt, net = wrapped(ESAM())
    opt.step(lambda: F.cross_entropy(net(batches()[0][0]), batches()[0][1]))
def lbfgs(): MethodOptimizer(SAM(), torch.optim.LBFGS(network().parameters()), network())
def other_parameters(): MethodOptimizer(SAM(), sgd(network()), network())
def learner_method(): MethodOptimizer(MESA(), sgd(network()), network())
def method_class(): MethodOptimizer(SAM, sgd(network()), network())
def not_an_optimizer(): MethodOptimizer(SAM(), network(), network())
def first_step_of_sadt(): wrapped(SADT())[0].first_step()
def sparse():
    net = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    sam_step(net, lambda: net(torch.tensor([1, 2])).sum(), torch.optim.SGD(net.parameters(), lr=.1))
def negative(): sam_step(network(), lambda: 0, sgd(network()), rho=-1)
def not_a_number(): asam_step(network(), lambda: 0, sgd(network()), rho=math.nan)
def endless(): sam_step(network(), lambda: 0, sgd(network()), rho=math.inf)


@pytest.mark.parametrize('make, error, words', [
    (no_closure, ValueError, 'a closure is a function'), (number, ValueError, "returned 'float'"),
    (no_graph, ValueError, 'a tensor without a graph'),
    (other_network, ValueError, 'does the closure run this network'),
    (no_logits, ValueError, r'\(logits, loss\)'), (no_rows, ValueError, 'positions'),
    (lbfgs, ValueError, 'several times in one step'), (other_parameters, ValueError, 'steps no parameter'),
    (learner_method, TypeError, 'needs a fastai Learner'), (method_class, TypeError, r'SAM\(rho=.05\)'),
    (not_an_optimizer, TypeError, 'got Sequential'),
    (first_step_of_sadt, ValueError, 'give `step` a closure'),
    (sparse, ValueError, 'sparse=False'), (negative, ValueError, '`rho` must be positive'),
    (not_a_number, ValueError, '`rho` must be positive'), (endless, ValueError, '`rho` must be positive'),
])
def test_bad_input_is_an_error_with_advice(make, error, words):
    with pytest.raises(error, match=words): make()


def test_an_error_in_the_closure_leaves_weights_and_gradients():
    net, calls = network(norm=False), []
    opt = MethodOptimizer(SAM(.1), sgd(net), net)
    kept = [torch.ones_like(p) for p in net.parameters()]
    for p, g in zip(net.parameters(), kept): p.grad = g
    before = values(net)
    def fails():
        calls.append(1)
        if len(calls) == 2: raise RuntimeError('out of memory')
        return F.cross_entropy(net(batches()[0][0]), batches()[0][1])
    with pytest.raises(RuntimeError, match='out of memory'): opt.step(fails)
    assert torch.equal(values(net), before)
    assert all(p.grad is g for p, g in zip(net.parameters(), kept))


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    from accelerate.state import AcceleratorState, GradientState
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def two_by_two(data):
    "Train with the mean of the SAM gradients of two micro-batches in each step."
    net = network(norm=False)
    opt = MethodOptimizer(SAM(.1), sgd(net), net)
    for i, (x, y) in enumerate(data):
        opt.backward(lambda x=x, y=y: F.cross_entropy(net(x), y) / 2)
        if i % 2:
            opt.step()
            opt.zero_grad()
    return values(net)


def test_sam_step_inside_accelerates_accumulation(accelerator):
    "Each optimizer step uses the mean of the SAM gradients of its two micro-batches."
    data = batches(4, 4)
    net = network(norm=False)
    prepared, opt = accelerator.prepare(net, sgd(net))
    for x, y in data:
        with accelerator.accumulate(prepared):
            def closure(x=x, y=y):
                loss = F.cross_entropy(prepared(x), y)
                accelerator.backward(loss)
                return loss
            sam_step(prepared, closure, opt, rho=.1)
    torch.testing.assert_close(values(net), two_by_two(data), rtol=1e-11, atol=1e-13)


def test_a_wrapper_that_accelerate_has_prepared(accelerator):
    data = batches(4, 4)
    net = network(norm=False)
    wrapper = MethodOptimizer(SAM(.1), sgd(net), net)
    prepared, opt = accelerator.prepare(net, wrapper)
    for x, y in data:
        with accelerator.accumulate(prepared):
            wrapper.backward(lambda x=x, y=y: F.cross_entropy(prepared(x), y) / 2)
            opt.step()
            opt.zero_grad()
    torch.testing.assert_close(values(net), two_by_two(data), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam'])
def test_a_step_leaves_no_copies_of_the_weights(name, monkeypatch):
    "Without a garbage collection, which may come after many steps."
    step, method = FUNCTIONS[name]
    net, ((x, y), *_) = network(), batches()
    made, allocate = [], perturb.scratch_like
    def noted(*args):
        made.append(weakref.ref(t := allocate(*args)))
        return t
    monkeypatch.setattr(perturb, 'scratch_like', noted)
    gc.disable()
    try:
        step(net, closure_for(method(), net, x, y), sgd(net))
        assert len(made) >= 6 and not any(r() is not None for r in made)
    finally: gc.enable()


def test_first_step_of_a_method_that_makes_its_own_passes():
    net = network(norm=False)
    opt, before = MethodOptimizer(Sum(), sgd(net), net), values(net)
    F.cross_entropy(net(batches()[0][0]), batches()[0][1]).backward()
    with pytest.raises(ValueError, match='Sum does not make exactly one pass'): opt.first_step()
    assert torch.equal(values(net), before)


def test_a_copied_optimizer_goes_on_with_the_copied_network():
    net, ((x, y), *_) = network(), batches()
    opt = MethodOptimizer(LookSAM(.1, k=3), sgd(net), net)
    def step(net, opt): opt.step(lambda: F.cross_entropy(net(x), y))
    step(net, opt)
    other_net, other = copy.deepcopy((net, opt))
    for _ in range(3): step(net, opt)
    assert not torch.equal(values(other_net), values(net))
    for _ in range(3): step(other_net, other)
    assert torch.equal(values(other_net), values(net))


@pytest.mark.parametrize('way', ['step', 'two steps'])
def test_schedulers_see_that_the_wrapper_has_stepped(way, recwarn):
    opt, net = wrapped()
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=.5)
    (x, y), *_ = batches()
    if way == 'step': opt.step(closure_for(SAM(), net, x, y))
    else:
        F.cross_entropy(net(x), y).backward()
        opt.first_step()
        F.cross_entropy(net(x), y).backward()
        opt.second_step()
    schedule.step()
    assert not [w for w in recwarn if 'lr_scheduler' in str(w.message)]


@pytest.mark.parametrize('returned, found', [
    (lambda losses, rows: losses.mean(), r'shape \(\)'),
    (lambda losses, rows: losses[:, None].expand(-1, 6), r'shape \(8, 6\)'),
    (lambda losses, rows: losses.tolist(), "'list'"),
])
@pytest.mark.parametrize('rows_used', [True, False])
def test_esam_refuses_other_losses_than_one_per_sample(returned, found, rows_used):
    (x, y), *_ = batches()
    net = network(norm=False)
    opt = MethodOptimizer(ESAM(), torch.optim.SGD(net.parameters(), lr=.1), net)
    before = values(net)
    def closure(rows):
        if rows is None or not rows_used: rows = slice(None)
        return returned(F.cross_entropy(net(x[rows]), y[rows], reduction='none'), rows)
    with pytest.raises(ValueError, match=f'one loss per sample.*{found}'): opt.step(closure)
    assert torch.equal(values(net), before)


def test_esam_refuses_a_closure_that_ignores_the_positions():
    (x, y), *_ = batches()
    net = network(norm=False)
    opt = MethodOptimizer(ESAM(), torch.optim.SGD(net.parameters(), lr=.1), net)
    before = values(net)
    with pytest.raises(ValueError, match=r'shape \(4,\), got the shape \(8,\)'):
        opt.step(lambda rows: F.cross_entropy(net(x), y, reduction='none'))
    assert torch.equal(values(net), before)


def test_hooks_of_the_wrapper_run_in_every_kind_of_step():
    (x, y), *_ = batches()
    net = network(norm=False)
    opt = MethodOptimizer(SAM(.1), torch.optim.SGD(net.parameters(), lr=.1), net)
    calls = []
    before = values(net)
    def at_the_weights(*_): calls.append(('before', torch.equal(values(net), before)))
    opt.register_step_pre_hook(at_the_weights)
    opt.register_step_post_hook(lambda *_: calls.append(('after', torch.equal(values(net), before))))
    F.cross_entropy(net(x), y).backward()
    assert opt.first_step() and not calls
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.second_step()
    assert calls == [('before', True), ('after', False)]


def test_hooks_of_the_wrapper_change_its_state_as_in_pytorch():
    net = network(norm=False)
    opt = MethodOptimizer(SAM(.1, interval=2), torch.optim.SGD(net.parameters(), lr=.1), net)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append(('saving', o is opt)))
    opt.register_state_dict_post_hook(lambda o, state: state | dict(note='mine'))
    def take_note(o, state):
        calls.append(state['note'])
        return {k: v for k, v in state.items() if k != 'note'}
    opt.register_load_state_dict_pre_hook(take_note)
    opt.register_load_state_dict_post_hook(lambda o: calls.append(('loaded', o is opt)))
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert calls == [('saving', True), 'mine', ('loaded', True)] and state['note'] == 'mine'


def step_and_drop(opt):
    "An optimizer step within the backward, which frees the gradient."
    def hook(p):
        opt.step()
        p.grad = None
    return hook


def step_and_keep(opt):
    def hook(p): opt.step()
    return hook


def drop(opt):
    def hook(p): p.grad = None
    return hook


def clip(opt):
    def hook(p): p.grad.clamp_(-.01, .01)
    return hook


@pytest.mark.parametrize('way', ['closure', 'closure that calls backward', 'two steps'])
@pytest.mark.parametrize('make_hook', [step_and_drop, step_and_keep, drop, clip])
@pytest.mark.parametrize('name', ['sam', 'gsam', 'looksam', 'esam', 'sadt1'])
def test_a_hook_that_uses_up_a_gradient_in_the_backward(name, make_hook, way):
    x, y = batches(1)[0]
    net, method = network(norm=False), METHODS[name]()
    hooked, other = net[0].weight, [p for p in net.parameters() if p is not net[0].weight]
    hook = make_hook(torch.optim.SGD([hooked], lr=.1))
    hooked.register_post_accumulate_grad_hook(hook)
    opt = MethodOptimizer(method, torch.optim.SGD(other, lr=.1), net)
    closure = closure_for(method, net, x, y)
    def step():
        if way == 'two steps':
            closure().backward()
            opt.first_step()
        elif way == 'closure': opt.step(closure)
        else:
            def runs_backward():
                loss = closure()
                loss.backward()
                return loss
            opt.step(runs_backward)
    if way != 'closure' and name in ('esam', 'sadt1'): return # they need the returned losses or predictions
    seen_late = way == 'two steps' and make_hook is step_and_keep # the gradient is still there
    if make_hook is clip or seen_late: step()
    else:
        with pytest.raises(ValueError, match="hook of the parameter '0.weight'"): step()
    assert list(hooked._post_accumulate_grad_hooks.values()) == [hook]


@pytest.mark.parametrize('options', [{}, dict(flatten_optimizer_state_dict=True), dict(full_state_dict=True)])
@pytest.mark.parametrize('base', [sgd, lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(.01))])
@pytest.mark.parametrize('name', ['sam', 'looksam', 'sadt1'])
def test_the_state_dicts_of_distributed_checkpoints(name, base, options):
    "They keep the state of the base; the state of the method is saved beside it."
    dcp = pytest.importorskip('torch.distributed.checkpoint.state_dict')
    options = dcp.StateDictOptions(**options)
    data = batches(4)
    def wrapped():
        net, method = network(), METHODS[name]()
        return net, MethodOptimizer(method, base(net), net)
    def train(net, opt, data):
        for x, y in data: opt.step(closure_for(opt.method, net, x, y))
        opt.zero_grad()
    whole, opt = wrapped()
    train(whole, opt, data)
    first, opt = wrapped()
    train(first, opt, data[:2])
    saved = dcp.get_optimizer_state_dict(first, opt, options=options)
    second, resumed = wrapped()
    second.load_state_dict(first.state_dict())
    before = values(second)
    dcp.get_optimizer_state_dict(second, resumed, options=options) # makes an empty state
    dcp.set_optimizer_state_dict(second, resumed, saved, options=options)
    assert torch.equal(values(second), before)
    load_method_state(resumed.method, method_state(opt.method))
    train(second, resumed, data[2:])
    torch.testing.assert_close(values(second), values(whole), rtol=0, atol=0)


def test_a_step_with_plain_gradients_is_an_error_at_a_rate_of_zero_too():
    net = network()
    opt = MethodOptimizer(SAM(.1), torch.optim.SGD(net.parameters(), lr=0.), net)
    (x, y), = batches(1)
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(ValueError, match='plain'): opt.step()


def scaled(closure, scaler, calls_backward):
    "Return a closure that scales its loss with a scaler which the wrapper does not have."
    def run():
        out = closure()
        logits, loss = out if isinstance(out, tuple) else (None, out)
        loss = scaler.scale(loss)
        if logits is not None: return logits, loss
        if calls_backward: loss.backward()
        return loss
    return run


@pytest.mark.parametrize('calls_backward', [True, False])
@pytest.mark.parametrize('name', [n for n in METHODS if n not in ('esam', 'esam half')])
def test_a_scaler_of_the_loop_changes_nothing(name, calls_backward):
    "The scale changes at every second step, and is a power of two."
    method, net = METHODS[name](), network()
    opt = MethodOptimizer(method, sgd(net), net)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024., growth_interval=2)
    torch.manual_seed(2)
    for x, y in batches():
        opt.zero_grad()
        opt.backward(scaled(closure_for(method, net, x, y), scaler, calls_backward))
        scaler.step(opt)
        scaler.update()
    expected = by_wrapper(METHODS[name](), network(), batches())
    torch.testing.assert_close(values(net), expected, rtol=1e-9, atol=1e-11)


def step_of_wrapper(method, net, closure): MethodOptimizer(method, sgd(net), net).step(closure)
def step_of_function(method, net, closure): closure_step(method, net, closure, sgd(net))


@pytest.mark.parametrize('step', [step_of_wrapper, step_of_function])
@pytest.mark.parametrize('name', ['sam', 'wsam', 'sadt1'])
def test_a_step_with_scaled_gradients_is_an_error(name, step):
    method, net = METHODS[name](), network()
    scaler = torch.amp.GradScaler('cpu')
    before = [p.detach().clone() for p in net.parameters()]
    (x, y), = batches(1)
    closure = scaled(closure_for(method, net, x, y), scaler, True)
    with pytest.raises(ValueError, match='scaler=scaler'): step(method, net, closure)
    assert all(map(torch.equal, net.parameters(), before))


@pytest.mark.filterwarnings('ignore:.*torch.jit')
@pytest.mark.parametrize('script', [torch.jit.script, lambda net: torch.jit.trace(net, batches(1)[0][0])])
@pytest.mark.parametrize('name', ['sam', 'asam', 'looksam', 'sadt1'])
def test_a_scripted_network_is_the_network(name, script):
    net = script(network(norm=False))
    got = by_wrapper(METHODS[name](), net, batches())
    expected = by_wrapper(METHODS[name](), network(norm=False), batches())
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    assert net.state_dict().keys() == network(norm=False).state_dict().keys()
