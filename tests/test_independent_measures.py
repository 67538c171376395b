"The measures against oracles from their definitions: dense Hessians, scipy, PIL, colorsys, enumeration."
import colorsys
import copy
import io
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from PIL import Image
from sadt_nb.core.fixed_loss import FixedLoss
from sadt_nb.measures.calibration import calibration_error, memorisation
from sadt_nb.measures.hessian import hessian_trace, spectral_density, top_eigenvalues, top_eigenvectors
from sadt_nb.measures.landscape import direction_between, loss_line, loss_surface, random_direction
from sadt_nb.measures.robustness import corrupt, corrupted_accuracy, effective_robustness
from sadt_nb.measures.sharpness import (FlatnessRecorder, average_sharpness, gradient_norm, sam_sharpness,
                                        weight_histograms)
from scipy import ndimage, stats
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

SIZES = [5, 4, 2]


def net(act=nn.Tanh, seed=0, c=3):
    "Return a small network in evaluation mode, with BatchNorm statistics that are not 0 and 1."
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(2, c, 2), nn.BatchNorm2d(c), act(), nn.Flatten(), nn.Linear(4 * c, 3))
    m = m.double().eval()
    with torch.no_grad():
        for t in (m[1].weight, m[1].running_var): t.uniform_(.5, 2)
        for t in (m[1].bias, m[1].running_mean): t.normal_()
    return m


def logits_as_given(classes):
    "Return a network whose logits are its inputs."
    m = nn.Linear(classes, classes).double().eval()
    with torch.no_grad():
        m.weight.copy_(torch.eye(classes))
        m.bias.zero_()
    return m


def data(sizes=SIZES, seed=1):
    "Return a list of (x, y) batches of these sizes, the same at every call."
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    x = torch.randn(n, 2, 3, 3, generator=g).double()
    y = torch.randint(0, 3, (n,), generator=g)
    return list(zip(x.split(sizes), y.split(sizes)))


def learner(m, b, loss=None, **kw):
    return Learner(DataLoaders(b, b), m, loss_func=loss or nn.CrossEntropyLoss(), **kw)


def joined(batches):
    "Return the batches as one: all inputs, all labels."
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def flat(d):
    "Return a list or dict of tensors as one vector."
    tensors = d.values() if isinstance(d, dict) else d
    return torch.cat([t.reshape(-1) for t in tensors])


def flat_direction(m, direction):
    "Return a direction in weight space as one vector, in the order of the network's parameters."
    return flat([direction[name] for name, _ in m.named_parameters()])


def exact_loss(m, b, loss=None):
    "Return the loss of all samples as a function of the vector of trainable weights, and that vector."
    x, y = joined(b)
    loss = loss or nn.CrossEntropyLoss()
    params = {k: v.detach() for k, v in m.named_parameters() if v.requires_grad}
    sizes = [t.numel() for t in params.values()]

    def f(v):
        weights = {k: part.view_as(t) for part, (k, t) in zip(v.split(sizes), params.items())}
        return loss(functional_call(m, weights, (x,)), y)
    return f, flat(params)


def close(a, b, tol=1e-8):
    a, b = (torch.as_tensor(t, dtype=torch.double) for t in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


LOSSES = [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=.2), nn.MultiMarginLoss()]


@pytest.mark.parametrize('loss', LOSSES)
def test_fixed_loss_is_the_mean_over_all_samples(loss):
    m, b = net(nn.ReLU), data()
    f, w = exact_loss(m, b, loss)
    m[0].weight.grad = torch.full_like(m[0].weight, 7.)
    fixed = FixedLoss(learner(m, b, loss))
    value, g = fixed.gradient()
    close(fixed(), f(w))
    close(value, f(w))
    close(flat(g), grad(f)(w))
    assert (m[0].weight.grad == 7).all()
    assert m[4].weight.grad is None


def test_fixed_loss_of_some_samples():
    m, b = net(), data()
    x, y = joined(b)
    each = nn.CrossEntropyLoss(reduction='none')(m(x), y).detach()
    for k in (1, 5, 7, 11):
        fixed = FixedLoss(learner(m, b), samples=k)
        means = torch.stack([each[list(c)].mean() for c in itertools.combinations(range(11), k)])
        assert (means - fixed()).abs().min() < 1e-10
        assert fixed() == fixed()
    with torch.no_grad(): m[4].bias[0] += 1
    close(fixed(), nn.CrossEntropyLoss()(m(x), y).item())


