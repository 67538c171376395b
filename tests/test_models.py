"""Every network of `MODELS`: built on the meta device, one step of training, memory formats, copies.

Also the weights that a ViT loads, and the error when its extra is missing."""
import copy
import importlib.util
import inspect
import pickle
import re
import sys
import time

import pytest
import torch
from conftest import LARGE
from sadt_nb.experiments.config import Run
from sadt_nb.models.registry import MODELS, make_model, model_options
from sadt_nb.models.vit import vit
from sadt_nb.models.weights import Normalize
from sadt_nb.models.wide_resnet import wide_resnet
from torch import nn
from torch.nn import functional as F

needs_timm = pytest.mark.skipif(importlib.util.find_spec('timm') is None,
                                reason='timm, the extra sadt_nb[timm], is not installed')
needs_clip = pytest.mark.skipif(importlib.util.find_spec('open_clip') is None,
                                reason='open_clip, the extra sadt_nb[clip], is not installed')
EXTRAS = dict(vit=needs_timm, clip=needs_clip)


def needs_small_images(name): return name.startswith(('vit', 'clip'))


def with_extra(name, *marks):
    "Return the name, marked to be skipped where the extra that the network needs is missing."
    family = name.split('_')[0]
    return pytest.param(name, marks=[*marks, EXTRAS[family]] if family in EXTRAS else marks)


NAMES = [with_extra(name) for name in MODELS]
WITHOUT_LARGE = [with_extra(name, *([pytest.mark.slow] if name in LARGE else [])) for name in MODELS]
IMAGENET = ('resnet50', 'resnet152')


def small(name, classes=10):
    "Return the network, with few patches if it is a ViT, and three of the smallest images that it takes."
    net = make_model(name, classes, **(dict(img_size=64) if needs_small_images(name) else {}))
    side = 64 if name in IMAGENET else 32
    return net, torch.randn(3, 3, side, side)


@pytest.mark.parametrize('name', NAMES)
def test_a_configuration_is_checked_without_memory(name):
    with torch.device('meta'):
        make_model(name) # the first call also imports what the network needs
        start = time.process_time()
        net = make_model(name, 100)
    assert time.process_time() - start < 3
    for t in [*net.parameters(), *net.buffers()]: assert t.is_meta
    assert Run(model=name).name.startswith(f'baseline-{name}-')
    with pytest.raises(ValueError, match=name): Run(model=name, model_args=dict(colour=3))


def biases_before_batchnorm(net):
    """Return the ids of biases that BatchNorm follows.

    BatchNorm subtracts what such a bias adds, so that the bias has no gradient except for rounding."""
    leaves = [m for m in net.modules() if not list(m.children())]
    found = set()
    for m, after in zip(leaves, leaves[1:]):
        if isinstance(after, (nn.BatchNorm1d, nn.BatchNorm2d)) and hasattr(m, 'bias'): found.add(id(m.bias))
    return found


@pytest.mark.parametrize('name', WITHOUT_LARGE)
def test_a_step_reaches_every_parameter(name):
    net, x = small(name, 100)
    for m in net.modules(): # a branch that starts at zero, as CLIP's do, hides its layers from the first step
        if isinstance(m, nn.BatchNorm2d) and not m.weight.any(): nn.init.constant_(m.weight, .5)
    y = net(x)
    assert y.shape == (3, 100)
    F.cross_entropy(y, torch.arange(3)).backward()
    may_be_zero = biases_before_batchnorm(net)
    for n, p in net.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, n
            assert p.grad.isfinite().all(), n
            assert p.grad.any() or id(p) in may_be_zero, n
        else: assert p.grad is None, n # fixed filters and scales


@pytest.mark.parametrize('name', WITHOUT_LARGE)
def test_memory_formats_copies_and_stored_weights_give_the_same_logits(name):
    net, x = small(name)
    for m in net.modules(): # statistics that are not those of a fresh network
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.uniform_(-.1, .1)
            m.running_var.uniform_(.8, 1.25)
    net, x = net.double().eval(), x[:1].double()
    with torch.no_grad():
        y = net(x)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), y)
        fresh = small(name)[0].double().eval()
        assert not torch.equal(fresh(x), y)
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh(x), y)
        last = copy.deepcopy(net).to(memory_format=torch.channels_last)
        got = last(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-9 * y.abs().max().item())


