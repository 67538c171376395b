"""Optimizers with options that a method could misread: `rho`, `maximize`, no learning rate."""
import copy
from functools import partial

import pytest
import torch
from conftest import sam_gradients
from torch import nn
from torch.nn import functional as F
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM


def batch(seed=0, n=16):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=gen, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=gen)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_of(net, x, y): return lambda: F.cross_entropy(net(x), y)
def values(net): return torch.cat([p.detach().flatten() for p in net.parameters()])
def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# A parameter group with a `rho`
@pytest.mark.parametrize('way', ['wrapper', 'function'])
def test_the_rho_of_adadelta_is_no_radius(way):
    net, oracle = network(), network()
    base, plain = (torch.optim.Adadelta(n.parameters(), rho=.8) for n in (net, oracle))
    method = SAM(.05)
    wrapper = MethodOptimizer(SAM(.05), base, net)
    for seed in range(3):
        x, y = batch(seed)
        if way == 'wrapper': wrapper.step(loss_of(net, x, y))
        else: closure_step(method, net, loss_of(net, x, y), base)
        _, moved = sam_gradients(oracle, loss_of(oracle, x, y), [.05] * 4)
        for p, g in zip(oracle.parameters(), moved): p.grad = g
        plain.step()
    close(values(net), values(oracle))


@pytest.mark.parametrize('method', [MSAM, SADT])
def test_adadelta_may_be_the_base_of_methods_without_radii(method):
    net = network()
    base = torch.optim.Adadelta(net.parameters())
    if method is SADT: MethodOptimizer(SADT(), base, net)
    else:
        with pytest.raises(ValueError, match='momentum'): MethodOptimizer(MSAM(), base, net)


def groups(net, rho): return [dict(params=net[0].parameters(), rho=rho), dict(params=net[2].parameters())]


@pytest.mark.parametrize('rho', [-.1, float('nan'), float('inf'), None, 'large'])
def test_a_radius_of_a_group_out_of_range_is_refused_before_training(rho):
    net = network()
    base = torch.optim.SGD(groups(net, rho), lr=.1)
    with pytest.raises(ValueError, match='`rho` of a parameter group'): MethodOptimizer(SAM(), base, net)


def test_a_radius_of_a_group_that_is_added_later_is_checked():
    net = network()
    opt = MethodOptimizer(SAM(), torch.optim.SGD(net[0].parameters(), lr=.1), net)
    opt.add_param_group(dict(params=net[2].parameters(), rho=-1.))
    before = values(net)
    with pytest.raises(ValueError, match='`rho` of a parameter group'): opt.step(loss_of(net, *batch()))
    assert torch.equal(values(net), before)


@pytest.mark.parametrize('method', [MSAM, SADT])
def test_methods_without_radii_refuse_the_radius_of_a_group(method):
    net = network()
    base = torch.optim.SGD(groups(net, .1), lr=.1, momentum=.9)
    with pytest.raises(ValueError, match='leave `rho` out'): MethodOptimizer(method(), base, net)


class Nowhere(PerturbedPass):
    "A method of another package, without `rho`."
    def perturbation(self, params, grads): return {}


def test_a_method_without_rho_refuses_the_radius_of_a_group():
    net = network()
    base = torch.optim.SGD(groups(net, .1), lr=.1)
    with pytest.raises(ValueError, match='Nowhere has no radius'): MethodOptimizer(Nowhere(), base, net)


@pytest.mark.parametrize('rate, share', [(.1, 1.), (.05, .5), (0., 0.)])
def test_the_schedule_of_gsam_scales_the_radius_of_every_group(rate, share):
    net, oracle = network(), network()
    method = GSAM(.1, 0., alpha=.4, lr_max=.1)
    base = torch.optim.SGD(groups(net, .3), lr=rate)
    opt = MethodOptimizer(method, base, net)
    opt.backward(loss_of(net, *batch()))
    got = torch.cat([p.grad.flatten() for p in net.parameters()])
    radii = [share * r for r in (.3, .3, .1, .1)]
    both = sam_gradients(oracle, loss_of(oracle, *batch()), radii)
    g, g_p = (torch.cat([t.flatten() for t in grads]) for grads in both)
    close(got, g_p - .4 * (g - (g @ g_p) / (g_p @ g_p) * g_p))


# An optimizer that maximizes
MADE_FOR_DESCENT = [SAM, ASAM, partial(ESAM, gamma=1), GSAM, LookSAM, FriendlySAM, WSAM, SADT]


