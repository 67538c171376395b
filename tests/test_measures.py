"Flatness and landscapes against exact Hessians and brute force, and errors for wrong arguments."
import itertools
import json
from contextlib import contextmanager
from copy import deepcopy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.data.core import DataLoaders, Datasets, TfmdDL
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.optimizer import SGD
from PIL import Image
from sadt_nb.core.fixed_loss import FixedLoss
from sadt_nb.data.datasets import get_dls
from sadt_nb.measures import hessian, landscape, robustness
from sadt_nb.measures.calibration import calibration_error, memorisation
from sadt_nb.measures.hessian import (hessian_trace, smoothed_density, spectral_density, top_eigenvalues,
                                      top_eigenvectors)
from sadt_nb.measures.landscape import direction_between, loss_line, loss_surface, orthogonal_directions
from sadt_nb.measures.landscape import random_direction
from sadt_nb.measures.robustness import CORRUPTIONS, corrupt, corrupted_accuracy, shifted_accuracy
from sadt_nb.measures.sharpness import FlatnessRecorder, average_sharpness, gradient_norm, sam_sharpness
from torch import nn
from torch.func import functional_call

quiet = dict(progress=False)


def conv_net():
    "Return a small convolutional network in evaluation mode, with BatchNorm statistics that are not 0 and 1."
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.5),
                        nn.Flatten(), nn.Linear(27, 4)).double()
    for _ in range(3): net(torch.randn(16, 1, 8, 8, dtype=torch.float64))
    return net.eval()


class CountReads:
    "A loader that counts how often it is read."
    def __init__(self, batches):
        self.batches = batches
        self.reads = 0
    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


@contextmanager
def interrupted(owner, name, after, error=KeyboardInterrupt):
    "Make a function raise `error` in every call after the first `after` ones."
    function, calls = getattr(owner, name), itertools.count(1)
    def stopping(*args, **kwargs):
        if next(calls) > after: raise error
        return function(*args, **kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        yield


def cross_entropy_learner(data, net):
    return Learner(DataLoaders(data, data), net, loss_func=nn.CrossEntropyLoss())


@pytest.fixture
def learn():
    g = torch.Generator().manual_seed(0)
    data = []
    for n in (10, 10, 3): # the last batch is smaller
        x = torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64)
        data.append((x, torch.randint(0, 4, (n,), generator=g)))
    return cross_entropy_learner(data, conv_net())


def whole(data):
    "Return the batches as one: all inputs, all labels."
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def same_state(net, state):
    "Return whether the network's state still equals a copy of it."
    return all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))


def flat_loss(learn, inputs, y):
    "Return the loss as a function of the vector of trainable weights, and that vector."
    named = {n: p for n, p in learn.model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]
    def f(w):
        parts = {n: v.view(p.shape) for (n, p), v in zip(named.items(), w.split(sizes))}
        return learn.loss_func(functional_call(learn.model, parts, inputs), y)
    return f, torch.cat([p.detach().flatten() for p in named.values()])


def exact(learn):
    "Return the Hessian of the mean loss over the training data."
    f, w = flat_loss(learn, *whole(learn.dls.train))
    return torch.func.hessian(f)(w)


