"""MSAM and WeightAverage against loops written by hand from their definitions, and what others see of them.

The loops are written here in plain PyTorch, without a line of the library."""
import copy
import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EvaluateInEpoch, batches, cnn, flat, in_two_processes, learner, mlp
from fastai.callback.core import (Callback, CancelBatchException, CancelFitException, CancelStepException,
                                  CancelTrainException)
from fastai.callback.tracker import SaveModelCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, Recorder, load_learner
from fastai.optimizer import SGD, OptimWrapper, RMSProp
from sadt_nb.core.checkpoint import Checkpoint
from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.optim import KerasAdam, keras_adam
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.run_folder import load_model
from sadt_nb.experiments.runner import run
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.msam import MSAM, _MovedBatch
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.weight_average import WeightAverage, reestimate_
from sadt_nb.models.simple_cnn import simple_cnn
from torch import nn
from torch.nn import functional as F

LR, MOM, WD, RHO = .1, .9, 1e-3, .3


def conv(**kw): return batches(conv=True, **kw)
def six(): return conv(n=48)
def torch_sgd(params, lr, **kw):
    return OptimWrapper(params, torch.optim.SGD, lr=lr, **{'momentum': MOM, 'weight_decay': WD, **kw})


def fit(cbs, net=None, data=None, opt_func=torch_sgd, epochs=1, **kw):
    "Train a Learner on six batches, or on `data`, and return the Learner."
    learn = learner(cnn() if net is None else net, cbs, six() if data is None else data, opt_func, LR, **kw)
    learn.fit(epochs)
    return learn


# MSAM by its definition

class SGDRule:
    "SGD with momentum; the decay is part of the gradient, and so taken where the gradient is."
    def __init__(self, params): self.momenta = [torch.zeros_like(p) for p in params]
    def gradient(self, g, there): return g + WD * there
    def step(self, w, g, i):
        self.momenta[i] = MOM * self.momenta[i] + g
        return w - LR * self.momenta[i]


class DecoupledSGDRule(SGDRule):
    "fastai's SGD: the decay shrinks the weights themselves."
    def gradient(self, g, there): return g
    def step(self, w, g, i): return super().step(w * (1 - LR * WD), g, i)


class AdamRule:
    "Adam; with `decoupled`, AdamW."
    b1, b2, eps = .9, .999, 1e-8
    def __init__(self, params, decoupled=False):
        self.momenta, self.squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
        self.counts, self.decoupled = [0] * len(params), decoupled
    def gradient(self, g, there): return g if self.decoupled else g + WD * there
    def step(self, w, g, i):
        self.counts[i] += 1
        m = self.momenta[i] = self.b1 * self.momenta[i] + (1 - self.b1) * g
        s = self.squares[i] = self.b2 * self.squares[i] + (1 - self.b2) * g * g
        t = self.counts[i]
        if self.decoupled: w = w * (1 - LR * WD)
        return w - LR * (m / (1 - self.b1**t)) / ((s / (1 - self.b2**t)).sqrt() + self.eps)


class KerasRule(AdamRule):
    "Adam of Keras: epsilon outside the bias correction, and decoupled decay."
    eps = 1e-7
    def step(self, w, g, i):
        self.counts[i] += 1
        m = self.momenta[i] = self.b1 * self.momenta[i] + (1 - self.b1) * g
        s = self.squares[i] = self.b2 * self.squares[i] + (1 - self.b2) * g * g
        t = self.counts[i]
        rate = LR * (1 - self.b2**t)**.5 / (1 - self.b1**t)
        return w * (1 - LR * WD) - rate * m / (s.sqrt() + self.eps)


def by_hand(make_rule, net, data=None, rho=RHO, max_norm=None):
    "Return the weights after MSAM in a plain loop; the network keeps the moved weights only for a pass."
    net.train()
    params = list(net.parameters())
    rule = make_rule(params)
    for x, y in six() if data is None else data:
        length = sum(float((v * v).sum()) for v in rule.momenta)**.5
        weights = [p.detach().clone() for p in params]
        there = [w - rho * v / (length + 1e-12) for w, v in zip(weights, rule.momenta)]
        for p, t in zip(params, there): p.data = t.clone()
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        if max_norm:
            norm = sum(float((g * g).sum()) for g in grads)**.5
            grads = [g * min(1., max_norm / (norm + 1e-6)) for g in grads]
        for i, p in enumerate(params):
            p.data = rule.step(weights[i], rule.gradient(grads[i], there[i]), i)
    return flat(net, True)


decoupled = partial(AdamRule, decoupled=True)
def wrapped(cls, **kw): return partial(OptimWrapper, opt=cls, weight_decay=WD, **kw)
RULES = {
    'torch SGD': (torch_sgd, SGDRule),
    'fastai SGD': (partial(SGD, mom=MOM, wd=WD), DecoupledSGDRule),
    'fastai SGD, decay in the gradient': (partial(SGD, mom=MOM, wd=WD, decouple_wd=False), SGDRule),
    'torch AdamW': (wrapped(torch.optim.AdamW), decoupled),
    'torch Adam': (wrapped(torch.optim.Adam), AdamRule),
    'keras_adam': (partial(keras_adam, weight_decay=WD), partial(KerasRule, decoupled=True)),
}


