"Measures outside image classification: several targets, odd batches, hooks, noise, states, wrong targets."
import random
from copy import deepcopy
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from sadt_nb.core.fixed_loss import FixedLoss, collect_batches
from sadt_nb.data.datasets import get_dls
from sadt_nb.measures.calibration import calibration_error, memorisation
from sadt_nb.measures.hessian import hessian_trace, spectral_density, top_eigenvalues
from sadt_nb.measures.landscape import loss_line, random_direction
from sadt_nb.measures.robustness import corrupted_accuracy, effective_robustness, shifted_accuracy
from sadt_nb.measures.sharpness import FlatnessRecorder, average_sharpness, gradient_norm, sam_sharpness
from sadt_nb.measures.similarity import agreement, collect_logits, diversity, logit_mse
from test_hessian_layers import Cubed
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss


def inputs(n=10):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=g)


def batches(*tensors, sizes=(7, 3)):
    "Return the samples in batches of unequal size."
    return list(zip(*[t.split(list(sizes)) for t in tensors]))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()


def learner(net, data, loss=F.cross_entropy): return Learner(DataLoaders(data, data), net, loss_func=loss)


def exact(net, loss_of):
    "Return loss, gradient and Hessian in the trainable weights, where `loss_of` maps a network to its loss."
    params = {n: p.detach() for n, p in net.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    start = torch.cat([p.reshape(-1) for p in params.values()])
    def f(v):
        weights = {n: part.view_as(p) for part, (n, p) in zip(v.split(sizes), params.items())}
        return loss_of(lambda x: functional_call(net, weights, (x,)))
    v = start.clone().requires_grad_()
    return f(start).item(), torch.autograd.grad(f(v), v)[0], torch.autograd.functional.hessian(f, start)


def agrees(learn, loss, gradient, hessian):
    fixed = FixedLoss(learn)
    assert fixed() == pytest.approx(loss, rel=1e-12)
    assert fixed.gradient()[0] == pytest.approx(loss, rel=1e-12)
    assert gradient_norm(learn) == pytest.approx(gradient.norm().item(), rel=1e-10)
    assert hessian_trace(learn).value == pytest.approx(hessian.trace().item(), rel=1e-8)
    largest = torch.linalg.eigvalsh(hessian)[-1].item()
    assert top_eigenvalues(learn).values[0].item() == pytest.approx(largest, rel=1e-8)


# targets
def heads(out, y):
    "A loss of classes and of a number."
    classes, number = y.values() if isinstance(y, dict) else y
    return F.cross_entropy(out, classes) + F.mse_loss(out[:, 0], number)


TARGETS = [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: dict(classes=a, number=b)]


@pytest.mark.parametrize('packed', TARGETS)
def test_several_targets_in_batches_of_unequal_size(packed):
    x, y = inputs()
    z = x.sum(1)
    data = [(bx, packed(by, bz)) for bx, by, bz in batches(x, y, z)]
    net = network()
    agrees(learner(net, data, heads), *exact(net, lambda f: heads(f(x), (y, z))))
    some = FixedLoss(learner(net, data, heads), samples=8)
    assert some.n == 8
    assert some() == pytest.approx(heads(net(x[:8]), (y[:8], z[:8])).item(), rel=1e-12)


def test_inputs_in_a_dictionary():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
        def forward(self, x): return self.net(x['a'] + x['b'])
    x, y = inputs()
    data = [(dict(a=bx, b=2 * bx), by) for bx, by in batches(x, y)]
    net = Sum().eval()
    want = F.cross_entropy(net.net(3 * x[:8]), y[:8]).item()
    learn = learner(net, data)
    assert FixedLoss(learn, samples=8)() == pytest.approx(want, rel=1e-12)
    line = loss_line(learn, span=1, points=3, samples=8, progress=False)
    assert line.loss[1] == pytest.approx(want, rel=1e-12)


def test_lists_with_one_entry_per_sample():
    "As for detection: images and numbers of boxes differ from sample to sample."
    images = [torch.ones(1, 2 + i) for i in range(5)]
    boxes = [dict(boxes=torch.full((3 - i % 2, 4), float(i))) for i in range(5)]
    data = [(images[:3], boxes[:3]), (images[3:], boxes[3:])]
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))
        def forward(self, x): return [self.w * t.mean() for t in x]
    def loss(out, y): return torch.stack([(o - b['boxes'].mean()).square() for o, b in zip(out, y)]).mean()
    learn = learner(Mean().eval(), data, loss)
    assert FixedLoss(learn).n == 5 and FixedLoss(learn)() == pytest.approx((1 + 0 + 1 + 4 + 9) / 5)
    assert FixedLoss(learn, samples=4).n == 4 and FixedLoss(learn, samples=4)() == pytest.approx(6 / 4)