MEASURES = [FixedLoss, gradient_norm, sam_sharpness, average_sharpness, loss_line, calibration_error,
            hessian_trace]


@pytest.mark.parametrize('call', MEASURES)
def test_unusable_networks_and_losses_are_refused(call):
    b = data()
    with pytest.raises(ValueError): call(learner(net().train(), b))
    with pytest.raises(ValueError): call(learner(net().requires_grad_(False), b))
    if call is not calibration_error:
        with pytest.raises(ValueError): call(learner(net(), b, nn.CrossEntropyLoss(reduction='sum')))
    m = net()
    with torch.no_grad(): m[0].weight[0, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError): call(learner(m, b))


def test_measures_leave_the_network_alone():
    m, b = net(), data()
    before = copy.deepcopy(m.state_dict())
    m[0].weight.requires_grad_(False)
    direction = random_direction(m)
    l = learner(m, b)
    quiet = dict(progress=False)
    measures = [gradient_norm, sam_sharpness, calibration_error,
                partial(average_sharpness, **quiet), partial(hessian_trace, **quiet),
                partial(top_eigenvalues, **quiet), partial(spectral_density, steps=5, vectors=2, **quiet),
                partial(loss_line, direction=direction, points=3, **quiet),
                partial(loss_surface, directions=[direction, direction], points=2, **quiet)]
    for measure in measures:
        measure(l)
        for k, v in m.state_dict().items(): assert torch.equal(v, before[k])
        assert not m.training
        assert not m[0].weight.requires_grad
        assert m[0].bias.requires_grad
        for p in m.parameters(): assert p.grad is None


@pytest.mark.parametrize('act, frozen', [(nn.Tanh, False), (nn.ReLU, True)])
def test_trace_and_eigenvalues(act, frozen):
    m, b = net(act, c=2), data([7, 4])
    m[0].weight.requires_grad_(not frozen)
    f, w = exact_loss(m, b)
    true = torch.linalg.eigvalsh(hessian(f)(w)).flip(0)
    l = learner(m, b)
    exact = hessian_trace(l, progress=False)
    assert exact.converged
    assert abs(exact.value - true.sum()) < 1e-8
    got = top_eigenvalues(l, 4, tol=1e-9, progress=False)
    close(got.values, true[:4], 1e-7)
    assert got.converged
    assert len(got.error) == 4
    rough = top_eigenvalues(l, 2, tol=1e-2, progress=False)
    assert ((rough.values - true[:2]).abs() <= 1e-2 * true[0]).all()
    assert rough.n < got.n
    assert (rough.values <= true[:2] + 1e-10).all(), 'a Ritz value never exceeds the eigenvalue'


@pytest.mark.parametrize('sketch', [0, 10])
def test_errors_of_trace_estimates_match_their_deviations(sketch):
    m, b = net(), data([11])
    f, w = exact_loss(m, b)
    true = hessian(f)(w).trace().item()
    estimate = partial(hessian_trace, learner(m, b), tol=1e-9, max_probes=20, sketch=sketch, progress=False)
    runs = [estimate(seed=s) for s in range(7)]
    z = torch.tensor([(r.value - true) / r.error for r in runs])
    assert z.abs().max() < 4
    assert abs(z.mean()) < 4 / 7 ** .5
    assert .2 < z.square().mean() < 3
    assert z.abs().min() > 1e-6
    assert not any(r.converged for r in runs)
    assert len({r.value for r in runs}) == 7


def test_eigenvectors():
    m, b = net(), data()
    f, w = exact_loss(m, b)
    h = hessian(f)(w)
    values, vectors = top_eigenvectors(learner(m, b), 3, tol=1e-10, progress=False)
    v = torch.stack([flat_direction(m, d) for d in vectors])
    close(v @ v.T, torch.eye(3), 1e-6)
    close(v @ h, values.values[:, None] * v, 1e-5)
    close(values.values, torch.linalg.eigvalsh(h).flip(0)[:3], 1e-7)
    for d in vectors:
        for k, p in m.named_parameters(): assert d[k].shape == p.shape


