"Training of kinds that image classification does not have: complex weights, hidden states, frozen networks."
import math
from functools import partial

import pytest
import torch
from conftest import as_loader, learner
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.rnn import rnn_cbs
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.losses import CrossEntropyLossFlat
from fastai.text.models.awdlstm import AWD_LSTM
from fastai.text.models.core import LinearDecoder, SequentialRNN
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.fixed_loss import FixedLoss
from sadt_nb.core.states import _rows_of_state, hidden_states
from sadt_nb.core.perturb import ascent, global_dot, global_norm, weight_sizes
from sadt_nb.measures.hessian import hessian_trace
from sadt_nb.measures.sharpness import sam_sharpness
from sadt_nb.methods.agc import AGC
from sadt_nb.methods.asam import ASAM, asam_step
from sadt_nb.methods.controls import RepeatBatch, RepeatStep
from sadt_nb.methods.esam import ESAM, esam_step
from sadt_nb.methods.gradient_centralization import GradientCentralization
from sadt_nb.methods.gsam import GSAM, gsam_step
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.sadt import (SADT, gradient_ascent, layer_noise, normalized_ascent, sadt_step,
                                  weight_noise)
from sadt_nb.methods.sam import SAM, sam_step

METHODS = {
    'sam': partial(SAM, .1), 'sam adaptive': partial(SAM, 1., adaptive=True), 'asam': partial(ASAM, .5),
    'gsam': partial(GSAM, .1, .1), 'gsam adaptive': partial(GSAM, .1, .1, adaptive=True),
    'looksam': partial(LookSAM, .1, k=2), 'esam': partial(ESAM, .1, beta=.5),
    'sadt1': partial(SADT, 1, noise_scale=1000), 'sadt3': partial(SADT, 3, noise_scale=1000),
    'sadt up': partial(SADT, rho=.5),
}
STEPS = {
    'sam': partial(sam_step, rho=.1), 'sam adaptive': partial(sam_step, rho=1., adaptive=True),
    'asam': partial(asam_step, rho=.5), 'gsam': partial(gsam_step, rho=.1),
    'esam': partial(esam_step, rho=.1), 'sadt': partial(sadt_step, perturb=[weight_noise(.1)]),
}


def closure_for(name, net, x, y):
    "Return a closure in the form that the method of this name takes."
    def loss(): return F.cross_entropy(net(x), y)
    def losses(rows):
        part = slice(None) if rows is None else rows
        return F.cross_entropy(net(x[part]), y[part], reduction='none')
    def both():
        logits = net(x)
        return logits, F.cross_entropy(logits, y)
    if name.startswith('esam'): return losses
    return both if name.startswith('sadt') else loss


def by_callback(name, net, data):
    torch.manual_seed(2)
    learner(net, [METHODS[name]()], data).fit(1)
    return flat_real(net)


def by_wrapper(name, net, data):
    torch.manual_seed(2)
    opt = MethodOptimizer(METHODS[name](), torch.optim.SGD(net.parameters(), lr=.1, momentum=.9), net)
    for x, y in data: opt.step(closure_for(name, net, x, y))
    return flat_real(net)


def by_function(name, net, data):
    torch.manual_seed(2)
    opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
    for x, y in data: STEPS[name](net, closure_for(name, net, x, y), opt)
    return flat_real(net)


def flat_real(net):
    parts = [torch.view_as_real(p) if p.is_complex() else p for p in net.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


WAYS = [(by_callback, name) for name in METHODS] + [(by_wrapper, name) for name in METHODS]
WAYS += [(by_function, name) for name in STEPS]


def data(n=4, bs=6):
    g = torch.Generator().manual_seed(7)
    x = torch.randn(n * bs, 4, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (n * bs,), generator=g)
    return list(zip(x.split(bs), y.split(bs)))


# Complex weights
class Waves(nn.Module):
    "A layer with complex weights between dense layers; `real`: two real weights for every complex one."
    def __init__(self, real):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(4, 4)
        weight = torch.randn(5, 4, dtype=torch.cdouble)
        bias = torch.randn(5, dtype=torch.cdouble)
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if real else weight)
        self.bias = nn.Parameter(torch.view_as_real(bias).clone() if real else bias)
        self.last = nn.Linear(5, 3)
        self.double()
    def forward(self, x):
        weight, bias = (p if p.is_complex() else torch.view_as_complex(p) for p in (self.weight, self.bias))
        z = self.first(x).to(weight.dtype) @ weight.conj().T + bias.conj()
        return self.last(z.real * z.imag)


