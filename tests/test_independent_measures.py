"The measures against oracles written from their definitions: dense Hessians, scipy, PIL, colorsys, enumeration."
import colorsys
import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from PIL import Image
from sadt_nb.core.fixed_loss import FixedLoss
from sadt_nb.measures.hessian import hessian_trace, spectral_density, top_eigenvalues, top_eigenvectors
from sadt_nb.measures.landscape import direction_between, loss_line, loss_surface, random_direction
from sadt_nb.measures.robustness import calibration_error, corrupt, corrupted_accuracy, effective_robustness, memorisation
from sadt_nb.measures.sharpness import FlatnessRecorder, average_sharpness, gradient_norm, sam_sharpness, weight_histograms
from scipy import ndimage, stats
from torch import nn
from torch.func import functional_call, grad, hessian, vmap

SIZES = [5, 4, 2]


def lapack():
    pytest.importorskip('curvlinops', reason='curvlinops, the extra sadt_nb[curvature], is not installed')


def net(act=nn.Tanh, seed=0, c=3):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Conv2d(2, c, 2), nn.BatchNorm2d(c), act(), nn.Flatten(), nn.Linear(4 * c, 3)).double().eval()
    with torch.no_grad():
        for t in (m[1].weight, m[1].running_var): t.uniform_(.5, 2)
        for t in (m[1].bias, m[1].running_mean): t.normal_()
    return m


def data(sizes=SIZES, seed=1):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(sum(sizes), 2, 3, 3, generator=g).double(), torch.randint(0, 3, (sum(sizes),), generator=g)
    return list(zip(x.split(sizes), y.split(sizes)))


def learner(m, b, loss=None, **kw): return Learner(DataLoaders(b, b), m, loss_func=loss or nn.CrossEntropyLoss(), **kw)


def flat(d): return torch.cat([t.reshape(-1) for t in (d.values() if isinstance(d, dict) else d)])


def truth(m, b, loss=None):
    "The loss of all samples at once as a function of the vector of trainable weights, and that vector."
    x, y = (torch.cat(t) for t in zip(*b))
    p = {k: v.detach() for k, v in m.named_parameters() if v.requires_grad}

    def f(v):
        parts = v.split([t.numel() for t in p.values()])
        return (loss or nn.CrossEntropyLoss())(functional_call(m, {k: s.view_as(t) for s, (k, t) in zip(parts, p.items())}, (x,)), y)
    return f, flat(p)


def close(a, b, tol=1e-8):
    a, b = (torch.as_tensor(t, dtype=torch.double) for t in (a, b))
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=.2), nn.MultiMarginLoss()])
def test_fixed_loss_is_the_mean_over_all_samples(loss):
    m, b = net(nn.ReLU), data()
    f, w = truth(m, b, loss)
    m[0].weight.grad = torch.full_like(m[0].weight, 7.)
    fixed = FixedLoss(learner(m, b, loss))
    value, g = fixed.gradient()
    close(fixed(), f(w)), close(value, f(w)), close(flat(g), grad(f)(w))
    assert (m[0].weight.grad == 7).all() and m[4].weight.grad is None


def test_fixed_loss_of_some_samples():
    m, b = net(), data()
    x, y = (torch.cat(t) for t in zip(*b))
    each = nn.CrossEntropyLoss(reduction='none')(m(x), y).detach()
    for k in (1, 5, 7, 11):
        fixed = FixedLoss(learner(m, b), samples=k)
        means = torch.stack([each[list(c)].mean() for c in itertools.combinations(range(11), k)])
        assert (means - fixed()).abs().min() < 1e-10 and fixed() == fixed()
    with torch.no_grad(): m[4].bias[0] += 1
    close(fixed(), nn.CrossEntropyLoss()(m(x), y).item())


@pytest.mark.parametrize('call', [FixedLoss, gradient_norm, sam_sharpness, average_sharpness, loss_line, calibration_error, hessian_trace])
def test_refusals(call):
    if call is hessian_trace: lapack()
    b = data()
    with pytest.raises(ValueError): call(learner(net().train(), b))
    with pytest.raises(ValueError): call(learner(net().requires_grad_(False), b))
    if call is not calibration_error:
        with pytest.raises(ValueError): call(learner(net(), b, nn.CrossEntropyLoss(reduction='sum')))
    m = net()
    with torch.no_grad(): m[0].weight[0, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError): call(learner(m, b))