def test_spectral_density():
    m, b = net(c=1), data([11])
    f, w = exact_loss(m, b)
    true = torch.linalg.eigvalsh(hessian(f)(w))
    d = spectral_density(learner(m, b), steps=len(w), vectors=16, progress=False)
    assert len(d.nodes) == len(d.weights) == 16
    for p in (0, 1, 2):
        moments = torch.stack([(a * t ** p).sum() for t, a in zip(d.nodes, d.weights)])
        assert abs(moments.mean() - (true ** p).mean()) <= 4 * moments.std() / 4 + 1e-10
    for t in d.nodes:
        close(t.max(), true[-1])
        close(t.min(), true[0])
    close(torch.trapezoid(d.values, d.grid), 1, 1e-3)
    edges = [true[0] - 1, true[6:8].mean(), true[19:21].mean(), true[-1] + 1]
    share, error = d.mass(edges)
    counts = [((low < true) & (true <= high)).sum() for low, high in itertools.pairwise(edges)]
    want = torch.tensor(counts) / len(w)
    assert ((share - want).abs() <= 4 * error).all()
    assert (error < .1).all()
    close(share.sum(), 1)


@pytest.mark.parametrize('act', [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize('rho', [.01, .05, .5])
def test_sam_sharpness_and_gradient_norm(act, rho):
    m, b = net(act), data()
    f, w = exact_loss(m, b)
    g, l = grad(f)(w), learner(m, b)
    close(gradient_norm(l), g.norm())
    close(sam_sharpness(l, rho), f(w + rho * g / g.norm()) - f(w))
    eps = rho * w.square() * g / (w * g).norm()
    close((eps / w).norm(), rho)
    close(sam_sharpness(l, rho, adaptive=True), f(w + eps) - f(w))


def test_adaptive_worst_direction_is_the_worst_to_first_order():
    m, b = net(), data()
    f, w = exact_loss(m, b)
    got = sam_sharpness(learner(m, b), 1e-4, adaptive=True)
    u = torch.randn(3000, len(w), generator=torch.Generator().manual_seed(0)).double()
    other = vmap(f)(w + 1e-4 * w.abs() * u / u.norm(dim=1, keepdim=True)) - f(w)
    assert other.max() < got
    close(got / 1e-4, (w * grad(f)(w)).norm(), 1e-3)


@pytest.mark.parametrize('adaptive', [False, True])
def test_average_sharpness_of_a_quadratic(adaptive):
    torch.manual_seed(0)
    m = nn.Linear(6, 3).double().eval()
    b = [(torch.randn(n, 6).double(), torch.randn(n, 3).double()) for n in SIZES]
    f, w = exact_loss(m, b, nn.MSELoss())
    scale = w.square() if adaptive else 1
    true = .5 * .3 ** 2 * (hessian(f)(w).diagonal() * scale).sum()
    got = average_sharpness(learner(m, b, nn.MSELoss()), .3, pairs=400, adaptive=adaptive, progress=False)
    assert abs(got.value - true) < 4 * got.error
    assert got.error < .1 * true
    assert got.n == 400


@pytest.mark.parametrize('adaptive', [False, True])
def test_average_sharpness_of_a_network(adaptive):
    m, b = net(), data()
    f, w = exact_loss(m, b)
    noise = .2 * torch.randn(4000, len(w), generator=torch.Generator().manual_seed(5)).double()
    e = noise * (w.abs() if adaptive else 1)
    rise = (vmap(f)(w + e) + vmap(f)(w - e)) / 2 - f(w)
    z = []
    for s in range(6):
        got = average_sharpness(learner(m, b), .2, pairs=60, adaptive=adaptive, seed=s, progress=False)
        close(got.error, rise.std() / 60 ** .5, .5)
        z.append((got.value - rise.mean()) / math.hypot(got.error, rise.std() / 4000 ** .5))
    assert max(map(abs, z)) < 4


def test_weight_histograms():
    m = net()
    got = weight_histograms(m, bins=7)
    assert set(got) == {'0.weight', '4.weight'}
    for k, (edges, counts) in got.items():
        w = dict(m.named_parameters())[k].detach().flatten().numpy()
        close(edges.diff(), edges.diff()[0].expand(7), 1e-5)
        below = [int((w < e).sum()) for e in edges[1:-1].tolist()]
        assert counts.tolist() == np.diff([0, *below, len(w)]).tolist()
        close(edges[[0, -1]], [-abs(w).max(), abs(w).max()], 1e-6)


def test_flatness_recorder():
    kept = []

    class Keep(Callback):
        def after_epoch(self): kept.append(copy.deepcopy(self.model).eval())

    b = data()
    rec = FlatnessRecorder({'g': gradient_norm, 's': sam_sharpness}, every=2)
    def trainer(*cbs):
        cbs = [TrainEvalCallback(), *cbs]
        return learner(net().train(), b, opt_func=SGD, lr=.1, default_cbs=False, cbs=cbs)
    plain, recorded = trainer(), trainer(Keep(), rec)
    plain.fit(5)
    recorded.fit(5)
    for k, v in plain.model.state_dict().items(): assert torch.equal(v, recorded.model.state_dict()[k])
    assert len(rec.rows) == 3 == len(rec.table())
    for row, i in zip(rec.rows, (1, 3, 4)):
        f, w = exact_loss(kept[i], b)
        g = grad(f)(w)
        close(row['g'], g.norm())
        close(row['s'], f(w + .05 * g / g.norm()) - f(w))


def test_filter_normalised_direction():
    m = net()
    a, b = random_direction(m, 3), random_direction(m, 4)
    for k, p in m.named_parameters():
        if p.dim() == 1: assert not a[k].any()
        else:
            close(a[k].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
            cos = nn.functional.cosine_similarity(a[k].flatten(), b[k].flatten(), 0).abs()
            assert cos < 4 / p.numel() ** .5
            assert torch.equal(a[k], random_direction(m, 3)[k])


def test_line_between_two_networks():
    a, b, batches = net(), net(seed=9), data()
    line = loss_line(learner(a, batches), direction_between(a, b), span=1.5, points=7, progress=False)
    x, y = joined(batches)
    close(line.at, np.linspace(-1.5, 1.5, 7))
    start, end = a.state_dict(), b.state_dict()
    for t, got in zip(line.at, line.loss):
        mixed = {k: v + t * (end[k] - v) if v.is_floating_point() else v for k, v in start.items()}
        if (mixed['1.running_var'] < 0).any(): continue
        close(got, nn.CrossEntropyLoss()(functional_call(a, mixed, (x,)), y))
    one = loss_line(learner(a, batches), direction_between(a, b), points=3, progress=False)
    close(one.loss[1:], [nn.CrossEntropyLoss()(m(x), y).item() for m in (a, b)])


def test_line_and_surface():
    m, b = net(nn.ReLU), data()
    f, w = exact_loss(m, b)
    directions = [random_direction(m, 1), random_direction(m, 2)]
    u, v = (flat_direction(m, d) for d in directions)
    l = learner(m, b)
    line = loss_line(l, directions[0], .7, 5, progress=False)
    surface = loss_surface(l, directions, .7, 5, progress=False)
    close(line.loss, [f(w + t * u) for t in line.at])
    close(surface.loss, [[f(w + s * u + t * v) for t in surface.y] for s in surface.x])
    close(surface.x, np.linspace(-.7, .7, 5))
    close(surface.y, surface.x)
    drawn = loss_line(l, None, .5, 3, seed=6, progress=False)
    r = flat_direction(m, random_direction(m, 6))
    close(drawn.loss, [f(w + t * r) for t in (-.5, 0, .5)])


def expected_calibration_error(p, y, bins):
    confidence, right = p.max(1).values, (p.argmax(1) == y).double()
    total = 0
    for i in range(bins):
        own = (i / bins < confidence) & (confidence <= (i + 1) / bins)
        total += abs(right[own].sum() - confidence[own].sum()).item() / len(y)
    return total


@pytest.mark.parametrize('bins', [1, 4, 15])
def test_calibration_error(bins):
    torch.manual_seed(3)
    sizes = [40, 33, 7]
    x = 2.5 * torch.randn(80, 4).double()
    y = torch.randint(0, 4, (80,))
    x[:5] = 0
    x[:5, 1] = 2000
    y[40:] = x[40:].argmax(1)
    batches = list(zip(x.split(sizes), y.split(sizes)))
    got = calibration_error(learner(logits_as_given(4), batches), bins=bins)
    p = x.softmax(1)
    close(got.value, expected_calibration_error(p, y, bins))
    assert got.count.sum() == 80
    assert len(got.count) == bins
    assert got.count[-1] >= 5
    confidence = p.max(1).values
    bin_of = (confidence * bins).ceil().long() - 1
    for i in range(bins):
        own = bin_of == i
        assert got.count[i] == own.sum()
        if not got.count[i]: continue
        close(got.confidence[i], confidence[own].mean())
        close(got.accuracy[i], (x.argmax(1) == y)[own].double().mean())


def test_calibration_bins_are_closed_on_the_right():
    x = torch.tensor([[0., 0., -999], [9, -9, -9], [.1, 0, 0], [.2, 0, 0]]).double()
    batches = [(x, torch.tensor([0, 0, 0, 1]))]
    assert x.softmax(1)[0].max() == .5
    assert calibration_error(learner(logits_as_given(3), batches), bins=2).count.tolist() == [3, 1]


def test_memorisation():
    m, b = net(), data([30, 17, 3])
    x, given = joined(b)
    pred = m(x).argmax(1)
    true = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(2))
    wrong = [i for i in range(50) if given[i] != true[i]]
    got = memorisation(learner(m, b), true)
    assert 0 < len(wrong) < 50
    assert got.n == len(wrong)
    close(got.given, sum(int(pred[i] == given[i]) for i in wrong) / len(wrong))
    close(got.true, sum(int(pred[i] == true[i]) for i in wrong) / len(wrong))
    with pytest.raises(ValueError): memorisation(learner(m, b), given)
    with pytest.raises(ValueError): memorisation(learner(m, b), true[1:])


def logit(p): return np.log(p / (1 - p))


def expit(z): return 1 / (1 + np.exp(-z))


@pytest.mark.parametrize('level', [.5, .95])
def test_effective_robustness(level):
    "The oracle is a least-squares line through the logits, with its confidence band."
    base = np.array([.5, .62, .71, .8, .93, .97])
    moved = np.array([.33, .4, .58, .55, .8, .84])
    new = np.array([.55, .9, .99])
    shifted = np.array([.5, .7, .9])
    y = logit(moved)
    X = np.stack([np.ones(6), logit(base)], 1)
    Q = np.stack([np.ones(3), logit(new)], 1)
    inv = np.linalg.inv(X.T @ X)
    beta = inv @ X.T @ y
    s2 = ((y - X @ beta) ** 2).sum() / 4
    half = stats.t.ppf((1 + level) / 2, 4) * np.sqrt(s2 * np.einsum('ij,jk,ik->i', Q, inv, Q))
    got = effective_robustness(new, shifted, base, moved, level)
    close([got.intercept, got.slope], beta)
    close(got.expected, expit(Q @ beta))
    close(got.value, shifted - expit(Q @ beta))
    close(got.low, expit(Q @ beta - half))
    close(got.high, expit(Q @ beta + half))


def photo(n=2):
    "Return images of 32 pixels with smooth parts, edges, greys, black and white, on the 256 levels."
    g = np.random.default_rng(0)
    smooth = [ndimage.gaussian_filter(g.normal(size=(32, 32)), 2) for _ in range(3 * n)]
    x = np.stack(smooth).reshape(n, 3, 32, 32)
    x = np.clip((x * 3 + 1) / 2, 0, 1)
    x[:, :, :6, :6] = 0
    x[:, :, 20:25, 3:9] = 1
    x[:, :, 8:12, 8:20] = x[:, :1, 8:12, 8:20]
    x[:, :, 26:, 20:] = g.uniform(size=(n, 3, 6, 12))
    return np.floor(x * 255).astype(np.uint8)


def corrupted_photo(kind, severity):
    "Return the images as bytes, and their corruption in units of the 256 levels."
    raw = photo()
    return raw, corrupt(torch.tensor(raw) / 255., kind, severity).numpy() * 255


def channels_last(x): return x.transpose(1, 2, 0)


def channels_first(x): return x.transpose(2, 0, 1)


def hsv(x, change):
    "Return the image with hue, saturation and value of each pixel changed by a function of the three."
    y = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3)]
    return np.array(y).reshape(x.shape)