@pytest.mark.parametrize('way, name', WAYS)
def test_a_complex_weight_is_two_real_ones(way, name):
    got, expected = (way(name, Waves(real), data()) for real in (False, True))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert (got - flat_real(Waves(False))).abs().max() > .01


def test_a_layer_times_noise_has_noise_in_both_parts():
    steps = {}
    for real in (True, False):
        net, g = Waves(real), torch.Generator().manual_seed(0)
        params = dict(net.named_parameters())
        delta = layer_noise('weight', .5, multiply=True)(params, {}, g)['weight']
        steps[real] = delta if real else torch.view_as_real(delta)
    torch.testing.assert_close(steps[False], steps[True], rtol=0, atol=0)


def test_norms_and_products_of_complex_tensors_by_hand():
    a, b = torch.tensor([3 + 4j]), torch.tensor([1 - 2j])
    assert global_norm([a, torch.tensor([12.])]) == 13 and global_dot([a], [b]) == 3 - 8
    sizes = weight_sizes({'a': torch.tensor([-3 + 4j])}, ['a'], eta=1.)
    assert sizes['a'] == 4 + 5j
    step = ascent({'a': a.clone()}, 1., {'a': torch.tensor([2 + 1j])}) # T = (2, 1), T g = (6, 4)
    torch.testing.assert_close(step['a'], torch.tensor([12 + 4j]) / math.sqrt(52))


@pytest.mark.parametrize('adaptive', [False, True])
def test_sharpness_of_complex_weights(adaptive):
    got, expected = (sam_sharpness(learner(Waves(real).eval(), data=data()), .1, adaptive=adaptive)
                     for real in (False, True))
    assert abs(got - expected) < 1e-12 and got > 0


def test_the_hessian_refuses_complex_weights():
    with pytest.raises(ValueError, match="'weight' is complex.*two real parameters"):
        hessian_trace(learner(Waves(False).eval(), data=data()))


# Hidden states
class Memory(nn.Module):
    "A network whose hidden state goes from batch to batch; `kind` says where the state is kept."
    def __init__(self, kind='tensor'):
        super().__init__()
        torch.manual_seed(4)
        self.cell, self.head, self.kind = nn.Linear(7, 3), nn.Linear(3, 3), kind
        self.double()
        self.reset()
    def reset(self):
        self.h, self.batches = None, 0
        if self.kind == 'in place': self.h = torch.zeros(6, 3, dtype=torch.float64)
        if self.kind == 'list': self.h = []
        if self.kind == 'axis 1': self.h = (torch.zeros(1, 6, 3, dtype=torch.float64),)
    def state(self):
        "Return the hidden state `(n, 3)`, or `None` at the start."
        if self.kind in ('list', 'axis 1'): return self.h[0].reshape(-1, 3) if self.h else None
        return self.h
    def forward(self, x):
        h = self.state()
        h = torch.tanh(self.cell(torch.cat([x, x.new_zeros(len(x), 3) if h is None else h], 1)))
        if self.kind == 'tensor': self.h = h.detach()
        elif self.kind == 'in place': self.h.copy_(h.detach())
        elif self.kind == 'list': self.h[:] = [h.detach()]
        else: self.h = (h.detach()[None],)
        self.batches += 1
        return self.head(h)


def by_hand(data, rho=.1, lr=.1):
    "SAM with both passes of a batch from the same hidden state, and the state of the first pass afterwards."
    net = Memory()
    ps, states = list(net.parameters()), []
    for x, y in data:
        start = net.h
        g = torch.autograd.grad(F.cross_entropy(net(x), y), ps)
        left = net.h
        length = math.sqrt(sum((t**2).sum() for t in g))
        before = [p.detach().clone() for p in ps]
        with torch.no_grad():
            for p, t in zip(ps, g): p += rho * t / length
        net.h = start
        g = torch.autograd.grad(F.cross_entropy(net(x), y), ps)
        with torch.no_grad():
            for p, b, t in zip(ps, before, g): p.copy_(b - lr * t)
        net.h = left
        states.append(left)
    return net, torch.stack(states)