def test_measures_leave_the_network_alone():
    lapack()
    m, b = net(), data()
    before = copy.deepcopy(m.state_dict())
    m[0].weight.requires_grad_(False)
    d, kw = random_direction(m), {'progress': False}
    l = learner(m, b)
    for f in (gradient_norm, sam_sharpness, calibration_error, lambda l: average_sharpness(l, **kw), lambda l: hessian_trace(l, **kw),
              lambda l: top_eigenvalues(l, **kw), lambda l: spectral_density(l, steps=5, vectors=2, **kw),
              lambda l: loss_line(l, d, points=3, **kw), lambda l: loss_surface(l, [d, d], points=2, **kw)):
        f(l)
        assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items()) and not m.training
        assert not m[0].weight.requires_grad and m[0].bias.requires_grad and all(p.grad is None for p in m.parameters())


@pytest.mark.parametrize('act, frozen', [(nn.Tanh, False), (nn.ReLU, True)])
def test_trace_and_eigenvalues(act, frozen):
    lapack()
    m, b = net(act, c=2), data([7, 4])
    m[0].weight.requires_grad_(not frozen)
    f, w = truth(m, b)
    h = hessian(f)(w)
    true = torch.linalg.eigvalsh(h).flip(0)
    l = learner(m, b)
    exact = hessian_trace(l, progress=False)
    assert exact.converged and abs(exact.value - true.sum()) < 1e-8
    got = top_eigenvalues(l, 4, tol=1e-9, progress=False)
    close(got.values, true[:4], 1e-7)
    assert got.converged and len(got.error) == 4
    rough = top_eigenvalues(l, 2, tol=1e-2, progress=False)
    assert ((rough.values - true[:2]).abs() <= 1e-2 * true[0]).all() and rough.n < got.n
    assert (rough.values <= true[:2] + 1e-10).all(), 'a Ritz value never exceeds the eigenvalue'


@pytest.mark.parametrize('sketch', [0, 10])
def test_trace_estimates_are_as_far_off_as_they_say(sketch):
    lapack()
    m, b = net(), data([11])
    f, w = truth(m, b)
    true, l = hessian(f)(w).trace().item(), learner(m, b)
    runs = [hessian_trace(l, tol=1e-9, max_probes=20, sketch=sketch, seed=s, progress=False) for s in range(7)]
    z = torch.tensor([(r.value - true) / r.error for r in runs])
    assert z.abs().max() < 4 and abs(z.mean()) < 4 / 7 ** .5 and .2 < z.square().mean() < 3 and z.abs().min() > 1e-6
    assert not any(r.converged for r in runs) and len({r.value for r in runs}) == 7


def test_eigenvectors():
    lapack()
    m, b = net(), data()
    f, w = truth(m, b)
    h = hessian(f)(w)
    values, vectors = top_eigenvectors(learner(m, b), 3, tol=1e-10, progress=False)
    v = torch.stack([flat([d[k] for k, _ in m.named_parameters()]) for d in vectors])
    close(v @ v.T, torch.eye(3), 1e-6), close(v @ h, values.values[:, None] * v, 1e-5)
    close(values.values, torch.linalg.eigvalsh(h).flip(0)[:3], 1e-7)
    for d in vectors: assert all(d[k].shape == p.shape for k, p in m.named_parameters())


def test_spectral_density():
    lapack()
    m, b = net(c=1), data([11])
    f, w = truth(m, b)
    true = torch.linalg.eigvalsh(hessian(f)(w))
    d = spectral_density(learner(m, b), steps=len(w), vectors=16, progress=False)
    assert len(d.nodes) == len(d.weights) == 16
    for p in (0, 1, 2):
        moments = torch.stack([(a * t ** p).sum() for t, a in zip(d.nodes, d.weights)])
        assert abs(moments.mean() - (true ** p).mean()) <= 4 * moments.std() / 4 + 1e-10
    for t in d.nodes: close(t.max(), true[-1]), close(t.min(), true[0])
    close(torch.trapezoid(d.values, d.grid), 1, 1e-3)
    edges = [true[0] - 1, true[6:8].mean(), true[19:21].mean(), true[-1] + 1]
    share, error = d.mass(edges)
    want = torch.tensor([sum(a < e <= c for e in true) / len(w) for a, c in itertools.pairwise(edges)])
    assert ((share - want).abs() <= 4 * error).all() and (error < .1).all()
    close(share.sum(), 1)


