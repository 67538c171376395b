"""What a second pass must respect: autocast, gradients of callbacks, masks, parameters of losses, buffers."""
import copy
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import as_loader, batches, cnn, flat, learner, mlp, needed, sgd_for
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.training import GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.passes import replay, replaying
from sadt_nb.core.perturb import chosen_params, trainable_params, unwrapped
from sadt_nb.core.perturbed_passes import _OwnGradients
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.core.states import kept_buffers, random_states, rng_policy, set_random_states
from sadt_nb.measures.landscape import loss_line, random_direction
from sadt_nb.measures.sharpness import average_sharpness, sam_sharpness
from sadt_nb.methods.agc import AGC
from sadt_nb.methods.asam import _is_weight, asam_step
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.esam import ESAM, esam_step
from sadt_nb.methods.gradient_centralization import GradientCentralization
from sadt_nb.methods.registry import METHODS, make_method, method_options
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM, sam_step
from sadt_nb.models.registry import MODELS, make_model

OPTIONS = {
    'mesa': dict(lam=2., tau=1., beta=.8, start_epoch=0),
    'sadt2': dict(share_trunk=False), # a shared pass adds two gradients in bfloat16, one rounding less
}


def conv(dtype=torch.float64, **kw): return batches(conv=True, dtype=dtype, **kw)


def method(name): return make_method(name, **{**needed(name), **OPTIONS.get(name, {})})


@pytest.mark.parametrize('name', [name for name in METHODS if name not in ('baseline', 'saf')])
def test_a_fit_inside_autocast_sees_the_weights_of_every_step(name):
    def fit(cache_enabled):
        net = cnn(dtype=torch.float32)
        cbs = method(name)
        for cb in cbs:
            if hasattr(cb, 'teacher') and isinstance(cb.teacher, nn.Module): cb.teacher.float()
        torch.manual_seed(3)
        with torch.autocast('cpu', torch.bfloat16, cache_enabled=cache_enabled):
            data = conv(torch.float32)
            sgd_learner(net, data, *cbs, lr=.5)
            x, y = data[0]
            return flat(net), F.cross_entropy(net(x), y).item()
    right, loss = fit(False) # without the cache every pass casts the weights as they are
    got, there = fit(True)
    assert torch.equal(got, right) and there == loss


def test_measures_inside_autocast_see_moved_weights():
    torch.manual_seed(0)
    data = conv(torch.float32)
    learn = learner(cnn(dtype=torch.float32), [], data)
    learn.model.eval()
    def measures(cache_enabled):
        with torch.autocast('cpu', torch.bfloat16, cache_enabled=cache_enabled):
            direction = random_direction(learn.model, seed=0)
            sharpness = sam_sharpness(learn, .5, dl=data)
            average = average_sharpness(learn, .1, dl=data, pairs=2, progress=False)
            line = loss_line(learn, direction, points=3, dl=data, progress=False)
            return [sharpness, average.value, *line.loss]
    sharpness, average, *line = measures(True)
    assert [sharpness, average, *line] == measures(False)
    assert abs(sharpness) > 1e-3 and len(set(line)) == 3


def sgd_learner(net, data, *cbs, **kw):
    kw = dict(loss_func=nn.CrossEntropyLoss(), opt_func=sgd_for(cbs), lr=.1) | kw
    learn = Learner(DataLoaders(data, data), net, default_cbs=False, cbs=[TrainEvalCallback, *cbs], **kw)
    learn.fit(1)
    return flat(net)


class AddsOne(Callback):
    "Adds a gradient of one to every weight by a backward of its own, at one of the batch's events."
    run_valid = False
    def __init__(self, event, guarded):
        self.guarded = guarded
        setattr(self, event, self.add)
    def add(self):
        if self.guarded and replaying(self.learn): return
        sum(p.sum() for p in self.model.parameters()).backward()


@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam', 'friendly_sam', 'wsam', 'looksam', 'esam', 'sadt1'])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss', 'before_backward'])
@pytest.mark.parametrize('guarded', [True, False])
def test_a_backward_of_a_callback_counts_once_in_every_batch(name, event, guarded):
    data = conv()
    def weights(*cbs): return sgd_learner(cnn(bn=False), data[:1], *method(name), *cbs)
    if name in ('sadt1', 'esam'): # its share also turns the ascent, or is in both steps: see the plain ones
        return check_share_of_two_steps(name, data, event, guarded)
    shift = weights() - weights(AddsOne(event, guarded))
    torch.testing.assert_close(shift, torch.full_like(shift, .1), rtol=1e-9, atol=1e-12)