def plain_sgd(net): return torch.optim.SGD(net.parameters(), lr=.1)


class NoteStates(Callback):
    "Keeps the hidden state that each batch leaves."
    run_valid = False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append(self.model.state().clone())


def sam_by(way, net, data):
    "Make SAM's steps on a network with a memory; return the hidden states that the batches left."
    states = []
    if way == 'callback':
        learn = learner(net, [SAM(.1), NoteStates()], data)
        learn.fit(1)
        return torch.stack(learn.note_states.seen)
    opt = MethodOptimizer(SAM(.1), plain_sgd(net), net)
    base = plain_sgd(net)
    for x, y in data:
        if way == 'function': sam_step(net, closure_for('sam', net, x, y), base, rho=.1)
        if way == 'wrapper': opt.step(closure_for('sam', net, x, y))
        if way == 'two steps':
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            opt.first_step()
            F.cross_entropy(net(x), y).backward()
            opt.second_step()
        states.append(net.state().clone())
    return torch.stack(states)


@pytest.mark.parametrize('kind', ['tensor', 'in place', 'list', 'axis 1'])
@pytest.mark.parametrize('way', ['callback', 'function', 'wrapper', 'two steps'])
def test_both_passes_start_from_the_same_hidden_state(way, kind):
    expected, left = by_hand(data())
    net = Memory(kind)
    states = sam_by(way, net, data())
    torch.testing.assert_close(flat_real(net), flat_real(expected), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(states, left, rtol=1e-11, atol=1e-13)
    assert net.batches == (2 if way == 'callback' else 1) * len(data()) # `fit` validates, too


@pytest.mark.parametrize('way, name', WAYS)
def test_every_method_keeps_the_hidden_state_of_the_first_pass(way, name):
    "The state after a batch is the one of the same weights without the method."
    (x, y), *_ = data()
    net, alone = Memory(), Memory()
    alone(x)
    one = [(x, y)]
    if way is by_callback:
        learn = learner(net, [METHODS[name]()], one)
        learn.dls = DataLoaders(one, []) # without validation
        learn.fit(1)
    else: way(name, net, one)
    torch.testing.assert_close(net.h, alone.h, rtol=0, atol=0)
    assert net.batches == 1 # the other simple attributes of such a module are those of one pass, too


@pytest.mark.parametrize('kind', ['tensor', 'axis 1'])
def test_esam_takes_the_states_of_its_samples(kind):
    "With as many classes of states as samples, the second pass over two samples starts from their states."
    (x, y), *_ = data()
    seen = []
    class Spy(Memory):
        def forward(self, x):
            seen.append((x.detach().clone(), self.state().clone()))
            return super().forward(x)
    net = Spy(kind)
    h = torch.arange(18.).view(6, 3).double() / 18
    net.h = h if kind == 'tensor' else (h[None],)
    esam_step(net, closure_for('esam', net, x, y), plain_sgd(net), rho=.1, gamma=.5)
    first, _, second = seen
    rows = [next(i for i in range(6) if torch.equal(x[i], part)) for part in second[0]]
    assert len(rows) == 3 and torch.equal(first[1], h)
    assert torch.equal(second[1], h[rows])


def awd_lstm(seed=0):
    torch.manual_seed(seed)
    # with weight_p=0, fastai cannot evaluate the network
    body = AWD_LSTM(12, 5, 7, 2, hidden_p=0., input_p=0., embed_p=0., weight_p=1e-14)
    return SequentialRNN(body, LinearDecoder(12, 5, 0., tie_encoder=body.encoder)).double()


def text(n=4, bs=3, length=6):
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 12, (bs, n * length + 1), generator=g)
    parts = range(0, n * length, length)
    return [(tokens[:, i:i + length], tokens[:, i + 1:i + 1 + length]) for i in parts]