@pytest.mark.parametrize('act', [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize('rho', [.01, .05, .5])
def test_sam_sharpness_and_gradient_norm(act, rho):
    m, b = net(act), data()
    f, w = truth(m, b)
    g, l = grad(f)(w), learner(m, b)
    close(gradient_norm(l), g.norm())
    close(sam_sharpness(l, rho), f(w + rho * g / g.norm()) - f(w))
    eps = rho * w.square() * g / (w * g).norm()
    close((eps / w).norm(), rho), close(sam_sharpness(l, rho, adaptive=True), f(w + eps) - f(w))


def test_adaptive_worst_direction_is_the_worst_to_first_order():
    m, b = net(), data()
    f, w = truth(m, b)
    got = sam_sharpness(learner(m, b), 1e-4, adaptive=True)
    u = torch.randn(3000, len(w), generator=torch.Generator().manual_seed(0)).double()
    other = vmap(f)(w + 1e-4 * w.abs() * u / u.norm(dim=1, keepdim=True)) - f(w)
    assert other.max() < got
    close(got / 1e-4, (w * grad(f)(w)).norm(), 1e-3)


@pytest.mark.parametrize('adaptive', [False, True])
def test_average_sharpness_of_a_quadratic(adaptive):
    torch.manual_seed(0)
    m, b = nn.Linear(6, 3).double().eval(), [(torch.randn(n, 6).double(), torch.randn(n, 3).double()) for n in SIZES]
    f, w = truth(m, b, nn.MSELoss())
    true = .5 * .3 ** 2 * (hessian(f)(w).diagonal() * (w.square() if adaptive else 1)).sum()
    got = average_sharpness(learner(m, b, nn.MSELoss()), .3, pairs=400, adaptive=adaptive, progress=False)
    assert abs(got.value - true) < 4 * got.error and got.error < .1 * true and got.n == 400


@pytest.mark.parametrize('adaptive', [False, True])
def test_average_sharpness_of_a_network(adaptive):
    m, b = net(), data()
    f, w = truth(m, b)
    e = .2 * torch.randn(4000, len(w), generator=torch.Generator().manual_seed(5)).double() * (w.abs() if adaptive else 1)
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
        inner = [int((w < e).sum()) for e in edges[1:-1].tolist()]
        assert counts.tolist() == np.diff([0, *inner, len(w)]).tolist()
        close(edges[[0, -1]], [-abs(w).max(), abs(w).max()], 1e-6)


def test_flatness_recorder():
    kept = []

    class Keep(Callback):
        def after_epoch(self): kept.append(copy.deepcopy(self.model).eval())

    b, rec = data(), FlatnessRecorder({'g': gradient_norm, 's': sam_sharpness}, every=2)
    plain, l = (learner(net().train(), b, opt_func=SGD, lr=.1, default_cbs=False, cbs=[TrainEvalCallback(), *c]) for c in ([], [Keep(), rec]))
    plain.fit(5), l.fit(5)
    assert all(torch.equal(v, l.model.state_dict()[k]) for k, v in plain.model.state_dict().items())
    assert len(rec.rows) == 3 == len(rec.table())
    for row, i in zip(rec.rows, (1, 3, 4)):
        f, w = truth(kept[i], b)
        g = grad(f)(w)
        close(row['g'], g.norm()), close(row['s'], f(w + .05 * g / g.norm()) - f(w))


def test_filter_normalised_direction():
    m = net()
    a, b = random_direction(m, 3), random_direction(m, 4)
    for k, p in m.named_parameters():
        if p.dim() == 1: assert not a[k].any()
        else:
            close(a[k].flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
            cos = nn.functional.cosine_similarity(a[k].flatten(), b[k].flatten(), 0).abs()
            assert cos < 4 / p.numel() ** .5 and torch.equal(a[k], random_direction(m, 3)[k])


def test_line_between_two_networks():
    a, b, batches = net(), net(seed=9), data()
    line = loss_line(learner(a, batches), direction_between(a, b), span=1.5, points=7, progress=False)
    x, y = (torch.cat(t) for t in zip(*batches))
    close(line.at, np.linspace(-1.5, 1.5, 7))
    s, e = a.state_dict(), b.state_dict()
    for t, got in zip(line.at, line.loss):
        mixed = {k: v + t * (e[k] - v) if v.is_floating_point() else v for k, v in s.items()}
        if (mixed['1.running_var'] < 0).any(): continue
        close(got, nn.CrossEntropyLoss()(functional_call(a, mixed, (x,)), y))
    one = loss_line(learner(a, batches), direction_between(a, b), points=3, progress=False)
    close(one.loss[1:], [nn.CrossEntropyLoss()(m(x), y).item() for m in (a, b)])


def test_line_and_surface():
    m, b = net(nn.ReLU), data()
    f, w = truth(m, b)
    dirs = [random_direction(m, 1), random_direction(m, 2)]
    u, v = (flat([d[k] for k, _ in m.named_parameters()]) for d in dirs)
    l = learner(m, b)
    line, surf = loss_line(l, dirs[0], .7, 5, progress=False), loss_surface(l, dirs, .7, 5, progress=False)
    close(line.loss, [f(w + t * u) for t in line.at])
    close(surf.loss, [[f(w + s * u + t * v) for t in surf.y] for s in surf.x])
    close(surf.x, np.linspace(-.7, .7, 5)), close(surf.y, surf.x)
    first = loss_line(l, None, .5, 3, seed=6, progress=False)
    r = flat([random_direction(m, 6)[k] for k, _ in m.named_parameters()])
    close(first.loss, [f(w + t * r) for t in (-.5, 0, .5)])


def ece(p, y, bins):
    conf, right = p.max(1).values.tolist(), (p.argmax(1) == y).tolist()
    total = 0
    for i in range(bins):
        own = [(c, r) for c, r in zip(conf, right) if i / bins < c <= (i + 1) / bins]
        if own: total += abs(sum(r for _, r in own) - sum(c for c, _ in own)) / len(conf)
    return total


@pytest.mark.parametrize('bins', [1, 4, 15])
def test_calibration_error(bins):
    torch.manual_seed(3)
    sizes = [40, 33, 7]
    x, y = 2.5 * torch.randn(80, 4).double(), torch.randint(0, 4, (80,))
    x[:5], x[:5, 1] = 0, 2000
    y[40:] = x[40:].argmax(1)
    m = nn.Linear(4, 4).double().eval()
    with torch.no_grad(): m.weight.copy_(torch.eye(4)), m.bias.zero_()
    got = calibration_error(learner(m, list(zip(x.split(sizes), y.split(sizes)))), bins=bins)
    p = x.softmax(1)
    close(got.value, ece(p, y, bins))
    assert got.count.sum() == 80 and len(got.count) == bins and got.count[-1] >= 5
    own = (p.max(1).values * bins).ceil().long() - 1
    for i in range(bins):
        assert got.count[i] == (own == i).sum()
        if not got.count[i]: continue
        close(got.confidence[i], p.max(1).values[own == i].mean()), close(got.accuracy[i], (x.argmax(1) == y)[own == i].double().mean())


def test_calibration_bins_are_closed_on_the_right():
    x = torch.tensor([[0., 0., -999], [9, -9, -9], [.1, 0, 0], [.2, 0, 0]]).double()
    m = nn.Linear(3, 3).double().eval()
    with torch.no_grad(): m.weight.copy_(torch.eye(3)), m.bias.zero_()
    assert x.softmax(1)[0].max() == .5
    assert calibration_error(learner(m, [(x, torch.tensor([0, 0, 0, 1]))]), bins=2).count.tolist() == [3, 1]


def test_memorisation():
    m, b = net(), data([30, 17, 3])
    pred, given = m(torch.cat([x for x, _ in b])).argmax(1), torch.cat([y for _, y in b])
    true = torch.randint(0, 3, (50,), generator=torch.Generator().manual_seed(2))
    wrong = [i for i in range(50) if given[i] != true[i]]
    got = memorisation(learner(m, b), true)
    assert 0 < len(wrong) < 50 and got.n == len(wrong)
    close(got.given, sum(int(pred[i] == given[i]) for i in wrong) / len(wrong))
    close(got.true, sum(int(pred[i] == true[i]) for i in wrong) / len(wrong))
    with pytest.raises(ValueError): memorisation(learner(m, b), given)
    with pytest.raises(ValueError): memorisation(learner(m, b), true[1:])


@pytest.mark.parametrize('level', [.5, .95])
def test_effective_robustness(level):
    base, moved = np.array([.5, .62, .71, .8, .93, .97]), np.array([.33, .4, .58, .55, .8, .84])
    new, shifted = np.array([.55, .9, .99]), np.array([.5, .7, .9])
    logit = lambda p: np.log(p / (1 - p))
    expit = lambda z: 1 / (1 + np.exp(-z))
    x, y, q = logit(base), logit(moved), logit(new)
    X = np.stack([np.ones(6), x], 1)
    inv = np.linalg.inv(X.T @ X)
    beta = inv @ X.T @ y
    s2 = ((y - X @ beta) ** 2).sum() / 4
    Q = np.stack([np.ones(3), q], 1)
    half = stats.t.ppf((1 + level) / 2, 4) * np.sqrt(s2 * np.einsum('ij,jk,ik->i', Q, inv, Q))
    got = effective_robustness(new, shifted, base, moved, level)
    close([got.intercept, got.slope], beta), close(got.expected, expit(Q @ beta)), close(got.value, shifted - expit(Q @ beta))
    close(got.low, expit(Q @ beta - half)), close(got.high, expit(Q @ beta + half))


def photo(n=2):
    "Images of 32 pixels with smooth parts, edges, greys, black and white, on the 256 levels."
    g = np.random.default_rng(0)
    x = np.stack([[ndimage.gaussian_filter(g.normal(size=(32, 32)), 2) for _ in range(3)] for _ in range(n)])
    x = np.clip((x * 3 + 1) / 2, 0, 1)
    x[:, :, :6, :6], x[:, :, 20:25, 3:9], x[:, :, 8:12, 8:20] = 0, 1, x[:, :1, 8:12, 8:20]
    x[:, :, 26:, 20:] = g.uniform(size=(n, 3, 6, 12))
    return np.floor(x * 255).astype(np.uint8)


def hsv(x, change):
    y = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3)]
    return np.array(y).reshape(x.shape)


def same(got, want):
    "Whether the levels are the whole parts of `want`, but for values so close to the next level that float32 decides."
    near, off = np.abs(want - want.round()) < 5e-3, np.abs(got - np.floor(want))
    return off[~near].max() < 1e-3 and off.max() < 1.001 and (~near).mean() > .05


def cut(v): return min(max(v, 0), 1)


def zoomed(x, z):
    c = math.ceil(32 / z)
    t = (32 - c) // 2
    y = ndimage.zoom(x[t:t + c, t:t + c], (z, z, 1), order=1)
    t = (len(y) - 32) // 2
    return y[t:t + 32, t:t + 32]


def box(image, n): return image.resize((n, n), Image.BOX)


SMOOTH = {
    'contrast': lambda x, s: (x - x.mean((0, 1))) * (.75, .5, .4, .3, .15)[s] + x.mean((0, 1)),
    'brightness': lambda x, s: hsv(x, lambda h, a, v: (h, a, cut(v + (.05, .1, .15, .2, .3)[s]))),
    'saturate': lambda x, s: hsv(x, lambda h, a, v: (h, cut(a * (.3, .1, 1.5, 2, 2.5)[s] + (0, 0, 0, .1, .2)[s]), v)),
    'gaussian_blur': lambda x, s: ndimage.gaussian_filter(x, (*[(.4, .6, .7, .8, 1)[s]] * 2, 0), mode='nearest', truncate=4),
    'zoom_blur': lambda x, s: np.mean([x, *(zoomed(x, z) for z in np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[s], .01))], 0)}


