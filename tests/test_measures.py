"Flatness, landscapes: against exact Hessians, brute force, and what goes wrong."
import importlib.util
import json
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
from sadt_nb.core.fixed_loss import FixedLoss
from sadt_nb.data.datasets import get_dls
from sadt_nb.measures import hessian
from sadt_nb.measures.hessian import hessian_trace, smoothed_density, spectral_density, top_eigenvalues, top_eigenvectors
from sadt_nb.measures.landscape import direction_between, loss_line, loss_surface, random_direction
from sadt_nb.measures.robustness import CORRUPTIONS, calibration_error, corrupt, corrupted_accuracy, memorisation, shifted_accuracy
from sadt_nb.measures.sharpness import FlatnessRecorder, average_sharpness, gradient_norm, sam_sharpness
from torch import nn
from torch.func import functional_call

quiet = dict(progress=False)
needs_curvlinops = pytest.mark.skipif(importlib.util.find_spec('curvlinops') is None, reason='curvlinops, the extra sadt_nb[curvature], is not installed')


def conv_net():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(.5), nn.Flatten(), nn.Linear(27, 4)).double()
    for _ in range(3): net(torch.randn(16, 1, 8, 8, dtype=torch.float64)) # BatchNorm statistics that are not 0 and 1
    return net.eval()


class Once:
    "A loader that can be read one time."
    def __init__(self, batches): self.batches, self.reads = batches, 0
    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


@pytest.fixture
def learn():
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(0, 4, (n,), generator=g)) for n in (10, 10, 3)] # the last batch is smaller
    return Learner(DataLoaders(data, data), conv_net(), loss_func=nn.CrossEntropyLoss())


def flat_loss(learn, x, y):
    named = {n: p for n, p in learn.model.named_parameters() if p.requires_grad}
    def f(w):
        parts = dict(zip(named, (v.view(p.shape) for v, p in zip(w.split([p.numel() for p in named.values()]), named.values()))))
        return learn.loss_func(functional_call(learn.model, parts, (x,)), y)
    return f, torch.cat([p.detach().flatten() for p in named.values()])