def test_empty_batches_change_nothing():
    x, y = inputs()
    net = network()
    data = batches(x, y, sizes=(0, 7, 0, 3, 0))
    agrees(learner(net, data), *exact(net, lambda f: F.cross_entropy(f(x), y)))
    assert [len(b) for _, b in collect_batches(learner(net, data), samples=8)] == [7, 1]
    with pytest.raises(ValueError, match='no batches'): FixedLoss(learner(net, data[:1]))


# the loss
def half_sum(out, y, reduction='sum'): return F.cross_entropy(out, y, reduction=reduction) / 2


@pytest.mark.parametrize('loss', [
    partial(F.cross_entropy, reduction='sum'), partial(partial(F.cross_entropy, reduction='none')), half_sum,
    partial(nn.CrossEntropyLoss(reduction='sum')), sigmoid_focal_loss])
def test_a_loss_that_is_no_mean_is_refused(loss):
    learn = learner(network(), batches(*inputs()), loss)
    with pytest.raises(ValueError, match='mean over the batch'): FixedLoss(learn)


def loss_of(learn): return FixedLoss(learn)()


@pytest.mark.parametrize('measure', [gradient_norm, hessian_trace, loss_of])
def test_a_loss_that_is_not_one_number_is_refused(measure):
    def by_class(out, y): return (out - F.one_hot(y, 3)).square().mean(0)
    learn = learner(network(), batches(*inputs()), by_class)
    with pytest.raises(ValueError, match=r'one number, .* got a tensor of shape \(3,\)'): measure(learn)


@pytest.mark.parametrize('loss', [
    partial(half_sum, reduction='mean'), nn.CrossEntropyLoss(), partial(F.cross_entropy, label_smoothing=.1)])
def test_a_mean_is_taken(loss):
    x, y = inputs()
    net = network()
    found = FixedLoss(learner(net, batches(x, y), loss))()
    assert found == pytest.approx(loss(net(x), y).item(), rel=1e-12)


@pytest.mark.parametrize('loss', [
    nn.KLDivLoss(reduction='batchmean'), partial(F.kl_div, reduction='batchmean')])
def test_the_mean_divergence_over_a_batch_is_a_mean(loss):
    x, _ = inputs()
    shares = x[:, :3].softmax(1)
    net = nn.Sequential(network(), nn.LogSoftmax(1)).eval()
    agrees(learner(net, batches(x, shares), loss), *exact(net, lambda f: loss(f(x), shares)))


# hooks, compilation, random numbers
def test_hooks_of_parameters_change_no_measure():
    x, y = inputs()
    net = network()
    found = exact(net, lambda f: F.cross_entropy(f(x), y))
    calls = []
    def clip(g):
        calls.append(1)
        return g.clamp(-.01, .01)
    handle = net[0].weight.register_hook(clip)
    learn = learner(net, batches(x, y))
    agrees(learn, *found)
    F.cross_entropy(net(x), y).backward() # the hook works as before
    assert calls == [1] and net[0].weight.grad.abs().max() <= .01
    handle.remove()
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert calls == [1] and net[0].weight.grad.abs().max() > .01


