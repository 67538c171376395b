"""How predictions are compared: classes along an axis, labels, numbers; each with values by hand."""
import math
from functools import partial

import pytest
import torch
from conftest import flat
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai import losses as fastai_losses
from fastai.losses import (BaseLoss, BCELossFlat, BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss,
                           FocalLoss, FocalLossFlat, L1LossFlat, LabelSmoothingCrossEntropy,
                           LabelSmoothingCrossEntropyFlat, MSELossFlat)
from fastai.optimizer import SGD
from fastai.vision.core import TensorMask
from tasks import NETWORKS, normal, task
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.losses import KINDS, Divergence, as_divergence, divergence_of, kd_loss, kl_div
from sadt_nb.measures.similarity import agreement, logit_mse
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.sadt import SADT, sadt_step, weight_noise
from sadt_nb.methods.saf import SAF


def categorical_by_hand(t, s, tau, axis):
    "The mean over predictions of the sum over classes, with plain numbers."
    t, s = ((z / tau).movedim(axis, -1).flatten(0, -2).tolist() for z in (t, s))
    total = 0.
    for a, b in zip(t, s):
        za, zb = sum(map(math.exp, a)), sum(map(math.exp, b))
        for u, v in zip(a, b):
            p, q = math.exp(u) / za, math.exp(v) / zb
            total += p * math.log(p / q)
    return total / len(t)


def bernoulli_by_hand(t, s, tau):
    total, t, s = 0., (t / tau).flatten().tolist(), (s / tau).flatten().tolist()
    for u, v in zip(t, s):
        p, q = 1 / (1 + math.exp(-u)), 1 / (1 + math.exp(-v))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total / len(t)


def gaussian_by_hand(t, s, tau):
    pairs = list(zip(t.flatten().tolist(), s.flatten().tolist()))
    return sum(((a - b) / tau)**2 for a, b in pairs) / len(pairs)


TASKS = { # outputs, loss function, and the divergence by hand
    'images': ((6, 3), nn.CrossEntropyLoss(), partial(categorical_by_hand, axis=1)),
    'images, fastai': ((6, 3), CrossEntropyLossFlat(), partial(categorical_by_hand, axis=1)),
    'segmentation': ((2, 3, 4, 5), nn.CrossEntropyLoss(), partial(categorical_by_hand, axis=1)),
    'segmentation, fastai': ((2, 3, 4, 5), CrossEntropyLossFlat(axis=1),
                             partial(categorical_by_hand, axis=1)),
    'segmentation, Dice': ((2, 3, 4, 5), DiceLoss(), partial(categorical_by_hand, axis=1)),
    'text': ((2, 5, 7), CrossEntropyLossFlat(), partial(categorical_by_hand, axis=-1)),
    'multi-label': ((6, 4), nn.BCEWithLogitsLoss(), bernoulli_by_hand),
    'multi-label, fastai': ((6, 4), BCEWithLogitsLossFlat(), bernoulli_by_hand),
    'one logit': ((6, 1), BCEWithLogitsLossFlat(), bernoulli_by_hand),
    'one logit, flat': ((6,), F.binary_cross_entropy_with_logits, bernoulli_by_hand),
    'regression': ((6, 1), MSELossFlat(), gaussian_by_hand),
    'regression, flat': ((6,), nn.MSELoss(), gaussian_by_hand),
    'several numbers': ((6, 3), partial(F.mse_loss), gaussian_by_hand),
}


@pytest.mark.parametrize('tau', [1., 2.5])
@pytest.mark.parametrize('task', TASKS)
def test_value_by_hand(task, tau):
    shape, loss, by_hand = TASKS[task]
    t, s = normal(*shape), normal(*shape, seed=1)
    assert divergence_of(loss)(t, s, tau).item() == pytest.approx(by_hand(t, s, tau), rel=1e-12)
    assert abs(divergence_of(loss)(t, t, tau).item()) < 1e-14


