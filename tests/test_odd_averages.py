"""Averages of complex weights and infinite buffers, teachers of recurrent networks, against hand loops."""
import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from conftest import learner
from fastai.callback.core import Callback, CancelBatchException, CancelFitException
from fastai.callback.rnn import ModelResetter, RNNCallback
from fastai.optimizer import SGD, OptimWrapper
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
from fastai.text.models.core import get_language_model
from sadt_nb.core.losses import Divergence
from sadt_nb.core.perturb import copy_not_finite_
from sadt_nb.core.recipe import Lookahead
from sadt_nb.core.teachers import Ensemble
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.weight_average import WeightAverage
from torch import nn
from torch.nn import functional as F

STEPS = 6


def values(step):
    "Return the values of all tensors at a step; step 0 is before training."
    g = torch.Generator().manual_seed(step)
    def real(): return torch.randn(3, generator=g, dtype=torch.float64)
    def complex(): return torch.complex(real(), real())
    found = dict(real=real(), complex=complex(), stat=real(), cstat=complex())
    found['mask'] = torch.tensor([0., -math.inf, 1.]).double()
    found['odd'] = real()
    if step == 2: found['odd'][0] = math.inf # one step only
    if step == 3: found['odd'][1] = math.nan
    found['count'] = torch.tensor(step)
    return found


class Driven(nn.Module):
    "A network with parameters and buffers of every kind, whose values `Drive` sets."
    def __init__(self):
        super().__init__()
        start = values(0)
        for name in ('real', 'complex'): self.register_parameter(name, nn.Parameter(start.pop(name)))
        for name, t in start.items(): self.register_buffer(name, t)
    def forward(self, x): return x * self.real + (self.complex * self.complex.conj()).real


class Drive(Callback):
    "Sets all values after every step, before a method reads them."
    order, run_valid = -9, False # just after fastai counts the batch
    def after_batch(self):
        for name, t in values(self.train_iter).items(): self.model.state_dict()[name].copy_(t)


def mixed(old, new, kept):
    "Return `kept` old + (1 - `kept`) new; what is not finite in one of the two is new, as are integers."
    old, new = old.numpy(), new.numpy()
    if not np.issubdtype(new.dtype, np.inexact): return torch.tensor(new)
    both = np.isfinite(old) & np.isfinite(new)
    with np.errstate(invalid='ignore'): mean = kept * old + (1 - kept) * new
    return torch.tensor(np.where(both, mean, new))


def drive(cb):
    x = torch.ones(2, 3, dtype=torch.float64)
    net, sgd = Driven(), partial(OptimWrapper, opt=torch.optim.SGD)
    learner(net, [cb, Drive()], [(x, 0 * x)] * STEPS, sgd, loss_func=F.mse_loss).fit(1)
    return net


def check(found, right):
    assert found.keys() == right.keys()
    for n, t in right.items(): torch.testing.assert_close(found[n], t, rtol=1e-12, atol=1e-14)


def test_the_teacher_of_mesa():
    mesa, average = MESA(beta=.7, start_epoch=5), values(0)
    drive(mesa)
    for step in range(1, STEPS + 1): average = {n: mixed(average[n], t, .7) for n, t in values(step).items()}
    check(mesa.teacher.state_dict(), average)


@pytest.mark.parametrize('kind', ['swa', 'ema'])
def test_a_weight_average(kind):
    average = values(1)
    found = drive(WeightAverage(kind, start=0., decay=.7))
    for step in range(2, STEPS + 1):
        kept = .7 if kind == 'ema' else (step - 1) / step
        average = {n: mixed(average[n], t, kept) for n, t in values(step).items()}
    check(found.state_dict(), average)


def test_the_slow_weights_of_lookahead():
    found, slow = drive(Lookahead(every=2, decay=.9)), values(0)
    for step in range(2, STEPS + 1, 2):
        kept = .9**2 * (step / STEPS)**3
        slow = {n: mixed(slow[n], t, kept) for n, t in values(step).items()}
    check(found.state_dict(), slow)


def test_finite_values_keep_their_bits():
    averages = [torch.tensor([-0., 0., 1e-45, 3e38]), torch.tensor([1 + 2j]), torch.tensor([3])]
    before = [t.clone() for t in averages]
    copy_not_finite_(averages, [torch.full((4,), 7.), torch.tensor([7j]), torch.tensor([7])])
    for a, b in zip(averages, before): assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