def assert_whole_parts(got, want):
    "Check that levels are the whole parts of `want`, except very close to a level, where float32 may round."
    near = np.abs(want - want.round()) < 5e-3
    off = np.abs(got - np.floor(want))
    assert off[~near].max() < 1e-3
    assert off.max() < 1.001
    assert (~near).mean() > .05


def clipped(v): return min(max(v, 0), 1)


def zoomed(x, z):
    "Return the middle of an image, enlarged `z` times, in the size of the image."
    c = math.ceil(32 / z)
    t = (32 - c) // 2
    y = ndimage.zoom(x[t:t + c, t:t + c], (z, z, 1), order=1)
    t = (len(y) - 32) // 2
    return y[t:t + 32, t:t + 32]


def resized(image, n): return image.resize((n, n), Image.BOX)


def contrast(x, s):
    mean = x.mean((0, 1))
    return (x - mean) * (.75, .5, .4, .3, .15)[s] + mean


def brightness(x, s):
    added = (.05, .1, .15, .2, .3)[s]
    return hsv(x, lambda h, a, v: (h, a, clipped(v + added)))


def saturate(x, s):
    factor = (.3, .1, 1.5, 2, 2.5)[s]
    added = (0, 0, 0, .1, .2)[s]
    return hsv(x, lambda h, a, v: (h, clipped(a * factor + added), v))