def network(bn):
    "Return the network; with BatchNorm, the convolution has no bias, whose gradient would be rounding alone."
    net = cnn(bn)
    if bn: net[0].register_parameter('bias', None)
    return net


@pytest.mark.parametrize('bn', [False, True], ids=['no BatchNorm', 'BatchNorm'])
@pytest.mark.parametrize('name', RULES)
def test_msam_equals_its_definition(name, bn):
    opt_func, rule = RULES[name]
    kw = dict(wd=None, wd_bn_bias=True)
    got = flat(fit([MSAM(RHO)], network(bn), opt_func=opt_func, **kw).model, True)
    torch.testing.assert_close(got, by_hand(rule, network(bn)), rtol=1e-12, atol=1e-12)
    plain = flat(fit([], network(bn), opt_func=opt_func, **kw).model, True)
    assert (got - plain).abs().max() > 1e-4, 'MSAM does something'


@pytest.mark.parametrize('opt', ['torch', 'fastai'])
def test_parameter_groups_have_their_own_decay_and_one_norm(opt):
    "The first group has no decay; the norm goes over all groups."
    class Rule(SGDRule):
        def gradient(self, g, there): return g + (WD * 50 if g.shape in decayed else 0.) * there
    decayed = {p.shape for p in cnn(bn=False)[3:].parameters()}
    first = {p.shape for p in cnn(bn=False)[:3].parameters()}
    decayed -= first
    def group(net, decays): return [p for p in net.parameters() if (p.shape in decayed) == decays]
    def split(net): return [group(net, False), group(net, True)]
    def make(params, lr):
        params = [list(group) for group in params]
        if opt == 'fastai':
            made = SGD(params, lr=lr, mom=MOM, decouple_wd=False)
            made.set_hyper('wd', [0., WD * 50])
            return made
        groups = [dict(params=p, weight_decay=wd) for p, wd in zip(params, (0., WD * 50))]
        return OptimWrapper(groups, torch.optim.SGD, convert_groups=False, lr=lr, momentum=MOM)
    got = flat(fit([MSAM(RHO)], cnn(bn=False), opt_func=make, splitter=split, wd_bn_bias=True).model)
    torch.testing.assert_close(got, by_hand(Rule, cnn(bn=False)), rtol=1e-12, atol=1e-12)


def test_fastai_leaves_biases_without_decay_there_too():
    "With `wd_bn_bias=False`, fastai's rule skips BatchNorm and biases; MSAM must not add a decay to them."
    class Rule(SGDRule):
        def gradient(self, g, there): return g + (.05 * there if there.ndim > 1 else 0.)
    opt_func = partial(SGD, mom=MOM, decouple_wd=False)
    got = flat(fit([MSAM(RHO)], opt_func=opt_func, wd=.05, wd_bn_bias=False).model, True)
    torch.testing.assert_close(got, by_hand(Rule, cnn()), rtol=1e-12, atol=1e-12)


def test_maximize_decays_in_the_right_direction():
    "torch turns the gradient first: descent on the negative loss must equal ascent on the loss."
    def negative(pred, y): return -F.cross_entropy(pred, y)
    up = fit([MSAM(RHO)], cnn(bn=False), loss_func=negative,
             opt_func=partial(torch_sgd, maximize=True, weight_decay=.1))
    down = fit([MSAM(RHO)], cnn(bn=False), opt_func=partial(torch_sgd, weight_decay=.1))
    torch.testing.assert_close(flat(up.model), flat(down.model), rtol=1e-12, atol=1e-12)


def test_clipping_acts_on_the_gradient_and_not_on_the_decay():
    got = flat(fit([MSAM(RHO), GradientClip(.05)], cnn(bn=False)).model)
    expected = by_hand(SGDRule, cnn(bn=False), max_norm=.05)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_micro_batches_are_taken_at_the_same_weights():
    got = flat(fit([MSAM(RHO), GradientAccumulation(8)], cnn(bn=False), conv(n=48, bs=4)).model)
    torch.testing.assert_close(got, by_hand(SGDRule, cnn(bn=False)), rtol=1e-12, atol=1e-12)


class Overflow(Callback):
    "Make the loss of one batch infinite, like an overflow in half precision."
    run_valid, order = False, 9.5
    def before_backward(self):
        if self.iter == 2: self.learn.loss_grad = self.learn.loss_grad * float('inf')


