"What belongs to others: parameters of another optimizer, attributes of the network, states of another time."
import copy
from contextlib import suppress

import pytest
import torch
from conftest import as_loader, batches, learner, mlp
from fastai.callback.core import Callback
from fastai.callback.schedule import LRFinder
from fastai.learner import Recorder
from fastai.optimizer import SGD
from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.methods.controls import RepeatBatch
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.weight_average import WeightAverage
from sadt_nb.methods.wsam import WSAM
from torch import nn
from torch.nn import functional as F

METHODS = dict(sam=lambda: SAM(rho=.5), looksam=lambda: LookSAM(rho=.5, k=2), gsam=lambda: GSAM(.5, .5),
               friendly_sam=lambda: FriendlySAM(rho=.5), wsam=lambda: WSAM(rho=.5), msam=lambda: MSAM(rho=.5),
               sadt=lambda: SADT(rho=.5, divergence='categorical'), repeat_batch=RepeatBatch)
ONE_PASS = 'sam', 'looksam', 'gsam', 'friendly_sam', 'wsam'
every_method = pytest.mark.parametrize('name', METHODS)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch():
    gen = torch.Generator().manual_seed(0)
    return torch.randn(16, 5, generator=gen, dtype=torch.float64), torch.randint(0, 3, (16,), generator=gen)


def sgd(params): return torch.optim.SGD(params, lr=.1, momentum=.9)
def values(net): return torch.cat([p.detach().flatten() for p in net.parameters()])
def new_scaler(): return torch.amp.GradScaler('cpu', init_scale=65536.)
def exactly(got, expected): torch.testing.assert_close(got, expected, rtol=0, atol=0)
def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


# with a scale, the small number that is added to a norm counts less, and many steps enlarge the difference
def roughly(got, expected): torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def closure_of(net):
    x, y = batch()
    def closure():
        out = net(x)
        return out, F.cross_entropy(out, y)
    return closure


# Parameters that another optimizer steps, or none

def by_closure(opt, net, scaler):
    del scaler
    opt.step(closure_of(net))


def by_split(opt, net, scaler):
    net.zero_grad()
    def backward():
        loss = closure_of(net)()[1]
        (scaler.scale(loss) if scaler else loss).backward()
    backward()
    if opt.first_step(): backward()
    opt.second_step()


def head_and_trunk(name, step, scaled, second):
    "Train the head with a method and clipping, and the trunk with plain SGD or not at all."
    net = network()
    scaler = new_scaler() if scaled else None
    opt = MethodOptimizer(METHODS[name](), sgd(net[2].parameters()), net, scaler, max_norm=.1)
    other = sgd(net[0].parameters()) if second else None
    for _ in range(3):
        step(opt, net, scaler)
        if second: scaler.step(other) if scaled else other.step()
        if scaled: scaler.update()
    return values(net)


@pytest.mark.parametrize('second', [False, True])
@pytest.mark.parametrize('name, step', [(n, by_closure) for n in METHODS] + [(n, by_split) for n in ONE_PASS])
def test_a_loss_scale_changes_no_clipped_step_beside_parameters_of_another_optimizer(name, step, second):
    # 65,536 is a power of two, so unscaling rounds nothing
    close(head_and_trunk(name, step, True, second), head_and_trunk(name, step, False, second))


class OwnScaler(torch.optim.SGD):
    "An optimizer that unscales in its own step, as accelerate's does."
    def __init__(self, params, scaler):
        super().__init__(params, lr=.1)
        self.scaler = scaler

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group['params']: p.grad /= self.scaler.get_scale()
        super().step(closure)


def test_a_gradient_is_clipped_without_the_scale_of_an_optimizer_that_unscales_itself():
    def trained(scaled):
        net, scaler = network(), new_scaler()
        base = OwnScaler(net.parameters(), scaler) if scaled else torch.optim.SGD(net.parameters(), lr=.1)
        opt = MethodOptimizer(SAM(.5), base, net, max_norm=.1)
        x, y = batch()
        def closure():
            loss = F.cross_entropy(net(x), y)
            (scaler.scale(loss) if scaled else loss).backward()
            return loss
        opt.step(closure)
        return values(net)
    close(trained(True), trained(False))