def check_share_of_two_steps(name, data, event, guarded):
    "The callback's gradient of one is in both steps of SADT, and once in ESAM's."
    def weights(method, *cbs): return sgd_learner(cnn(bn=False), data[:1], method, *cbs)
    if name == 'esam':
        shift = weights(ESAM(.05, 1, 1)) - weights(ESAM(.05, 1, 1), AddsOne(event, guarded))
        torch.testing.assert_close(shift, torch.full_like(shift, .1), rtol=1e-9, atol=1e-12)
    else:
        shift = weights(SADT(1, kl_weight=0.)) - weights(SADT(1, kl_weight=0.), AddsOne(event, guarded))
        torch.testing.assert_close(shift, torch.full_like(shift, .2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('event', ['before_batch', 'before_backward'])
def test_the_share_is_kept_in_later_batches_too(event):
    data = conv()[:2]
    def shift(*cbs):
        with_it = sgd_learner(cnn(bn=False), data, *cbs, AddsOne(event, False), lr=1e-6)
        return (sgd_learner(cnn(bn=False), data, *cbs, lr=1e-6) - with_it) / 1e-6
    torch.testing.assert_close(shift(SAM(.05)), torch.full_like(shift(), 2.), rtol=1e-4, atol=1e-4)


class Mask(Callback):
    "Keeps the first layer as it is, by zeroing its gradient after every backward."
    run_valid = False
    def after_backward(self):
        for p in self.model[0].parameters(): p.grad.zero_()


MASKED = ['baseline', 'sam', 'asam', 'gsam', 'friendly_sam', 'wsam', 'looksam', 'esam',
          'sadt1', 'sadt2', 'sadt3', 'repeat_step', 'repeat_batch', 'msam', 'weight_average']


@pytest.mark.parametrize('name', MASKED)
def test_a_mask_on_gradients_holds_in_every_pass(name):
    net = cnn(bn=False)
    before = [p.detach().clone() for p in net.parameters()]
    sgd_learner(net, conv(), *method(name), Mask(), wd=0.)
    first = list(net[0].parameters())
    assert all(torch.equal(p, b) for p, b in zip(first, before))
    others = list(zip(net.parameters(), before))[len(first):]
    assert not any(torch.equal(p, b) for p, b in others)


class Scaled(nn.Module):
    "Cross-entropy of logits times a scale that is trained, too."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    def forward(self, logits, y): return F.cross_entropy(self.scale * logits, y)


def with_loss_params(loss, model): return [list(model.parameters()), list(loss.parameters())]


def train_scale(*cbs, steps=1):
    loss, net = Scaled(), cnn(bn=False)
    data = conv()[:1] * steps
    sgd_learner(net, data, *cbs, loss_func=loss, splitter=partial(with_loss_params, loss), lr=.1, wd=0.)
    return loss.scale.item()


def test_parameters_of_the_loss_get_the_second_gradient_only():
    (x, y), *_ = conv()
    net = cnn(bn=False)
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
        for p, g in zip(net.parameters(), grads): p += .5 * g / norm
    loss = Scaled()
    expected = 1 - .1 * torch.autograd.grad(loss(net(x), y), loss.scale)[0].item()
    assert train_scale(SAM(.5)) == pytest.approx(expected, rel=1e-12)


def test_parameters_of_the_loss_make_as_many_steps_as_the_network():
    (x, y), *_ = conv()
    net, loss = cnn(bn=False), Scaled()
    g = torch.autograd.grad(loss(net(x), y), loss.scale)[0].item()
    assert train_scale(RepeatStep(2)) == pytest.approx(1 - 2 * .1 * g, rel=1e-12)
    assert train_scale(SADT(1, divergence='categorical')) == pytest.approx(1 - 2 * .1 * g, rel=1e-12)


class OwnNorm(nn.Module):
    "A normalisation of its own class, which puts new tensors in the place of its averages."
    def __init__(self):
        super().__init__()
        self.register_buffer('mean', torch.zeros(8, dtype=torch.float64))
        self.register_buffer('last', None)
        self.register_buffer('seen', torch.zeros((), dtype=torch.long))
    def forward(self, x):
        if self.training:
            self.mean = .9 * self.mean + .1 * x.detach().mean(0)
            self.last = x.detach()
            self.seen += 1
        return x - self.mean


def own_norm_net():
    torch.manual_seed(1)
    spectral = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8))
    return nn.Sequential(spectral, OwnNorm(), nn.Tanh(), nn.Linear(8, 3)).double().train()