@pytest.mark.parametrize('task', TASKS)
def test_gradients_by_finite_differences(task):
    shape, loss, _ = TASKS[task]
    t, s = normal(*shape).requires_grad_(), normal(*shape, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(divergence_of(loss), (t, s))


def test_a_constant_per_pixel_changes_nothing():
    z = normal(2, 3, 4, 5)
    shifted = z + normal(2, 1, 4, 5, seed=1)
    assert divergence_of(nn.CrossEntropyLoss())(z, shifted).abs() < 1e-12


CLASSES, PIXELS = Divergence('categorical', 1), Divergence('categorical', -1) # by the axis of the classes
LABELS, NUMBERS = Divergence('bernoulli'), Divergence('gaussian')
# the same for losses that leave out the target -100
SOME_CLASSES = Divergence('categorical', 1, ignore_index=-100)
SOME_PIXELS = Divergence('categorical', -1, ignore_index=-100)
TORCH_LOSSES = { # None: the outputs are not logits or means, so none of the three divergences fits
    'CrossEntropyLoss': SOME_CLASSES, 'NLLLoss': SOME_CLASSES, 'NLLLoss2d': SOME_CLASSES,
    'BCEWithLogitsLoss': LABELS, 'MultiLabelSoftMarginLoss': LABELS, 'MSELoss': NUMBERS,
    **dict.fromkeys(['AdaptiveLogSoftmaxWithLoss', 'BCELoss', 'CTCLoss', 'CosineEmbeddingLoss',
                     'GaussianNLLLoss', 'HingeEmbeddingLoss', 'HuberLoss', 'KLDivLoss', 'L1Loss',
                     'LinearCrossEntropyLoss', 'MarginRankingLoss', 'MultiLabelMarginLoss',
                     'MultiMarginLoss', 'PoissonNLLLoss', 'SmoothL1Loss', 'SoftMarginLoss',
                     'TripletMarginLoss', 'TripletMarginWithDistanceLoss']),
}
SIZES = {'AdaptiveLogSoftmaxWithLoss': (8, 5, [2]), 'LinearCrossEntropyLoss': (4, 3)}


@pytest.mark.filterwarnings('ignore::FutureWarning') # NLLLoss2d is deprecated
@pytest.mark.parametrize('name', [n for n in dir(nn) if 'Loss' in n])
def test_the_divergence_of_every_loss_of_torch(name):
    loss = getattr(nn, name)(*SIZES.get(name, ()))
    assert divergence_of(loss) == TORCH_LOSSES[name]
    assert divergence_of(partial(loss)) == TORCH_LOSSES[name]
    if TORCH_LOSSES[name] is None:
        with pytest.raises(ValueError, match=f'no default for the loss function {name};'):
            as_divergence(None, loss)


FASTAI_LOSSES = {
    'CrossEntropyLossFlat': (CrossEntropyLossFlat(), SOME_PIXELS),
    'FocalLoss': (FocalLoss(), SOME_CLASSES), 'FocalLossFlat': (FocalLossFlat(), SOME_PIXELS),
    'BCEWithLogitsLossFlat': (BCEWithLogitsLossFlat(), LABELS),
    'BCELossFlat': (BCELossFlat(), None), 'MSELossFlat': (MSELossFlat(), NUMBERS),
    'L1LossFlat': (L1LossFlat(), None), 'DiceLoss': (DiceLoss(), CLASSES),
    'LabelSmoothingCrossEntropy': (LabelSmoothingCrossEntropy(), CLASSES),
    'LabelSmoothingCrossEntropyFlat': (LabelSmoothingCrossEntropyFlat(), PIXELS),
    'BaseLoss': (BaseLoss(nn.HuberLoss), None),
    'classes': (BaseLoss(nn.CrossEntropyLoss, axis=1), SOME_CLASSES),
    'labels': (BaseLoss(nn.BCEWithLogitsLoss, is_2d=False), LABELS),
    'numbers': (BaseLoss(nn.MSELoss, is_2d=False), NUMBERS),
    'partial': (partial(CrossEntropyLossFlat(axis=1)), SOME_CLASSES),
}


@pytest.mark.parametrize('name', sorted({*fastai_losses.__all__, *FASTAI_LOSSES}))
def test_the_divergence_of_every_loss_of_fastai(name):
    loss, expected = FASTAI_LOSSES[name]
    assert divergence_of(loss) == expected
    if expected is None:
        with pytest.raises(ValueError, match='no default for the loss function (Huber|BCE|L1)Loss;'):
            as_divergence(None, loss)


@pytest.mark.parametrize('axis', [1, -1])
def test_the_axis_of_a_loss_that_does_not_flatten(axis):
    "A constant that is added along the axis of the classes does not change the loss."
    loss = CrossEntropyLossFlat(axis=axis, flatten=False)
    z, y = normal(2, 3, 3, 3), torch.randint(0, 3, (2, 3, 3))
    classes = divergence_of(loss).axis
    def with_constant(along): return loss(z + normal(2, 3, 3, 3, seed=1).mean(along, keepdim=True), y)
    assert with_constant(classes).item() == pytest.approx(loss(z, y).item(), rel=1e-12)
    assert abs(with_constant(-classes).item() - loss(z, y).item()) > 1e-3


def test_other_losses():
    for unknown in (F.l1_loss, F.huber_loss, F.binary_cross_entropy, lambda p, y: p.mean()):
        assert divergence_of(unknown) is None


def test_the_argument_overrides_the_loss():
    assert as_divergence('gaussian', nn.CrossEntropyLoss()) == Divergence('gaussian')
    assert as_divergence('categorical', CrossEntropyLossFlat()) == SOME_PIXELS
    # an unknown loss of classes, inside a loss of fastai that has their axis
    assert as_divergence('categorical', BaseLoss(nn.MultiMarginLoss, axis=-1)) == PIXELS
    own = Divergence('gaussian', scale=3.)
    assert as_divergence(own, None) is own and own(torch.ones(2), torch.zeros(2)) == 3


@pytest.mark.parametrize('make, words', [
    (lambda: Divergence('laplace'), "'bernoulli'"), (lambda: Divergence('gaussian', scale=0.), '`scale`'),
    (lambda: Divergence()(normal(6, 1), normal(6, 1)), 'no classes along axis 1'),
    (lambda: Divergence()(normal(6), normal(6)), 'no classes along axis 1'),
    (lambda: Divergence('bernoulli')(normal(6), normal(6, 1)), 'must have the same shape'),
    (lambda: as_divergence(None, nn.HuberLoss()), 'no default for the loss function HuberLoss'),
])
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_kd_loss_takes_an_axis():
    t, s = normal(2, 5, 7), normal(2, 5, 7, seed=1)
    y = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 0, 1, 2]])
    expected = .3 * F.cross_entropy(s.reshape(-1, 7), y.reshape(-1)) + .7 * 4. * kl_div(t, s, 2.)
    assert kd_loss(t, s, y, .3, 2.).item() == pytest.approx(expected.item(), rel=1e-12)
    pixels, other = normal(2, 3, 4, 5), normal(2, 3, 4, 5, seed=1)
    y = torch.zeros(2, 4, 5, dtype=torch.long)
    expected = .3 * F.cross_entropy(other, y) + .7 * 4. * categorical_by_hand(pixels, other, 2., 1)
    assert kd_loss(pixels, other, y, .3, 2., axis=1).item() == pytest.approx(expected.item(), rel=1e-12)