@pytest.mark.parametrize('frozen', [False, True])
def test_hessian_of_a_convolutional_network(learn, frozen):
    if frozen: learn.model[0].requires_grad_(False)
    H = exact(learn)
    values = torch.linalg.eigvalsh(H).flip(0)
    dl = CountReads(list(learn.dls.train))
    top = top_eigenvalues(learn, 6, dl, **quiet)
    assert dl.reads == 1
    assert top.converged
    assert top.values.dtype == torch.float64
    torch.testing.assert_close(top.values, values[:6], rtol=1e-5, atol=0)
    assert ((top.values - values[:6]).abs() <= top.error).all()
    assert (top.error <= 1e-5 * top.values).all()
    trace = hessian_trace(learn, max_probes=60, tol=1e-9, **quiet)
    assert abs(trace.value - H.trace().item()) < 3 * trace.error
    assert not trace.converged
    assert trace.n == 80
    all_probes = hessian_trace(learn, max_probes=len(H), **quiet)
    assert all_probes.value == pytest.approx(H.trace().item(), rel=1e-9)
    found, vectors = top_eigenvectors(learn, 2, **quiet)
    for value, parts in zip(found.values, vectors):
        assert set(parts) == {n for n, p in learn.model.named_parameters() if p.requires_grad}
        u = torch.cat([t.flatten() for t in parts.values()])
        assert (H @ u - value * u).norm() < 1e-4 * value
    if frozen: return
    density = spectral_density(learn, steps=len(H), vectors=4, **quiet)
    edges = [values.min() - 1, -1e-4, 1e-4, .05, values.max() + 1]
    share, error = density.mass(edges)
    counted = torch.stack([((values > a) & (values <= b)).double().mean() for a, b in zip(edges, edges[1:])])
    assert ((share - counted).abs() < 4 * error + 1e-6).all()
    assert share.sum() == pytest.approx(1)


def test_hessian_with_several_inputs():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(3, 2).double()
            self.b = nn.Linear(2, 2).double()
        def forward(self, x, z): return torch.tanh(self.a(x)) * self.b(z)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, generator=g).double()
    z = torch.randn(9, 2, generator=g).double()
    y = torch.randint(0, 2, (9,), generator=g)
    data = [(x[:5], z[:5], y[:5]), (x[5:], z[5:], y[5:])]
    learn = cross_entropy_learner(data, TwoInputs().eval())
    learn.dls.n_inp = 2
    f, w = flat_loss(learn, (x, z), y)
    expected = torch.linalg.eigvalsh(torch.func.hessian(f)(w)).flip(0)[:3]
    torch.testing.assert_close(top_eigenvalues(learn, 3, **quiet).values, expected, rtol=1e-5, atol=0)


def test_a_stored_spectrum_can_be_drawn_again(learn):
    from sadt_nb.experiments.measure import _as_json
    H = exact(learn)
    density = spectral_density(learn, steps=5, vectors=40, **quiet)
    stored = json.loads(json.dumps(_as_json(density)))
    again = smoothed_density(stored['nodes'], stored['weights'])
    torch.testing.assert_close(again.values, density.values, rtol=1e-3, atol=1e-5)
    root_mean_square = torch.linalg.eigvalsh(H).square().mean().sqrt().item()
    assert abs(stored['value'] - root_mean_square) < 4 * stored['error']
    assert stored['n'] == 200
    top = json.loads(json.dumps(_as_json(top_eigenvalues(learn, 5, **quiet))))
    assert top['value'] == top['values'][0]
    assert len(top['values']) == 5
    assert top['converged'] is True


def test_repeated_and_zero_eigenvalues():
    "The Hessian is 2/5 for five weights, 0 for four."
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(5).double())
            self.unused = nn.Parameter(torch.ones(4).double())
        def forward(self, x): return self.w * x + 0 * self.unused.sum()
    data = [(torch.ones(3, 5).double(), torch.zeros(3, 5).double())]
    learn = Learner(DataLoaders(data, data), Sum().eval(), loss_func=nn.MSELoss())
    top = top_eigenvalues(learn, 9, **quiet)
    expected = torch.tensor([.4] * 5 + [0.] * 4, dtype=torch.float64)
    torch.testing.assert_close(top.values, expected, rtol=0, atol=1e-12)
    assert top.converged
    assert hessian_trace(learn, **quiet).value == pytest.approx(2.)
    share, _ = spectral_density(learn, steps=9, vectors=50, **quiet).mass([-1., .1, 1.])
    # random signs have the same share of every weight
    assert share.tolist() == pytest.approx([4 / 9, 5 / 9], abs=1e-9)


