"""Parts of a network without a gradient in a batch, and terms that other callbacks add to the loss."""
from functools import partial

import pytest
import torch
from conftest import flat
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD, Adam
from tasks import normal
from torch import nn
from torch.nn import functional as F

from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM

R = 1e-14 # a radius at which every method is plain training, up to rounding
AS_PLAIN = {
    'sam': lambda: SAM(R), 'asam': lambda: ASAM(R), 'gsam': lambda: GSAM(R, R, alpha=0.),
    'looksam': lambda: LookSAM(R, alpha=0.), 'friendly_sam': lambda: FriendlySAM(R),
    'wsam': lambda: WSAM(R, gamma=.5), 'esam': lambda: ESAM(R, beta=1., gamma=1.), 'msam': lambda: MSAM(R),
    'every third batch': lambda: SAM(R, interval=3), 'a part of training': lambda: SAM(R, start=.3, stop=.7),
}


class Experts(nn.Module):
    "A network in which each batch uses one of three layers, by the first number of the batch."
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        expert = self.experts[int(x[0, 0].abs() * 1000) % 3]
        return self.last(expert(self.first(x).tanh()).tanh())

    def groups(self):
        "Return the parameters as groups of a fastai optimizer."
        return [list(self.first.parameters()), list(self.experts.parameters()), list(self.last.parameters())]


OPTIMIZERS = {'adam': partial(Adam, wd=.1), 'momentum': partial(SGD, mom=.9, wd=.1)}


def learner(method, opt='adam', *cbs, lr=.02):
    torch.manual_seed(0)
    samples = list(zip(normal(58, 6), torch.arange(58) % 3))
    dl = DataLoader(samples, bs=8, shuffle=False)
    own = [] if method is None else [method]
    return Learner(DataLoaders(dl, dl), Experts().double(), loss_func=nn.CrossEntropyLoss(), lr=lr,
                   opt_func=OPTIMIZERS[opt], splitter=Experts.groups, default_cbs=False,
                   cbs=[TrainEvalCallback, *own, *cbs])


@pytest.mark.parametrize('opt, more', [('adam', ()), ('momentum', ()), ('adam', (GradientClip(.2),)),
                                       ('adam', (GradientAccumulation(20),))],
                         ids=['adam', 'momentum', 'clipped', 'accumulated'])
@pytest.mark.parametrize('method', AS_PLAIN)
def test_a_layer_that_a_batch_does_not_use(method, opt, more):
    "The optimizer moves the layer as in plain training, where fastai leaves zeros in its gradient."
    plain = learner(None, opt, *more)
    plain.fit(2)
    got = learner(AS_PLAIN[method](), opt, *more)
    got.fit(2)
    torch.testing.assert_close(flat(got.model), flat(plain.model), rtol=1e-8, atol=1e-10)


def test_the_layer_moves_without_a_gradient():
    "Otherwise the test above would also pass if plain training left the layer alone."
    moved = []
    class Watch(Callback):
        def before_batch(self): self.before = [flat(e) for e in self.model.experts]
        def after_batch(self):
            if not self.training: return
            used = int(self.xb[0][0, 0].abs() * 1000) % 3
            for i, expert in enumerate(self.model.experts):
                if i != used: moved.append((flat(expert) - self.before[i]).abs().max().item())
    learner(SAM(.05), 'adam', Watch()).fit(3)
    assert sum(m > 1e-4 for m in moved) > 20