def train(name, *cbs, epochs=3):
    net, samples, loss = task(name)
    dl = DataLoader(samples, bs=8, shuffle=False)
    learn = Learner(DataLoaders(dl, dl), net, loss_func=loss, opt_func=SGD, lr=.1, default_cbs=False,
                    cbs=[TrainEvalCallback, *cbs])
    learn.fit(epochs)
    return learn


def teacher(name):
    torch.manual_seed(9)
    return NETWORKS[name][0]().double()


WITH_TERM = {
    'sadt': lambda name: SADT(1, noise_scale=1000.),
    'sadt up': lambda name: SADT(1, noise_scale=1000., grad_at='up'),
    'saf': lambda name: SAF(2., 1., lag=1, start_epoch=1),
    'mesa': lambda name: MESA(2., 1., .5, start_epoch=0),
    'distillation': lambda name: Distillation(teacher(name), .5),
}


@pytest.mark.parametrize('method', WITH_TERM)
@pytest.mark.parametrize('name', NETWORKS)
def test_the_term_changes_training_for_every_task(name, method):
    plain = RepeatStep(2) if method.startswith('sadt') else None
    without = flat(train(name, *[plain] * (plain is not None)).model)
    got = flat(train(name, WITH_TERM[method](name)).model)
    assert (got - without).abs().max() > 1e-4 and torch.isfinite(got).all()