@pytest.mark.parametrize('kind, severity', [(k, s) for k in SMOOTH for s in range(1, 6)])
def test_smooth_corruptions(kind, severity):
    raw = photo()
    got = corrupt(torch.tensor(raw) / 255., kind, severity).numpy() * 255
    want = 255 * np.clip(np.stack([SMOOTH[kind](x.transpose(1, 2, 0) / 255, severity - 1).transpose(2, 0, 1) for x in raw]), 0, 1)
    assert same(got, want) and np.abs(got - raw).max() > 2


@pytest.mark.parametrize('severity, share', zip(range(1, 6), (.95, .9, .85, .75, .65)))
def test_pixelate_is_that_of_pil(severity, share):
    raw = photo()
    for x, got in zip(raw, corrupt(torch.tensor(raw) / 255., 'pixelate', severity)):
        close(got * 255, np.asarray(box(box(Image.fromarray(x.transpose(1, 2, 0)), int(32 * share)), 32)).transpose(2, 0, 1), 1e-4)


@pytest.mark.parametrize('severity', range(1, 6))
def test_jpeg_is_that_of_pil(severity):
    raw = photo()
    for x, got in zip(raw, corrupt(torch.tensor(raw) / 255., 'jpeg_compression', severity)):
        f = io.BytesIO()
        Image.fromarray(x.transpose(1, 2, 0)).save(f, 'JPEG', quality=(80, 65, 58, 50, 40)[severity - 1])
        close(got * 255, np.array(Image.open(f)).transpose(2, 0, 1), 1e-4)