def test_errors_in_single_precision_include_rounding(learn):
    values = torch.linalg.eigvalsh(exact(learn)).flip(0)
    learn.model.float()
    data = [(x.float(), y) for x, y in learn.dls.train]
    learn.dls = DataLoaders(data, data)
    top = top_eigenvalues(learn, 5, tol=1e-12, **quiet)
    assert top.converged
    assert (top.error >= 1e-6 * top.values[0]).all()
    assert ((top.values - values[:5]).abs() <= top.error).all()


def interrupted_products(after):
    "Interrupt every Hessian-vector product after the first `after` ones."
    return interrupted(hessian._Products, '__call__', after)


def test_an_interrupted_measure_returns_its_estimate_so_far(learn):
    H = exact(learn)
    with interrupted_products(after=35): trace = hessian_trace(learn, max_probes=100, tol=1e-9, **quiet)
    assert not trace.converged
    assert trace.n == 35
    assert trace.error > 0
    assert abs(trace.value - H.trace().item()) < 4 * trace.error
    with interrupted_products(after=8): top = top_eigenvalues(learn, 2, **quiet)
    assert not top.converged
    assert top.n == 8
    assert (top.error > 0).all()
    assert abs(top.values[0] - torch.linalg.eigvalsh(H)[-1]) <= top.error[0]
    with interrupted_products(after=50): density = spectral_density(learn, steps=20, vectors=9, **quiet)
    assert not density.converged
    assert len(density.nodes) == 2
    with interrupted_products(after=3):
        with pytest.raises(KeyboardInterrupt): hessian_trace(learn, **quiet)
        with pytest.raises(KeyboardInterrupt): top_eigenvalues(learn, k=5, **quiet)
        with pytest.raises(KeyboardInterrupt): spectral_density(learn, **quiet)


def test_derivatives_that_are_not_finite(learn):
    learn.loss_func = lambda pred, y: (pred - pred.detach()).abs().sqrt().mean()
    for f in (hessian_trace, top_eigenvalues, spectral_density):
        with pytest.raises(ValueError, match='NaN or infinite at these weights'): f(learn, **quiet)


MEASURES = [sam_sharpness, gradient_norm, average_sharpness, loss_line, loss_surface, FixedLoss]


@pytest.mark.parametrize('measure', MEASURES)
def test_unusable_data_modes_and_losses_are_refused(learn, measure):
    with pytest.raises(ValueError, match='labels'): measure(learn, dl=[(torch.randn(2, 1, 8, 8).double(),)])
    with pytest.raises(ValueError, match='no batches'): measure(learn, dl=[])
    with pytest.raises(ValueError, match='samples'): measure(learn, samples=0)
    learn.model[1].train()
    with pytest.raises(ValueError, match="training mode .1."): measure(learn)
    learn.model.eval()
    learn.model[1].running_var[0] = float('inf')
    with pytest.raises(ValueError, match='1.running_var'): measure(learn)
    learn.loss_func = nn.CrossEntropyLoss(reduction='sum')
    with pytest.raises(ValueError, match='mean over the batch'): measure(learn)


def test_sharpness_over_uneven_batches(learn):
    x, y = whole(learn.dls.train)
    f, w = flat_loss(learn, x, y)
    def rise(loss, step): return (loss(w + step) - loss(w)).item()
    g = torch.func.grad(f)(w)
    assert gradient_norm(learn) == pytest.approx(g.norm().item(), rel=1e-12)
    assert sam_sharpness(learn, .3) == pytest.approx(rise(f, .3 * g / g.norm()), rel=1e-9)
    T = w.abs()
    adaptive_step = .3 * T**2 * g / (T * g).norm()
    assert sam_sharpness(learn, .3, adaptive=True) == pytest.approx(rise(f, adaptive_step), rel=1e-9)
    first_seven, _ = flat_loss(learn, x[:7], y[:7])
    g = torch.func.grad(first_seven)(w)
    expected = rise(first_seven, .3 * g / g.norm())
    assert sam_sharpness(learn, .3, samples=7) == pytest.approx(expected, rel=1e-9)


