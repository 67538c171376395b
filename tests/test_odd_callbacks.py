"""WeightAverage and SampleIds beside callbacks that change inputs, skip batches, or evaluate within a fit."""
import copy
import pickle

import pytest
import torch
from conftest import EvaluateInEpoch, as_loader, batches, flat, learner, mlp
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException,
                                  CancelEpochException, CancelFitException, CancelTrainException)
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import MixUp
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation
from fastai.learner import before_batch_cb
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.loss_terms import SampleIds
from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.passes import replaying
from sadt_nb.core.recipe import FreezeAfter, Lookahead
from sadt_nb.measures.sharpness import FlatnessRecorder
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.wsam import WSAM
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM, sam_step
from sadt_nb.methods.asam import ASAM, asam_step
from sadt_nb.methods.gsam import GSAM, gsam_step
from sadt_nb.methods.weight_average import WeightAverage


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def statistics(learn, inputs):
    "Return the means over batches of BatchNorm's means and variances, computed from the definition."
    with torch.no_grad(): outputs = [learn.model[0](x) for x in inputs]
    return torch.stack([o.mean(0) for o in outputs]).mean(0), torch.stack([o.var(0) for o in outputs]).mean(0)


def check_statistics(learn, inputs, tolerance=1e-12):
    norm = learn.model[1]
    got = norm.running_mean, norm.running_var
    torch.testing.assert_close(got, statistics(learn, inputs), rtol=tolerance, atol=tolerance)


class Seen(Callback):
    "Keeps the inputs of the last epoch, as the network gets them, and the random state before that epoch."
    order, run_valid = 5000, False
    def before_epoch(self): self.xs = []
    def before_train(self): self.state = torch.get_rng_state()
    def after_pred(self): self.xs.append(self.learn.xb[0].clone())


class Normalise(Callback):
    "Scales the inputs, and counts its batches."
    n = 0
    def before_batch(self):
        self.learn.xb = (self.learn.xb[0] / 128 - 1,)
        if self.training: self.n += 1


class ScaleTraining(Normalise):
    run_valid = False


def scaled(cb, xb, yb): return (xb[0] / 128 - 1,), yb


@pytest.mark.parametrize('make', [Normalise, ScaleTraining, lambda: before_batch_cb(scaled)],
                         ids=['always', 'training only', 'a function'])
@pytest.mark.parametrize('others', [list, lambda: [SAM()], lambda: [SAF(start_epoch=0)],
                                    lambda: [GradientAccumulation(16)]], ids=['alone', 'sam', 'saf', 'micro'])
def test_statistics_are_of_the_inputs_that_training_sees(make, others):
    data = [(x * 100 + 50, y) for x, y in batches()]
    cb, seen = make(), Seen()
    learn = learner(normed(), [cb, seen, WeightAverage(), *others()], as_loader(data))
    learn.fit(4)
    assert seen.xs[0].abs().max() < 20, 'the callback has scaled the inputs'
    check_statistics(learn, seen.xs)
    if isinstance(cb, Normalise): assert cb.n == 4 * len(data), 'the pass at the end does not count'
    assert not learn.training and learn.xb == (None,)


def test_mixed_inputs_are_mixed_for_the_statistics():
    "MixUp draws the shares and partners of each batch after the training; the test draws them again."
    class State(Callback):
        order = WeightAverage.order - .5
        def after_fit(self): self.state = torch.get_rng_state()
    mixup, state = MixUp(.4), State()
    data = batches(dtype=torch.float32) # fastai's MixUp does not work in double precision
    learn = learner(normed().float(), [mixup, state, WeightAverage()], data, loss_func=CrossEntropyLossFlat())
    learn.fit(4)
    torch.set_rng_state(state.state)
    mixed = []
    for x, _ in data:
        lam = mixup.distrib.sample((len(x),)).squeeze()
        lam = torch.maximum(lam, 1 - lam)[:, None]
        mixed.append(torch.lerp(x[torch.randperm(len(x))], x, lam))
    check_statistics(learn, mixed, 1e-6)
    with pytest.raises(AssertionError): check_statistics(learn, [x for x, _ in data], 1e-6)


def test_the_pass_at_the_end_changes_nothing_else():
    "The learning rate, hooks of fastai and random numbers are as after a fit without BatchNorm's pass."
    def trained(*cbs):
        learn = learner(normed(), [ParamScheduler(dict(lr=lambda share: .1 * (1 - share))), *cbs])
        learn.fit(4)
        return learn
    plain, averaged = trained(), trained(ActivationStats(every=2), WeightAverage())
    assert plain.opt.hypers[-1]['lr'] == averaged.opt.hypers[-1]['lr'] > 0
    assert not any(m._forward_hooks for m in averaged.model.modules())