@pytest.mark.parametrize('name', NETWORKS)
def test_distillation_is_its_formula(name):
    net, samples, loss = task(name)
    x, y = (torch.stack(t) for t in zip(*samples[:8]))
    copy, other = teacher(name), teacher(name)
    learn = Learner(DataLoaders([(x, y)], [(x, y)]), net, loss_func=loss, opt_func=SGD, lr=.1,
                    default_cbs=False, cbs=[TrainEvalCallback, Distillation(copy, .3, 2.)])
    learn.fit(1)
    fresh = task(name)[0]
    kind = divergence_of(loss).kind
    by_hand = {'bernoulli': bernoulli_by_hand, 'gaussian': gaussian_by_hand}.get(kind)
    total = .3 * loss(fresh(x), y) + .7 * 4. * divergence_of(loss)(other(x).detach(), fresh(x), 2.)
    if by_hand: value = by_hand(other(x).detach(), fresh(x).detach(), 2.)
    else: value = categorical_by_hand(other(x).detach(), fresh(x).detach(), 2., divergence_of(loss).axis)
    imitation = (total - .3 * loss(fresh(x), y)).item()
    assert imitation == pytest.approx(.7 * 4. * value, rel=1e-10)
    total.backward()
    stepped = torch.cat([(p - .1 * p.grad).flatten() for p in fresh.parameters()])
    torch.testing.assert_close(flat(net), stepped.detach(), rtol=1e-12, atol=1e-14)


def test_an_unknown_loss_is_refused_before_training():
    net, samples, _ = task('regression')
    for loss in (nn.HuberLoss(), L1LossFlat()):
        for make in WITH_TERM.values():
            with pytest.raises(ValueError, match='has no default for the loss function'):
                learn = Learner(DataLoaders(samples, samples), net, loss_func=loss, opt_func=SGD,
                                default_cbs=False, cbs=[TrainEvalCallback, make('regression')])
                learn.fit(1)


def test_a_plain_step_with_one_output():
    x, y = normal(8, 4), normal(8, 1, seed=1)
    def step(**kwargs):
        torch.manual_seed(0)
        net = nn.Linear(4, 1).double()
        def closure():
            out = net(x)
            return out, F.mse_loss(out, y)
        noise, opt = torch.Generator().manual_seed(0), torch.optim.SGD(net.parameters(), lr=.1)
        sadt_step(net, closure, opt, [weight_noise(1.)], generator=noise, **kwargs)
        return flat(net)
    with pytest.raises(ValueError, match='set it to'): step()
    with pytest.raises(ValueError, match='no classes'): step(divergence='categorical')
    assert not torch.allclose(step(divergence='gaussian'), step(divergence='bernoulli'))


def test_agreement_of_segmentations_and_labels():
    class Fixed(nn.Module):
        def __init__(self, z):
            super().__init__()
            self.z = z
        def forward(self, x): return self.z
    z = torch.zeros(1, 2, 2, 2)
    z[0, 0] = 1.
    other = z.clone()
    other[0, 1, 0, 0] = 5. # one pixel of four in another class
    dl = [(torch.zeros(1), torch.zeros(1))]
    assert agreement(Fixed(z), Fixed(other), dl) == .75
    labels, others = torch.tensor([[1., -1.], [2., 3.]]), torch.tensor([[2., 1.], [3., 1.]])
    assert agreement(Fixed(labels), Fixed(others), dl, axis=None) == .75
    assert logit_mse(Fixed(labels), Fixed(others), dl) == pytest.approx((1 + 4 + 1 + 4) / 4)
    one, other = Fixed(labels[:, :1]), Fixed(others[:, :1])
    with pytest.raises(ValueError, match='axis=None'): agreement(one, other, dl)