def gaussian_blur(x, s):
    std = (.4, .6, .7, .8, 1)[s]
    return ndimage.gaussian_filter(x, (std, std, 0), mode='nearest', truncate=4)


def zoom_blur(x, s):
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[s], .01)
    return np.mean([x, *(zoomed(x, z) for z in factors)], 0)


SMOOTH = dict(contrast=contrast, brightness=brightness, saturate=saturate, gaussian_blur=gaussian_blur,
              zoom_blur=zoom_blur)


@pytest.mark.parametrize('kind, severity', [(k, s) for k in SMOOTH for s in range(1, 6)])
def test_smooth_corruptions(kind, severity):
    raw, got = corrupted_photo(kind, severity)
    want = np.stack([channels_first(SMOOTH[kind](channels_last(x) / 255, severity - 1)) for x in raw])
    assert_whole_parts(got, 255 * np.clip(want, 0, 1))
    assert np.abs(got - raw).max() > 2


@pytest.mark.parametrize('severity, share', zip(range(1, 6), (.95, .9, .85, .75, .65)))
def test_pixelate_equals_pils(severity, share):
    for x, got in zip(*corrupted_photo('pixelate', severity)):
        small = resized(Image.fromarray(channels_last(x)), int(32 * share))
        close(got, channels_first(np.asarray(resized(small, 32))), 1e-4)


