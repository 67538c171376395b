"""SADT without a first step beside every method that acts on the optimizer's steps, against loops by hand.

The loops are written here from the methods' definitions, without a line of the library. Weights are a
dictionary by name, in float64, and the optimizer is SGD without momentum."""
from functools import partial

import pytest
import torch
from conftest import learner
from fastai.callback.core import Callback, CancelStepException
from fastai.callback.training import GradientAccumulation
from fastai.optimizer import SGD as OptSGD
from sadt_nb.core import micro_batches
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.sadt import SADT, gradient_ascent
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.weight_average import WeightAverage
from sadt_nb.methods.wsam import WSAM
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

LR, RHO, UP = .2, .3, .7
EPOCHS, BATCHES, SIZE = 2, 5, 6


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def samples():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * SIZE, 4, generator=g, dtype=torch.float64)
    return x, torch.randint(0, 3, (BATCHES * SIZE,), generator=g)


def batches(): return list(zip(*(t.split(SIZE) for t in samples())))


# Arithmetic of weights by name

def added(a, b, factor=1.): return {n: a[n] + factor * b[n] for n in a}
def times(a, factor): return {n: factor * t for n, t in a.items()}
def dot(a, b): return sum((a[n] * b[n]).sum() for n in a)
def norm(a): return dot(a, a).sqrt()
def uphill(w, g): return added(w, g, RHO / norm(g))


def gradient(w, loss):
    "Return the gradient of `loss`, a function of the network's logits as a function of the inputs."
    w = {n: t.clone().requires_grad_() for n, t in w.items()}
    grads = torch.autograd.grad(loss(lambda x: functional_call(net(), w, (x,))), list(w.values()))
    return dict(zip(w, grads))


def plain_gradient(w, x, y): return gradient(w, lambda f: F.cross_entropy(f(x), y))


def kl(reference, logits):
    "KL(reference || prediction), the mean over samples; both are logits."
    p, log_p, log_q = reference.softmax(1), reference.log_softmax(1), logits.log_softmax(1)
    return (p * (log_p - log_q)).sum(1).mean()


def kl_of(q, x, f): return kl(q, f(x))
def logits_at(w, x): return functional_call(net(), w, (x,)).detach()


# Each rule returns the gradient that the optimizer uses. `stepped` gets the weights after the optimizer's
# first step with this gradient, and returns them as the method changes them; `end` gets the weights after
# the batch

class Plain:
    repeats = 1 # steps with each gradient; without momentum, two steps are one at twice the rate
    def stepped(self, w): return w
    def end(self, w): pass


class OfMESA(Plain):
    lam, tau, beta = .8, 2., .6
    def __init__(self, w): self.teacher = w
    def gradient(self, w, x, y):
        target = logits_at(self.teacher, x) / self.tau
        def loss(f): return F.cross_entropy(f(x), y) + self.lam * kl(target, f(x) / self.tau)
        return gradient(w, loss)
    def end(self, w): self.teacher = added(times(self.teacher, self.beta), w, 1 - self.beta)
    def method(self): return MESA(self.lam, self.tau, self.beta, start_epoch=0)
    def state(self, cb): return dict(cb.teacher.named_parameters()), self.teacher


class OfWSAM(Plain):
    alpha = .75 / .25
    def __init__(self, w): pass
    def gradient(self, w, x, y):
        def loss(f): return F.cross_entropy(f(x), y)
        g = gradient(w, loss)
        self.difference = added(gradient(uphill(w, g), loss), g, -1.)
        return g
    def stepped(self, w): return added(w, self.difference, -LR * self.alpha)
    def method(self): return WSAM(RHO, gamma=.75)
    def state(self, cb): return {}, {}


class OfLookSAM(Plain):
    def __init__(self, w): self.steps, self.direction = 0, None
    def gradient(self, w, x, y):
        def loss(f): return F.cross_entropy(f(x), y)
        g = gradient(w, loss)
        if self.steps % 2: return added(g, self.direction, .5 * norm(g))
        sam = gradient(uphill(w, g), loss)
        across = added(sam, g, -dot(sam, g) / dot(g, g))
        self.new = times(across, 1 / norm(across))
        return sam
    def end(self, w): self.steps, self.direction = self.steps + 1, self.new
    def method(self): return LookSAM(RHO, alpha=.5, k=2)
    def state(self, cb):
        found = cb.direction | dict(steps=torch.tensor(cb.steps))
        return found, self.direction | dict(steps=torch.tensor(self.steps))