def levels(kind, s, x, h):
    "The probability of each of the 256 levels, the whole part of 255 v + h, for a pixel of value `x`; the levels that float32 decides between."
    c = {'gaussian_noise': (.04, .06, .08, .09, .1), 'shot_noise': (500, 250, 100, 75, 50), 'impulse_noise': (.01, .02, .03, .05, .07),
         'speckle_noise': (.06, .1, .12, .16, .2)}[kind][s]
    p, ties = np.zeros(256), []
    if kind == 'impulse_noise': p[0], p[255], p[round(x * 255)] = c / 2, c / 2, 1 - c
    elif kind == 'shot_noise':
        for k in range(4 * c):
            v = min(k / c, 1) * 255 + h
            p[int(v + 1e-6)] += stats.poisson.pmf(k, x * c)
            if abs(v - round(v)) < 1e-6: ties.append(round(v))
    else: p[:] = np.diff([0, *stats.norm.cdf((np.arange(1, 256) - h) / 255, x, c * (x if kind[0] == 's' else 1)), 1])
    return p, ties


def excess(n, p, ties):
    "By how many standard deviations chi squared exceeds its mean."
    n, p = n.copy(), p * n.sum()
    for i in ties: n[i], p[i], n[i - 1], p[i - 1] = n[i] + n[i - 1], p[i] + p[i - 1], 0, 0
    if n[p < 1e-9].any(): return math.inf
    groups = [(0, 0)]
    for a, b in zip(n, p): groups = [*groups, (a, b)] if groups[-1][1] > 10 else [*groups[:-1], (groups[-1][0] + a, groups[-1][1] + b)]
    if groups[-1][1] <= 10: groups[-2:] = [tuple(np.add(*groups[-2:]))]
    df = len(groups) - 1
    assert df >= 2
    return (sum((a - b) ** 2 / b for a, b in groups) - df) / (2 * df) ** .5