def whole(net): return torch.compile(net, backend='aot_eager')


def in_place(net):
    net.compile(backend='aot_eager')
    return net


def one_layer(net):
    net[0] = torch.compile(net[0], backend='aot_eager')
    return net


@pytest.mark.parametrize('compiled', [whole, in_place, one_layer])
def test_compiled_networks(compiled):
    x, y = inputs()
    found = exact(network(), lambda f: F.cross_entropy(f(x), y))
    agrees(learner(compiled(network()), batches(x, y)), *found)


def cube(out, y): return Cubed.apply(out).mean() # many fused losses have no second derivative either


@pytest.mark.parametrize('measure', [hessian_trace, top_eigenvalues, spectral_density])
def test_a_loss_without_a_second_derivative_is_an_error(measure):
    "The last function gets a gradient that is a constant, and then PyTorch itself reports no error."
    learn = learner(network(), batches(*inputs()), cube)
    with pytest.raises(ValueError, match='twice'): measure(learn)


class Noisy(nn.Module):
    "A network that draws from all generators in evaluation mode, as a variational autoencoder may."
    def __init__(self):
        super().__init__()
        self.net = network()
    def forward(self, x): return self.net(x + torch.randn_like(x) * np.random.rand() * random.random())


def draws(): return torch.rand(2).tolist(), np.random.rand(), random.random()


def seed_all():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


BY_LEARNER = [sam_sharpness, gradient_norm, hessian_trace, top_eigenvalues, spectral_density,
              calibration_error, partial(average_sharpness, pairs=2), partial(loss_line, points=3),
              partial(memorisation, true=torch.arange(10) % 3)]


def test_noise_is_the_same_in_every_call():
    x, y = inputs()
    seed_all()
    loss = FixedLoss(learner(Noisy().eval(), batches(x, y)))
    first, (same, _) = loss(), loss.gradient()
    draws()
    assert loss() == first == same


@pytest.mark.parametrize('measure', BY_LEARNER)
def test_measures_of_a_noisy_network_leave_random_numbers_alone(measure):
    learn = learner(Noisy().eval(), batches(*inputs()))
    seed_all()
    expected = draws()
    seed_all()
    measure(learn)
    assert draws() == expected


# states
class Running(nn.Module):
    "A network that keeps a sum of its inputs in an attribute, a list and a buffer."
    def __init__(self):
        super().__init__()
        self.net = network()
        self.total = torch.zeros(4, dtype=torch.float64)
        self.seen = []
        self.register_buffer('calls', torch.zeros((), dtype=torch.float64))
    def forward(self, x):
        self.total = self.total + x.mean(0).detach()
        self.seen.append(self.total)
        self.calls += 1
        return self.net(x + self.total + len(self.seen) + .1 * self.calls)
    def state(self): return self.total.tolist(), len(self.seen), self.calls.item()


@pytest.mark.parametrize('measure', BY_LEARNER)
def test_measures_leave_the_states_of_a_network_alone(measure):
    x, y = inputs()
    net = Running().eval()
    net(x) # a state before the measurement
    before, total = net.state(), net.total
    measure(learner(net, batches(x, y)))
    assert net.state() == before and net.total is total


def test_every_call_starts_from_the_same_states():
    x, y = inputs()
    loss = FixedLoss(learner(Running().eval(), batches(x, y)))
    first = loss()
    assert loss() == first == loss.gradient()[0]


def test_states_come_back_after_an_error():
    class Fails(Running):
        def forward(self, x):
            out = super().forward(x)
            if len(self.seen) == 2: raise KeyError('in the second batch')
            return out
    net = Fails().eval()
    before = net.state()
    learn = learner(net, batches(*inputs()))
    for call in (FixedLoss(learn), FixedLoss(learn).gradient):
        with pytest.raises(KeyError) as kept: call()
        assert net.state() == before and kept
    # an error outside the network, between two batches; `kept` holds its traceback, and so the iterator
    net = Running().eval()
    learn = learner(net, batches(*inputs()), cube)
    with pytest.raises(ValueError, match='twice') as kept: hessian_trace(learn)
    assert net.state() == before and kept