def test_a_skipped_step_leaves_weights_and_momentum_alone():
    "The batch that overflows leaves no trace, as if it had not been there."
    def train(data, *cbs):
        net = cnn(bn=False, dtype=torch.float32)
        return flat(fit([MSAM(RHO), DeviceMixedPrecision('fp16', init_scale=64.), *cbs], net, data).model)
    data = conv(n=48, dtype=torch.float32)
    torch.testing.assert_close(train(data, Overflow()), train(data[:2] + data[3:]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('opt_func, words', [
    (SGD, 'Optimizer'), (partial(torch_sgd, momentum=0.), 'SGD'),
    (RMSProp, 'Optimizer'), (partial(OptimWrapper, opt=torch.optim.RMSprop), 'RMSprop'),
    (partial(OptimWrapper, opt=torch.optim.Adagrad), 'Adagrad')])
def test_an_optimizer_without_momentum_is_refused_before_training(opt_func, words):
    net = cnn()
    with pytest.raises(ValueError, match=f'this {words} has none that'): fit([MSAM()], net, opt_func=opt_func)
    assert torch.equal(flat(net, True), flat(cnn(), True))


@pytest.mark.parametrize('other', [SAM, MSAM])
def test_a_second_method_that_moves_the_weights_is_refused(other):
    with pytest.raises(ValueError, match='chooses the weights'): fit([MSAM(), other()])


def test_a_closure_cannot_serve_a_weight_average():
    net = mlp()
    with pytest.raises(TypeError, match='needs a fastai Learner'):
        MethodOptimizer(WeightAverage(), torch_sgd_of(net), net)


# MSAM in a loop without a Learner

CLOSURES = {
    'torch SGD': (lambda params: torch.optim.SGD(params, lr=LR, momentum=MOM, weight_decay=WD), SGDRule),
    'torch AdamW': (lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=WD), decoupled),
    'torch Adam': (lambda params: torch.optim.Adam(params, lr=LR, weight_decay=WD), AdamRule),
    'KerasAdam': (lambda params: KerasAdam(params, lr=LR, weight_decay=WD),
                  partial(KerasRule, decoupled=True)),
}
def torch_sgd_of(net): return CLOSURES['torch SGD'][0](net.parameters())


def loss_of(net, x, y): return F.cross_entropy(net(x), y)
def share_of(net, x, y, n): return F.cross_entropy(net(x), y, reduction='sum') / n


def in_loop(net, step, data=None):
    "Call `step` with a closure for every batch; return the weights."
    net.train()
    for x, y in six() if data is None else data: step(partial(loss_of, net, x, y))
    return flat(net, True)


@pytest.mark.parametrize('name', CLOSURES)
def test_a_plain_loop_equals_the_definition(name):
    make, rule = CLOSURES[name]
    net = network(True)
    method_opt = MethodOptimizer(MSAM(RHO), make(net.parameters()), net)
    expected = by_hand(rule, network(True))
    torch.testing.assert_close(in_loop(net, method_opt.step), expected, rtol=1e-12, atol=1e-12)

    net, method = network(True), MSAM(RHO)
    opt = make(net.parameters())
    got = in_loop(net, lambda closure: closure_step(method, net, closure, opt))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_clipping_and_micro_batches_in_a_plain_loop():
    net = cnn(bn=False)
    opt = MethodOptimizer(MSAM(RHO), torch_sgd_of(net), net, max_norm=.05)
    got = in_loop(net, opt.step)
    torch.testing.assert_close(got, by_hand(SGDRule, cnn(bn=False), max_norm=.05), rtol=1e-12, atol=1e-12)

    net = cnn(bn=False).train()
    opt = MethodOptimizer(MSAM(RHO), torch_sgd_of(net), net)
    for x, y in six():
        for rows in (slice(0, 3), slice(3, None)):
            opt.backward(partial(share_of, net, x[rows], y[rows], len(y)))
        opt.step()
        opt.zero_grad()
    torch.testing.assert_close(flat(net, True), by_hand(SGDRule, cnn(bn=False)), rtol=1e-12, atol=1e-12)


def test_a_plain_loop_sees_the_weights_outside_of_the_closure():
    "After `backward`, after a step, and after an exception the network has the weights, not the moved ones."
    net = cnn(bn=False).train()
    opt = MethodOptimizer(MSAM(RHO), torch_sgd_of(net), net)
    seen = []
    def closure(fails=False):
        seen.append(flat(net))
        if fails: raise RuntimeError('on purpose')
        return F.cross_entropy(net(x), y)
    for i, (x, y) in enumerate(six()):
        before = flat(net)
        if i == 3:
            with pytest.raises(RuntimeError, match='on purpose'): opt.step(lambda: closure(fails=True))
            assert torch.equal(flat(net), before)
        opt.backward(closure)
        assert torch.equal(flat(net), before)
        assert torch.equal(seen[-1], before) == (i == 0), 'the closure ran at moved weights'
        opt.step()
    torch.testing.assert_close(flat(net, True), by_hand(SGDRule, cnn(bn=False)), rtol=1e-12, atol=1e-12)


def test_the_state_of_a_plain_loop_is_the_state_of_its_optimizer():
    "A loop that stops after three batches, and goes on in new objects, ends with the same bits."
    def fresh():
        net = cnn(bn=False).train()
        return net, MethodOptimizer(MSAM(RHO), torch_sgd_of(net), net)
    whole, opt = fresh()
    in_loop(whole, opt.step)
    half, opt = fresh()
    in_loop(half, opt.step, six()[:3])
    rest, new = fresh()
    rest.load_state_dict(half.state_dict())
    new.load_state_dict(opt.state_dict())
    in_loop(rest, new.step, six()[3:])
    assert torch.equal(flat(rest), flat(whole))


def test_what_a_plain_loop_refuses():
    net = cnn(bn=False)
    without = torch.optim.SGD(net.parameters(), lr=.1)
    with pytest.raises(ValueError, match='this SGD has none that'): MethodOptimizer(MSAM(), without, net)
    opt = MethodOptimizer(MSAM(), torch_sgd_of(net), net)
    with pytest.raises(ValueError, match='exactly one pass at perturbed weights; give `step` a closure'):
        opt.first_step()


def test_two_steps_per_batch():
    "`RepeatStep` repeats the gradient of the moved weights, decay included."
    net = cnn(bn=False)
    params = list(net.parameters())
    rule = SGDRule(params)
    for x, y in six():
        length = sum(float((v * v).sum()) for v in rule.momenta)**.5
        shift = [-RHO * v / (length + 1e-12) for v in rule.momenta]
        weights = [p.detach().clone() for p in params]
        for p, s in zip(params, shift): p.data = p.data + s
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        for i, p in enumerate(params):
            p.data = weights[i]
            for _ in range(2): p.data = rule.step(p.data, grads[i] + WD * (p.data + shift[i]), i)
    got = flat(fit([MSAM(RHO), RepeatStep(2)], cnn(bn=False)).model)
    torch.testing.assert_close(got, flat(net), rtol=1e-12, atol=1e-12)


# What others see of MSAM: the weights w, before and after every batch, however the batch ends

STOPS = dict(fit=CancelFitException, train=CancelTrainException, batch=CancelBatchException,
             step=CancelStepException, error=RuntimeError,
             ctrl_c=KeyboardInterrupt)
EVENTS = {'before_batch': 'fit train batch error ctrl_c', 'after_pred': 'fit train batch error ctrl_c',
          'after_loss': 'fit train batch error ctrl_c', 'before_backward': 'fit batch error ctrl_c',
          'after_backward': 'fit batch error ctrl_c', 'before_step': 'fit batch step error ctrl_c'}
CASES = [(event, kind) for event, kinds in EVENTS.items() for kind in kinds.split()]


class Stop(Callback):
    "Raises an exception in an event of the fourth batch, after the weights have moved in it, if they do."
    order, run_valid = 0, False
    def __init__(self, event, exception):
        self.exception = exception
        setattr(self, event, self.stop)
    def stop(self):
        if self.iter == 3: raise self.exception('on purpose')


@pytest.mark.parametrize('event, kind', CASES)
def test_no_stop_leaves_moved_weights(event, kind):
    "Before the batch that stops, `Before` keeps w; after it, w is there again, to the last bit."
    class Before(Callback):
        order, run_valid = 500, False
        def before_batch(self):
            if self.iter == 3: self.kept = flat(self.model)
    before = Before()
    learn = learner(cnn(bn=False), [MSAM(RHO), before, Stop(event, STOPS[kind])], six()[:4], torch_sgd, LR)
    try: learn.fit(1)
    except (RuntimeError, KeyboardInterrupt): pass
    if event == 'before_batch': # no pass, no step
        assert torch.equal(flat(learn.model), flat(fit([MSAM(RHO)], cnn(bn=False), six()[:3]).model))
    else: assert torch.equal(flat(learn.model), before.kept)


class ErrorIn(nn.Module):
    "A layer that fails in the forward or in the backward of its fourth batch of training."
    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0
    def forward(self, x):
        self.calls += self.training
        if self.training and self.calls == 4:
            if self.where == 'forward': raise KeyboardInterrupt('on purpose')
            def fail(grad): raise RuntimeError('on purpose')
            x.register_hook(fail)
        return x


@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_an_error_in_the_network_puts_the_weights_back(where):
    net = cnn(bn=False)
    net.append(ErrorIn(where))
    with pytest.raises((RuntimeError, KeyboardInterrupt), match='on purpose'): fit([MSAM(RHO)], net)
    three = flat(fit([MSAM(RHO)], cnn(bn=False), six()[:3]).model)
    assert torch.equal(flat(net), three)


def test_after_an_error_the_learner_goes_on_as_another_one_would():
    "Evaluation, a second fit, a copy, and plain training without MSAM."
    def crashed():
        learn = learner(cnn(bn=False), [MSAM(RHO), Stop('after_pred', RuntimeError)], six(), torch_sgd, LR)
        with pytest.raises(RuntimeError): learn.fit(1)
        learn.remove_cb(Stop)
        return learn
    def expected(*cbs):
        learn = fit([MSAM(RHO)], cnn(bn=False), six()[:3])
        learn.remove_cb(MSAM)
        learn.add_cbs(cbs)
        learn.dls = DataLoaders(six(), six())
        learn.fit(1)
        return flat(learn.model)
    learn = crashed()
    before = flat(learn.model)
    learn.get_preds(dl=six())
    assert torch.equal(flat(learn.model), before)
    learn.fit(1)
    assert torch.equal(flat(learn.model), expected(MSAM(RHO)))
    learn = pickle.loads(pickle.dumps(crashed()))
    learn.fit(1)
    assert torch.equal(flat(learn.model), expected(MSAM(RHO)))
    learn = crashed()
    learn.remove_cb(MSAM)
    learn.fit(1)
    assert torch.equal(flat(learn.model), expected()), 'without MSAM, plain training'
    assert '_do_one_batch' not in vars(fit([MSAM()])), 'nothing is left after a fit'


class Watch(Callback):
    "Copies and averages the network after every batch, and evaluates it after every epoch, in two ways."
    order, run_valid = 2000, False
    def __init__(self, data): self.data = data
    def before_fit(self):
        if self.learn.lock.locked(): return
        self.ema, self.predictions, self.copies = None, [], []
    def after_batch(self):
        w = flat(self.model)
        self.ema = w if self.ema is None else .5 * self.ema + .5 * w
        self.copies.append(flat(copy.deepcopy(self.model)))
    def after_epoch(self):
        if self.learn.lock.locked(): return
        self.learn.model.eval()
        x = torch.cat([x for x, _ in self.data])
        with torch.no_grad(): directly = self.learn.model(x)
        predicted = self.learn.get_preds(dl=self.data, act=nn.Identity(), inner=True)[0]
        self.predictions.append((directly, predicted))


def test_everything_between_batches_sees_the_weights(tmp_path):
    "EMA, copies, `get_preds` in the middle of a fit, `learn.save`, `SaveModelCallback`, `Checkpoint`."
    def net(): return cnn(bn=False, dtype=torch.float32) # fastai's Recorder is of single precision
    def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    def stored(file): return torch.load(tmp_path / file, weights_only=True)
    def weights(state): return torch.cat([t.flatten().double() for t in state.values()])
    data = conv(n=48, dtype=torch.float32)
    watch, saving = Watch(data), SaveModelCallback(monitor='train_loss', every_epoch=1)
    cbs = [MSAM(RHO), watch, Recorder(train_metrics=True), saving]
    learn = learner(net(), cbs, data, torch_sgd, LR, path=tmp_path)
    with learn.no_logging(), learn.no_mbar(): learn.fit(2, cbs=Checkpoint(tmp_path / 'c.pt'))
    steps = [by_hand(SGDRule, net(), (data * 2)[:n]) for n in range(1, 13)]
    close(torch.stack(watch.copies), torch.stack(steps))
    ema = steps[0]
    for w in steps[1:]: ema = .5 * ema + .5 * w
    close(watch.ema, ema)
    for directly, predicted in watch.predictions: close(directly, predicted)
    for epoch, w in enumerate((steps[5], steps[11])): close(weights(stored(f'models/model_{epoch}.pth')), w)
    close(weights(stored('c.pt')['model']), steps[11])
    learn.save('end')
    close(weights(stored('models/end.pth')['model']), steps[11])


def test_an_evaluation_in_mid_epoch_ends_neither_method():
    evaluate = EvaluateInEpoch(six(), iteration=2)
    learn, steps, _ = averaged(WeightAverage(start=0), cnn(bn=False), cbs=[evaluate])
    torch.testing.assert_close(flat(learn.model), mean_of(steps), rtol=1e-12, atol=1e-12)
    net = cnn(bn=False)
    fit([MSAM(RHO), EvaluateInEpoch(six(), iteration=2)], net)
    torch.testing.assert_close(flat(net), by_hand(SGDRule, cnn(bn=False)), rtol=1e-12, atol=1e-12)


def test_validation_and_predictions_are_those_of_the_weights(tmp_path):
    "`validate`, `get_preds`, `show_results` and `export` after training with images of a data block."
    dls = get_dls('digits', bs=30, n_train=90, device='cpu')
    learn = Learner(dls, simple_cnn(dropout=0.), lr=.01, opt_func=partial(SGD, mom=.9), path=tmp_path,
                    cbs=MSAM(RHO))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        w = flat(learn.model, True)
        learn.model.eval()
        with torch.no_grad():
            losses = [(F.cross_entropy(learn.model(x), y, reduction='sum'), len(y)) for x, y in dls.valid]
        expected = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
        assert abs(learn.validate()[0] - expected) < 1e-5
        predictions = learn.get_preds()[0]
    learn.export('x.pkl')
    loaded = load_learner(tmp_path / 'x.pkl')
    assert torch.equal(flat(loaded.model, True), w)
    assert loaded.msam.scratch == {}
    assert len(predictions) == len(dls.valid.dataset)
    assert torch.equal(flat(learn.model, True), w)


# Weight averages

class Record(Callback):
    "Keeps the weights and buffers after every batch of training, and those that validation sees."
    order, run_valid = 1500, False
    def before_fit(self):
        if not self.learn.lock.locked(): self.all, self.validated = [], []
    def after_batch(self): self.all.append(flat(self.model, True))
    def before_validate(self):
        if not self.learn.lock.locked(): self.validated.append(flat(self.model, True))


def averaged(average, net=None, epochs=2, cbs=(), data=None, **kw):
    "Train with `average` for two epochs of six batches; return the Learner and what `Record` has kept."
    record = Record()
    learn = fit([average, record, *cbs], net, data, epochs=epochs, **kw)
    return learn, torch.stack(record.all), record.validated


def mean_of(steps): return sum(steps[1:], start=steps[0]) / len(steps)
def ema_of(steps, decay):
    average = steps[0]
    for w in steps[1:]: average = decay * average + (1 - decay) * w
    return average


AVERAGES = {
    'swa': (WeightAverage(), lambda w: mean_of(w[8:])), # step 9 of 12 ends at 0.75
    'swa from the start': (WeightAverage(start=0), mean_of),
    'swa, every third': (WeightAverage(start=.25, every=3), lambda w: mean_of(w[2::3])),
    'swa of the last': (WeightAverage(start=1), lambda w: w[11]),
    'ema': (WeightAverage('ema', decay=.7), lambda w: ema_of(w, .7)),
    'ema, from half on, every second': (WeightAverage('ema', .5, .7, 2), lambda w: ema_of(w[5::2], .7)),
}


@pytest.mark.parametrize('opt_func', [torch_sgd, wrapped(torch.optim.AdamW)], ids=['SGD', 'AdamW'])
@pytest.mark.parametrize('name', AVERAGES)
def test_an_average_equals_its_definition(name, opt_func):
    average, expected = AVERAGES[name]
    average = copy.deepcopy(average)
    learn, steps, _ = averaged(average, cnn(bn=False), opt_func=opt_func)
    torch.testing.assert_close(flat(learn.model), expected(steps), rtol=1e-12, atol=1e-12)
    assert torch.equal(steps, averaged(Callback(), cnn(bn=False), opt_func=opt_func)[1]), 'plain training'
    net = cnn(bn=False)
    net.load_state_dict(average.trained)
    assert torch.equal(flat(net), steps[-1])


def statistics(net, data):
    "Return BatchNorm's mean and variance, as means over batches, and its outputs' shape by numpy."
    weight, bias = (p.detach().numpy() for p in (net[0].weight, net[0].bias))
    means, variances = [], []
    for x, _ in data:
        patches = np.lib.stride_tricks.sliding_window_view(x.numpy(), (3, 3), axis=(2, 3)) # n, 2, 4, 4, 3, 3
        out = np.einsum('nchwij,ocij->nohw', patches, weight) + bias[:, None, None]
        means.append(out.mean((0, 2, 3)))
        variances.append(out.var((0, 2, 3), ddof=1))
    return torch.tensor(np.mean(means, 0)), torch.tensor(np.mean(variances, 0))


def test_batchnorm_has_the_statistics_of_the_averaged_weights():
    "The input of BatchNorm is the first convolution's output, here computed by numpy, of all twelve batches."
    data = conv(n=96)
    learn, steps, _ = averaged(WeightAverage(), data=data)
    norm = learn.model[1]
    expected = statistics(learn.model, data)
    torch.testing.assert_close((norm.running_mean, norm.running_var), expected, rtol=1e-12, atol=1e-12)
    assert int(norm.num_batches_tracked) == 12
    assert norm.momentum == .1
    n = len(flat(learn.model))
    torch.testing.assert_close(flat(learn.model), mean_of(steps[17:, :n]), rtol=1e-12, atol=1e-12)
    net = cnn()
    net.load_state_dict(learn.weight_average.trained)
    assert torch.equal(flat(net, True), steps[-1]), 'buffers, too'


def test_validation_sees_the_average_and_training_goes_on_without_it():
    "Four epochs: from the third on, validation sees the average, with statistics of the last batches."
    seen = []
    class Statistics(Callback):
        order, run_valid = 1500, False
        def before_validate(self): seen.append((copy.deepcopy(self.learn.model), self.learn.model.training))
    learn, steps, validated = averaged(WeightAverage(start=.5), epochs=4, cbs=[Statistics()])
    n = len(flat(learn.model))
    assert torch.equal(validated[0], steps[5]), 'trained weights and statistics'
    for epoch in (1, 2, 3):
        expected = mean_of(steps[11:6 * (epoch + 1), :n])
        torch.testing.assert_close(validated[epoch][:n], expected, rtol=1e-12, atol=1e-12)
        net, training = seen[epoch]
        got = net[1].running_mean, net[1].running_var
        torch.testing.assert_close(got, statistics(net, six()), rtol=1e-12, atol=1e-12)
        assert not training
    assert torch.equal(steps, averaged(Callback(), epochs=4)[1]), 'the training is that of plain SGD'


def test_batchnorm_that_was_not_trained_and_other_modes_stay():
    "Reestimation changes the given layers only, and neither modes nor random numbers."
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(.5), nn.BatchNorm1d(4), nn.BatchNorm1d(
        4, track_running_stats=False)).double().train()
    net[3].eval()
    before, state = flat(net[3], True), torch.get_rng_state()
    data = [(x,) for x, _ in batches(n=25)] # the last batch has one sample
    reestimate_(net, [net[1], net[4]], data)
    outputs = torch.stack([net[0](x).detach().mean(0) for x, in data[:3]])
    torch.testing.assert_close(net[1].running_mean, outputs.mean(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(flat(net[3], True), before)
    assert [m.training for m in net] == [True, True, True, False, True]
    assert torch.equal(torch.get_rng_state(), state)
    kept = flat(net, True)
    reestimate_(net, [net[1]], [])
    assert torch.equal(flat(net, True), kept), 'no batch, no change'


class Shared(nn.Module):
    "A network with a shared weight, a frozen layer, an integer buffer and a buffer that is not stored."
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.frozen = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3).requires_grad_(False)
        self.b.weight = self.a.weight
        self.register_buffer('calls', torch.tensor(0))
        self.register_buffer('scale', torch.ones(1), persistent=False)
        self.double()
    def forward(self, x):
        if self.training: self.calls += 1
        return self.frozen(torch.tanh(self.b(torch.tanh(self.a(x)))) * self.scale)


@pytest.mark.parametrize('kind', ['swa', 'ema'])
def test_shared_and_frozen_weights_and_integers(kind):
    net = Shared()
    learn = fit([WeightAverage(kind, start=0, decay=.6)], net, batches(), epochs=2)
    assert net.a.weight is net.b.weight
    assert torch.equal(flat(net.frozen), flat(Shared().frozen))
    assert net.calls.dtype == torch.int64
    assert int(net.calls) == 6
    other = Shared()
    other.load_state_dict(learn.weight_average.trained)
    assert not torch.equal(other.a.weight, net.a.weight)
    trained = flat(fit([], Shared(), batches(), epochs=2).model)
    assert torch.equal(flat(other), trained)


def test_a_skipped_step_does_not_count():
    "With a loss scale; and SADT without a first step, which makes its step later, does count."
    cbs = [DeviceMixedPrecision('fp16', init_scale=64.), Overflow()]
    average = WeightAverage(start=0)
    fit([average, *cbs], cnn(dtype=torch.float32), conv(n=48, dtype=torch.float32))
    assert int(average.averaged.n_averaged) == 5
    average = WeightAverage(start=0)
    learn, steps, _ = averaged(average, cnn(bn=False), cbs=[SADT(first_step=False)], epochs=1)
    assert int(average.averaged.n_averaged) == 6
    torch.testing.assert_close(flat(learn.model), mean_of(steps), rtol=1e-12, atol=1e-12)


def test_micro_batches_count_once():
    average = WeightAverage(start=0)
    fit([average, GradientAccumulation(16)])
    assert int(average.averaged.n_averaged) == 3


@pytest.mark.parametrize('make', [lambda: SAM(.1), lambda: MSAM(RHO), lambda: RepeatStep(2)],
                         ids=['sam', 'msam', 'repeat_step'])
def test_the_average_of_another_method(make):
    learn, steps, _ = averaged(WeightAverage(), cnn(bn=False), cbs=[make()])
    torch.testing.assert_close(flat(learn.model), mean_of(steps[8:]), rtol=1e-12, atol=1e-12)
    alone = averaged(Callback(), cnn(bn=False), cbs=[make()])[1]
    assert torch.equal(steps, alone), 'the steps are those of the method alone'


def test_a_fit_that_ends_early():
    "Before the start the trained weights stay; after it, the Learner gets the average so far."
    class StopAfter(Callback):
        order, run_valid = 3000, False
        def __init__(self, n): self.n = n
        def after_batch(self):
            if self.learn.train_iter == self.n: raise CancelFitException
    for n, expected in ((4, lambda w: w[3]), (11, lambda w: mean_of(w[8:]))):
        learn, steps, _ = averaged(WeightAverage(), cnn(bn=False), cbs=[StopAfter(n)])
        assert len(steps) == n
        torch.testing.assert_close(flat(learn.model), expected(steps), rtol=1e-12, atol=1e-12)
    assert learn.weight_average.trained is not None


def test_evaluations_exchange_nothing():
    "`validate` and `get_preds`, after a fit and within it, leave average and trained weights alone."
    class Evaluate(Callback):
        order, run_valid = 2000, False
        def after_epoch(self):
            if not self.learn.lock.locked(): self.learn.get_preds(dl=six(), inner=True)
    learn, steps, _ = averaged(WeightAverage(), cnn(bn=False), cbs=[Evaluate()])
    expected = mean_of(steps[8:])
    torch.testing.assert_close(flat(learn.model), expected, rtol=1e-12, atol=1e-12)
    w, trained = flat(learn.model), learn.weight_average.trained
    learn.remove_cb(Evaluate)
    learn.validate(dl=six())
    learn.get_preds(dl=six())
    assert torch.equal(flat(learn.model), w)
    assert torch.equal(learn.weight_average.trained['0.weight'], trained['0.weight'])


def test_a_second_fit_starts_from_the_average():
    learn, _, _ = averaged(WeightAverage(), cnn(bn=False))
    average = flat(learn.model)
    learn.fit(1, lr=0.)
    assert torch.equal(learn.record.all[0], average)
    assert torch.equal(flat(learn.model), average)


def test_pickles_and_copies_have_the_average():
    learn, _, _ = averaged(WeightAverage())
    for other in (pickle.loads(pickle.dumps(learn)), copy.deepcopy(learn)):
        assert torch.equal(flat(other.model, True), flat(learn.model, True))
        assert other.weight_average.averaged is None
        other.fit(1)


@pytest.mark.parametrize('stop', [(1, 2), (2, 0), (3, 5)])
def test_resume_across_the_start(stop, tmp_path):
    "The average begins in the second epoch of four; a run stops in it or later, and has the same bits."
    class StopIn(Callback):
        def before_batch(self):
            if self.training and (self.epoch, self.iter) == stop: raise KeyboardInterrupt
    def train(file, *cbs):
        learn = learner(cnn(), [WeightAverage(start=.4), *cbs], six(), torch_sgd, LR)
        learn.fit(4, cbs=Checkpoint(tmp_path / file))
        return learn
    whole = train('whole.pt')
    with pytest.raises(KeyboardInterrupt): train('cut.pt', StopIn())
    again = train('cut.pt')
    finished = train('cut.pt') # the checkpoint after the last epoch
    for other in (again, finished):
        assert torch.equal(flat(other.model, True), flat(whole.model, True))
        for name, t in whole.weight_average.trained.items():
            assert torch.equal(other.weight_average.trained[name], t)


def test_a_run_reports_the_average(tmp_path):
    "The stored weights are the average, and both accuracies are measured with it."
    cfg = Run(method='weight_average', epochs=4, n_train=64, bs=16, valid=0., opt='sgd', lr=.05,
              opt_args=dict(momentum=.9), method_args=dict(start=.5))
    result = run(cfg, tmp_path, progress=False)
    learn = make_learner(cfg)
    learn.fit(4)
    net = load_model(cfg, tmp_path, 10)
    assert torch.equal(flat(net, True), flat(learn.model, True))
    plain = run(cfg.but(method='baseline', method_args={}), tmp_path, progress=False)
    assert {k: result[k] for k in ('forwards', 'steps')} == {k: plain[k] for k in ('forwards', 'steps')}
    assert result['method_bytes'] == pytest.approx(sum(t.nbytes for t in net.state_dict().values()), abs=64)
    with torch.no_grad():
        hits = [(net(x).argmax(1) == y).float() for x, y in learn.dls[2]]
    assert result['accuracy'] == pytest.approx(torch.cat(hits).mean().item(), abs=1e-6)


@pytest.mark.parametrize('options, words', [
    (dict(kind='mean'), 'kind'), (dict(start=-.1), 'start'), (dict(start=75), 'start'),
    (dict(start=float('nan')), 'start'), (dict(decay=1.), 'decay'), (dict(decay=-.1), 'decay'),
    (dict(every=0), 'every'), (dict(every=1.5), 'every')])
def test_options_of_the_average_out_of_range(options, words):
    with pytest.raises(ValueError, match=words): WeightAverage(**options)


def test_a_state_of_another_network_is_refused():
    average = WeightAverage(start=0)
    fit([average], cnn(bn=False))
    other = WeightAverage(start=0)
    other.load_state_dict(average.state_dict())
    with pytest.raises(ValueError, match='does not fit'): fit([other], mlp(), batches())


def test_two_averages_are_refused():
    with pytest.raises(ValueError, match='averages the weights'): fit([WeightAverage(), WeightAverage()])


def test_both_are_registered():
    for name, cls in dict(msam=MSAM, weight_average=WeightAverage).items():
        callback, = make_method(name)
        assert isinstance(callback, cls)
        assert (METHODS[name].passes, METHODS[name].steps) == (1, 1)


def _reestimate_in_a_process(folder):
    "Estimate statistics from this process's half of the batches, and store them."
    torch.distributed.init_process_group('gloo')
    rank = torch.distributed.get_rank()
    net = cnn()
    reestimate_(net, [net[1]], [(x,) for x, _ in six()[rank::2]])
    torch.save((net[1].running_mean, net[1].running_var), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


def test_processes_have_the_same_batchnorm_statistics(tmp_path):
    "Each process sees half of the batches, and all get the means over all batches."
    in_two_processes(_reestimate_in_a_process, tmp_path)
    for rank in range(2):
        got = torch.load(tmp_path / f'{rank}.pt')
        torch.testing.assert_close(got, statistics(cnn(), six()), rtol=1e-12, atol=1e-12)


def test_a_batch_that_an_exception_left_moved_is_replaced():
    learn = SimpleNamespace()
    for _ in range(2): _MovedBatch.install(SimpleNamespace(learn=learn))
    learn._do_one_batch.remove()
    assert '_do_one_batch' not in vars(learn)