def buffers(net): return {n: b.clone() for n, b in net.named_buffers()}


@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam', 'friendly_sam', 'wsam', 'looksam', 'esam', 'sadt1',
                                  'sadt3'])
def test_keep_restores_every_buffer(name):
    data = batches()[:1]
    def after(*cbs):
        net = own_norm_net()
        sgd_learner(net, data, *cbs)
        return buffers(net)
    kept, plain = after(*make_method(name, bn='keep')), after()
    assert kept.keys() == plain.keys() and kept['1.seen'] == 1
    for n in plain: torch.testing.assert_close(kept[n], plain[n], rtol=0, atol=0)
    if name != 'esam': assert after(*make_method(name, bn='update'))['1.seen'] == 2


def plain_step(step, **kwargs):
    "Make one step of a plain function on one batch; return its network."
    (x, y), *_ = batches()
    net = own_norm_net()
    def losses(rows=None):
        part = slice(None) if rows is None else rows
        values = F.cross_entropy(net(x[part]), y[part], reduction='none')
        return values if step is esam_step else values.mean()
    step(net, losses, torch.optim.SGD(net.parameters(), lr=.1), **kwargs)
    return net


@pytest.mark.parametrize('step', [sam_step, esam_step])
def test_functions_keep_buffers_too(step):
    once = own_norm_net()
    once(batches()[0][0])
    kept = buffers(plain_step(step, bn='keep'))
    for n, b in once.named_buffers(): torch.testing.assert_close(kept[n], b, rtol=0, atol=0)


@pytest.mark.parametrize('step', [sam_step, esam_step])
def test_statistics_move_twice_and_not_three_times(step): assert plain_step(step)[1].seen == 2


def test_kept_buffers_after_an_exception():
    net = own_norm_net()
    before = buffers(net)
    with pytest.raises(RuntimeError), kept_buffers(net):
        net(torch.randn(4, 5, dtype=torch.float64))
        raise RuntimeError
    assert net[1].last is None and buffers(net).keys() == before.keys()
    for n, b in before.items(): assert torch.equal(dict(net.named_buffers())[n], b)


class DictNet(nn.Module):
    "Takes a dict and a list, as networks for text and detection do, and returns a dict."
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
    def forward(self, inputs, more): return dict(logits=self.b(torch.tanh(self.a(inputs['x']) + more[0])))


class DictLoss(nn.CrossEntropyLoss):
    def forward(self, out, y): return super().forward(out['logits'], y)


def plain_net():
    class Plain(DictNet):
        def forward(self, x, more): return super().forward(dict(x=x), [more])['logits']
    return Plain().double()


@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam', 'friendly_sam', 'wsam', 'looksam', 'esam'])
def test_batches_of_dicts_and_lists(name):
    data = batches()
    more = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nested = [(dict(x=x), [more], y) for x, y in data]
    flat_batches = [(x, more, y) for x, y in data]
    got = DictNet().double()
    learn = Learner(DataLoaders(nested, nested), got, loss_func=DictLoss(), opt_func=SGD, lr=.1,
                    default_cbs=False, cbs=[TrainEvalCallback, *method(name)])
    learn.dls.n_inp = 2
    learn.fit(1)
    expected = plain_net()
    learn = Learner(DataLoaders(flat_batches, flat_batches), expected, loss_func=nn.CrossEntropyLoss(),
                    opt_func=SGD, lr=.1, default_cbs=False, cbs=[TrainEvalCallback, *method(name)])
    learn.dls.n_inp = 2
    learn.fit(1)
    assert torch.equal(flat(got), flat(expected))