SIMILARITY = [logit_mse, agreement, lambda a, b, dl: diversity([a, b], dl)]


@pytest.mark.parametrize('measure', SIMILARITY)
def test_similarity_leaves_states_alone_and_networks_trainable(measure):
    class Cached(nn.Module):
        "A network that makes a constant in its first pass, as position encodings do."
        def __init__(self):
            super().__init__()
            self.scale = None
            self.net = network(1)
        def forward(self, x):
            if self.scale is None: self.scale = torch.ones(4, dtype=x.dtype)
            return self.net(x * self.scale)
    x, _ = inputs()
    running, cached = Running(), Cached()
    before = running.state()
    measure(running, cached, [(x,), (x,)])
    assert running.state() == before
    for net in (running, cached): net(x.requires_grad_()).sum().backward() # no tensor of an inference mode


def test_batches_that_are_one_tensor():
    x, _ = inputs()
    a, b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    want = (a(x) - b(x)).square()
    for dl in ([x[:7], x[7:]], [(x[:7],), (x[7:],)]):
        assert logit_mse(a, b, dl) == pytest.approx(want.mean().item(), rel=1e-12)
        assert collect_logits([a, b], dl).shape == (2, 10, 3)
        torch.testing.assert_close(diversity([a, b], dl), want.mean(1) / 4)


@pytest.mark.parametrize('shape', [(), (3,), (3, 5, 5)])
def test_diversity_has_one_value_per_sample(shape):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        def forward(self, x): return x.view(-1, *[1] * len(shape)) * self.w
    x = torch.arange(1, 5, dtype=torch.float64)
    nets = [Shaped() for _ in range(3)]
    z = np.stack([m(x).detach().numpy() for m in nets])
    want = ((z - z.mean(0))**2).mean(0).reshape(4, -1).mean(1)
    np.testing.assert_allclose(diversity(nets, [(x,)]).numpy(), want, rtol=1e-12)


# counters of a loader
@pytest.mark.parametrize('options', [dict(), dict(samples=20), dict(dl=True), dict(dl=True, samples=20)])
def test_a_recorder_mirrors_the_same_images(options):
    "A loader with `flip='alternate'` counts its epochs."
    def trained(recorded):
        seed_all()
        dls = get_dls('digits', bs=16, n_train=64, flip='alternate', device='cpu', seed=0)
        given = options | (dict(dl=dls.train) if 'dl' in options else {})
        recorder = [FlatnessRecorder(**given)] if recorded else []
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), lr=.05, opt_func=SGD, default_cbs=False,
                        cbs=[TrainEvalCallback(), *recorder])
        learn.fit(3)
        return net[1].weight
    assert torch.equal(trained(False), trained(True))


def test_reading_batches_keeps_the_counters_of_a_loader_and_its_sampler():
    class Counting(torch.utils.data.Sampler):
        def __init__(self): self.epoch = 0
        def __len__(self): return 4
        def __iter__(self):
            self.epoch += 1
            return iter(range(4))
    sampler = Counting()
    dl = torch.utils.data.DataLoader([(torch.ones(4), 0)] * 4, 2, sampler=sampler)
    learn = learner(nn.Linear(4, 3).eval(), dl)
    for _ in range(3): collect_batches(learn, dl)
    assert sampler.epoch == 0
    dl = torch.utils.data.DataLoader([(torch.ones(4), 0)] * 4, 2, num_workers=1, persistent_workers=True)
    collect_batches(learn, dl)
    assert dl._iterator is not None # its workers are kept