def test_average_sharpness_is_half_the_trace_and_survives_an_interrupt(learn):
    # noise crosses the kinks of relu and maximum, which a Hessian does not include
    learn.model[2] = nn.Tanh().eval()
    learn.model[3] = nn.AvgPool2d(2).eval()
    weights = deepcopy(learn.model.state_dict())
    def average(**kw): return average_sharpness(learn, std=1e-3, pairs=400, **kw, **quiet)
    first = average()
    assert abs(first.value - .5e-6 * exact(learn).trace().item()) < 4 * first.error
    assert first == average()
    assert first != average(seed=1)
    with interrupted(FixedLoss, '__call__', after=8): part = average_sharpness(learn, pairs=50, **quiet)
    assert part.n == 3
    assert not part.converged
    assert same_state(learn.model, weights)


def test_recorder_keeps_modes_and_skips_a_learning_rate_search(learn):
    learn.model[1].requires_grad_(False)
    class Before(Callback):
        order = 70
        def after_epoch(self):
            self.model.train()
            self.model[1].eval() # a BatchNorm that is meant to stay as it is
    modes = []
    class After(Callback):
        order = 90
        def after_epoch(self): modes.append([m.training for m in self.model])
    measures = dict(norm=gradient_norm, average=partial(average_sharpness, pairs=2, progress=False))
    rec = FlatnessRecorder(measures, every=2, samples=5)
    cbs = [TrainEvalCallback(), Before(), After(), rec]
    learn = Learner(DataLoaders(learn.dls.train, []), learn.model, loss_func=learn.loss_func, opt_func=SGD,
                    lr=.1, default_cbs=False, cbs=cbs)
    learn.fit(5)
    assert [r['epoch'] for r in rec.rows] == [2, 4, 5]
    assert list(rec.table().columns) == ['epoch', 'loss', 'norm', 'average']
    assert modes == [[True, False, True, True, True, True, True]] * 5
    learn.model.eval()
    assert rec.rows[-1]['norm'] == gradient_norm(learn, samples=5)
    assert rec.rows[-1]['loss'] == FixedLoss(learn, samples=5)()
    learn.lr_finder = object()
    learn.fit(1)
    assert rec.rows == []


def test_surface_equals_the_losses_of_networks_with_those_weights(learn):
    first, second = (random_direction(learn.model, seed=s) for s in (4, 5))
    surface = loss_surface(learn, [first, second], span=.5, points=3, **quiet)
    x, y = whole(learn.dls.train)
    for i, a in enumerate((-.5, 0., .5)):
        for j, b in enumerate((-.5, 0., .5)):
            net = deepcopy(learn.model)
            moved = {n: p.detach() + a * first[n] + b * second[n] for n, p in learn.model.named_parameters()}
            net.load_state_dict({**net.state_dict(), **moved})
            assert surface.loss[i, j] == pytest.approx(learn.loss_func(net(x), y).item(), rel=1e-12)
    for n, p in learn.model.named_parameters():
        d = first[n]
        if p.ndim <= 1: assert not d.any()
        else: torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))


def test_slices_leave_the_weights_alone(learn):
    weights = deepcopy(learn.model.state_dict())
    other = conv_net()
    with torch.no_grad():
        for t in other.state_dict().values():
            if t.is_floating_point(): t.add_(torch.ones_like(t))
    way = direction_between(learn.model, other)
    assert '1.running_mean' in way
    assert '1.num_batches_tracked' not in way
    line = loss_line(learn, way, span=(0., 1.), points=2, **quiet)
    x, y = whole(learn.dls.train)
    ends = [learn.loss_func(net(x), y).item() for net in (learn.model, other)]
    assert line.loss.tolist() == pytest.approx(ends, rel=1e-12)

    def longer_line(): return loss_line(learn, way, span=(0., 1.), points=9, **quiet)
    with interrupted(FixedLoss, '__call__', after=4): assert np.isfinite(longer_line().loss).sum() == 4
    assert same_state(learn.model, weights)
    with interrupted(FixedLoss, '__call__', after=4, error=RuntimeError):
        with pytest.raises(RuntimeError): longer_line()
    assert same_state(learn.model, weights)