@pytest.mark.parametrize('make', MADE_FOR_DESCENT)
def test_methods_refuse_to_maximize_in_a_loop(make):
    "Uphill is then where training goes, so that each method would do the opposite of what it is for."
    net = network()
    base = torch.optim.SGD([dict(params=net[0].parameters()),
                            dict(params=net[2].parameters(), maximize=True)], lr=.1)
    with pytest.raises(ValueError, match='return the negative loss'): MethodOptimizer(make(), base, net)


@pytest.mark.parametrize('make', [*MADE_FOR_DESCENT, MESA, SAF, lambda: Distillation(network())])
def test_methods_refuse_to_maximize_in_a_learner(make):
    net = network()
    before = values(net)
    data = [batch(i) for i in range(2)]
    opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, maximize=True))
    learn = Learner(DataLoaders(data, data), net, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func,
                    default_cbs=False, cbs=[TrainEvalCallback, make()])
    with learn.no_bar(), pytest.raises(ValueError, match='return the negative loss'): learn.fit(1)
    assert torch.equal(values(net), before)


@pytest.mark.parametrize('decouple', [True, False])
def test_a_multiplier_of_the_loss_may_be_maximized(decouple):
    "The multiplier of a constraint is no weight of the network; WSAM raises the weighted loss over it."
    net, oracle = network(), network()
    d = nn.Parameter(torch.tensor(.5, dtype=torch.float64))
    x, y = batch()
    def loss(n, d): return F.cross_entropy(n(x), y) + d * (n(x).square().mean() - 1)
    base = torch.optim.SGD([dict(params=net.parameters()), dict(params=[d], maximize=True)], lr=.1)
    MethodOptimizer(WSAM(.05, gamma=.9, decouple=decouple), base, net).step(lambda: loss(net, d))

    other = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
    params = list(oracle.parameters())
    g = torch.autograd.grad(loss(oracle, other), [*params, other])
    norm = torch.cat([t.flatten() for t in g[:-1]]).norm()
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, t in zip(params, g): p += .05 * t / norm
    g_p = torch.autograd.grad(loss(oracle, other), [*params, other])
    weighted = [a + 9 * (b - a) for a, b in zip(g, g_p)]
    close(d.detach(), .5 + .1 * weighted[-1])
    close(values(net), torch.cat([(w - .1 * t).flatten() for w, t in zip(before, weighted)]))


# An optimizer without a learning rate
class Halving(torch.optim.Optimizer):
    "Subtracts half of the gradient; its groups have the learning rate `None`, or none at all."
    def __init__(self, params, defaults): super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is not None: p -= .5 * p.grad


WITHOUT_RATE = pytest.mark.parametrize('defaults', [{}, dict(lr=None)])


@WITHOUT_RATE
@pytest.mark.parametrize('make', [SAM, GSAM, partial(WSAM, decouple=False), SADT])
def test_a_method_that_needs_no_rate_steps_without_one(make, defaults):
    x, y = batch()
    def trained(make_base):
        net = network()
        opt = MethodOptimizer(make(), make_base(net.parameters()), net)
        def closure():
            logits = net(x)
            return logits, F.cross_entropy(logits, y)
        for _ in range(2): opt.step(closure)
        return values(net)
    close(trained(partial(Halving, defaults=defaults)), trained(partial(torch.optim.SGD, lr=.5)))


@WITHOUT_RATE
@pytest.mark.parametrize('make, words', [(partial(WSAM, decouple=True), 'decouple=False'),
                                         (partial(SADT, sigma='rate'), "sigma='fixed'"),
                                         (partial(GSAM, lr_max=.1), 'leave `lr_max` out')])
def test_a_missing_rate_is_named_before_training(make, words, defaults):
    net = network()
    base = Halving(net.parameters(), defaults)
    with pytest.raises(ValueError, match=words): MethodOptimizer(make(), base, net)


@pytest.mark.parametrize('make', [partial(LookSAM, .1, k=3), partial(FriendlySAM, .1)])
def test_two_trainings_from_one_loaded_state_are_equal(make):
    "The base optimizer has no state, so the state is the method's alone."
    def fresh():
        net = network()
        return net, MethodOptimizer(make(), torch.optim.SGD(net.parameters(), lr=.1), net)
    def steps(net, opt, seeds):
        for seed in seeds: opt.step(loss_of(net, *batch(seed)))
    net, opt = fresh()
    steps(net, opt, range(4))
    saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
    ends = []
    for _ in range(2):
        net, opt = fresh()
        net.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        steps(net, opt, range(4, 8))
        ends.append(values(net))
    assert torch.equal(*ends)