# class numbers only
def pictures():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 3, 8, 8), generator=g) / 255.
    return x, torch.randint(0, 3, (6,), generator=g)


def on_pictures(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, outputs)).eval()


def corrupted(learn): return corrupted_accuracy(learn, ['contrast'], [1, 5]).to_numpy().tolist()


def remembered(learn): return memorisation(learn, torch.tensor([0, 1, 2, 0, 1, 2]))


@pytest.mark.parametrize('measure', [corrupted, remembered, lambda learn: calibration_error(learn).value])
def test_labels_in_a_column(measure):
    "fastai's losses take labels of shape `(n, 1)`, too."
    x, y = pictures()
    def data(y): return batches(x, y, sizes=(4, 2))
    assert measure(learner(on_pictures(), data(y[:, None]))) == measure(learner(on_pictures(), data(y)))


@pytest.mark.parametrize('measure', [corrupted, remembered, calibration_error])
@pytest.mark.parametrize('outputs, target, message', [
    (1, lambda y: y.clamp(max=1), 'at least two classes'),                      # one logit for two classes
    (3, lambda y: y.double(), 'one class number per sample, got targets of torch.float64'), # numbers
    (6, lambda y: F.one_hot(y, 6), 'one class number per sample'),              # several labels per sample
    (3, lambda y: F.one_hot(y, 3).float(), 'one class number per sample'),      # shares of classes
    (2, lambda y: y, 'classes 0 to 1, got targets from 0 to 2'),                # a class without an output
    (3, lambda y: y.masked_fill(y == 0, -100), 'got targets from -100')])       # targets that a loss ignores
def test_other_tasks_are_refused(measure, outputs, target, message):
    x, y = pictures()
    y[:3] = torch.arange(3)
    data = [(x, target(y))]
    with pytest.raises(ValueError, match=message): measure(learner(on_pictures(outputs), data))


def test_dense_predictions_are_refused():
    x, _ = pictures()
    data = [(x, torch.zeros(6, 8, 8, dtype=torch.long))]
    learn = learner(nn.Conv2d(3, 4, 1).eval(), data)
    with pytest.raises(ValueError, match=r'\(n, classes\)'): calibration_error(learn)


def test_a_layer_in_training_mode_is_noticed_by_shifted_accuracy(tmp_path):
    x, y = pictures()
    bytes_ = x.mul(255).byte().permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / 'x.npy', bytes_)
    np.save(tmp_path / 'y.npy', y.numpy())
    net = nn.Sequential(nn.BatchNorm2d(3), *on_pictures()).eval()
    learn = learner(net, [(x, y)])
    learn.dls.vocab = ['a', 'b', 'c']
    files = tmp_path / 'x.npy', tmp_path / 'y.npy'
    assert shifted_accuracy(learn, files).n == 6
    net[0].train()
    before = deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r'training mode \(0\)'): shifted_accuracy(learn, files)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))


@pytest.mark.parametrize('level', [0, 1, 95, -.5, float('nan')])
def test_the_level_of_a_band_is_a_share(level):
    with pytest.raises(ValueError, match='`level` must lie in'):
        effective_robustness([.6], [.5], [.5, .6, .7], [.4, .5, .55], level)


# values, scales
@pytest.mark.parametrize('scale', [1e-15, 1., 1e4, 1e9])
def test_the_density_of_equal_eigenvalues_has_the_integral_one(scale):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(30, dtype=torch.float64))
        def forward(self, x): return x * self.w
    def loss(out, y): return scale * out.square().sum(1).mean() / 2
    data = [(torch.ones(2, 30, dtype=torch.float64), torch.zeros(2))]
    density = spectral_density(learner(Scaled().eval(), data, loss))
    assert torch.trapezoid(density.values, density.grid).item() == pytest.approx(1, rel=1e-3)
    at = density.grid[density.values.argmax()].item()
    assert at == pytest.approx(scale, rel=1e-5)
    mean = torch.trapezoid(density.values * density.grid, density.grid).item()
    assert mean == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize('sketch', [0, 10])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_trace_in_half_precision(dtype, sketch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 3)).to(dtype).eval()
    x, y = inputs()
    x = x.to(dtype)
    wide = deepcopy(net).double()
    *_, hessian = exact(wide, lambda f: F.cross_entropy(f(x.double()), y))
    found = hessian_trace(learner(net, batches(x, y)), sketch=sketch)
    assert found.value == pytest.approx(hessian.trace().item(), abs=4 * found.error)
    assert found.error < .1 * found.value