def sorted_digits():
    "Return DataLoaders of the digits in the order of their labels."
    dls = get_dls('digits', bs=64, device='cpu', valid=0.)
    dls.loaders[0] = dls.train.new(dls.train.dataset.subset(dls.train.dataset.y.argsort()))
    return dls


def sorted_fastai_data():
    "Return DataLoaders of fastai with 500 samples in the order of their ten labels."
    data = Datasets(list(range(500)), tfms=[[lambda i: torch.full((3,), float(i))], [lambda i: i // 50]])
    return DataLoaders(TfmdDL(data, bs=16, num_workers=0), TfmdDL(data, bs=16, num_workers=0))


@pytest.mark.parametrize('kind', ['ours', 'fastai'])
def test_a_sample_is_random_and_the_same_every_time(kind):
    dls = sorted_digits() if kind == 'ours' else sorted_fastai_data()
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    net(dls.one_batch()[0])
    learn = Learner(dls, net.eval(), loss_func=nn.CrossEntropyLoss())
    def labels(*args, **kw): return torch.cat([y for _, y in FixedLoss(learn, *args, **kw).batches])
    sample = labels(samples=100)
    assert torch.equal(sample, labels(samples=100))
    assert len(sample) == 100
    assert len(sample.unique()) > 8
    assert torch.equal(sample, labels(dls.train, samples=100))
    every = labels()
    assert len(every) == len(dls.train.dataset)
    assert (every.diff() >= 0).all(), 'in order'


def test_zoom_blur_is_the_mean_of_zoomed_pictures():
    from scipy.ndimage import zoom
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    x = x.mul(255).round().div(255)
    image = x[0].numpy()
    for severity, largest, number in zip(range(1, 6), (1.06, 1.11, 1.16, 1.21, 1.26), (8, 13, 17, 22, 27)):
        pictures = [image]
        for factor in np.arange(1, largest, .01):
            n = int(np.ceil(32 / factor))
            a = (32 - n) // 2
            big = zoom(image[:, a:a + n, a:a + n], (1, factor, factor), order=1)
            b = (big.shape[-1] - 32) // 2
            pictures.append(big[:, b:b + 32, b:b + 32])
        assert len(pictures) == number
        off = 255 * (np.mean(pictures, 0) - corrupt(x, 'zoom_blur', severity)[0].numpy())
        assert off.min() > -.002
        assert off.max() < 1.002 # cut off to bytes


def test_corruption_comes_before_the_normalisation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    mean, std = (.2, .3, .4), (.5, .6, .7)
    dls = get_dls('digits', bs=64, device='cpu', mean=mean, std=std)
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    ours = corrupted_accuracy(learn, ['contrast', 'gaussian_noise'], (2, 5), **quiet)
    assert ours.shape == (2, 2)
    x, y = dls.valid.dataset.x.permute(0, 3, 1, 2) / 255, dls.valid.dataset.y
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    corrupted = corrupt(x, 'contrast', 5)
    def accuracy(images): return (net(images).argmax(1) == y).double().mean().item()
    assert ours.loc['contrast', 5] == pytest.approx(accuracy((corrupted - m) / s))
    assert ours.loc['contrast', 5] != accuracy(corrupted), 'the test can tell the two orders apart'
    normalised = [((x - m) / s, y)]
    class FastaiLoader: # what our code sees of fastai's image loaders
        class after_batch: fs = [Normalize.from_stats(mean, std, cuda=False)]
        def __iter__(self): return iter(normalised)
    empty = cross_entropy_learner([], net)
    fastai = corrupted_accuracy(empty, ['contrast'], (2, 5), dl=FastaiLoader(), **quiet)
    pd.testing.assert_frame_equal(fastai, ours.loc[['contrast']])
    with pytest.raises(ValueError, match='needs their `mean` and `std`'):
        corrupted_accuracy(learn, dl=normalised, **quiet)
    with pytest.raises(ValueError, match='both'): corrupted_accuracy(learn, mean=0.)


def test_saturation_changes_no_grey_pixel_that_was_normalised():
    grey = (torch.arange(256.) / 255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    m, s = (torch.tensor(v)[:, None, None] for v in ((.4914, .4822, .4465), (.247, .2435, .2616)))
    restored = (grey - m) / s * s + m
    for severity in range(1, 6):
        assert torch.equal(corrupt(restored, 'saturate', severity), corrupt(grey, 'saturate', severity))


def test_an_interrupted_table_keeps_its_first_rows():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    dls = get_dls('digits', bs=64, device='cpu', valid=.5)
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    with interrupted(robustness, 'corrupt', after=9):
        table = corrupted_accuracy(learn, ['contrast', 'brightness'], (1, 2), **quiet)
    assert 0 < table.notna().sum().sum() < 4
    assert table.notna().iloc[0, 0]


def test_shifted_data_of_the_wrong_kind(tmp_path):
    dls = get_dls('digits', bs=64, device='cpu')
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    x, y = dls[2].dataset.x.numpy()[:6], dls[2].dataset.y.numpy()[:6]
    arrays = dict(x=x, y=y, short=y[:5], floats=x / 255., flat=x.reshape(6, -1), real=y.astype(float),
                  large=y + 10, none=x[:0], no=y[:0], objects=np.array([{}] * 6, dtype=object))
    for name, array in arrays.items(): np.save(tmp_path / f'{name}.npy', array, allow_pickle=True)
    def shifted(images, labels):
        return shifted_accuracy(learn, [tmp_path / f'{images}.npy', tmp_path / f'{labels}.npy'])
    found = shifted_accuracy(learn, (tmp_path / 'x.npy', tmp_path / 'y.npy'))
    predicted = learn.model(torch.as_tensor(x).permute(0, 3, 1, 2) / 255).argmax(1).numpy()
    assert found.n == 6
    assert found.value == pytest.approx((predicted == y).mean())
    assert found.error == pytest.approx((found.value * (1 - found.value) / 6)**.5)
    with pytest.raises(ValueError, match='6 images'): shifted('x', 'short')
    with pytest.raises(ValueError, match='bytes of shape'): shifted('floats', 'y')
    with pytest.raises(ValueError, match='bytes of shape'): shifted('flat', 'y')
    with pytest.raises(ValueError, match='whole numbers'): shifted('x', 'real')
    with pytest.raises(ValueError, match='labels must lie between 0 and 9, got labels from 11 to 19'):
        shifted('x', 'large')
    with pytest.raises(ValueError, match='no images'): shifted('none', 'no')
    with pytest.raises(ValueError, match='objects are not loaded'): shifted('x', 'objects')
    (tmp_path / 'images' / 'cat').mkdir(parents=True)
    Image.fromarray(x[0]).save(tmp_path / 'images' / 'cat' / 'a.png')
    with pytest.raises(ValueError, match="class 'cat'"): shifted_accuracy(learn, tmp_path / 'images')


def test_calibration_and_memorisation_by_hand():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
        def forward(self, x): return x.log() + self.w
    p = torch.tensor([[.95, .05], [.85, .15], [.4, .6], [.35, .65], [.2, .8]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 1, 0])
    learn = cross_entropy_learner([(p[:3], y[:3]), (p[3:], y[3:])], Fixed().eval())
    # bin (.5, .75] has .6 and .65, both right; bin (.75, 1] has .95, right, and .85 and .8, wrong
    found = calibration_error(learn, bins=4)
    assert found.value == pytest.approx(abs(1.25 - 2) / 5 + abs(2.6 - 1) / 5)
    assert found.count.tolist() == [0, 0, 2, 3]
    assert found.accuracy[3] == pytest.approx(1 / 3)
    assert torch.isnan(found.accuracy[0])
    # the given label is wrong for sample 1 (predicted: 0, true), 3 (1, the given one) and 4 (1, true)
    memorised = memorisation(learn, torch.tensor([0, 0, 1, 0, 1]))
    assert memorised == (pytest.approx(1 / 3), pytest.approx(2 / 3), 3)
    for true in (y, y[:3]):
        with pytest.raises(ValueError): memorisation(learn, true)


def test_every_corruption_changes_with_its_severity_and_most_get_stronger():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind in CORRUPTIONS:
        levels = [corrupt(x, kind, severity) for severity in range(1, 6)]
        for v in levels:
            assert v.shape == x.shape
            assert 0 <= v.min()
            assert v.max() <= 1
            assert (v * 255 - (v * 255).round()).abs().max() < 1e-3
        for a, b in zip(levels, levels[1:]): assert not torch.equal(a, b), kind
        if kind in ('saturate', 'pixelate'): continue
        assert (levels[4] - x).square().mean() > (levels[0] - x).square().mean(), kind


def test_a_measure_uses_the_samples_that_training_leaves_out():
    dls = get_dls('digits', bs=64, device='cpu', valid=0., n_train=100, drop_last=True)
    assert sum(len(y) for _, y in dls.train) == 64
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)).eval()
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss())
    for samples, n in ((None, 100), (90, 90)):
        assert sum(len(y) for _, y in FixedLoss(learn, samples=samples).batches) == n


def linear_learner(weights, classes=3):
    "Return a Learner with a linear network of this many weights, a multiple of the number of classes."
    g = torch.Generator().manual_seed(2)
    inputs = weights // classes
    x = torch.randn(30, inputs, generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (30,), generator=g)
    torch.manual_seed(0)
    return cross_entropy_learner([(x, y)], nn.Linear(inputs, classes, bias=False).double().eval())


def test_the_exact_trace_and_its_rounding_error():
    "With as many probes as weights the trace is exact, with one fewer it is estimated."
    learn = linear_learner(24)
    H = exact(learn)
    found = hessian_trace(learn, max_probes=24, **quiet)
    assert (found.n, found.converged) == (24, True)
    assert found.value == pytest.approx(H.trace().item(), rel=1e-12)
    rounding = torch.finfo(torch.float64).eps * H.norm(dim=0).sum().item()
    assert found.error / rounding == pytest.approx(1, rel=1e-6)
    estimated = hessian_trace(learn, max_probes=23, tol=1e-9, **quiet)
    assert (estimated.n, estimated.converged) == (2 * 10 + 23, False)


@pytest.mark.parametrize('sketch', [0, 3])
def test_the_trace_looks_at_its_error_after_every_tenth_probe_only(sketch):
    "A stop at the first probe that brings the error below the tolerance would favour lucky probes."
    learn = linear_learner(300)
    ends = {hessian_trace(learn, tol=tol, sketch=sketch, **quiet).n - 2 * sketch
            for tol in (1e9, .045, .04, .035, .03, .025)}
    assert min(ends) == 20
    assert len(ends) > 2, 'tolerances that end at different probes'
    assert all(n % 10 == 0 for n in ends), ends


def test_the_directions_of_a_surface_are_two(learn):
    s = loss_surface(learn, span=1., points=3, seed=2, **quiet)
    two = [random_direction(learn.model, seed) for seed in (4, 5)]
    given = loss_surface(learn, two, span=1., points=3, **quiet)
    assert (s.loss == given.loss).all()
    assert abs(s.loss - s.loss.T).max() > 1e-3, 'twice the same direction would be symmetric'


def test_orthogonal_directions_are_orthogonal_and_filter_normalised():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(),
                        nn.Linear(16, 3)).double()
    one, two = orthogonal_directions(net, seed=3)
    expected = random_direction(net, 6)
    assert all(torch.equal(one[n], expected[n]) for n in one), 'the first direction stays as it is'
    for n, p in net.named_parameters():
        a, b, w = (t.detach().flatten(1) if p.ndim > 1 else t.detach() for t in (one[n], two[n], p))
        if p.ndim < 2 or n == '2.weight': # no direction, or one weight per unit
            assert not b.any()
            continue
        assert ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).abs().max() < 1e-14
        torch.testing.assert_close(b.norm(dim=1), w.norm(dim=1), rtol=1e-13, atol=0)
    dot = sum((one[n] * two[n]).sum() for n in one)
    assert abs(dot) < 1e-13