@pytest.mark.parametrize('opt', OPTIMIZERS)
@pytest.mark.parametrize('method', AS_PLAIN)
def test_frozen_layers(method, opt):
    "fastai's optimizer goes on with the momentum of layers that were frozen after the first fit."
    def train(method):
        learn = learner(method, opt)
        learn.fit(1)
        learn.freeze_to(-1)
        learn.fit(1)
        learn.unfreeze()
        learn.fit(1)
        return flat(learn.model)
    torch.testing.assert_close(train(AS_PLAIN[method]()), train(None), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('method', AS_PLAIN)
def test_an_unused_layer_has_no_zeros_during_the_passes(method):
    "The zeros would need the memory of another copy of the weights."
    seen = []
    class Watch(Callback):
        def after_pred(self):
            if self.training: seen.append([p.grad is None for p in self.model.experts.parameters()])
    learner(AS_PLAIN[method](), 'adam', Watch()).fit(2)
    if method in ('sam', 'asam', 'gsam', 'friendly_sam', 'wsam', 'esam'):
        extra = seen[3::2] # the extra passes after the first step
        assert len(extra) > 10 and all(map(all, extra))


class AddsTerm(Callback):
    "Adds the mean square of the outputs to the loss, as `RNNRegularizer` does with activations."
    order = 5
    def __init__(self, factor): self.factor = factor
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad + self.factor * self.pred.square().mean()


class Halves(Callback):
    "Halves the loss, as `GradientAccumulation` does with two micro-batches."
    order, scales_loss = 6, True
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad / 2


def moved(params, grads, generator): return {n: torch.full_like(p, .1) for n, p in params.items()}


def sadt_by_hand(factor, scale, grad_at):
    "Return the weights of a linear network after one step of SADT whose teacher has .1 added to the weights."
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 3).double(), normal(8, 6), torch.arange(8) % 3
    w = [p.detach().clone().requires_grad_() for p in net.parameters()]
    def out(w): return x @ w[0].T + w[1]
    q = out(w)
    loss = scale * (F.cross_entropy(q, y) + factor * q.square().mean())
    g = torch.autograd.grad(loss, w)
    up = [(p - .5 * d).detach().requires_grad_() for p, d in zip(w, g)]
    aux = [(p + .1).detach().requires_grad_() for p in up]
    def kl(a, b): return (a.softmax(1) * (a.log_softmax(1) - b.log_softmax(1))).sum(1).mean()
    if grad_at == 'aux': h = torch.autograd.grad(scale * kl(q.detach(), out(aux)), aux)
    else: h = torch.autograd.grad(scale * kl(out(up), out(aux).detach()), up)
    return torch.cat([(p - .5 * (a + b)).flatten() for p, a, b in zip(up, g, h)]).detach()


@pytest.mark.parametrize('grad_at', ['aux', 'up'])
@pytest.mark.parametrize('scale', [1., .5])
@pytest.mark.parametrize('factor', [0., 3.])
def test_a_term_of_another_callback_counts_once(factor, scale, grad_at):
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 3).double(), normal(8, 6), torch.arange(8) % 3
    cbs = [SADT(1, perturb=[moved], grad_at=grad_at), AddsTerm(factor), *[Halves()] * (scale < 1)]
    Learner(DataLoaders([(x, y)], [(x, y)]), net, loss_func=nn.CrossEntropyLoss(), lr=.5, opt_func=SGD,
            default_cbs=False, cbs=[TrainEvalCallback, *cbs]).fit(1)
    torch.testing.assert_close(flat(net), sadt_by_hand(factor, scale, grad_at), rtol=1e-10, atol=1e-12)


def test_a_term_counts_in_the_extra_pass_of_sam():
    "SAM's extra pass repeats the whole loss, so the term counts there, too."
    torch.manual_seed(0)
    net, x, y = nn.Linear(6, 3).double(), normal(8, 6), torch.arange(8) % 3
    w = [p.detach().clone().requires_grad_() for p in net.parameters()]
    def loss(w):
        z = x @ w[0].T + w[1]
        return F.cross_entropy(z, y) + 3. * z.square().mean()
    g = torch.autograd.grad(loss(w), w)
    norm = torch.cat([d.flatten() for d in g]).norm()
    up = [(p + .3 * d / norm).detach().requires_grad_() for p, d in zip(w, g)]
    h = torch.autograd.grad(loss(up), up)
    Learner(DataLoaders([(x, y)], [(x, y)]), net, loss_func=nn.CrossEntropyLoss(), lr=.5, opt_func=SGD,
            default_cbs=False, cbs=[TrainEvalCallback, SAM(.3), AddsTerm(3.)]).fit(1)
    expected = torch.cat([(p - .5 * d).flatten() for p, d in zip(w, h)]).detach()
    torch.testing.assert_close(flat(net), expected, rtol=1e-9, atol=1e-11)


def test_a_pass_without_noise_equals_two_plain_steps():
    "A teacher without noise adds nothing, also beside a term of another callback."
    def train(method, lr=1e-6):
        learn = learner(method, 'momentum', AddsTerm(3.), lr=lr)
        start = flat(learn.model)
        learn.fit(1)
        return flat(learn.model) - start
    sadt, repeat = train(SADT(1, noise_scale=0.)), train(RepeatStep(2))
    assert (sadt - repeat).norm() < 1e-5 * repeat.norm()
