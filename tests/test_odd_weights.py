"Weights and buffers in unusual forms: half precision, `parametrize.cached`, expanded buffers."
from functools import partial

import pytest
import torch
from conftest import sam_gradients
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.perturb import ascent, global_dot, global_norm
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM

METHODS = {'sam': SAM, 'asam': ASAM, 'gsam': GSAM, 'looksam': partial(LookSAM, k=2), 'wsam': WSAM,
           'friendly_sam': FriendlySAM, 'esam': partial(ESAM, gamma=1.), 'msam': MSAM,
           'sadt': partial(SADT, rho=.1)}


def batch(seed=0, n=16):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=gen, dtype=torch.float64), torch.randint(0, 3, (n,), generator=gen)


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def momentum(net, lr=.1): return torch.optim.SGD(net.parameters(), lr=lr, momentum=.9)
def values(net): return torch.cat([p.detach().flatten() for p in net.parameters()])
def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def closure_of(method, net, x, y, factor=1.):
    def closure():
        logits = net(x)
        loss = F.cross_entropy(logits, y) * factor
        return (logits, loss) if isinstance(method, SADT) else loss
    return closure


# Half precision
@pytest.mark.parametrize('name', list(METHODS))
def test_a_gradient_of_zero_moves_nothing_in_half_precision(name):
    "As of a hinge loss whose margins are all kept."
    net, (x, y) = network(torch.float16), batch()
    before = values(net)
    method = METHODS[name]()
    opt = MethodOptimizer(method, momentum(net), net)
    for _ in range(3):
        opt.step(closure_of(method, net, x.half(), y, factor=0.))
        opt.zero_grad()
    if name == 'sadt': assert values(net).isfinite().all() # the divergence has a gradient
    else: assert torch.equal(values(net), before)


def test_products_of_small_gradients_in_half_precision():
    "The squares of many of these gradients are zero in float16; the oracle is the same network in float64."
    x, y = batch()
    grads = []
    for dtype in (torch.float16, torch.float64):
        net, inputs = network(torch.float16).to(dtype), x.half().to(dtype)
        opt = MethodOptimizer(GSAM(), torch.optim.SGD(net.parameters(), lr=.1), net)
        opt.step(closure_of(opt.method, net, inputs, y, factor=1e-3))
        grads.append(torch.cat([p.grad.double().flatten() for p in net.parameters()]))
    half, double = grads
    assert (half - double).norm() < .005 * double.norm()


def test_norms_and_products_that_leave_the_range_of_half_precision():
    large, small = torch.full((1000,), 3000.).half(), torch.full((1000,), 1e-5).half()
    assert abs(global_norm([large]) / (3000 * 1000**.5) - 1) < 1e-3
    assert abs(global_dot([small], [small]) / (1000 * small[0].double()**2) - 1) < 1e-3
    step = ascent({'w': large.clone()}, .1)['w'].double()
    assert abs(step.norm() / .1 - 1) < 1e-2
    assert ascent({'w': torch.full((4,), 6e-8).half()}, .1)['w'].isfinite().all()


# Parametrizations
class Symmetric(nn.Module):
    def forward(self, w): return w.triu() + w.triu(1).T


def parametrized(kind):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if kind == 'weight_norm': weight_norm(net[0])
    else: parametrize.register_parametrization(net[0], 'weight', Symmetric())
    return net


@pytest.mark.parametrize('kind', ['weight_norm', 'symmetric'])
@pytest.mark.parametrize('name', list(METHODS))
def test_weights_cached_by_a_parametrization_are_moved_in_every_pass(name, kind):
    ends = []
    for cached in (False, True):
        net, method = parametrized(kind), METHODS[name]()
        opt = MethodOptimizer(method, momentum(net), net)
        for seed in range(3):
            closure = closure_of(method, net, *batch(seed))
            if cached:
                with parametrize.cached(): opt.step(closure)
            else: opt.step(closure)
            opt.zero_grad()
        ends.append(values(net))
    close(ends[1], ends[0])


@pytest.mark.parametrize('kind', ['weight_norm', 'symmetric'])
def test_sam_of_a_parametrization_by_hand(kind):
    net, oracle = parametrized(kind), parametrized(kind)
    opt, base = MethodOptimizer(SAM(.1), momentum(net), net), momentum(oracle)
    n = len(list(oracle.parameters()))
    for seed in range(3):
        with parametrize.cached(): opt.step(closure_of(opt.method, net, *batch(seed)))
        _, moved = sam_gradients(oracle, closure_of(opt.method, oracle, *batch(seed)), [.1] * n)
        for p, g in zip(oracle.parameters(), moved): p.grad = g
        base.step()
    close(values(net), values(oracle))


# Buffers
class Scaled(nn.Module):
    "A network with a scale in a buffer that is one number, expanded."
    def __init__(self, expanded):
        super().__init__()
        self.net = nn.Sequential(network(), nn.BatchNorm1d(3).double())
        scale = torch.full((1,), .5, dtype=torch.float64)
        self.register_buffer('scale', scale.expand(3) if expanded else scale)
    def forward(self, x): return self.net(x) * self.scale


@pytest.mark.parametrize('name', ['sam', 'gsam', 'sadt'])
def test_an_expanded_buffer_is_left_alone(name):
    ends = []
    for expanded in (False, True):
        net = Scaled(expanded)
        method = METHODS[name](bn='keep')
        opt = MethodOptimizer(method, momentum(net), net)
        for seed in range(3):
            opt.step(closure_of(method, net, *batch(seed)))
            opt.zero_grad()
        ends.append(torch.cat([values(net), net.net[1].running_mean, net.net[1].running_var]))
    close(ends[1], ends[0])


def test_an_expanded_buffer_beside_a_loss_scale():
    net, (x, y) = Scaled(True), batch()
    scaler = torch.amp.GradScaler('cpu')
    opt = MethodOptimizer(SAM(.1), momentum(net), net, scaler=scaler)
    before = values(net), net.net[1].running_mean.clone()
    opt.step(lambda: F.cross_entropy(net(x), y) * torch.inf)
    scaler.update()
    assert torch.equal(values(net), before[0])
    opt.zero_grad()
    opt.step(lambda: F.cross_entropy(net(x), y))
    assert values(net).isfinite().all() and not torch.equal(values(net), before[0])