def test_batches_that_a_callback_skips_are_left_out():
    class SkipFirst(Callback):
        order = -100
        def before_batch(self):
            if self.iter == 0: raise CancelBatchException()
    data = batches()
    learn = learner(normed(), [SkipFirst(), WeightAverage()], data)
    learn.fit(4)
    check_statistics(learn, [x for x, _ in data[1:]])


def test_a_callback_that_ended_the_fit_does_not_end_the_pass():
    class StopLate(Callback):
        run_valid = False
        def before_batch(self):
            if self.learn.pct_train >= .9: raise CancelFitException()
    data = batches()
    learn = learner(normed(), [StopLate(), WeightAverage()], data)
    learn.fit(4)
    assert learn.weight_average.swapped
    check_statistics(learn, [x for x, _ in data])


# Sample ids

class TestSet(Callback):
    "Evaluates after every epoch, and in the middle of training."
    __test__ = False
    busy = False
    def evaluate(self):
        if self.busy: return
        self.busy = True
        self.learn.validate(dl=self.learn.dls.valid)
        self.learn.get_preds(dl=self.learn.dls.valid, inner=True)
        self.busy = False
    def after_epoch(self): self.evaluate()


@pytest.mark.parametrize('lag, start_epoch', [(1, 1), (2, 0)])
def test_saf_beside_a_callback_that_evaluates(lag, start_epoch):
    def trained(*cbs):
        learn = learner(mlp(), [SAF(1., 1., lag=lag, start_epoch=start_epoch), *cbs], as_loader(batches()))
        learn.fit(3)
        return learn
    plain, learn = trained(), trained(TestSet())
    for p, q in zip(plain.model.parameters(), learn.model.parameters()): assert torch.equal(p, q)
    assert torch.equal(plain.saf.records.logits, learn.saf.records.logits)
    assert not any(isinstance(cb, SampleIds) for cb in learn.cbs)


def test_evaluations_outside_a_fit_leave_no_sample_ids():
    learn = learner(mlp(), [SAF(start_epoch=0)], as_loader(batches()))
    for call in (learn.validate, learn.get_preds, lambda: learn.fit(1), learn.validate):
        call()
        assert not any(isinstance(cb, SampleIds) for cb in learn.cbs)


# Chunks of one sample

def sam_by_hand(net, chunks, rho, lr=.1):
    "Make one SAM step with the size-weighted mean of the chunks' gradients."
    net.train()
    params = list(net.parameters())
    n = sum(len(y) for _, y in chunks)
    mean = [torch.zeros_like(p) for p in params]
    for x, y in chunks:
        g = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        length = sum(t.square().sum() for t in g).sqrt()
        weights = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, t in zip(params, g): p += rho * t / length
        uphill = torch.autograd.grad(F.cross_entropy(net(x), y), params)
        with torch.no_grad():
            for p, w in zip(params, weights): p.copy_(w)
        for t, u in zip(mean, uphill): t += u * len(y) / n
    with torch.no_grad():
        for p, t in zip(params, mean): p -= lr * t


@pytest.mark.parametrize('rng', ['fresh', 'replay'])
def test_the_trial_of_one_sample_draws_no_random_numbers(rng):
    "Dropout has the masks of a batch whose two chunks are given as micro-batches."
    def net(): return nn.Sequential(*normed()[:3], nn.Dropout(.5), normed()[3])
    def trained(cbs, data):
        learn = learner(net(), cbs, data)
        torch.manual_seed(3)
        learn.fit(1)
        return torch.get_rng_state()
    x, y = batches(n=9, bs=9)[0]
    whole = torch.empty(9, 8, dtype=torch.float64)
    class SkipWhole(Callback):
        "Draws the mask of the forward pass over the whole batch, which chunks have."
        order, run_valid = -5, False
        def before_batch(self):
            if self.iter == 0: F.dropout(whole, .5)
    micro = [(x[:4], y[:4]), (x[4:], y[4:])]
    state = trained([SkipWhole(), SAM(.2, rng=rng), GradientAccumulation(9)], micro)
    assert torch.equal(trained([SAM(.2, m=4, rng=rng)], [(x, y)]), state)