def test_what_the_last_step_has_left_in_a_parameter_without_optimizer_is_refused():
    def head_only():
        net = network()
        return net, MethodOptimizer(SAM(.5), sgd(net[2].parameters()), net)
    expected, reference = head_only()
    for _ in range(2): reference.step(closure_of(expected))
    net, opt = head_only()
    for zero_grad in (opt.zero_grad, net.zero_grad):
        zero_grad()
        closure_of(net)()[1].backward()
        opt.first_step()
        closure_of(net)()[1].backward()
        opt.second_step()
    close(values(net), values(expected))
    opt.zero_grad()
    closure_of(net)()[1].backward() # adds to the trunk's gradient
    before = values(net)
    with pytest.raises(ValueError, match=r"'0.weight'.*model.zero_grad\(\)"): opt.first_step()
    exactly(values(net), before)
    opt.cancel_first_step()
    assert all(p.grad is None for p in net.parameters())
    by_split(opt, net, None)
    reference.step(closure_of(expected))
    close(values(net), values(expected))


# A scaler knows an optimizer by its identity

@every_method
def test_one_scaler_serves_several_methods(name):
    def trained(scaler):
        nets = [network() for _ in range(3)]
        methods = METHODS[name](), SADT(divergence='categorical'), SAM()
        opts = [MethodOptimizer(m, sgd(net.parameters()), net, scaler) for m, net in zip(methods, nets)]
        for _ in range(40):
            for opt, net in zip(opts, nets): opt.step(closure_of(net))
            if scaler: scaler.update()
        return torch.cat([values(net) for net in nets])
    roughly(trained(new_scaler()), trained(None))


@pytest.mark.parametrize('at_call', [1, 2])
@every_method
def test_a_step_after_an_error_is_unscaled(name, at_call):
    def trained(scaler):
        net = network()
        opt = MethodOptimizer(METHODS[name](), sgd(net.parameters()), net, scaler)
        calls = [] # of the present step
        failing = False
        def closure():
            calls.append(1)
            if failing and len(calls) == at_call: raise MemoryError
            return closure_of(net)()
        for i in range(30):
            calls.clear()
            failing = i % 2 == 0
            with suppress(MemoryError):
                opt.step(closure)
                if scaler: scaler.update()
        return values(net)
    roughly(trained(new_scaler()), trained(None))


# The hidden state of a recurrent network

class Recurrent(nn.Module):
    "A recurrent network that notes the sum of the state from which a forward starts."
    def __init__(self, note):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.r, self.out = (nn.Linear(*n, dtype=torch.float64) for n in ((5, 6), (6, 6), (6, 3)))
        self.h = None
        self.note = note # a list of numbers would be a part of the state

    def reset(self): self.h = None

    def forward(self, x):
        h = torch.zeros(len(x), 6, dtype=torch.float64) if self.h is None else self.h
        self.note(h.sum().item())
        h = torch.tanh(self.a(x) + self.r(h))
        self.h = h.detach()
        return self.out(h)


def recurrent_steps(name, step, place, reset_every):
    "Train with `zero_grad` before the forward, or between the forward and its backward."
    starts = []
    net = Recurrent(starts.append)
    opt = MethodOptimizer(METHODS[name](), sgd(net.parameters()), net)
    x, y = batch()
    def first_pass():
        if place == 'before': opt.zero_grad()
        out = net(x)
        loss = F.cross_entropy(out, y)
        if place == 'between': opt.zero_grad()
        return out, loss
    def with_backward():
        out, loss = first_pass()
        if name != 'sadt': loss.backward() # the closure of SADT leaves it to the method
        return out, loss
    for i in range(6):
        if reset_every and i % reset_every == 0:
            net.reset()
            opt.zero_grad()
        if step is by_closure: opt.step(with_backward)
        else:
            first_pass()[1].backward()
            if opt.first_step(): F.cross_entropy(net(x), y).backward()
            opt.second_step()
    return starts, values(net)


@pytest.mark.parametrize('reset_every', [0, 2])
@pytest.mark.parametrize('name, step', [(n, by_closure) for n in METHODS] + [(n, by_split) for n in ONE_PASS])
def test_both_passes_start_from_one_hidden_state_wherever_the_loop_calls_zero_grad(name, step, reset_every):
    starts, weights = recurrent_steps(name, step, 'before', reset_every)
    if name in ('sam', 'sadt', 'wsam'): assert starts[::2] == starts[1::2] and len(set(starts)) > 3
    other_starts, other_weights = recurrent_steps(name, step, 'between', reset_every)
    assert other_starts == starts
    exactly(other_weights, weights)