def exact(learn):
    data = learn.dls.train
    f, w = flat_loss(learn, torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    return torch.func.hessian(f)(w)


@needs_curvlinops
@pytest.mark.parametrize('frozen', [False, True])
def test_hessian_of_a_convolutional_network(learn, frozen):
    if frozen: learn.model[0].requires_grad_(False)
    H = exact(learn)
    values, dl = torch.linalg.eigvalsh(H).flip(0), Once(list(learn.dls.train))
    top = top_eigenvalues(learn, 6, dl, **quiet)
    assert dl.reads == 1 and top.converged and top.values.dtype == torch.float64
    torch.testing.assert_close(top.values, values[:6], rtol=1e-5, atol=0)
    assert ((top.values - values[:6]).abs() <= top.error).all() and (top.error <= 1e-5 * top.values).all()
    t = hessian_trace(learn, max_probes=60, tol=1e-9, **quiet)
    assert abs(t.value - H.trace().item()) < 3 * t.error and not t.converged and t.n == 80
    assert hessian_trace(learn, max_probes=len(H), **quiet).value == pytest.approx(H.trace().item(), rel=1e-9)
    found, ds = top_eigenvectors(learn, 2, **quiet)
    for v, u in zip(found.values, ds):
        assert set(u) == {n for n, p in learn.model.named_parameters() if p.requires_grad}
        u = torch.cat([t.flatten() for t in u.values()])
        assert (H @ u - v * u).norm() < 1e-4 * v
    if frozen: return
    d = spectral_density(learn, steps=len(H), vectors=4, **quiet)
    edges = [values.min() - 1, -1e-4, 1e-4, .05, values.max() + 1]
    share, error = d.mass(edges)
    counted = torch.stack([((values > a) & (values <= b)).double().mean() for a, b in zip(edges, edges[1:])])
    assert ((share - counted).abs() < 4 * error + 1e-6).all() and share.sum() == pytest.approx(1)


@needs_curvlinops
def test_hessian_with_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
        def forward(self, x, z): return torch.tanh(self.a(x)) * self.b(z)
    g = torch.Generator().manual_seed(0)
    x, z, y = torch.randn(9, 3, generator=g).double(), torch.randn(9, 2, generator=g).double(), torch.randint(0, 2, (9,), generator=g)
    data = [(x[:5], z[:5], y[:5]), (x[5:], z[5:], y[5:])]
    dls = DataLoaders(data, data)
    dls.n_inp = 2
    learn = Learner(dls, Two().eval(), loss_func=nn.CrossEntropyLoss())
    named = dict(learn.model.named_parameters())
    def f(w): return learn.loss_func(functional_call(learn.model, dict(zip(named, (v.view(p.shape) for v, p in zip(w.split([p.numel() for p in named.values()]), named.values())))), (x, z)), y)
    H = torch.func.hessian(f)(torch.cat([p.detach().flatten() for p in named.values()]))
    torch.testing.assert_close(top_eigenvalues(learn, 3, **quiet).values, torch.linalg.eigvalsh(H).flip(0)[:3], rtol=1e-5, atol=0)


@needs_curvlinops
def test_a_stored_spectrum_can_be_drawn_again(learn):
    from sadt_nb.experiments.measure import _stored
    H = exact(learn)
    d = spectral_density(learn, steps=5, vectors=40, **quiet)
    s = json.loads(json.dumps(_stored(d)))
    again = smoothed_density(s['nodes'], s['weights'])
    torch.testing.assert_close(again.values, d.values, rtol=1e-3, atol=1e-5)
    assert abs(s['value'] - torch.linalg.eigvalsh(H).square().mean().sqrt().item()) < 4 * s['error'] and s['n'] == 200
    top = json.loads(json.dumps(_stored(top_eigenvalues(learn, 5, **quiet))))
    assert top['value'] == top['values'][0] and len(top['values']) == 5 and top['converged'] is True


@needs_curvlinops
def test_repeated_and_zero_eigenvalues():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.unused = nn.Parameter(torch.ones(5).double()), nn.Parameter(torch.ones(4).double())
        def forward(self, x): return self.w * x + 0 * self.unused.sum()
    data = [(torch.ones(3, 5).double(), torch.zeros(3, 5).double())]
    learn = Learner(DataLoaders(data, data), Sum().eval(), loss_func=nn.MSELoss())
    top = top_eigenvalues(learn, 9, **quiet) # the Hessian is 2/5 for five weights, 0 for four
    torch.testing.assert_close(top.values, torch.tensor([.4] * 5 + [0.] * 4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert top.converged and hessian_trace(learn, **quiet).value == pytest.approx(2.)
    share, _ = spectral_density(learn, steps=9, vectors=50, **quiet).mass([-1., .1, 1.])
    assert share.tolist() == pytest.approx([4 / 9, 5 / 9], abs=1e-9) # random signs have the same share of every weight


@needs_curvlinops
def test_single_precision_says_so(learn):
    values = torch.linalg.eigvalsh(exact(learn)).flip(0)
    learn.model.float()
    learn.dls = DataLoaders(*[[(x.float(), y) for x, y in learn.dls.train]] * 2)
    top = top_eigenvalues(learn, 5, tol=1e-12, **quiet)
    assert top.converged and (top.error >= 1e-6 * top.values[0]).all() and ((top.values - values[:5]).abs() <= top.error).all()


def interrupt(monkeypatch, after):
    call, count = hessian._Products.__call__, [0]
    def stopping(self, v):
        count[0] += 1
        if count[0] > after: raise KeyboardInterrupt
        return call(self, v)
    monkeypatch.setattr(hessian._Products, '__call__', stopping)


@needs_curvlinops
def test_an_interrupted_measure_returns_what_is_done(learn, monkeypatch):
    H = exact(learn)
    interrupt(monkeypatch, 35)
    t = hessian_trace(learn, max_probes=100, tol=1e-9, **quiet)
    assert not t.converged and t.n == 35 and t.error > 0 and abs(t.value - H.trace().item()) < 4 * t.error
    monkeypatch.undo(), interrupt(monkeypatch, 8)
    e = top_eigenvalues(learn, 2, **quiet)
    assert not e.converged and e.n == 8 and (e.error > 0).all() and abs(e.values[0] - torch.linalg.eigvalsh(H)[-1]) <= e.error[0]
    monkeypatch.undo(), interrupt(monkeypatch, 50)
    d = spectral_density(learn, steps=20, vectors=9, **quiet)
    assert not d.converged and len(d.nodes) == 2
    monkeypatch.undo(), interrupt(monkeypatch, 3)
    for f in (hessian_trace, top_eigenvalues, spectral_density):
        with pytest.raises(KeyboardInterrupt): f(learn, **(dict(k=5) if f is top_eigenvalues else {}), **quiet)


@needs_curvlinops
def test_derivatives_that_are_not_finite(learn):
    learn.loss_func = lambda pred, y: (pred - pred.detach()).abs().sqrt().mean()
    for f in (hessian_trace, top_eigenvalues, spectral_density):
        with pytest.raises(ValueError, match='not finite at these weights'): f(learn, **quiet)


def test_without_curvlinops_the_extra_is_named(learn, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'curvlinops', None)
    with pytest.raises(ImportError, match=r'sadt_nb\[curvature\]'): hessian_trace(learn)


@pytest.mark.parametrize('measure', [sam_sharpness, gradient_norm, average_sharpness, loss_line, loss_surface, FixedLoss])
def test_what_no_measure_takes(learn, measure):
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
    x, y = (torch.cat(t) for t in zip(*learn.dls.train))
    f, w = flat_loss(learn, x, y)
    g = torch.func.grad(f)(w)
    assert gradient_norm(learn) == pytest.approx(g.norm().item(), rel=1e-12)
    assert sam_sharpness(learn, .3) == pytest.approx((f(w + .3 * g / g.norm()) - f(w)).item(), rel=1e-9)
    T = w.abs()
    assert sam_sharpness(learn, .3, adaptive=True) == pytest.approx((f(w + .3 * T**2 * g / (T * g).norm()) - f(w)).item(), rel=1e-9)
    assert sam_sharpness(learn, .3, samples=7) == pytest.approx((lambda f, w: (f(w + .3 * (g := torch.func.grad(f)(w)) / g.norm()) - f(w)).item())(flat_loss(learn, x[:7], y[:7])[0], w), rel=1e-9)


def test_average_sharpness_is_half_the_trace_and_survives_an_interrupt(learn, monkeypatch):
    learn.model[2], learn.model[3] = nn.Tanh().eval(), nn.AvgPool2d(2).eval() # noise crosses the kinks of relu and maximum, which no Hessian sees
    weights = deepcopy(learn.model.state_dict())
    a = average_sharpness(learn, std=1e-3, pairs=400, **quiet)
    assert abs(a.value - .5e-6 * exact(learn).trace().item()) < 4 * a.error
    assert a == average_sharpness(learn, std=1e-3, pairs=400, **quiet) and a != average_sharpness(learn, std=1e-3, pairs=400, seed=1, **quiet)
    call, count = FixedLoss.__call__, [0]
    def stopping(self):
        count[0] += 1
        if count[0] > 8: raise KeyboardInterrupt
        return call(self)
    monkeypatch.setattr(FixedLoss, '__call__', stopping)
    part = average_sharpness(learn, pairs=50, **quiet)
    assert part.n == 3 and not part.converged and all(torch.equal(a, b) for a, b in zip(weights.values(), learn.model.state_dict().values()))


def test_recorder_keeps_modes_and_stays_out_of_a_search(learn):
    learn.model[1].requires_grad_(False)
    class Before(Callback):
        order, seen = 70, []
        def after_epoch(self):
            self.model.train()
            self.model[1].eval() # a BatchNorm that is meant to stay as it is
    class After(Callback):
        order, seen = 90, []
        def after_epoch(self): self.seen.append([m.training for m in self.model])
    rec = FlatnessRecorder(dict(norm=gradient_norm, average=partial(average_sharpness, pairs=2, progress=False)), every=2, samples=5)
    learn = Learner(DataLoaders(learn.dls.train, []), learn.model, loss_func=learn.loss_func, opt_func=SGD, lr=.1, default_cbs=False, cbs=[TrainEvalCallback(), Before(), After(), rec])
    learn.fit(5)
    assert [r['epoch'] for r in rec.rows] == [2, 4, 5] and list(rec.table().columns) == ['epoch', 'loss', 'norm', 'average']
    assert After.seen == [[True, False, True, True, True, True, True]] * 5
    learn.model.eval()
    assert rec.rows[-1]['norm'] == gradient_norm(learn, samples=5) and rec.rows[-1]['loss'] == FixedLoss(learn, samples=5)()
    learn.lr_finder = object()
    learn.fit(1)
    assert rec.rows == []


def test_surface_against_networks_that_are_loaded(learn):
    ds = [random_direction(learn.model, seed=s) for s in (4, 5)]
    s = loss_surface(learn, ds, span=.5, points=3, **quiet)
    x, y = (torch.cat(t) for t in zip(*learn.dls.train))
    for i, a in enumerate((-.5, 0., .5)):
        for j, b in enumerate((-.5, 0., .5)):
            net = deepcopy(learn.model)
            net.load_state_dict({**net.state_dict(), **{n: p.detach() + a * ds[0][n] + b * ds[1][n] for n, p in learn.model.named_parameters()}})
            assert s.loss[i, j] == pytest.approx(learn.loss_func(net(x), y).item(), rel=1e-12)
    for n, p in learn.model.named_parameters():
        d = ds[0][n]
        if p.ndim > 1: torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
        else: assert not d.any()


def test_slices_leave_the_weights_alone(learn, monkeypatch):
    weights, call, count = deepcopy(learn.model.state_dict()), FixedLoss.__call__, [0]
    other = conv_net()
    with torch.no_grad():
        for t in other.state_dict().values(): t.add_(torch.ones_like(t)) if t.is_floating_point() else None
    way = direction_between(learn.model, other)
    assert '1.running_mean' in way and '1.num_batches_tracked' not in way
    line = loss_line(learn, way, span=(0., 1.), points=2, **quiet)
    x, y = (torch.cat(t) for t in zip(*learn.dls.train))
    assert line.loss.tolist() == pytest.approx([learn.loss_func(m(x), y).item() for m in (learn.model, other)], rel=1e-12)
    for error, expected in ((KeyboardInterrupt, None), (RuntimeError, RuntimeError)):
        def stopping(self):
            count[0] += 1
            if count[0] > 4: raise error
            return call(self)
        count[0] = 0
        monkeypatch.setattr(FixedLoss, '__call__', stopping)
        if expected:
            with pytest.raises(expected): loss_line(learn, way, span=(0., 1.), points=9, **quiet)
        else: assert np.isfinite(loss_line(learn, way, span=(0., 1.), points=9, **quiet).loss).sum() == 4
        assert all(torch.equal(a, b) for a, b in zip(weights.values(), learn.model.state_dict().values()))


@pytest.mark.parametrize('kind', ['ours', 'fastai'])
def test_a_sample_is_a_fixed_choice_by_chance(kind):
    if kind == 'ours':
        dls = get_dls('digits', bs=64, device='cpu', valid=0.)
        dls.loaders[0] = dls.train.new(dls.train.dataset.subset(dls.train.dataset.y.argsort()))
    else:
        data = Datasets(list(range(500)), tfms=[[lambda i: torch.full((3,), float(i))], [lambda i: i // 50]])
        dls = DataLoaders(TfmdDL(data, bs=16, num_workers=0), TfmdDL(data, bs=16, num_workers=0))
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    net(dls.one_batch()[0])
    learn = Learner(dls, net.eval(), loss_func=nn.CrossEntropyLoss())
    a, b = (torch.cat([y for _, y in FixedLoss(learn, samples=100).batches]) for _ in range(2))
    assert torch.equal(a, b) and len(a) == 100 and len(a.unique()) > 8
    assert torch.equal(a, torch.cat([y for _, y in FixedLoss(learn, dls.train, samples=100).batches]))
    whole = torch.cat([y for _, y in FixedLoss(learn).batches])
    assert len(whole) == len(dls.train.dataset if kind == 'ours' else data) and (whole.diff() >= 0).all(), 'all of them, in order'


def test_zoom_blur_is_the_mean_of_zoomed_pictures():
    from scipy.ndimage import zoom
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double().mul(255).round().div(255)
    for s in range(1, 6):
        pictures = [x[0].numpy()]
        for f in np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[s - 1], .01):
            n = int(np.ceil(32 / f))
            a = (32 - n) // 2
            big = zoom(x[0].numpy()[:, a:a + n, a:a + n], (1, f, f), order=1)
            b = (big.shape[-1] - 32) // 2
            pictures.append(big[:, b:b + 32, b:b + 32])
        d = 255 * (np.mean(pictures, 0) - corrupt(x, 'zoom_blur', s)[0].numpy())
        assert len(pictures) == (8, 13, 17, 22, 27)[s - 1] and d.min() > -.002 and d.max() < 1.002 # cut off to bytes


def test_corruption_comes_before_the_normalisation():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    mean, std = (.2, .3, .4), (.5, .6, .7)
    dls = get_dls('digits', bs=64, device='cpu', mean=mean, std=std)
    ours = corrupted_accuracy(Learner(dls, net, loss_func=nn.CrossEntropyLoss()), ['contrast', 'gaussian_noise'], (2, 5), **quiet)
    x, y = dls.valid.dataset.x.permute(0, 3, 1, 2) / 255, dls.valid.dataset.y
    m, s = (torch.tensor(v)[:, None, None] for v in (mean, std))
    assert ours.loc['contrast', 5] == pytest.approx((net((corrupt(x, 'contrast', 5) - m) / s).argmax(1) == y).double().mean().item()) and ours.shape == (2, 2)
    assert ours.loc['contrast', 5] != (net(corrupt(x, 'contrast', 5)).argmax(1) == y).double().mean().item(), 'the test can tell'
    tfm = Normalize.from_stats(mean, std, cuda=False)
    class Fastai: # what fastai's image loaders look like from here
        class after_batch: fs = [tfm]
        def __iter__(self): return iter([((x - m) / s, y)])
    pd.testing.assert_frame_equal(corrupted_accuracy(Learner(DataLoaders([], []), net, loss_func=nn.CrossEntropyLoss()), ['contrast'], (2, 5), dl=Fastai(), **quiet), ours.loc[['contrast']])
    with pytest.raises(ValueError, match='normalisation'): corrupted_accuracy(Learner(dls, net, loss_func=nn.CrossEntropyLoss()), dl=[((x - m) / s, y)], **quiet)
    with pytest.raises(ValueError, match='both'): corrupted_accuracy(Learner(dls, net, loss_func=nn.CrossEntropyLoss()), mean=0.)


def test_a_grey_pixel_has_no_hue_after_the_normalisation_either():
    grey = (torch.arange(256.) / 255).view(1, 1, 16, 16).expand(1, 3, -1, -1)
    m, s = (torch.tensor(v)[:, None, None] for v in ((.4914, .4822, .4465), (.247, .2435, .2616)))
    for severity in range(1, 6): assert torch.equal(corrupt((grey - m) / s * s + m, 'saturate', severity), corrupt(grey, 'saturate', severity))


def test_an_interrupted_table_keeps_its_first_rows(monkeypatch):
    from sadt_nb.measures import robustness
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    learn, count, f = Learner(get_dls('digits', bs=64, device='cpu', valid=.5), net, loss_func=nn.CrossEntropyLoss()), [0], robustness.corrupt
    def stopping(*args):
        count[0] += 1
        if count[0] > 9: raise KeyboardInterrupt
        return f(*args)
    monkeypatch.setattr(robustness, 'corrupt', stopping)
    table = corrupted_accuracy(learn, ['contrast', 'brightness'], (1, 2), **quiet)
    assert 0 < table.notna().sum().sum() < 4 and table.notna().iloc[0, 0]


def test_shifted_data_of_the_wrong_kind(tmp_path):
    dls = get_dls('digits', bs=64, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval(), loss_func=nn.CrossEntropyLoss())
    x, y = dls[2].dataset.x.numpy()[:6], dls[2].dataset.y.numpy()[:6]
    files = {}
    for name, v in dict(x=x, y=y, short=y[:5], floats=x / 255., flat=x.reshape(6, -1), real=y.astype(float), large=y + 10, none=x[:0], no=y[:0]).items():
        files[name] = tmp_path / f'{name}.npy'
        np.save(files[name], v)
    np.save(tmp_path / 'objects.npy', np.array([{}] * 6, dtype=object), allow_pickle=True)
    a = shifted_accuracy(learn, (files['x'], files['y']))
    assert a.n == 6 and a.value == pytest.approx((learn.model(torch.as_tensor(x).permute(0, 3, 1, 2) / 255).argmax(1).numpy() == y).mean()) and a.error == pytest.approx((a.value * (1 - a.value) / 6)**.5)
    for pair, text in ((('x', 'short'), '6 images'), (('floats', 'y'), 'bytes of shape'), (('flat', 'y'), 'bytes of shape'), (('x', 'real'), 'whole numbers'), (('x', 'large'), r'0..9'), (('none', 'no'), 'no images')):
        with pytest.raises(ValueError, match=text): shifted_accuracy(learn, [files[k] for k in pair])
    with pytest.raises(ValueError, match='objects are not loaded'): shifted_accuracy(learn, (files['x'], tmp_path / 'objects.npy'))
    (tmp_path / 'images' / 'cat').mkdir(parents=True)
    from PIL import Image
    Image.fromarray(x[0]).save(tmp_path / 'images' / 'cat' / 'a.png')
    with pytest.raises(ValueError, match="class 'cat'"): shifted_accuracy(learn, tmp_path / 'images')


def test_calibration_and_memory_by_hand():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
        def forward(self, x): return x.log() + self.w
    p = torch.tensor([[.95, .05], [.85, .15], [.4, .6], [.35, .65], [.2, .8]], dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 1, 0])
    data = [(p[:3], y[:3]), (p[3:], y[3:])]
    learn = Learner(DataLoaders(data, data), Fixed().eval(), loss_func=nn.CrossEntropyLoss())
    c = calibration_error(learn, bins=4) # bins (.5, .75] with .6 and .65, both right, and (.75, 1] with .95 right, .85 and .8 wrong
    assert c.value == pytest.approx(abs(1.25 - 2) / 5 + abs(2.6 - 1) / 5) and c.count.tolist() == [0, 0, 2, 3] and c.accuracy[3] == pytest.approx(1 / 3) and torch.isnan(c.accuracy[0])
    m = memorisation(learn, torch.tensor([0, 0, 1, 0, 1])) # wrong are 1 (answer 0, true), 3 (answer 1, given), 4 (answer 1, true)
    assert m == (pytest.approx(1 / 3), pytest.approx(2 / 3), 3)
    for true in (y, y[:3]):
        with pytest.raises(ValueError): memorisation(learn, true)


def test_every_corruption_gets_worse_or_other_with_severity():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind in CORRUPTIONS:
        levels = [corrupt(x, kind, s) for s in range(1, 6)]
        assert all(v.shape == x.shape and 0 <= v.min() and v.max() <= 1 and (v * 255 - (v * 255).round()).abs().max() < 1e-3 for v in levels)
        assert all(not torch.equal(a, b) for a, b in zip(levels, levels[1:])), kind
        if kind not in ('saturate', 'pixelate'): assert (levels[4] - x).square().mean() > (levels[0] - x).square().mean(), kind