class OddNames(nn.Module):
    "A ReLU network whose weights do not say so, and whose biases do."
    def __init__(self, scale=1.):
        super().__init__()
        torch.manual_seed(1)
        self.W1 = nn.Parameter(scale * torch.randn(8, 5, dtype=torch.float64))
        self.kernel = nn.Parameter(torch.randn(3, 8, dtype=torch.float64) / scale)
        self.weighting = nn.Linear(1, 1).double()
    def forward(self, x): return torch.relu(x @ self.W1.T) @ self.kernel.T + self.weighting.bias


def loss_uphill(scale, **options):
    "The loss in the second pass of ASAM, with the layers multiplied and divided by `scale`."
    net, losses, ((x, y), *_) = OddNames(scale), [], batches()
    def loss():
        losses.append(F.cross_entropy(net(x), y))
        return losses[-1]
    asam_step(net, loss, torch.optim.SGD(net.parameters(), lr=.1), rho=.5, eta=0., **options)
    return losses[1].item()


def test_asam_is_scale_invariant_whatever_the_parameters_are_called():
    assert loss_uphill(10.) == pytest.approx(loss_uphill(1.), rel=1e-9)
    assert abs(loss_uphill(10., weights='name') - loss_uphill(1., weights='name')) > 1e-3


@pytest.mark.parametrize('model', [name for name in MODELS if not name.startswith(('vit', 'clip'))])
def test_role_and_name_agree_on_networks_of_pytorch_layers(model):
    with torch.device('meta'): net = make_model(model)
    by_role = {n for n, p in net.named_parameters() if _is_weight(n, p)}
    assert by_role == {n for n, _ in net.named_parameters() if 'weight' in n}


COPIED = ['sam', 'asam', 'esam', 'gsam', 'friendly_sam', 'wsam', 'looksam', 'saf', 'mesa',
          'sadt1', 'sadt2', 'sadt3', 'repeat_step', 'repeat_batch', 'msam', 'weight_average']


@pytest.mark.parametrize('name', COPIED)
@pytest.mark.parametrize('how', [copy.deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))])
@pytest.mark.parametrize('trained', [False, True])
def test_a_copied_learner_trains_again(name, how, trained):
    options = dict(start_epoch=0) if name in ('saf', 'mesa') else {}
    learn = learner(cnn(), make_method(name, **{**needed(name), **options}), as_loader(conv()))
    if trained: learn.fit(1)
    other = how(learn)
    other.fit(1)
    learn.fit(1)
    assert torch.isfinite(flat(other.model)).all() and not torch.equal(flat(other.model), flat(cnn()))
    if name not in ('saf', 'mesa', 'looksam') or not trained: # these leave large state out of copies
        assert torch.equal(flat(other.model), flat(learn.model))


# Where a callback that transforms gradients acts

class Gradients(Callback):
    "Keeps the gradients with which each step is made."
    order, run_valid = 2000, False
    def __init__(self): self.seen = []
    def before_step(self): self.seen.append([p.grad.clone() for p in self.model.parameters()])


def first_gradients(*cbs, dtype=torch.float64):
    watch = Gradients()
    learner(mlp(dtype=dtype), [*cbs, watch], batches(dtype=dtype)).fit(1)
    return watch.seen[0]


def test_a_transform_acts_before_the_gradients_are_clipped():
    "After the clipping the norm is the limit; a transform that came later would have shortened the gradient."
    limit = 1e-3
    clipped = first_gradients(GradientCentralization(), GradientClip(limit))
    total = torch.cat([g.flatten() for g in clipped]).norm()
    assert total.item() == pytest.approx(limit, rel=1e-3)
    for g in clipped:
        if g.ndim == 2: assert g.mean(1).abs().max() < 1e-15, 'each row has the mean zero'
    plain = first_gradients(GradientClip(limit))
    assert max(g.mean(1).abs().max() for g in plain if g.ndim == 2) > 1e-6


def test_a_transform_acts_on_unscaled_gradients():
    "The limit of AGC is a share of the weights: on gradients times 65,536 it would clip all, to nearly zero."
    def gradients(*cbs): return first_gradients(AGC(), *cbs, dtype=torch.float32)
    for half, full in zip(gradients(DeviceMixedPrecision('fp16')), gradients(), strict=True):
        torch.testing.assert_close(half, full, rtol=.02, atol=1e-4)
        assert full.norm() > 1e-3