# Attributes of the network

ATTRIBUTES = ('scaler', 'loss_scaler', 'skip_to_epoch', 'kept', 'per_sample', 'step_grads', 'lr_finder',
              'own_replay', 'radius_scales', 'optimizer', 'rho', 'partial_epochs', 'progress', 'keep_best',
              '_replaying', '_replayed_rows', '_other_loss')
IN_A_LEARNER = METHODS | dict(mesa=lambda: MESA(start_epoch=0), saf=lambda: SAF(lag=1, start_epoch=1),
                              weight_average=lambda: WeightAverage('swa', start=.5))


@pytest.mark.parametrize('name', IN_A_LEARNER)
def test_attributes_of_the_network_are_not_taken_for_those_of_the_learner(name):
    def trained(attributes):
        net = mlp()
        for attribute in attributes: setattr(net, attribute, 'of the network')
        learner(net, [IN_A_LEARNER[name]()], as_loader(batches())).fit(2)
        return values(net)
    exactly(trained(ATTRIBUTES), trained(()))


# States of another time

def loader():
    x, y = batch()
    return list(zip(x.split(4), y.split(4)))


def learner_of(method, net): return learner(net, [method], loader(), opt_func=SGD)
def fit(method, net, epochs=1): learner_of(method, net).fit(epochs)


STATEFUL = dict(sadt=lambda: SADT(noise_scale=1e3, divergence='categorical'),
                mesa=lambda: MESA(start_epoch=0, beta=.5),
                weight_average=lambda: WeightAverage('swa', start=.5),
                looksam=lambda: LookSAM(rho=.5, k=3), friendly_sam=lambda: FriendlySAM(rho=.5))


def same(a, b):
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize('name', STATEFUL)
def test_a_loaded_state_is_the_state_at_once(name):
    earlier, later = STATEFUL[name](), STATEFUL[name]()
    fit(earlier, network(), 2)
    state = copy.deepcopy(earlier.state_dict())
    fit(later, network(), 3) # has a state of its own
    for method in (STATEFUL[name](), later):
        method.load_state_dict(copy.deepcopy(state))
        assert same(method.state_dict(), state)


@pytest.mark.parametrize('name', STATEFUL)
def test_a_state_from_before_training_undoes_the_training(name):
    method, net = STATEFUL[name](), network()
    state, weights = copy.deepcopy(method.state_dict()), copy.deepcopy(net.state_dict())
    learn = learner_of(method, net)
    learn.fit(1)
    method.load_state_dict(state)
    net.load_state_dict(weights)
    learn.fit(2)
    fresh, other = STATEFUL[name](), network()
    fit(fresh, other, 2)
    exactly(values(net), values(other))
    assert same(method.state_dict(), fresh.state_dict())


class SmoothLoss(Callback):
    "Replaces fastai's recorder, which cannot average losses in double precision, in a search for a rate."
    def before_fit(self):
        self.learn.smooth_loss = torch.tensor(1.)
        self.learn.recorder = Recorder()
    def after_fit(self): del self.learn.recorder


def test_searches_for_a_rate_leave_the_noise_as_it_was():
    def trained(searches):
        net, method = network(), STATEFUL['sadt']()
        learn = learner_of(method, net)
        learn.fit(1)
        for _ in range(searches): learn.fit(1, cbs=[LRFinder(num_it=3, stop_div=False), SmoothLoss()])
        learn.fit(1)
        return values(net)
    for searches in (1, 2): exactly(trained(searches), trained(0))


# GSAM's radius in a loop without fastai

def test_gsam_needs_the_highest_rate_where_it_cannot_know_it():
    net = network()
    with pytest.raises(ValueError, match='set `lr_max`'):
        MethodOptimizer(GSAM(.1, .01), sgd(net.parameters()), net)
    method = GSAM(.1, .01, lr_max=.1)
    opt = MethodOptimizer(method, sgd(net.parameters()), net)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 - i / 4)
    radii = []
    for _ in range(4):
        radii.append(method.rho)
        opt.step(closure_of(net))
        schedule.step()
    assert radii == pytest.approx([.1, .0775, .055, .0325], rel=1e-12)
    assert MethodOptimizer(GSAM(.1, .1), sgd(net.parameters()), net).method.rho == .1