@pytest.mark.parametrize('severity', range(1, 6))
def test_jpeg_equals_pils(severity):
    for x, got in zip(*corrupted_photo('jpeg_compression', severity)):
        f = io.BytesIO()
        Image.fromarray(channels_last(x)).save(f, 'JPEG', quality=(80, 65, 58, 50, 40)[severity - 1])
        close(got, channels_first(np.array(Image.open(f))), 1e-4)


NOISE = {'gaussian_noise': (.04, .06, .08, .09, .1),
         'shot_noise': (500, 250, 100, 75, 50),
         'impulse_noise': (.01, .02, .03, .05, .07),
         'speckle_noise': (.06, .1, .12, .16, .2)}


def levels(kind, s, x, h):
    """Return the probability of each of the 256 levels for a pixel of value `x`, and the undecided levels.

    A level is the whole part of 255 v + h, where v is the noisy value. An undecided level is one that float32
    may round to the level below it."""
    c = NOISE[kind][s]
    p, ties = np.zeros(256), []
    if kind == 'impulse_noise':
        p[0] = p[255] = c / 2
        p[round(x * 255)] = 1 - c
    elif kind == 'shot_noise':
        for k in range(4 * c):
            v = min(k / c, 1) * 255 + h
            p[int(v + 1e-6)] += stats.poisson.pmf(k, x * c)
            if abs(v - round(v)) < 1e-6: ties.append(round(v))
    else:
        std = c * x if kind == 'speckle_noise' else c
        below = stats.norm.cdf((np.arange(1, 256) - h) / 255, x, std)
        p[:] = np.diff([0, *below, 1])
    return p, ties


def excess(n, p, ties):
    "Return by how many standard deviations chi squared exceeds its mean, for counts `n` of the levels."
    n, p = n.copy(), p * n.sum()
    for i in ties: # count the level below with this one
        n[i] += n[i - 1]
        p[i] += p[i - 1]
        n[i - 1] = p[i - 1] = 0
    if n[p < 1e-9].any(): return math.inf
    counts, expected = [0], [0]
    for a, b in zip(n, p): # join levels until more than ten counts are expected
        if expected[-1] > 10:
            counts.append(a)
            expected.append(b)
        else:
            counts[-1] += a
            expected[-1] += b
    if expected[-1] <= 10:
        a, b = counts.pop(), expected.pop()
        counts[-1] += a
        expected[-1] += b
    df = len(counts) - 1
    assert df >= 2
    chi_squared = sum((a - b) ** 2 / b for a, b in zip(counts, expected))
    return (chi_squared - df) / (2 * df) ** .5


