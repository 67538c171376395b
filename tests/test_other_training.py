"Training of kinds that image classification does not have: complex weights, hidden states, frozen networks."
import math
from functools import partial

import pytest
import torch
from conftest import learner
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.perturb import ascent, global_dot, global_norm, weight_sizes
from sadt_nb.measures.hessian import hessian_trace
from sadt_nb.measures.sharpness import sam_sharpness
from sadt_nb.methods.asam import ASAM, asam_step
from sadt_nb.methods.esam import ESAM, esam_step
from sadt_nb.methods.gsam import GSAM, gsam_step
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.sadt import SADT, layer_noise, sadt_step, weight_noise
from sadt_nb.methods.sam import SAM, sam_step

METHODS = {
    'sam': partial(SAM, .1), 'sam adaptive': partial(SAM, 1., adaptive=True), 'asam': partial(ASAM, .5),
    'gsam': partial(GSAM, .1, .1), 'gsam adaptive': partial(GSAM, .1, .1, adaptive=True),
    'looksam': partial(LookSAM, .1, k=2), 'esam': partial(ESAM, .1, beta=.5),
    'sadt1': partial(SADT, 1, noise_scale=1000), 'sadt3': partial(SADT, 3, noise_scale=1000),
    'sadt up': partial(SADT, rho=.5),
}
STEPS = {
    'sam': partial(sam_step, rho=.1), 'sam adaptive': partial(sam_step, rho=1., adaptive=True),
    'asam': partial(asam_step, rho=.5), 'gsam': partial(gsam_step, rho=.1),
    'esam': partial(esam_step, rho=.1), 'sadt': partial(sadt_step, perturb=[weight_noise(.1)]),
}


def closure_for(name, net, x, y):
    "Return a closure in the form that the method of this name takes."
    def loss(): return F.cross_entropy(net(x), y)
    def losses(rows):
        part = slice(None) if rows is None else rows
        return F.cross_entropy(net(x[part]), y[part], reduction='none')
    def both():
        logits = net(x)
        return logits, F.cross_entropy(logits, y)
    if name.startswith('esam'): return losses
    return both if name.startswith('sadt') else loss


def by_callback(name, net, data):
    torch.manual_seed(2)
    learner(net, [METHODS[name]()], data).fit(1)
    return flat_real(net)


def by_wrapper(name, net, data):
    torch.manual_seed(2)
    opt = MethodOptimizer(METHODS[name](), torch.optim.SGD(net.parameters(), lr=.1, momentum=.9), net)
    for x, y in data: opt.step(closure_for(name, net, x, y))
    return flat_real(net)


def by_function(name, net, data):
    torch.manual_seed(2)
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    for x, y in data: STEPS[name](net, closure_for(name, net, x, y), opt)
    return flat_real(net)


def flat_real(net):
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


WAYS = [(by_callback, name) for name in METHODS] + [(by_wrapper, name) for name in METHODS]
WAYS += [(by_function, name) for name in STEPS]


def data(n=4, bs=6):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n * bs, 4, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (n * bs,), generator=g)
    return list(zip(x.split(bs), y.split(bs)))


# Complex weights
class Waves(nn.Module):
    "A layer with complex weights between dense layers; `real`: two real weights for every complex one."
    def __init__(self, real):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(4, 4)
        weight = torch.randn(5, 4, dtype=torch.cdouble)
        bias = torch.randn(5, dtype=torch.cdouble)
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if real else weight)
        self.bias = nn.Parameter(torch.view_as_real(bias).clone() if real else bias)
        self.last = nn.Linear(5, 3)
        self.double()
    def forward(self, x):
        weight, bias = (p if p.is_complex() else torch.view_as_complex(p) for p in (self.weight, self.bias))
        z = self.first(x).to(weight.dtype) @ weight.conj().T + bias.conj()
        return self.last(z.real * z.imag)


@pytest.mark.parametrize('way, name', WAYS)
def test_a_complex_weight_is_two_real_ones(way, name):
    got, expected = (way(name, Waves(real), data()) for real in (False, True))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert (got - flat_real(Waves(False))).abs().max() > .01


def test_a_layer_times_noise_has_noise_in_both_parts():
    steps = {}
    for real in (True, False):
        net, g = Waves(real), torch.Generator().manual_seed(0)
        params = dict(net.named_parameters())
        delta = layer_noise('weight', .5, multiply=True)(params, {}, g)['weight']
        steps[real] = delta if real else torch.view_as_real(delta)
    torch.testing.assert_close(steps[False], steps[True], rtol=0, atol=0)


def test_norms_and_products_of_complex_tensors_by_hand():
    a, b = torch.tensor([3 + 4j]), torch.tensor([1 - 2j])
    assert global_norm([a, torch.tensor([12.])]) == 13 and global_dot([a], [b]) == 3 - 8
    sizes = weight_sizes({'a': torch.tensor([-3 + 4j])}, ['a'], eta=1.)
    assert sizes['a'] == 4 + 5j
    step = ascent({'a': a.clone()}, 1., {'a': torch.tensor([2 + 1j])}) # T = (2, 1), T g = (6, 4)
    torch.testing.assert_close(step['a'], torch.tensor([12 + 4j]) / math.sqrt(52))


@pytest.mark.parametrize('adaptive', [False, True])
def test_sharpness_of_complex_weights(adaptive):
    got, expected = (sam_sharpness(learner(Waves(real).eval(), data=data()), .1, adaptive=adaptive)
                     for real in (False, True))
    assert abs(got - expected) < 1e-12 and got > 0


def test_the_hessian_refuses_complex_weights():
    with pytest.raises(ValueError, match="'weight' is complex.*two real parameters"):
        hessian_trace(learner(Waves(False).eval(), data=data()))