class Shifted(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x): return x + self.logits


def test_a_label_is_predicted_if_its_logit_is_positive():
    "A logit of .5 is as positive as one of 2."
    a, b = torch.tensor([[.5, 2., -1.]]), torch.tensor([[2., .5, -1.]])
    assert agreement(Shifted(a), Shifted(b), [(torch.zeros(1, 1),)], axis=None) == 1


def test_the_factor_of_a_term():
    for squared, factor in ((True, .5 * 3**2), (False, .5)):
        assert SAF(lam=.5, tau=3., tau_squared=squared).factor == factor


# Predictions that the loss leaves out by its `ignore_index`, such as padding

LEAVING_OUT = { # loss functions, and the target that they leave out
    'class': (nn.CrossEntropyLoss(ignore_index=2), 2), 'default': (nn.CrossEntropyLoss(), -100),
    'function': (F.cross_entropy, -100), 'nll': (F.nll_loss, -100),
    'partial': (partial(F.cross_entropy, ignore_index=0), 0),
    'flat': (CrossEntropyLossFlat(ignore_index=1), 1),
    'partial of a class': (partial(nn.CrossEntropyLoss(ignore_index=1)), 1),
    'partial of a partial': (partial(partial(F.cross_entropy, ignore_index=0), label_smoothing=.1), 0),
    'focal': (FocalLoss(), -100), 'Dice': (DiceLoss(), None),
    'smoothing': (LabelSmoothingCrossEntropyFlat(), None), 'labels': (nn.BCEWithLogitsLoss(), None),
}


@pytest.mark.parametrize('name', LEAVING_OUT)
def test_the_target_that_a_loss_leaves_out(name):
    loss, ignored = LEAVING_OUT[name]
    assert divergence_of(loss).ignore_index == ignored
    if divergence_of(loss).kind != 'categorical': return
    assert as_divergence('categorical', loss).ignore_index == ignored
    if ignored is None: return
    # the loss itself gives the left-out row no gradient
    z, y = normal(4, 3).requires_grad_(), torch.tensor([0, 1, 2, ignored])
    loss(z, y).backward()
    assert not z.grad[3].any() and z.grad[:3].any()


@pytest.mark.parametrize('shape, axis', [((6, 3), 1), ((2, 3, 4, 5), 1), ((2, 5, 7), -1)])
def test_only_the_counted_predictions_are_averaged(shape, axis):
    t, s = normal(*shape), normal(*shape, seed=1).requires_grad_()
    y = torch.arange(t.numel() // t.shape[axis]).remainder(3).reshape(t.movedim(axis, -1).shape[:-1])
    keep = (y != 1).flatten()
    rows = [z.movedim(axis, -1).flatten(0, -2)[keep] for z in (t, s)]
    expected = categorical_by_hand(*(z.detach() for z in rows), 2., -1)
    got = Divergence('categorical', axis, ignore_index=1)(t, s, 2., y)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(*torch.autograd.grad(got, s), *torch.autograd.grad(kl_div(*rows, 2.), s),
                               rtol=1e-12, atol=1e-15)
    assert kl_div(t, s, 2., axis, y != 1) == got
    # fastai's masks of segmentations have an axis of size 1, and its tensors have classes
    assert Divergence('categorical', axis, ignore_index=1)(t, s, 2., TensorMask(y[:, None])) == got
    nothing = Divergence('categorical', axis, ignore_index=1)(t, s, 2., torch.ones_like(y))
    assert nothing == 0 and not torch.autograd.grad(nothing, s)[0].any()
    for targets in (None, y.double(), y.flatten()[:-1]): # no class indices, or not one per prediction
        everything = Divergence('categorical', axis, ignore_index=1)(t, s, 2., targets)
        assert everything == kl_div(t, s, 2., axis)


@pytest.mark.parametrize('kind', KINDS)
def test_the_divergence_of_no_outputs_is_zero(kind):
    t, s = normal(0, 3), normal(0, 3, seed=1).requires_grad_()
    got = Divergence(kind)(t, s)
    got.backward()
    assert got == 0 and s.grad.shape == (0, 3)
    if kind == 'categorical': assert kl_div(t, s, counted=torch.ones(0, dtype=torch.bool)) == 0


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_if_every_prediction_counts_no_bit_is_another(dtype):
    t, s = normal(1027, 10).to(dtype), normal(1027, 10, seed=1).to(dtype).requires_grad_()
    plain, some = kl_div(t, s, 5.), kl_div(t, s, 5., counted=torch.ones(1027, dtype=torch.bool))
    assert plain == some
    assert torch.equal(*torch.autograd.grad(plain, s), *torch.autograd.grad(some, s))


def trained_on(x, y, loss, *cbs):
    "Return the weights after four epochs with the samples in one batch."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 7)).double()
    dl = DataLoader(list(zip(x, y)), bs=len(x), shuffle=False)
    Learner(DataLoaders(dl, dl), net, loss_func=loss, opt_func=SGD, lr=.1, default_cbs=False,
            cbs=[TrainEvalCallback, *cbs]).fit(4)
    return flat(net)