def test_the_joined_chunk_is_right():
    x, y = batches(n=9, bs=9)[0]
    learn, expected = learner(normed(), [SAM(.2, m=4)], [(x, y)]), normed()
    learn.fit(1)
    sam_by_hand(expected, [(x[:4], y[:4]), (x[4:], y[4:])], .2)
    for a, b in zip(learn.model.state_dict().values(), expected.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_single_samples_are_refused_with_advice():
    learn = learner(normed(), [SAM(m=1)])
    before = learn.model[0].weight.clone()
    with pytest.raises(ValueError, match='`m=1` runs each sample alone.* set `m` to 2 or more'): learn.fit(1)
    assert torch.equal(learn.model[0].weight, before)


@pytest.mark.parametrize('method', [SAM, ASAM])
def test_chunks_of_a_sum_are_refused(method):
    "The mean of the chunks' gradients would be a part of the gradient of the sum."
    def fit(m, reduction):
        learner(mlp(), [method(m=m)], loss_func=nn.CrossEntropyLoss(reduction=reduction)).fit(1)
    with pytest.raises(ValueError, match="`m` needs a loss that is a mean .*, got reduction 'sum'"):
        fit(4, 'sum')
    fit(4, 'mean')
    fit(None, 'sum')


# States and closures that do not fit

def sgd(net): return torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)


@pytest.mark.parametrize('named', [True, False])
@pytest.mark.parametrize('saved, loaded, lacks', [
    (SADT(1), SAM(), 'steps'), (SAM(), ESAM(), 'generator'), (SAM(), WSAM(), 'total'),
    (SAM(), FriendlySAM(), 'total'), (WSAM(), LookSAM(), 'steps'), (SAM(), SADT(1), ''), (SAM(), GSAM(), ''),
    (LookSAM(), SAM(), ''), (FriendlySAM(), WSAM(), ''), (ASAM(), SADT(1), '')])
def test_a_state_of_another_method_is_refused(saved, loaded, lacks, named):
    if not named and not lacks: pytest.skip('a state without a name that has all entries')
    net = mlp()
    state = MethodOptimizer(saved, sgd(net), net).state_dict()
    state['param_groups'][0]['lr'] = 7.
    if not named: state['method'].pop('method_name') # as this library has written it before
    opt = MethodOptimizer(loaded, sgd(net), net)
    name = type(loaded).__name__
    words = f"not of {name}: it lacks '{lacks}' and"
    if named: words = f'is of {type(saved).__name__}, not of {name};'
    with pytest.raises(ValueError, match=words): opt.load_state_dict(state)
    assert opt.param_groups[0]['lr'] == .1, 'the base is as before'
    opt.load_state_dict(MethodOptimizer(loaded, sgd(net), net).state_dict())


def test_lightning_refuses_the_state_of_another_method():
    pytest.importorskip('lightning')
    from sadt_nb.core.lightning import MethodCallback
    state = MethodCallback(SAM()).state_dict()
    other = MethodCallback(GSAM())
    with pytest.raises(ValueError, match='is of SAM, not of GSAM'): other.load_state_dict(state)
    MethodCallback(SAM()).load_state_dict(state)


@pytest.mark.parametrize('step', [sam_step, asam_step, gsam_step])
def test_a_step_with_lbfgs_is_refused(step):
    "`LBFGS.step` evaluates the loss itself; no forward pass has run when the error comes."
    net, (x, y) = mlp(), batches()[0]
    calls = []
    def loss():
        calls.append(1)
        return F.cross_entropy(net(x), y)
    with pytest.raises(ValueError, match='LBFGS evaluates the loss several times'):
        step(net, loss, torch.optim.LBFGS(net.parameters()))
    assert not calls


@pytest.mark.parametrize('returned, words', [
    (lambda a, b: (a, b), 'two values, the first of which is a single number'),
    (lambda a, b: (a, b, a), 'a tuple of 3'), (lambda a, b: (a,), 'a tuple of 1'),
    (lambda a, b: (), 'a tuple of 0')])
@pytest.mark.parametrize('method', [SAM, lambda: SADT(1)])
def test_several_losses_are_refused(method, returned, words):
    net, (x, y) = mlp(), batches()[0]
    def closure():
        a = F.cross_entropy(net(x), y)
        return returned(a, a * .5)
    before = net[0].weight.clone()
    opt = MethodOptimizer(method(), sgd(net), net)
    with pytest.raises(ValueError, match=f'the loss or .logits, loss., got {words}; return the sum'):
        opt.step(closure)
    assert torch.equal(net[0].weight, before)