class Causal(nn.Module):
    "Attention with a causal mask in a buffer."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(1, 4), nn.Linear(4, 3)
        self.register_buffer('mask', nn.Transformer.generate_square_subsequent_mask(5))
    def forward(self, x):
        h = self.embed(x[..., None])
        return self.out(((h @ h.transpose(1, 2) + self.mask).softmax(-1) @ h).mean(1))


AVERAGING = dict(swa=partial(WeightAverage, 'swa', start=0.), ema=partial(WeightAverage, 'ema', decay=.9),
                 mesa=partial(MESA, start_epoch=0), lookahead=partial(Lookahead, 2))


@pytest.mark.parametrize('make', AVERAGING.values(), ids=AVERAGING)
def test_a_causal_mask(make):
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 5, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(4)]
    net = Causal()
    learner(net, [make()], data).fit(2)
    assert torch.equal(net.mask, Causal().mask)
    assert net(data[0][0]).isfinite().all()


# Recurrent networks

LAM, TAU, BETA, ALPHA, WORDS = .8, 2., .6, .4, 9


def language_model(seed=0, weight_p=1e-15):
    "Return a small AWD-LSTM without dropout; fastai's dropout of weights fails with a probability of 0."
    torch.manual_seed(seed)
    options = dict(awd_lstm_lm_config, emb_sz=6, n_hid=5, n_layers=2)
    options |= {name: 0. for name in options if name.endswith('_p')}
    net = get_language_model(AWD_LSTM, WORDS, config=options | dict(weight_p=weight_p)).double()
    net.reset() # also makes the dropped weights anew, which `double` has left
    return net


def texts():
    g = torch.Generator().manual_seed(3)
    return [(torch.randint(0, WORDS, (4, 7), generator=g), torch.randint(0, WORDS, (4, 7), generator=g))
            for _ in range(3)]


def term(target, logits):
    "KL(target || prediction), softened: the mean over all words."
    p, log_q = (target / TAU).softmax(-1), (logits / TAU).log_softmax(-1)
    return (p * (p.log() - log_q)).sum(-1).mean()


WORDWISE = Divergence('categorical', axis=-1)
def of_words(logits, y): return F.cross_entropy(logits.reshape(-1, WORDS), y.flatten())


def by_hand(teacher, loss, moves):
    "Train with `loss(plain loss, term)`; the states of both networks begin anew in every epoch."
    net = language_model()
    teacher.eval()
    opt = torch.optim.SGD(net.parameters(), lr=.5)
    for _ in range(2):
        net.train().reset()
        teacher.reset()
        for x, y in texts():
            logits = net(x)[0]
            with torch.no_grad(): target = teacher(x)[0]
            opt.zero_grad()
            loss(of_words(logits, y), term(target, logits)).backward()
            opt.step()
            if not moves: continue
            with torch.no_grad():
                for v, w in zip(teacher.parameters(), net.parameters()): v.mul_(BETA).add_(w, alpha=1 - BETA)
    return net


def recurrent(cbs, net=None, rnn=True):
    own = [ModelResetter(), RNNCallback()] if rnn else []
    net = net or language_model()
    learn = learner(net, [*own, *cbs], texts(), SGD, .5, loss_func=of_words)
    learn.fit(2)
    return net


def check_weights(found, right):
    for v, w in zip(found.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-10, atol=1e-12)


def test_mesa_of_a_recurrent_network():
    teacher, mesa = language_model(), MESA(LAM, TAU, BETA, start_epoch=0, divergence=WORDWISE)
    right = by_hand(teacher, lambda plain, t: plain + LAM * t, moves=True)
    check_weights(recurrent([mesa]), right)
    check_weights(mesa.teacher, teacher)


def test_distillation_of_a_recurrent_network():
    def loss(plain, t): return ALPHA * plain + (1 - ALPHA) * TAU**2 * t
    right = by_hand(language_model(1), loss, moves=False)
    check_weights(recurrent([Distillation(language_model(1), ALPHA, TAU, WORDWISE)]), right)


class Logits(nn.Module):
    "A network around a language model that returns the logits alone."
    def __init__(self, seed=1):
        super().__init__()
        self.net = language_model(seed)
    def reset(self): self.net.reset()
    def forward(self, x): return self.net(x)[0]


def ensemble(seed): return Ensemble([language_model(seed)])