def test_without_dropout_nothing_is_drawn():
    x = torch.randn(2, 3, 32, 32)
    for dropout in (0., .3):
        net = wide_resnet(depth=10, width=1, dropout=dropout)
        before = torch.get_rng_state()
        net(x)
        assert torch.equal(before, torch.get_rng_state()) == (dropout == 0)


def test_vit_without_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match=r'sadt_nb\[timm\]'): make_model('vit_s32')


@needs_timm
def test_vit_reads_other_precisions_and_runs_no_code_from_a_file(tmp_path):
    donor = vit(10, img_size=64).vit
    weights = donor.state_dict()
    torch.save({n: v.half() for n, v in weights.items()}, tmp_path / 'half.pt')
    net = vit(10, img_size=64, pretrained=tmp_path / 'half.pt').vit
    for n, v in net.state_dict().items():
        assert v.dtype == torch.float32, n
        assert torch.equal(v, weights[n].half().float()), n
    trunk = {n: v for n, v in weights.items() if not n.startswith('head.')}
    torch.save(trunk, tmp_path / 'trunk.pt')
    net = vit(10, img_size=64, pretrained=tmp_path / 'trunk.pt').vit
    assert torch.equal(net.pos_embed, donor.pos_embed)

    class Evil:
        def __reduce__(self): return (tmp_path / 'proof').touch, ()
    torch.save({'cls_token': Evil()}, tmp_path / 'evil.pt')
    with pytest.raises(ValueError, match='evil.pt'): vit(10, img_size=64, pretrained=tmp_path / 'evil.pt')
    assert not (tmp_path / 'proof').exists()
    with pytest.raises(FileNotFoundError): vit(10, pretrained=tmp_path / 'none.pt')


@needs_timm
def test_vit_weights_are_checked_with_the_configuration(tmp_path, recwarn):
    torch.save(vit(1000, img_size=64).vit.state_dict(), tmp_path / 's.pt')
    options = dict(img_size=64, pretrained=str(tmp_path / 's.pt'))
    Run(model='vit_s32', model_args=options)
    assert not [w for w in recwarn if 'meta' in str(w.message)]
    with pytest.raises(ValueError, match='does not fit'): Run(model='vit_b32', model_args=options)


@pytest.mark.parametrize('name', ['simple_cnn', 'vgg16_slim', 'inception_resnet_slim'])
def test_the_starting_weights_of_keras_and_of_pytorch(name):
    "Keras starts with zero biases; PyTorch draws them from a range that the number of inputs gives."
    def biases(init):
        modules = make_model(name, 10, init=init).modules()
        layers = [m for m in modules if isinstance(m, (nn.Conv2d, nn.Linear))]
        return [(m.bias.abs().max().item(), m.weight[0].numel()**-.5) for m in layers if m.bias is not None]
    assert {largest for largest, _ in biases('keras')} == {0.}
    for largest, limit in biases('torch'): assert 0 < largest <= limit


@pytest.mark.parametrize('function', [make_model, model_options])
def test_an_unknown_network_is_named_with_the_nearest_name(function):
    with pytest.raises(ValueError, match="unknown model 'resnet8'; did you mean 'resnet18'"):
        function('resnet8')


def test_a_normalisation_has_no_entries_in_the_state():
    layer = Normalize((.5, .4, .3), (.1, .2, .3))
    assert not layer.state_dict()
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(layer(x)[:, 1], (x[:, 1] - .4) / .2)


def documented_size(name):
    found = re.search(r'([\d,]+) parameters', inspect.getdoc(MODELS[name]) or '')
    return found and int(found[1].replace(',', ''))


@pytest.mark.parametrize('name', [with_extra(name) for name in MODELS if documented_size(name)])
def test_a_network_has_as_many_parameters_as_its_help_says(name):
    with torch.device('meta'): net = MODELS[name]()
    assert sum(p.numel() for p in net.parameters()) == documented_size(name)