@pytest.mark.parametrize('ignored', [-100, 2])
@pytest.mark.parametrize('method', WITH_TERM)
def test_padding_changes_nothing(method, ignored):
    "The network treats each token alone, so padded texts train it as their tokens without padding do."
    x, y = normal(6, 5, 4), torch.arange(30).remainder(7).reshape(6, 5)
    y[y == 2] = ignored
    counted = y != ignored
    loss = CrossEntropyLossFlat(ignore_index=ignored)
    expected = trained_on(x[counted], y[counted], loss, WITH_TERM[method]('text'))
    got = trained_on(x, y, loss, WITH_TERM[method]('text'))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    as_told = WITH_TERM[method]('text')
    as_told.divergence = PIXELS # counts every token
    assert (trained_on(x, y, loss, as_told) - expected).abs().max() > 1e-6


def test_padding_with_extra_passes_over_some_samples():
    "ESAM's second pass takes some of the samples, and the term must take the targets of the same samples."
    x, y = normal(6, 5, 4), torch.arange(30).remainder(7).reshape(6, 5)
    def trained(padding):
        inputs = torch.where((y == 2)[..., None], padding, x)
        targets = y.masked_fill(y == 2, -100)
        return trained_on(inputs, targets, CrossEntropyLossFlat(), ESAM(.1, beta=1., gamma=.5),
                          Distillation(teacher('text'), .5))
    torch.testing.assert_close(trained(0.), trained(3.), rtol=1e-10, atol=1e-12)


def test_kd_loss_leaves_out_the_targets_that_the_cross_entropy_leaves_out():
    t, s, y = normal(6, 4), normal(6, 4, seed=1), torch.tensor([0, -100, 2, 3, -100, 1])
    counted = y != -100
    expected = kd_loss(t[counted], s[counted], y[counted], .3, 2.)
    assert kd_loss(t, s, y, .3, 2.).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize('ignored', [-100, 1])
def test_a_loop_in_which_the_loss_leaves_out_targets(ignored):
    x, y = normal(6, 4), torch.tensor([0, ignored, 2, 0, ignored, 2])
    def trained(x, y, select):
        torch.manual_seed(0)
        net = nn.Linear(4, 3).double()
        method = SADT(1, noise_scale=1000.)
        opt = MethodOptimizer(method, torch.optim.SGD(net.parameters(), lr=.1), net)
        def closure():
            out = net(x)[select]
            return out, F.cross_entropy(out, y[select], ignore_index=ignored)
        for _ in range(3): opt.step(closure)
        return flat(net)
    counted = y != ignored
    with pytest.raises(ValueError, match='let the closure return only'): trained(x, y, slice(None))
    without = trained(x[counted], y[counted], slice(None))
    torch.testing.assert_close(trained(x, y, counted), without, rtol=1e-10, atol=1e-12)


def own_function(teacher, student, temperature): return (teacher - student).square().mean()


