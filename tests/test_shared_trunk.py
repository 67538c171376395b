"`shared_forward` against full passes, on networks with branches, shared modules and functional glue."
import inspect

import pytest
import torch
from sadt_nb.core.passes import shared_forward
from sadt_nb.core.perturb import perturbed, trainable_params
from sadt_nb.models.registry import MODELS, make_model
from torch import nn
from torch.nn import functional as F


class Branches(nn.Module):
    "A module used twice, a branch around the changed layer, functions between modules."
    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.late, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
    def forward(self, x):
        a = torch.tanh(self.stem(x))
        b = F.relu(self.twice(a)) + self.twice(a * 2)
        return self.head(self.twice(self.late(b)) + b + a) # `twice` runs again after the changed layer


def check(net, names, x, scale=1.):
    ps = trainable_params(net)
    deltas = [{n: .1 * torch.randn_like(ps[n]) for n in group} for group in names]
    loss = lambda p, i: p.square().sum() * (i + 1) * scale
    sum(loss(p, i) for i, p in enumerate(shared_forward(net, deltas, x))).backward()
    got = {n: p.grad.clone() for n, p in ps.items()}
    net.zero_grad()
    for i, d in enumerate(deltas):
        with perturbed(ps, d): loss(net(x), i).backward()
    for n, p in ps.items(): torch.testing.assert_close(got[n], p.grad, rtol=1e-9, atol=1e-11, msg=lambda m: f'{n}: {m}')
    assert not any('forward' in vars(m) for m in net.modules())


@pytest.mark.parametrize('names', [[['late.weight'], ['head.bias']], [['head.weight'], ['head.bias'], ['late.bias', 'head.weight']], [['twice.weight'], ['head.weight']],
                                   [['stem.weight'], ['head.weight']], [['late.weight'], []]])
def test_branches(names): check(Branches().double(), names, torch.randn(5, 4, dtype=torch.float64))


LARGE = ('resnet101', 'wide_resnet_28_10', 'pyramidnet_110', 'vit_b32', 'clip_resnet101') # up to half a minute each in float64; what they share with the small ones is tested with those

@pytest.mark.parametrize('model', [pytest.param(m, marks=pytest.mark.slow) if m in LARGE else m for m in MODELS])
def test_our_models(model):
    if model.startswith('vit'): pytest.importorskip('timm', reason='timm, the extra sadt_nb[timm], is not installed')
    if model.startswith('clip'): pytest.importorskip('open_clip', reason='open_clip, the extra sadt_nb[clip], is not installed')
    known = inspect.signature(MODELS[model]).parameters
    net = make_model(model, **(dict(init='keras') if 'init' in known else dict(img_size=64) if model.startswith(('vit', 'clip')) else {})).double()
    for m in net.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    convs, dense = ([n for n, m in net.named_modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear))
    scale = 1e-6 if model in ('resnet50', 'resnet152') else 1. # torchvision's start makes their gradients that large on images of one pixel after the last stride
    check(net, [[f'{convs[-1]}.weight'], [f'{dense[-1]}.weight']], torch.rand(6, 3, 32, 32, dtype=torch.float64), scale)


def test_the_trunk_runs_once_and_the_model_is_put_back_after_an_error():
    net = Branches().double()
    runs = []
    net.stem.forward = lambda x, f=net.stem.forward: (runs.append(1), f(x))[1] # somebody else's patch must survive
    patched = net.stem.forward
    shared_forward(net, [{'late.weight': torch.zeros(6, 6, dtype=torch.float64)}, {'head.bias': torch.ones(3, dtype=torch.float64)}], torch.randn(5, 4, dtype=torch.float64))
    assert len(runs) == 1 and net.stem.forward is patched
    with pytest.raises(RuntimeError): shared_forward(net, [{'late.weight': torch.zeros(1, 2, 3, dtype=torch.float64)}], torch.randn(5, 4, dtype=torch.float64))
    assert net.stem.forward is patched and 'forward' not in vars(net.twice)