@pytest.mark.parametrize('severity', range(1, 6))
@pytest.mark.parametrize('kind', NOISE)
def test_random_corruptions(kind, severity):
    "The levels are whole parts or rounded values, with the probabilities of the noise."
    def noisy(x, seed): return (corrupt(x, kind, severity, seed=seed) * 255).round().long()
    cut_off, rounded = [], []
    for level in (40, 128, 230):
        x = torch.full((15, 3, 32, 32), level) / 255.
        got = noisy(x, 1)
        n = np.bincount(got.flatten(), minlength=256)
        cut_off.append(excess(n, *levels(kind, severity - 1, level / 255, 0)))
        rounded.append(excess(n, *levels(kind, severity - 1, level / 255, .5)))
    assert min(max(cut_off), max(rounded)) < 4
    assert torch.equal(noisy(x, 1), got)
    assert not torch.equal(corrupt(x, kind, severity, seed=2), corrupt(x, kind, severity, seed=1))
    assert not torch.equal(got[0], got[1]), 'each image has noise of its own'
    if kind == 'impulse_noise':
        c, pixels = NOISE[kind][severity - 1], 15 * 1024
        q = 3 * c ** 2 * (1 - c) + c ** 3
        hit_twice = ((got != level).sum(1) >= 2).sum()
        off = abs(hit_twice - pixels * q)
        assert off < 4 * (pixels * q * (1 - q)) ** .5 + 1, 'channels are hit independently'


def test_corrupted_accuracy():
    torch.manual_seed(0)
    raw, sizes = photo(23), [10, 9, 4]
    images = torch.tensor(raw) / 255.
    mean, std = [.4, .5, .3], [.2, .3, .25]
    def normalised(x): return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    x = normalised(images)
    m = nn.Sequential(nn.Flatten(), nn.Linear(3072, 9)).eval()
    y = m(x).argmax(1)
    y[::5] = (y[::5] + 1) % 9
    batches = list(zip(x.split(sizes), y.split(sizes)))
    kinds = ['contrast', 'gaussian_blur', 'pixelate']
    got = corrupted_accuracy(learner(m, batches), kinds, (2, 5), mean=mean, std=std, progress=False)
    assert list(got.index) == kinds
    assert list(got.columns) == [2, 5]
    seen = set()
    for kind, severity in itertools.product(got.index, got.columns):
        pred = m(normalised(corrupt(images, kind, severity))).argmax(1)
        want = (pred == y).double().mean()
        close(got.loc[kind, severity], want)
        seen.add(want.item())
    assert len(seen) > 2
    with pytest.raises(ValueError): # without the normalisation
        corrupted_accuracy(learner(m, [(x, y)]), ['contrast'], (1,), progress=False)
    numbers = dict(mean=mean, std=std, progress=False)
    again = corrupted_accuracy(learner(m, batches), iter(kinds), iter((2, 5)), **numbers)
    assert again.equals(got)


@pytest.mark.parametrize('kinds, severities', [(['contrast', 'rain'], (1,)), (['contrast'], (1, 6)),
                                               (['contrast', 'pixelate'], (5, 0))])
def test_a_wrong_corruption_is_named_before_a_batch_is_read(kinds, severities):
    class Unread:
        def __iter__(self): raise AssertionError('read')
    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(3072, 9)).eval(), [])
    with pytest.raises(ValueError, match="unknown corruption 'rain'|`severity` must be"):
        corrupted_accuracy(learn, kinds, severities, dl=Unread(), progress=False)


@pytest.mark.parametrize('left_out', [(0, 1), (2, 3)])
def test_effective_robustness_needs_both_accuracies_of_each_network(left_out):
    given = [[.6, .7], [.5, .55], [.5, .6, .7, .8], [.4, .5, .6, .65]]
    effective_robustness(*given)
    for i in left_out:
        short = [v[:-1] if j == i else v for j, v in enumerate(given)]
        with pytest.raises(ValueError, match='each network needs both accuracies'):
            effective_robustness(*short)