@pytest.mark.parametrize('cb', [SAM(.1), SAM(.1, rng='replay'), GSAM(.1, .1, alpha=0.), ESAM(.1, 1., 1.)])
def test_fastais_language_model_against_a_loop(cb):
    "AWD_LSTM with the callbacks of fastai; the second pass has the loss terms of `RNNRegularizer`, too."
    loss_func = CrossEntropyLossFlat()
    net = awd_lstm()
    learner(net, [*rnn_cbs(alpha=.5, beta=.25), cb], text(), loss_func=loss_func).fit(2)
    by_hand, ps = awd_lstm(), None
    def loss(x, y):
        logits, raw, out = by_hand(x)
        drift = (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        return loss_func(logits, y) + .5 * out.pow(2).mean() + .25 * drift
    ps = list(by_hand.parameters())
    for _ in range(2):
        by_hand.reset()
        for x, y in text():
            start, n = by_hand[0].hidden, by_hand[0].bs
            g = torch.autograd.grad(loss(x, y), ps)
            left, length = by_hand[0].hidden, math.sqrt(sum((t**2).sum() for t in g))
            before = [p.detach().clone() for p in ps]
            with torch.no_grad():
                for p, t in zip(ps, g): p += .1 * t / length
            by_hand[0].hidden, by_hand[0].bs = start, n
            g = torch.autograd.grad(loss(x, y), ps)
            with torch.no_grad():
                for p, b, t in zip(ps, before, g): p.copy_(b - .1 * t)
            by_hand[0].hidden = left
    # fastai adds its terms in single precision
    torch.testing.assert_close(flat_real(net), flat_real(by_hand), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize('name', ['esam', 'looksam', 'sadt1', 'sadt3'])
def test_methods_train_fastais_language_model(name):
    "ESAM's pass over some samples changes fastai's attribute `bs`, which comes back."
    net = awd_lstm()
    learner(net, [*rnn_cbs(), METHODS[name]()], text(), loss_func=CrossEntropyLossFlat()).fit(2)
    assert net[0].bs == 3 and torch.isfinite(flat_real(net)).all()


def test_a_network_without_states_has_nothing_to_copy():
    assert hidden_states(nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))) == []


@pytest.mark.parametrize('kind', ['tensor', 'in place', 'list'])
def test_measures_start_from_the_same_hidden_state_at_every_call(kind):
    net = Memory(kind).eval()
    fresh = Memory().eval()
    loss = FixedLoss(learner(net, data=data()))
    expected = sum(F.cross_entropy(fresh(x), y).item() for x, y in data()) / len(data())
    for _ in range(3):
        assert abs(loss() - expected) < 1e-12 and abs(loss.gradient()[0] - expected) < 1e-12


def test_samples_lie_along_the_axis_that_recurrent_layers_use():
    "As many layers as samples: `(layers, n, width)`."
    t, rows = torch.randn(6, 6, 3), torch.tensor([1, 4])
    part = _rows_of_state(dict(h=(t, t[0]), other=torch.ones(2)), rows, 6)
    assert torch.equal(part['h'][0], t[:, rows]) and torch.equal(part['h'][1], t[0][rows])
    assert torch.equal(part['other'], torch.ones(2))


# Losses of single samples, for ESAM
class OwnLoss(nn.Module):
    "A loss without `reduction`."
    def forward(self, pred, y): return F.cross_entropy(pred, y)


class WrongLoss(OwnLoss):
    "A loss whose `reduction` changes nothing."
    reduction = 'mean'


def own_loss(pred, y): return F.cross_entropy(pred, y)
def reduced_loss(pred, y, reduction='mean'): return F.cross_entropy(pred, y, reduction=reduction)


def small_net(norm=False):
    torch.manual_seed(1)
    middle = nn.BatchNorm1d(8) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 3)).double()


@pytest.mark.parametrize('loss_func', [F.cross_entropy, reduced_loss, partial(F.cross_entropy, weight=None),
                                       CrossEntropyLossFlat()])
