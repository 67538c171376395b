"`shared_forward` against full passes, on networks with branches, shared modules and functional glue."
import inspect

import pytest
import torch
from conftest import SMALL_MODELS, covering
from sadt_nb.core.perturb import perturbed, trainable_params
from sadt_nb.core.shared_trunk import _trunk_modules, shared_forward
from sadt_nb.models.registry import MODELS, make_model
from torch import nn
from torch.nn import functional as F


class Branches(nn.Module):
    "A module used twice, a branch around the changed layer, functions between modules."
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.twice = nn.Linear(6, 6)
        self.late = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
    def forward(self, x):
        a = torch.tanh(self.stem(x))
        b = F.relu(self.twice(a)) + self.twice(a * 2)
        return self.head(self.twice(self.late(b)) + b + a) # `twice` runs again after the changed layer


def check(net, names, x, scale=1.):
    "Compare `shared_forward`, whose i-th pass perturbs the parameters `names[i]`, with full passes."
    params = trainable_params(net)
    deltas = [{n: .1 * torch.randn_like(params[n]) for n in group} for group in names]
    def loss(pred, i): return pred.square().sum() * (i + 1) * scale
    sum(loss(pred, i) for i, pred in enumerate(shared_forward(net, deltas, x))).backward()
    got = {n: p.grad.clone() for n, p in params.items()}
    net.zero_grad()
    for i, d in enumerate(deltas):
        with perturbed(params, d): loss(net(x), i).backward()
    for n, p in params.items():
        torch.testing.assert_close(got[n], p.grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f'{n}: {m}')
    for m in net.modules(): assert 'forward' not in vars(m)


PERTURBED = [[['late.weight'], ['head.bias']],
             [['head.weight'], ['head.bias'], ['late.bias', 'head.weight']],
             [['twice.weight'], ['head.weight']],
             [['stem.weight'], ['head.weight']],
             [['late.weight'], []]]


@pytest.mark.parametrize('names', PERTURBED)
def test_branches(names): check(Branches().double(), names, torch.randn(5, 4, dtype=torch.float64))


# images of one pixel after the last stride give these networks large initial gradients
LARGE_GRADIENTS = ('resnet50', 'resnet152')


def float64_model(name):
    "Return the network without dropout, with Keras' initial weights where it has the option."
    options = {}
    if name.startswith(('vit', 'clip')): options['img_size'] = 64
    if 'init' in inspect.signature(MODELS[name]).parameters: options = dict(init='keras')
    net = make_model(name, **options).double()
    for m in net.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    return net


# each takes up to half a minute in float64; the others have the same kinds of layers
LONG = ('wide_resnet_28_10', 'pyramidnet_110')


@pytest.mark.parametrize('model', covering(MODELS, [m for m in SMALL_MODELS if m not in LONG]))
def test_our_models(model):
    if model.startswith('vit'):
        pytest.importorskip('timm', reason='timm, the extra sadt_nb[timm], is not installed')
    if model.startswith('clip'):
        pytest.importorskip('open_clip', reason='open_clip, the extra sadt_nb[clip], is not installed')
    net = float64_model(model)
    last_conv = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)][-1]
    last_dense = [n for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    scale = 1e-6 if model in LARGE_GRADIENTS else 1.
    x = torch.rand(6, 3, 32, 32, dtype=torch.float64)
    check(net, [[f'{last_conv}.weight'], [f'{last_dense}.weight']], x, scale)


def test_the_trunk_runs_once_and_the_model_is_put_back_after_an_error():
    net = Branches().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    def zeros(*shape): return torch.zeros(*shape, dtype=torch.float64)
    runs = []
    stem_forward = net.stem.forward
    def patched(x): # another library's patch must survive
        runs.append(1)
        return stem_forward(x)
    net.stem.forward = patched
    shared_forward(net, [{'late.weight': zeros(6, 6)}, {'head.bias': zeros(3) + 1}], x)
    assert len(runs) == 1
    assert net.stem.forward is patched
    with pytest.raises(RuntimeError): shared_forward(net, [{'late.weight': zeros(1, 2, 3)}], x)
    assert net.stem.forward is patched
    assert 'forward' not in vars(net.twice)


def test_the_trunk_is_the_largest_unchanged_parts():
    first, second, last = (nn.Linear(2, 2) for _ in range(3))
    inner = nn.Sequential(second, last)
    assert _trunk_modules(nn.Sequential(first, inner), {last}) == {first, second}
    assert _trunk_modules(nn.Sequential(first, inner), {first}) == {inner}