@pytest.mark.parametrize('severity', range(1, 6))
@pytest.mark.parametrize('kind', ['gaussian_noise', 'shot_noise', 'impulse_noise', 'speckle_noise'])
def test_random_corruptions(kind, severity):
    off = {0: [], .5: []}
    for level in (40, 128, 230):
        x = torch.full((15, 3, 32, 32), level) / 255.
        got = (corrupt(x, kind, severity, seed=1) * 255).round().long()
        n = np.bincount(got.flatten(), minlength=256)
        for h, o in off.items(): o.append(excess(n, *levels(kind, severity - 1, level / 255, h)))
    assert min(max(o) for o in off.values()) < 4
    again = (corrupt(x, kind, severity, seed=1) * 255).round().long()
    assert torch.equal(again, got) and not torch.equal(corrupt(x, kind, severity, seed=2), corrupt(x, kind, severity, seed=1))
    hit = got != level
    assert not torch.equal(got[0], got[1]), 'each image has noise of its own'
    if kind == 'impulse_noise':
        c, m = (.01, .02, .03, .05, .07)[severity - 1], 15 * 1024
        q = 3 * c ** 2 * (1 - c) + c ** 3
        assert abs((hit.sum(1) >= 2).sum() - m * q) < 4 * (m * q * (1 - q)) ** .5 + 1, 'channels are hit independently'


def test_corrupted_accuracy():
    torch.manual_seed(0)
    raw, sizes = photo(23), [10, 9, 4]
    mean, std = torch.tensor([.4, .5, .3]).view(3, 1, 1), torch.tensor([.2, .3, .25]).view(3, 1, 1)
    x = (torch.tensor(raw) / 255. - mean) / std
    m = nn.Sequential(nn.Flatten(), nn.Linear(3072, 9)).eval()
    y = m(x).argmax(1)
    y[::5] = (y[::5] + 1) % 9
    got = corrupted_accuracy(learner(m, list(zip(x.split(sizes), y.split(sizes)))), ['contrast', 'gaussian_blur', 'pixelate'], (2, 5),
                             mean=mean.flatten().tolist(), std=std.flatten().tolist(), progress=False)
    assert list(got.index) == ['contrast', 'gaussian_blur', 'pixelate'] and list(got.columns) == [2, 5]
    seen = set()
    for k, s in itertools.product(got.index, got.columns):
        want = (m((corrupt(torch.tensor(raw) / 255., k, s) - mean) / std).argmax(1) == y).double().mean()
        close(got.loc[k, s], want), seen.add(want.item())
    assert len(seen) > 2
    with pytest.raises(ValueError): corrupted_accuracy(learner(m, [(x, y)]), ['contrast'], (1,), progress=False)