class OfFriendlySAM(Plain):
    def __init__(self, w): self.mean = None
    def gradient(self, w, x, y):
        def loss(f): return F.cross_entropy(f(x), y)
        self.g = gradient(w, loss)
        d = self.g if self.mean is None else added(self.g, self.mean, -1.)
        return gradient(uphill(w, d), loss)
    def end(self, w):
        self.mean = self.g if self.mean is None else added(times(self.mean, .9), self.g, .1)
    def method(self): return FriendlySAM(RHO)
    def state(self, cb): return cb.mean, self.mean


class OfAverage(Plain):
    def __init__(self, w): self.all = []
    def gradient(self, w, x, y): return gradient(w, lambda f: F.cross_entropy(f(x), y))
    def end(self, w): self.all.append(w)
    def method(self): return WeightAverage(start=0.)
    def state(self, cb):
        mean = {n: torch.stack([w[n] for w in self.all]).mean(0) for n in self.all[0]}
        return dict(cb.learn.model.named_parameters()), mean


class OfSAM(Plain):
    def __init__(self, w): self.steps = 0
    def gradient(self, w, x, y):
        def loss(f): return F.cross_entropy(f(x), y)
        g = gradient(w, loss)
        return g if self.steps % 2 else gradient(uphill(w, g), loss)
    def end(self, w): self.steps += 1
    def method(self): return SAM(RHO, interval=2)
    def state(self, cb): return dict(steps=torch.tensor(cb.steps)), dict(steps=torch.tensor(self.steps))


class OfRepeat(Plain):
    repeats = 3
    def __init__(self, w): pass
    def gradient(self, w, x, y): return plain_gradient(w, x, y)
    def method(self): return RepeatStep(self.repeats)
    def state(self, cb): return {}, {}


RULES = dict(mesa=OfMESA, wsam=OfWSAM, looksam=OfLookSAM, friendly_sam=OfFriendlySAM, average=OfAverage,
             sam=OfSAM, repeat=OfRepeat)


def by_hand(rule, first_step=False, without=()):
    "Train with SADT beside a method; the batches in `without` make no step. Return weights and rule."
    w = {n: p.detach().clone() for n, p in net().named_parameters()}
    rule = rule(w)
    for i, (x, y) in enumerate(EPOCHS * batches()):
        q = logits_at(w, x)
        g = rule.gradient(w, x, y)
        if i in without: continue
        if first_step: w = rule.stepped(added(w, g, -LR * rule.repeats))
        aux = gradient(added(w, g, UP), partial(kl_of, q, x))
        w = added(w, added(g, aux), -LR * (1 if first_step else rule.repeats))
        if not first_step: w = rule.stepped(w)
        rule.end(w)
    return w, rule


def in_learner(cbs):
    learn = learner(net(), cbs, batches(), lr=LR)
    learn.fit(EPOCHS)
    return learn


def sadt(first_step=False): return SADT(perturb=[gradient_ascent(UP, 0.)], first_step=first_step)
def ordered(method, other, last): return [method, other] if last else [other, method]


def check(found, right):
    assert found.keys() == right.keys()
    for n, t in right.items(): torch.testing.assert_close(found[n].detach(), t, rtol=1e-10, atol=1e-12)


def check_training(learn, method, right, rule):
    average = getattr(learn, 'weight_average', None) # then the Learner has the averaged weights
    check(average.trained if average else dict(learn.model.named_parameters()), right)
    check(*rule.state(method))


both_orders = pytest.mark.parametrize('last', [False, True], ids=['sadt first', 'sadt last'])