def test_a_surface_along_orthogonal_directions(learn):
    s = loss_surface(learn, points=100, span=(-.5, 1.5), orthogonal=True, seed=1, samples=3, **quiet)
    assert s.loss.shape == (100, 100) and np.isfinite(s.loss).all()
    assert (s.x[0], s.x[-1], len(s.x)) == (-.5, 1.5, 100)
    assert 'orthogonal' in s.about
    two = orthogonal_directions(learn.model, 1)
    given = loss_surface(learn, two, points=2, span=(-.5, 1.5), samples=3, **quiet)
    assert (given.loss == s.loss[::99, ::99]).all()
    with pytest.raises(ValueError, match='leave `directions` or `orthogonal` out'):
        loss_surface(learn, two, orthogonal=True)
    with pytest.raises(ValueError, match='at least 2 points'):
        loss_surface(learn, points=1, orthogonal=True)
    with pytest.raises(ValueError, match='`span` must be positive'):
        loss_surface(learn, span=0, orthogonal=True)


def test_the_largest_number_of_products_grows_with_the_number_of_eigenvalues(monkeypatch):
    "Both functions stop after 200 + 5 k products, and their bars say so."
    limits, real = [], hessian._Products.__init__
    def watched(self, learn, dl, samples, progress, name, total):
        limits.append(total)
        real(self, learn, dl, samples, progress, name, total)
    monkeypatch.setattr(hessian._Products, '__init__', watched)
    learn = linear_learner(30)
    for find in (top_eigenvalues, top_eigenvectors):
        find(learn, 2, **quiet)
        find(learn, 2, max_products=25, **quiet)
    assert limits == [210, 25] * 2