@pytest.mark.parametrize('mode, scales', [('fp16', True), ('bf16', False)])
def test_only_float16_scales_the_loss(mode, scales):
    seen = []
    class Look(Callback):
        order, run_valid = 2000, False
        def after_backward(self):
            scaler = self.learn.scaler
            seen.append((scaler.is_enabled(), scaler.get_scale()))
    data = batches(dtype=torch.float32)
    learner(mlp(dtype=torch.float32), [DeviceMixedPrecision(mode), Look()], data).fit(1)
    assert seen == [(True, 65536.) if scales else (False, 1.)] * 3


# The random numbers of an extra pass

def test_the_policies_of_random_numbers():
    "An extra pass draws the numbers of the first pass or new ones; the numbers after the pass are the same."
    cpu = torch.device('cpu')
    def draw(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    start = random_states(cpu)
    first, second, third = draw(), draw(), draw()
    set_random_states(start, cpu)
    assert [draw(), draw()] == [first, second]
    with rng_policy('replay', start, cpu): assert draw() == first
    assert draw() == third, 'the replayed pass has used up no numbers'
    for policy, state in (('fresh', start), ('replay', None)):
        set_random_states(start, cpu)
        draw()
        with rng_policy(policy, state, cpu): assert draw() == second
        assert draw() == third


# Wrappers

def distributed_shell(net):
    "Return a `DistributedDataParallel` around a network; it has no process group, so it cannot run."
    shell = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(shell)
    shell.module = net
    return shell


def test_wrappers_do_not_change_the_names_of_parameters():
    net = cnn()
    plain = dict(net.named_parameters())
    for wrap in (nn.DataParallel, distributed_shell, lambda net: distributed_shell(nn.DataParallel(net))):
        wrapped = wrap(net)
        assert unwrapped(wrapped) is net
        params = trainable_params(wrapped)
        assert params.keys() == plain.keys()
        assert all(params[n] is p for n, p in plain.items())
        assert chosen_params(wrapped, 'norm') == {'1.weight', '1.bias'}


PERTURBED = [name for name in METHODS if any(isinstance(cb, _OwnGradients) for cb in method(name))]


@pytest.mark.parametrize('name', PERTURBED)
def test_gradients_that_fastai_has_zeroed_are_not_set_aside(name):
    "They would be added to every batch's gradients again, as zeros, at the cost of one more copy."
    cb, = [cb for cb in method(name) if isinstance(cb, _OwnGradients)]
    seen = []
    class Look(Callback):
        order, run_valid = cb.order + .1, False
        def before_backward(self):
            if not replaying(self.learn): seen.append(len(cb._stash))
    learner(cnn(), [cb, Look()], as_loader(conv())).fit(2)
    assert seen == [0] * 6


class SetAside(Callback):
    "Notes in how many parameters a method holds gradients of before this backward."
    order = 100

    def __init__(self, cb): self.cb, self.seen = cb, []
    def before_backward(self):
        if not self.cb.replaying: self.seen.append(len(self.cb._stash))


def of_a_pass(name): return [cb for cb in make_method(name, **needed(name)) if isinstance(cb, _OwnGradients)]


@pytest.mark.parametrize('name', [n for n in METHODS if of_a_pass(n)])
def test_zeroed_gradients_are_not_set_aside(name):
    "fastai zeroes gradients in place; a method that keeps such zeros holds a second copy of the weights."
    cb, = of_a_pass(name)
    seen = SetAside(cb)
    learner(cnn(), [cb, seen], conv(), opt_func=sgd_for([cb])).fit(1)
    assert seen.seen == [0, 0, 0]


def test_replay_adds_its_gradient_to_the_one_that_is_there():
    "Also a forward pass alone leaves the gradient as it was."
    ratios = []

    class Again(Callback):
        def after_backward(self):
            def now(): return torch.cat([p.grad.flatten() for p in self.model.parameters()])
            first = now()
            replay(self.learn, until=self)
            twice = now()
            replay(self.learn, backward=False)
            ratios.append((torch.equal(twice, 2 * first), torch.equal(now(), twice)))
    learner(mlp(), [Again()]).fit(1)
    assert ratios == [(True, True)] * 3


@pytest.mark.parametrize('function', [make_method, method_options])
def test_an_unknown_method_is_named_with_the_nearest_name(function):
    with pytest.raises(ValueError, match="unknown method 'sma'; did you mean 'sam'"): function('sma')