# outputs, loss and divergence
LEAVING_OUT_IN_LOOPS = {
    'text': ((2, 5, 3), lambda z, y: F.cross_entropy(z.flatten(0, 1), y), Divergence('categorical', -1)),
    'text, with index': ((2, 5, 3), lambda z, y: F.cross_entropy(z.flatten(0, 1), y),
                         Divergence('categorical', -1, ignore_index=-100)),
    'segmentation': ((1, 3, 2, 5), lambda z, y: F.cross_entropy(z, y.reshape(1, 2, 5)), 'categorical'),
    'smoothed': ((10, 3), lambda z, y: F.cross_entropy(z, y, label_smoothing=.1), 'categorical'),
    'none': ((10, 3), lambda z, y: F.cross_entropy(z, y, reduction='none').mean(), None),
    'numbers': ((10, 3), lambda z, y: F.cross_entropy(z, y), 'gaussian'),
    'own function': ((10, 3), lambda z, y: F.cross_entropy(z, y), own_function),
}


@pytest.mark.parametrize('batch', [0, 2])
@pytest.mark.parametrize('case', LEAVING_OUT_IN_LOOPS)
def test_every_batch_of_a_loop_in_which_the_loss_leaves_out_targets(case, batch):
    "The divergence would count all outputs."
    shape, loss, divergence = LEAVING_OUT_IN_LOOPS[case]
    net = Attention(shape)
    method = SADT(1, noise_scale=1000., divergence=divergence)
    opt = MethodOptimizer(method, torch.optim.SGD(net.parameters(), lr=.1), net)
    def step(y):
        def closure():
            out = net(normal(2, 4))
            return out, loss(out, y)
        opt.step(closure)
    for _ in range(batch): step(labels(10))
    before = flat(net)
    some = labels(10).masked_fill(torch.arange(10) > 7, -100)
    if case == 'own function':
        step(some)
        return
    with pytest.raises(ValueError, match='let the closure return only'): step(some)
    assert torch.equal(flat(net), before)


# In a loop without a Learner, only the outputs and the loss of a closure are known

def contrastive(z): return F.cross_entropy(z, labels(3)) + F.cross_entropy(z.T, labels(3))


IN_LOOPS = { # outputs, loss, and the divergence in the first loop; `None`: an error
    'classes': ((6, 3), lambda z: F.cross_entropy(z, labels(6)), CLASSES),
    'probabilities of classes': ((6, 3), lambda z: F.cross_entropy(z, torch.full((6, 3), 1/3)), CLASSES),
    'smoothed labels': ((6, 3), lambda z: F.cross_entropy(z, labels(6), label_smoothing=.1), CLASSES),
    'focal loss': ((6, 3), lambda z: FocalLoss()(z, labels(6)) / 2 + z.square().mean(), CLASSES),
    'log-probabilities': ((6, 3), lambda z: F.nll_loss(z, labels(6)), CLASSES),
    'by hand': ((6, 3), lambda z: (z.logsumexp(1) - z[:, 0]).mean(), CLASSES),
    'autocast': ((6, 3), lambda z: F.cross_entropy(z.float(), labels(6)), CLASSES),
    'text': ((2, 5, 3), lambda z: F.cross_entropy(z.flatten(0, 1), labels(10)), None),
    'segmentation': ((2, 3, 4, 5), lambda z: F.cross_entropy(z, labels(2, 4, 5)), None),
    'multi-label': ((6, 3), lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)), None),
    'one logit': ((6, 1), lambda z: F.binary_cross_entropy_with_logits(z, torch.ones_like(z)), None),
    'image and text': ((3, 3), contrastive, CLASSES),
    'probabilities inside the loss': ((6, 3), lambda z: F.nll_loss(z.softmax(1).log(), labels(6)), CLASSES),
    'two heads': ((6, 6), lambda z: F.cross_entropy(z.reshape(12, 3), labels(12)), None),
    'one of two heads': ((6, 6), lambda z: F.cross_entropy(z[:, :3], labels(6)), None),
    'some rows': ((6, 3), lambda z: F.cross_entropy(z[:4], labels(4)), None),
    'classes in the rows': ((3, 6), lambda z: F.cross_entropy(z.T, labels(6)), None),
    'probabilities': ((6, 3), lambda z: F.nll_loss(z.square().log(), labels(6)), None),
    'logits from probabilities': ((6, 3), lambda z: F.cross_entropy(z.square().log(), labels(6)), None),
    'numbers': ((6, 3), lambda z: F.mse_loss(z, torch.ones_like(z)), None),
    'number': ((6,), lambda z: z.abs().mean(), None),
}