def test_esam_takes_functions_with_a_reduction(loss_func):
    def weights(loss_func):
        net = small_net()
        learner(net, [ESAM(.1)], data(), loss_func=loss_func).fit(1)
        return flat_real(net)
    torch.testing.assert_close(weights(loss_func), weights(nn.CrossEntropyLoss()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('loss_func', [own_loss, lambda pred, y: F.cross_entropy(pred, y), OwnLoss()])
def test_esam_refuses_a_loss_without_reduction_before_training(loss_func):
    net, batches_run = small_net(), []
    learn = learner(net, [ESAM(.1)], data(), loss_func=loss_func)
    net.register_forward_hook(lambda *args: batches_run.append(1))
    with pytest.raises(ValueError, match='`gamma` below 1 needs.*gamma=1'): learn.fit(1)
    assert not batches_run
    learner(net, [ESAM(.1, gamma=1.)], data(), loss_func=loss_func).fit(1)


def test_esam_names_a_reduction_that_does_nothing():
    learn = learner(small_net(), [ESAM(.1)], data(), loss_func=WrongLoss())
    with pytest.raises(ValueError, match='a loss for each of the 6 samples, got the shape'): learn.fit(1)


@pytest.mark.parametrize('way', ['callback', 'function', 'wrapper'])
@pytest.mark.parametrize('norm, kept', [(True, 2), (False, 1)])
def test_esam_keeps_two_samples_for_batchnorm(way, norm, kept):
    "`gamma` is a twelfth, so that a batch of six has half a sample."
    net, sizes, options = small_net(norm), [], dict(rho=.1, gamma=1 / 12)
    net.register_forward_pre_hook(lambda net, xb: sizes.append(len(xb[0])))
    (x, y), *_ = data()
    closure, base = closure_for('esam', net, x, y), plain_sgd(net)
    if way == 'callback': learner(net, [ESAM(**options)], [(x, y)]).fit(1)
    elif way == 'function': esam_step(net, closure, base, **options)
    else: MethodOptimizer(ESAM(**options), base, net).step(closure)
    assert sizes[:3] == [6, 6, kept] and torch.isfinite(flat_real(net)).all()


# The same method twice
TWICE = [(SAM, SAM), (SAM, ASAM), (GSAM, LookSAM), (ESAM, SAM), (SADT, SADT), (SADT, RepeatBatch),
         (RepeatStep, RepeatStep), (MESA, MESA)]


@pytest.mark.parametrize('one, other', TWICE)
def test_two_methods_for_the_same_thing_are_refused_before_training(one, other):
    net, before = small_net(), flat_real(small_net())
    names = f'{one.__name__}|{other.__name__}'
    with pytest.raises(ValueError, match=rf'one method that .*got ({names}) and ({names}); remove one'):
        learner(net, [one(), other()], data()).fit(1)
    assert torch.equal(flat_real(net), before)


@pytest.mark.parametrize('make', [partial(MESA, start_epoch=0), MixUp])
def test_a_batch_is_not_repeated_in_micro_batches_with_a_changed_loss(make):
    "The callback knows the teacher's outputs, or the mixed labels, for the last micro-batch only."
    batches = [(x.float(), y) for x, y in data()] # MixUp mixes in single precision
    def fit(net, *cbs): learner(net.float(), cbs, as_loader(batches), loss_func=CrossEntropyLossFlat()).fit(1)
    accumulate = GradientAccumulation(12)
    fit(small_net(), RepeatBatch(), accumulate)
    fit(small_net(), RepeatBatch(), make())
    net, before = small_net(), flat_real(small_net().float())
    with pytest.raises(ValueError, match=' knows the loss only for the last one; remove GradientAcc'):
        fit(net, RepeatBatch(), make(), accumulate)
    assert torch.equal(flat_real(net), before)


def test_a_method_once_more_after_the_first_is_removed():
    first = SAM(.1)
    learn = learner(small_net(), [first], data())
    learn.fit(1)
    learn.remove_cb(first)
    learn.add_cb(ASAM(.5))
    learn.fit(1)


@pytest.mark.parametrize('make', [GradientCentralization, AGC])
def test_transforms_of_the_gradient_twice_are_once(make):
    def weights(n):
        net = small_net()
        learner(net, [make() for _ in range(n)], data()).fit(1)
        return flat_real(net)
    torch.testing.assert_close(weights(2), weights(1), rtol=1e-12, atol=1e-14)
    assert not torch.equal(weights(1), weights(0))


# No gradient
class Without(nn.Module):
    "A network whose loss has no gradient (`none`), or a gradient of zero (`zero`)."
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.kind = nn.Linear(4, 3).double(), kind
    def forward(self, x):
        if self.kind == 'none': return x[:, :3].clone().requires_grad_()
        return self.layer(x) * 0


@pytest.mark.parametrize('kind', ['none', 'zero'])
@pytest.mark.parametrize('name', METHODS)
def test_a_batch_without_a_gradient_changes_nothing(name, kind):
    "As with plain SGD."
    net = Without(kind)
    by_callback(name, net, data())
    assert torch.equal(flat_real(net), flat_real(Without(kind)))


@pytest.mark.parametrize('way, name', [w for w in WAYS if w[0] is not by_callback])
def test_a_closure_without_a_gradient(way, name):
    "Zero changes nothing; no gradient at all is an error, because the closure may run another network."
    net = Without('zero')
    assert torch.equal(way(name, net, data()), flat_real(Without('zero')))
    with pytest.raises(ValueError, match='no parameter of the network has a gradient'):
        way(name, Without('none'), data())


def test_first_step_without_a_gradient():
    net = Without('none')
    opt = MethodOptimizer(SAM(.1), plain_sgd(net), net)
    with pytest.raises(ValueError, match='no parameter of the network has a gradient'): opt.first_step()


@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam', 'looksam', 'sadt3'])
def test_one_batch_without_a_gradient_among_others(name):
    "Training goes on after it, and the batch itself changes nothing."
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_net()
        def forward(self, x): return self.inner(x) if x[0, 0] > 0 else x[:, :3].clone().requires_grad_()
    flags = [x[0, 0] > 0 for x, _ in data()]
    assert any(flags) and not all(flags)
    net, only = Sometimes(), Sometimes()
    by_callback(name, net, data())
    by_callback(name, only, [d for d, flag in zip(data(), flags) if flag])
    if name in ('sam', 'asam', 'gsam'): # the others count batches, or draw noise for each
        torch.testing.assert_close(flat_real(net), flat_real(only), rtol=1e-12, atol=1e-14)
    assert torch.isfinite(flat_real(net)).all()


# A layer that only one pass uses
class Skips(nn.Module):
    "Three layers; the first pass leaves out `out_first`, the second `out_second`."
    def __init__(self, out_first=None, out_second=None):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b, self.c = (nn.Linear(4, 3).double() for _ in range(3))
        self.out, self.passes = (out_first, out_second), 0
    def forward(self, x):
        skipped = self.out[self.passes % 2]
        self.passes += 1
        return sum(layer(x) for name, layer in self.named_children() if name != skipped)


def gradients_of(net, x, y):
    "Return all gradients by name; zero where the pass leaves a layer out."
    loss = F.cross_entropy(net(x), y)
    return torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)


def dot(a, b): return sum((s * t).sum() for s, t in zip(a, b))


def expected_steps(kind, out, x, y, rho=.1, alpha=.4, lr=.1):
    "Return the weights after one step of SAM, GSAM or LookSAM, and after a second one of LookSAM."
    net = Skips(*out)
    ps = list(net.parameters())
    g = gradients_of(net, x, y)
    step = [rho * t / dot(g, g).sqrt() for t in g]
    with torch.no_grad():
        for p, t in zip(ps, step): p += t
    up = gradients_of(net, x, y)
    with torch.no_grad():
        for p, t in zip(ps, step): p -= t
    final = up
    if kind == 'gsam':
        along = dot(g, up) / dot(up, up)
        final = [u - alpha * (t - along * u) for t, u in zip(g, up)]
    with torch.no_grad():
        for p, t in zip(ps, final): p -= lr * t
    if kind == 'looksam':
        across = [u - dot(up, g) / dot(g, g) * t for t, u in zip(g, up)]
        length = dot(across, across).sqrt()
        net.out = None, None
        g = gradients_of(net, x, y)
        with torch.no_grad():
            for p, t, v in zip(ps, g, across): p -= lr * (t + .7 * dot(g, g).sqrt() * v / length)
    return flat_real(net)


ONE_PASS = {'sam': (partial(SAM, .1), partial(sam_step, rho=.1)),
            'gsam': (partial(GSAM, .1, .1), partial(gsam_step, rho=.1)),
            'looksam': (partial(LookSAM, .1, k=5), None)}


@pytest.mark.parametrize('out', [('c', None), (None, 'c'), ('b', 'c')])
@pytest.mark.parametrize('way', ['callback', 'function', 'wrapper'])
@pytest.mark.parametrize('kind', ONE_PASS)
def test_a_layer_that_one_pass_leaves_out_has_a_gradient_of_zero_there(kind, way, out):
    (x, y), *_ = data()
    net, (method, step) = Skips(*out), ONE_PASS[kind]
    base = plain_sgd(net)
    batches = 2 if kind == 'looksam' else 1
    if way == 'function' and step is None: pytest.skip('LookSAM has no plain function')
    opt = MethodOptimizer(method(), base, net) if way == 'wrapper' else None
    learn = learner(net, [method()], [(x, y)])
    for i in range(batches):
        if i: net.out = None, None
        if way == 'callback':
            net.train()
            learn.fit(1)
            net.passes += net.passes % 2 # `fit` validates, too
        elif way == 'function': step(net, closure_for('sam', net, x, y), base)
        else: opt.step(closure_for('sam', net, x, y))
    torch.testing.assert_close(flat_real(net), expected_steps(kind, out, x, y), rtol=1e-9, atol=1e-11)


def test_esam_draws_for_every_tensor_once_per_step():
    "A layer that the first micro-batch leaves out is perturbed in the second one, if its draw says so."
    (x, y), (x2, y2), *_ = data()
    net, moved = Skips(), []
    method = ESAM(.1, beta=1., gamma=1.)
    opt = MethodOptimizer(method, plain_sgd(net), net)
    at_rest = net.c.weight.detach().clone()
    net.out = 'c', None
    net.register_forward_pre_hook(lambda *args: moved.append(not torch.equal(net.c.weight, at_rest)))
    opt.backward(closure_for('esam', net, x, y))
    net.out = None, None
    opt.backward(closure_for('esam', net, x2, y2))
    assert moved == [False, False, False, True]


# Values out of range in the plain functions and in the wrapper
def refuse_step(step, **options):
    net = small_net()
    (x, y), *_ = data()
    name = {esam_step: 'esam', sadt_step: 'sadt'}.get(step, 'sam') # the kind of closure
    step(net, closure_for(name, net, x, y), plain_sgd(net), **options)


NUMBERS = [0, -1, math.nan, math.inf, -math.inf]
BAD = [(step, 'rho', v) for step in (sam_step, asam_step, gsam_step, esam_step) for v in NUMBERS]
BAD += [(asam_step, 'eta', v) for v in (-1, math.nan, math.inf)]
BAD += [(gsam_step, 'alpha', v) for v in (-1, math.nan, math.inf)]
BAD += [(esam_step, name, v) for name in ('beta', 'gamma') for v in (0, -1, 1.1, math.nan, math.inf)]
BAD += [(step, name, 'other') for step in (sam_step, asam_step, gsam_step, esam_step, sadt_step)
        for name in ('bn', 'rng')]
BAD += [(asam_step, 'weights', 'other'), (sadt_step, 'kl', 'other'), (sadt_step, 'perturb', [])]


@pytest.mark.parametrize('step, name, value', BAD)
def test_functions_refuse_values_out_of_range(step, name, value):
    with pytest.raises(ValueError, match=rf'`{name}(_max)?`'): refuse_step(step, **{name: value})


NEGATIVE = [-1, math.nan, math.inf]
BAD_METHODS = [(LookSAM, 'rho', v) for v in NUMBERS] + [(LookSAM, 'alpha', v) for v in NEGATIVE]
BAD_METHODS += [(LookSAM, 'k', v) for v in (0, -1, 2.5, math.nan, math.inf)]
BAD_METHODS += [(SAM, 'interval', v) for v in (0, -1, 2.5, math.nan, math.inf)]
BAD_METHODS += [(GSAM, name, v) for name in ('rho_max', 'rho_min') for v in (-1, math.nan, math.inf)]
BAD_METHODS += [(GSAM, 'lr_min', v) for v in (-1, math.nan)] + [(GSAM, 'lr_max', math.nan)]
BAD_METHODS += [(SADT, name, v) for name in ('kl_weight', 'noise_scale', 'rho') for v in NEGATIVE]


@pytest.mark.parametrize('method, name, value', BAD_METHODS)
def test_methods_refuse_values_out_of_range(method, name, value):
    with pytest.raises(ValueError, match=f'`{name}`'): method(**{name: value})


@pytest.mark.parametrize('make', [
    lambda v: weight_noise(v), lambda v: layer_noise('0', v), lambda v: gradient_ascent(v, 0.),
    lambda v: gradient_ascent(0., v), lambda v: normalized_ascent(v)])
@pytest.mark.parametrize('value', [-1, math.nan, math.inf])
def test_perturbations_refuse_values_out_of_range(make, value):
    with pytest.raises(ValueError, match='must (not be negative|be a finite number)'): make(value)