def test_the_bar_of_the_density_counts_every_product(monkeypatch):
    ends = []
    monkeypatch.setattr(hessian._Products, '__exit__', lambda self, *_: ends.append((self.bar.total, self.n)))
    for steps in (5, 60): # at most as many steps as weights
        found = spectral_density(linear_learner(12), steps=steps, vectors=3, **quiet)
        assert ends.pop() == (3 * min(steps, 12), found.n)
        assert found.n == 3 * min(steps, 12)


def test_a_landscape_of_images_and_of_videos():
    "Images are held with the channels last, which is faster; inputs with another number of axes as they are."
    for axes, conv in ((2, nn.Conv2d), (3, nn.Conv3d)):
        torch.manual_seed(0)
        net = nn.Sequential(conv(2, 3, 2), nn.Flatten(), nn.Linear(3 * 3**axes, 4)).double().eval()
        x, y = torch.randn(6, 2, *[4] * axes, dtype=torch.float64), torch.arange(6) % 4
        learn = cross_entropy_learner([(x, y)], net)
        direction = random_direction(net)
        line = loss_line(learn, direction, span=1., points=3, **quiet)
        assert line.loss[1] == pytest.approx(learn.loss_func(net(x), y).item(), rel=1e-12)
        (xb,), _ = landscape._Slice(learn, [direction], None, None).loss.batches[0]
        assert torch.equal(xb, x)
        if axes == 2: assert xb.is_contiguous(memory_format=torch.channels_last)


def test_the_error_of_a_stored_spectrum():
    "A root mean square is the root of a mean; its error is that of the mean over twice the root."
    from sadt_nb.experiments.measure import _as_json
    nodes = [torch.tensor([v, -v], dtype=torch.float64) for v in (1., 2., 3.)]
    weights = [torch.full((2,), .5, dtype=torch.float64)] * 3
    grid = torch.zeros(1)
    stored = _as_json(hessian.SpectralDensity(grid, grid, 6, True, grid, nodes, weights))
    assert stored['value'] == pytest.approx((14 / 3)**.5) # the mean of 1, 4 and 9
    deviation = ((1 + 16 + 81 - 14**2 / 3) / 2)**.5
    assert stored['error'] == pytest.approx(deviation / 3**.5 / (2 * (14 / 3)**.5))