@pytest.mark.parametrize('dtype', [torch.float64, torch.complex128])
def test_a_parameter_without_axes_has_a_direction_of_its_size(dtype):
    net = nn.Module()
    net.scale = nn.Parameter(torch.tensor(4.6, dtype=dtype))
    net.layer = nn.Linear(2, 2)
    assert random_direction(net, norm='layer')['scale'].abs().item() == pytest.approx(4.6, rel=1e-12)
    assert random_direction(net)['scale'].item() == 0


def test_a_gradient_that_is_not_finite_is_not_called_zero():
    x, y = inputs()
    x[0, 0] = float('nan')
    for adaptive in (False, True):
        with pytest.raises(ValueError, match='gradient of the loss is NaN or infinite'):
            sam_sharpness(learner(network(), batches(x, y)), adaptive=adaptive)


def test_outputs_of_other_batches():
    "`outputs` and `scores` take other batches than the fixed ones, such as corrupted images."
    x, y = inputs()
    net = network()
    loss = FixedLoss(learner(net, batches(x, y)))
    with torch.no_grad():
        for (scores, labels), by in zip(loss.scores([((2 * x[:4],), y[:4])]), [y[:4]], strict=True):
            assert torch.equal(scores, net(2 * x[:4])) and torch.equal(labels, by)
    assert len(list(islice(loss.outputs(), 1))) == 1


class OverflowsOnOne(nn.Module):
    "A network whose output for the last sample of a batch is NaN."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        out = self.net(x.flatten(1).double()[:, :4])
        out[-1] = float('nan')
        return out


@pytest.mark.parametrize('measure', ['calibration', 'memorisation', 'corrupted', 'shifted', 'agreement'])
def test_an_output_of_nan_is_no_answer(tmp_path, measure):
    "The largest of scores that are NaN is that of class 0, which can be the right class by chance."
    x, y = torch.rand(4, 3, 8, 8, dtype=torch.float64), torch.zeros(4).long()
    net = OverflowsOnOne(network()).eval()
    learn = learner(net, [(x, y)])
    learn.dls.vocab = ['0', '1', '2']
    np.save(tmp_path / 'x.npy', (255 * x).byte().permute(0, 2, 3, 1).numpy())
    np.save(tmp_path / 'y.npy', y.numpy())
    calls = dict(
        calibration=lambda: calibration_error(learn),
        memorisation=lambda: memorisation(learn, y + 1, learn.dls.valid),
        corrupted=lambda: corrupted_accuracy(learn, ['brightness'], [1], mean=0., std=1.),
        shifted=lambda: shifted_accuracy(learn, (tmp_path / 'x.npy', tmp_path / 'y.npy'), mean=0., std=1.),
        agreement=lambda: agreement(net, net, [(x, y)]))
    with pytest.raises(ValueError, match='NaN for some samples'): calls[measure]()
    net.forward = lambda x: net.net(x.flatten(1).double()[:, :4])
    calls[measure]() # without NaN, the same call is measured


@pytest.mark.parametrize('make', [
    lambda learn: hessian_trace(learn, tol=float('nan')),
    lambda learn: spectral_density(learn, width=float('nan'))])
def test_a_tolerance_or_width_of_nan_is_refused(make):
    with pytest.raises(ValueError, match='must be positive'): make(learner(network(), batches(*inputs())))