@pytest.mark.parametrize('make', [language_model, Logits, ensemble])
def test_distillation_of_several_recurrent_networks(make):
    "The states of all members begin anew when those of the student do, and all outputs are unpacked."
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([language_model(1), language_model(2)])
        def reset(self):
            for net in self.nets: net.reset()
        def forward(self, x): return (sum(net(x)[0] for net in self.nets) / 2,)
    def loss(plain, t): return ALPHA * plain + (1 - ALPHA) * TAU**2 * t
    right = by_hand(Mean(), loss, moves=False)
    teachers = [make(1), make(2)]
    for net in teachers: # leave states of an earlier use
        with torch.no_grad(): (net.models[0] if make is ensemble else net)(texts()[1][0])
    check_weights(recurrent([Distillation(teachers, ALPHA, TAU, WORDWISE)]), right)


def test_the_copy_of_a_network_with_dropped_weights_is_its_own():
    "After a pass in training, fastai's modules hold weights that were computed from others."
    net = language_model(weight_p=.5)
    net.train()(texts()[0][0])
    mesa = MESA(start_epoch=1, divergence=WORDWISE)
    recurrent([mesa], net)
    mine = {t.data_ptr() for t in [*net.parameters(), *net.buffers()]}
    assert not mine & {t.data_ptr() for t in mesa.teacher.parameters()}
    lstm = mesa.teacher[0].rnns[0].module
    assert not any(t.requires_grad for t in lstm._flat_weights)
    assert lstm.weight_hh_l0 is lstm._flat_weights[1]
    assert lstm.weight_hh_l0.data_ptr() != net[0].rnns[0].module.weight_hh_l0.data_ptr()


def test_weight_norm_of_the_old_kind():
    "PyTorch's old `weight_norm` also keeps a computed weight in the module."
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    net, mesa = make(), MESA(LAM, TAU, BETA, start_epoch=0)
    learner(net, [mesa]).fit(2)
    assert mesa.teacher(torch.ones(2, 5).double()).isfinite().all()
    assert not torch.equal(mesa.teacher[0].weight_v, net[0].weight_v)


@pytest.mark.parametrize('make', [
    lambda: MESA(start_epoch=0, divergence=WORDWISE),
    lambda: Distillation(language_model(1), divergence=WORDWISE)], ids=['mesa', 'distillation'])
def test_a_tuple_is_refused_without_the_callback_that_unpacks_it(make):
    with pytest.raises(ValueError, match='needs one tensor of logits from the .*, got tuple'):
        recurrent([make()], rnn=False)


def test_a_teacher_of_plain_logits_needs_no_unpacking():
    found = recurrent([Distillation(Logits(), ALPHA, TAU, WORDWISE)])
    check_weights(found, recurrent([Distillation(language_model(1), ALPHA, TAU, WORDWISE)]))


class Stop(Callback):
    "Ends a fit after some batches, and keeps a copy of what the callback `of` has then."
    order = 2000
    def __init__(self, of, after): self.of, self.after = of, after
    def after_batch(self):
        if self.iter + 1 < self.after: return
        self.state, self.weights = deepcopy(self.of.state_dict()), deepcopy(self.model.state_dict())
        raise CancelFitException()


class SkipFirst(Callback):
    "Skips the first batches of a fit."
    order = -200
    def __init__(self, n): self.n = n
    def before_batch(self):
        if self.iter < self.n: raise CancelBatchException()


def lookahead_learner(cbs):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(32, 3, dtype=torch.float64), torch.randn(32, 2, dtype=torch.float64)
    data = list(zip(x.split(4), y.split(4)))
    return learner(net, cbs, data, SGD, loss_func=F.mse_loss)


@pytest.mark.parametrize('failed_before', [False, True])
def test_a_state_of_lookahead_that_is_loaded_before_a_fit_continues(failed_before):
    whole = lookahead_learner([Lookahead(every=2)])
    whole.fit(1)
    first = Lookahead(every=2)
    stop = Stop(first, 3) # one batch after an update of the slow average
    lookahead_learner([first, stop]).fit(1)

    second = Lookahead(every=2)
    resumed = lookahead_learner([second, SkipFirst(3)])
    if failed_before:
        fails = Stop(second, 5)
        fails.after_batch = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError): resumed.fit(1, cbs=fails)
        resumed.remove_cb(fails)
    second.load_state_dict(stop.state)
    assert second.state_dict() is stop.state # also before the fit
    resumed.model.load_state_dict(stop.weights)
    resumed.fit(1)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()): assert torch.equal(a, b)


def test_a_state_of_lookahead_of_another_network_is_refused():
    other = Lookahead(every=2)
    other.load_state_dict(dict(slow={'weight': torch.zeros(5, 5)}, batches=2))
    with pytest.raises(ValueError, match='comes from another network'): lookahead_learner([other]).fit(1)