def test_logits_and_loss_are_still_taken():
    net, expected, (x, y) = mlp(), mlp(), batches()[0]
    def closure():
        logits = net(x)
        return logits, F.cross_entropy(logits, y)
    closure_step(SAM(.2), net, closure, torch.optim.SGD(net.parameters(), lr=.1))
    sam_by_hand(expected, [(x, y)], .2)
    for p, q in zip(net.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


class TakesBatch:
    def training_step(self, batch): return self.loss(batch)
class TakesIndex:
    def training_step(self, batch, i): return self.loss(batch)
class TakesAll:
    def training_step(self, *args):
        batch, index = args
        return self.loss(batch)
class TakesKeyword:
    def training_step(self, batch, *, k=1): return k * self.loss(batch)
class TakesIndexByName:
    def training_step(self, batch, batch_idx=None, **options):
        assert batch_idx is not None and not options
        return self.loss(batch)


@pytest.mark.parametrize('kind', [TakesBatch, TakesIndex, TakesAll, TakesKeyword, TakesIndexByName])
def test_the_second_pass_of_lightning_gives_the_same_arguments(kind):
    lightning = pytest.importorskip('lightning')
    from sadt_nb.core.lightning import MethodCallback
    class Module(kind, lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def loss(self, batch): return F.cross_entropy(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.net.parameters(), lr=.1)
        def train_dataloader(self): return torch.utils.data.DataLoader(batches(), batch_size=None)
    trainer = lightning.Trainer(max_epochs=1, accelerator='cpu', precision='64-true', logger=False,
                                enable_checkpointing=False, enable_progress_bar=False,
                                enable_model_summary=False, callbacks=[MethodCallback(SAM(.2))])
    module, expected = Module(), mlp()
    trainer.fit(module)
    for x, y in batches(): sam_by_hand(expected, [(x, y)], .2)
    for p, q in zip(module.net.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# Batches that a callback skips while gradients are accumulated

class Skip(Callback):
    "Ends batch `at` by an exception in an event; `first` runs before the exception."
    run_valid = False
    def __init__(self, event, at, error, order=50, first=lambda learn: None):
        self.event, self.at, self.error, self.order, self.first = event, at, error, order, first
        self.seen = 0 # batches of all epochs
    def before_batch(self): self.seen += 1
    def _skip(self, event):
        if event != self.event or self.seen - 1 != self.at or replaying(self.learn): return
        self.first(self.learn)
        raise self.error()
    def after_loss(self): self._skip('after_loss')
    def before_backward(self): self._skip('before_backward')
    def after_backward(self): self._skip('after_backward')


RECORDING = {'sadt': lambda: SADT(1, noise_scale=1000.), 'sadt without a first step':
             lambda: SADT(1, noise_scale=1000., first_step=False), 'sam': SAM, 'looksam': LookSAM,
             'friendly_sam': FriendlySAM, 'wsam': WSAM, 'only': lambda: SAM(only=lambda n, p: n[0] == '0')}

def weights_after(cbs, data, epochs=1):
    learn = learner(mlp(), cbs, data=data)
    learn.fit(epochs)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])


def micro_batches(n=6):
    gen = torch.Generator().manual_seed(5)
    xs = torch.randn(n, 4, 5, generator=gen, dtype=torch.float64)
    return list(zip(xs, torch.randint(0, 3, (n, 4), generator=gen)))


@pytest.mark.parametrize('event', ['after_loss', 'before_backward'])
@pytest.mark.parametrize('name', RECORDING)
def test_a_skipped_micro_batch_leaves_no_trace(name, event):
    "Steps of 8 samples from micro-batches of 4; the batch with number 1 would have completed the first step."
    data = micro_batches(5)
    skip = Skip(event, 1, CancelBatchException)
    skipped = weights_after([RECORDING[name](), GradientAccumulation(8), skip], data)
    without = weights_after([RECORDING[name](), GradientAccumulation(8)], data[:1] + data[2:])
    torch.testing.assert_close(skipped, without, rtol=0, atol=0)


@pytest.mark.parametrize('error', [CancelTrainException, CancelEpochException])
@pytest.mark.parametrize('name', RECORDING)
def test_an_epoch_that_ends_in_a_micro_batch_leaves_no_trace_of_it(name, error):
    "The gradient of the micro-batch before it stays, as in plain training, and counts in the next epoch."
    data = micro_batches(4)
    skip = Skip('before_backward', 1, error)
    ended = weights_after([RECORDING[name](), GradientAccumulation(8), skip], data, 2)
    without = weights_after([RECORDING[name](), GradientAccumulation(8)], data[:1] + data)
    torch.testing.assert_close(ended, without, rtol=0, atol=0)


def zero(learn): learn.opt.zero_grad()
def to_none(learn): learn.model.zero_grad()


@pytest.mark.parametrize('drop', [zero, to_none])
@pytest.mark.parametrize('name', RECORDING)
def test_a_callback_that_drops_gradients_drops_the_micro_batches(name, drop):
    data = micro_batches(6)
    accumulate = GradientAccumulation(8)
    def begin_anew(learn):
        drop(learn)
        accumulate.count = 0
    skip = Skip('after_backward', 1, CancelBatchException, first=begin_anew)
    dropped = weights_after([RECORDING[name](), accumulate, skip], data)
    without = weights_after([RECORDING[name](), GradientAccumulation(8)], data[2:])
    torch.testing.assert_close(dropped, without, rtol=1e-12, atol=1e-14)


def test_a_skipped_backward_gives_sadt_no_micro_batch():
    data = micro_batches(6)
    skip = Skip('before_backward', 1, CancelBackwardException)
    skipped = weights_after([RECORDING['sadt'](), GradientAccumulation(12), skip], data[:3])
    # by hand; the batch counts among the 12 samples, and gives neither a gradient nor a divergence
    net = mlp()
    params = list(net.parameters())
    kept = data[:3:2]
    loss = sum(F.cross_entropy(net(x), y) for x, y in kept) / 3
    g_up = torch.autograd.grad(loss, params)
    q = [net(x).detach().log_softmax(1) for x, _ in kept]
    generator = torch.Generator().manual_seed(0)
    noise = [.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    def move(changes, factor):
        with torch.no_grad():
            for p, change in zip(params, changes): p += factor * change
    move(g_up, -.1)
    move(noise, 1)
    pairs = [(net(x).log_softmax(1), target) for (x, _), target in zip(kept, q)]
    divergence = sum(F.kl_div(aux, target, log_target=True, reduction='batchmean') for aux, target in pairs)
    g_aux = torch.autograd.grad(divergence / 3, params)
    move(noise, -1)
    move([a + b for a, b in zip(g_up, g_aux)], -.1)
    expected = torch.cat([p.detach().flatten() for p in params])
    torch.testing.assert_close(skipped, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('error', [CancelBatchException, CancelTrainException, CancelEpochException])
def test_only_beside_a_callback_that_skips_the_backward(error):
    "The limited backward of the skipped batch must not be left for the next batch."
    data = micro_batches(3)
    for event in ('after_loss', 'before_backward'):
        got = weights_after([RECORDING['only'](), Skip(event, 1, error)], data, 2)
        rest = data[2:] if error is CancelBatchException else []
        expected = weights_after([RECORDING['only']()], data[:1] + rest + data)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_skipped_learner_can_be_pickled_and_copied():
    for name, make in RECORDING.items():
        if name == 'only': continue # a lambda
        learn = learner(mlp(), [make(), GradientAccumulation(8)], data=micro_batches(3))
        learn.fit(1)
        pickle.dumps(learn.cbs)
        copy.deepcopy(learn)


@pytest.mark.parametrize('make', [
    lambda: Lookahead(every=2, decay=.5), lambda: FreezeAfter({'0.weight': 1}),
    lambda: FreezeAfter({'0.weight': 0}),
], ids=['lookahead', 'frozen after an epoch', 'frozen from the start'])
def test_an_evaluation_within_an_epoch_changes_nothing_of_the_recipe(make):
    ends = []
    for others in ([], [EvaluateInEpoch(batches())]):
        learn = learner(mlp(), [make(), *others])
        learn.fit(3)
        assert all(p.requires_grad for p in learn.model.parameters())
        ends.append(flat(learn.model))
    assert torch.equal(*ends)


def test_rows_of_the_flatness_recorder_stay_through_evaluations():
    recorder = FlatnessRecorder()
    learn = learner(mlp(), [recorder])
    learn.fit(2)
    expected = [dict(row) for row in recorder.rows]
    learn.validate()
    assert recorder.rows == expected and [row['epoch'] for row in expected] == [1, 2]
    again = FlatnessRecorder()
    learn = learner(mlp(), [again, EvaluateInEpoch(batches())])
    learn.fit(2)
    assert again.rows == expected


def test_a_learner_that_never_trained_can_evaluate():
    learn = learner(mlp(), [FlatnessRecorder(), FreezeAfter({'0.weight': 1}), Lookahead(every=2)])
    learn.validate()
    assert learn.flatness_recorder.rows == [] and all(p.requires_grad for p in learn.model.parameters())