@both_orders
@pytest.mark.parametrize('name', RULES)
def test_a_held_step_is_a_step_for_the_other_method(name, last):
    right, rule = by_hand(RULES[name])
    method = rule.method()
    learn = in_learner(ordered(method, sadt(), last))
    check_training(learn, method, right, rule)


@pytest.mark.parametrize('name, last', [*((name, False) for name in RULES), ('repeat', True)])
def test_with_two_steps_the_first_is_that_of_the_other_method(name, last):
    right, rule = by_hand(RULES[name], first_step=True)
    method = rule.method()
    learn = in_learner([sadt(first_step=True), method] if last else [method, sadt(first_step=True)])
    check_training(learn, method, right, rule)


@both_orders
def test_a_step_with_accumulated_gradients_is_repeated(last):
    "Two batches make a step; the gradient is that of both together, so by hand they are one batch."
    data = [tuple(map(torch.cat, zip(*batches()[i:i + 2]))) for i in (0, 2)]
    def train(data, *cbs):
        learn = learner(net(), [RepeatStep(3), *cbs][::-1 if last else 1], data, lr=LR)
        learn.fit(1)
        return dict(learn.model.named_parameters())
    w = {n: p.detach().clone() for n, p in net().named_parameters()}
    for x, y in data: w = added(w, plain_gradient(w, x, y), -3 * LR)
    check(train(batches()[:4], GradientAccumulation(2 * SIZE)), w)


def test_decay_in_the_gradient_is_not_repeated_with_a_held_step():
    "fastai's SGD adds L2 decay to `.grad`; each of three steps adds it once, at the weights of this step."
    decay = .3
    opt = partial(OptSGD, decouple_wd=False)
    learn = learner(net(), [RepeatStep(3), sadt()], batches(), lr=LR, opt_func=opt, wd=decay, wd_bn_bias=True)
    learn.fit(1)
    w = {n: p.detach().clone() for n, p in net().named_parameters()}
    for x, y in batches():
        q, g = logits_at(w, x), plain_gradient(w, x, y)
        step = added(g, gradient(added(w, g, UP), partial(kl_of, q, x)))
        for _ in range(3): w = added(w, added(step, w, decay), -LR)
    check(dict(learn.model.named_parameters()), w)


class See(Callback):
    order, run_valid = 10**6, False # after all methods
    def before_fit(self): self.weights = []
    def after_batch(self):
        self.weights.append({n: p.detach().clone() for n, p in self.model.named_parameters()})


@pytest.mark.parametrize('name', ['wsam', 'looksam', 'friendly_sam'])
def test_an_average_has_the_weights_after_the_whole_step(name):
    "MESA's teacher moves after the held step, and after the part of WSAM's step that follows it."
    mesa, see = MESA(lam=0., beta=.6, start_epoch=0), See()
    in_learner([RULES[name](None).method(), mesa, sadt(), see])
    average = {n: p.detach() for n, p in net().named_parameters()}
    for w in see.weights: average = added(times(average, .6), w, .4)
    assert len(see.weights) == EPOCHS * BATCHES
    check(dict(mesa.teacher.named_parameters()), average)


class CancelStep(Callback):
    "Cancels the step of the batch number 3, as mixed precision does after an overflow."
    def before_step(self):
        if self.train_iter == 3: raise CancelStepException()


@both_orders
@pytest.mark.parametrize('name', RULES)
def test_a_step_that_another_callback_cancels_is_none(name, last):
    right, rule = by_hand(RULES[name], without=[3])
    method = rule.method()
    learn = in_learner([CancelStep(), *ordered(method, sadt(), last)])
    check_training(learn, method, right, rule)


@both_orders
@pytest.mark.parametrize('name', RULES)
def test_a_held_step_that_a_scaler_skips_is_none(name, last, monkeypatch):
    "As with a teacher's gradient that overflows: SADT's own step is left out."
    made = []
    def skips(learn, step):
        made.append(len(made) != 3)
        if made[-1]: step()
    monkeypatch.setattr(micro_batches, 'step_unscaled', skips)
    right, rule = by_hand(RULES[name], without=[3])
    method = rule.method()
    learn = in_learner(ordered(method, sadt(), last))
    check_training(learn, method, right, rule)