def labels(*shape): return torch.arange(math.prod(shape)).remainder(3).reshape(shape)


class Attention(nn.Module):
    "A network with a softmax of its own, which does not show what the outputs are."
    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.shape, self.bias, self.dense = shape, nn.Parameter(normal(*shape)), nn.Linear(4, 4).double()

    def forward(self, x):
        x = self.dense(x)
        return self.bias + (x.softmax(1) * x).sum() / 10


def loop_of(case, **kwargs):
    shape, loss, _ = IN_LOOPS[case]
    net = Attention(shape)
    method = SADT(1, noise_scale=1000., **kwargs)
    opt = MethodOptimizer(method, torch.optim.SGD(net.parameters(), lr=.1), net)
    def closure():
        out = net(normal(2, 4))
        return out, loss(out)
    return net, method, opt, closure


@pytest.mark.parametrize('case', IN_LOOPS)
def test_a_loop_without_a_learner_uses_a_divergence_that_fits_or_asks_for_one(case):
    expected = IN_LOOPS[case][2]
    net, method, opt, closure = loop_of(case)
    before = flat(net)
    if expected is not None:
        opt.step(closure)
        assert method.compare == expected
        return
    with pytest.raises(ValueError, match="'bernoulli' or 'gaussian', or to a `Divergence`"): opt.step(closure)
    assert torch.equal(flat(net), before) # before work started
    with pytest.raises(ValueError, match='set it to'):
        sadt_step(net, closure, opt.base, [weight_noise(1.)])
    assert torch.equal(flat(net), before)


@pytest.mark.parametrize('case', IN_LOOPS)
def test_a_loop_without_a_learner_takes_a_given_divergence(case):
    net, method, opt, closure = loop_of(case, divergence='gaussian')
    before = flat(net)
    opt.step(closure)
    assert method.compare == NUMBERS and not torch.equal(flat(net), before)
    net, method, opt, closure = loop_of(case, kl_weight=0.) # without a divergence, none is needed
    opt.step(closure)
    assert not torch.equal(flat(net), before)


def test_an_auxiliary_softmax_does_not_show_what_the_outputs_are():
    "The second term goes through the softmax inside the network, but not through the outputs."
    net, _, opt, _ = loop_of('numbers')
    def closure():
        out = net(normal(2, 4))
        return out, F.mse_loss(out, torch.ones_like(out)) + net.dense(normal(2, 4)).softmax(1).square().sum()
    message = 'not computed from the returned outputs by a softmax'
    with pytest.raises(ValueError, match=message): opt.step(closure)


def test_text_in_a_loop_is_text_in_a_learner():
    net, samples, loss = task('text')
    dl = DataLoader(samples, bs=8, shuffle=False)
    learn = Learner(DataLoaders(dl, dl), net, loss_func=loss, opt_func=SGD, lr=.1, wd=0.,
                    default_cbs=False, cbs=[TrainEvalCallback, SADT(1, noise_scale=1000.)])
    learn.fit(1)
    def in_loop(divergence):
        other = task('text')[0]
        opt = MethodOptimizer(SADT(1, noise_scale=1000., divergence=divergence),
                              torch.optim.SGD(other.parameters(), lr=.1), other)
        for x, y in dl:
            def closure(x=x, y=y):
                out = other(x)
                return out, F.cross_entropy(out.flatten(0, 1), y.flatten())
            opt.step(closure)
        return flat(other)
    # fastai's flat losses compute in single precision
    torch.testing.assert_close(flat(net), in_loop(PIXELS), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(flat(net), in_loop('categorical'), rtol=1e-4)
