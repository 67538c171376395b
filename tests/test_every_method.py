"Tests of every registered method. A new method is tested here as soon as it is registered."
import pickle
import weakref
from functools import partial

import pytest
import torch
from conftest import Net, as_loader, batches, cnn, covering, flat, follows_gradient, learner
from conftest import needed, needs_momentum, sgd_for
from documented_methods import DOCUMENTED, registered
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, TrainEvalCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, OptimWrapper
from torch.utils._pytree import tree_leaves
from sadt_nb.core.checkpoint import Checkpoint
from sadt_nb.core.loss_terms import LossTerm
from sadt_nb.core.losses import Divergence, kd_loss
from sadt_nb.core.optim import KerasAdam
from sadt_nb.core.passes import ExtraPass
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.data.augment import CropFlip, Cutout
from sadt_nb.data.datasets import get_dls
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.registry import METHODS, make_method, method_options
from sadt_nb.models.pyramidnet import pyramidnet_110
from sadt_nb.models.simple_cnn import simple_cnn

NAMES = [*METHODS, *DOCUMENTED]
ALL = pytest.mark.parametrize('name', NAMES)

# Methods that go through a Learner as another one does: agc, sam, wsam, sadt2, baseline, readme_method. They
# leave out the tests that cost half a second for each method.
LIKE_ANOTHER = ('gc', 'asam', 'gsam', 'friendly_sam', 'sadt1', 'sadt3', 'repeat_step', 'tutorial_method')
ONE_OF_EACH_KIND = pytest.mark.parametrize('name', covering(NAMES, {*NAMES} - {*LIKE_ANOTHER}))


@pytest.fixture(autouse=True)
def documented_methods():
    "The methods of README and tutorial 9 take every test, too, as they stand there."
    with registered(): yield


def has_extra_pass(name):
    return any(isinstance(c, ExtraPass) for c in make_method(name, **needed(name)))


def has_policies(name): return {'bn', 'rng'} <= set(method_options(name))


with registered():
    WITH_EXTRA_PASS = pytest.mark.parametrize('name', [n for n in NAMES if has_extra_pass(n)])
    WITH_POLICIES = pytest.mark.parametrize('name', [n for n in NAMES if has_policies(n)])


def per_micro_batch(name):
    """Return whether the method perturbs each micro-batch on its own.

    The notebooks of such methods compare this with an oracle."""
    return any(isinstance(c, PerturbedPass) for c in make_method(name, **needed(name)))


def conv(**kw): return batches(conv=True, **kw)


class Tally(Callback):
    """Counts optimizer steps, and samples that go forward and backward through the network or a copy of it.

    It also keeps the loss that the Learner shows after each batch."""
    run_valid = False
    def before_fit(self):
        self.steps = self.forwards = self.backwards = self.samples = 0
        self.losses = []
        self.on = False
        step = self.opt.step
        def counted(*args, **kwargs):
            self.steps += 1
            return step(*args, **kwargs)
        self.opt.step = counted
        self.hook = torch.nn.modules.module.register_module_forward_hook(self.count)
    def before_train(self): self.on = True
    def after_train(self): self.on = False
    def count(self, module, inputs, out):
        if not self.on or not isinstance(module, Net): return
        self.forwards += len(out)
        def backward(grad): self.backwards += len(out)
        if out.requires_grad: out.register_hook(backward)
    def after_batch(self):
        self.losses.append(self.loss.item())
        self.samples += len(self.x)
    def after_fit(self):
        self.hook.remove()
        del self.opt.step

    @property
    def passes(self): return (self.forwards + 2 * self.backwards) / 3 / self.samples


def methods(name, **opts):
    "Return the method's callbacks, with options that show an effect after a few steps."
    return make_method(name, **{**needed(name), **METHODS[name].few_steps, **opts})


def fit(name, net=None, data=None, epochs=2, cbs=(), opts=None, **kw):
    "Train by the method, by default on float64 images; `opts` are options of the method. Return the Learner."
    net = cnn() if net is None else net
    data = conv() if data is None else data
    learn = learner(net, [*methods(name, **(opts or {})), *cbs], as_loader(data), **kw)
    learn.fit(epochs)
    return learn


def overflow(learn):
    "Make the loss of this pass infinite, like an overflow in half precision."
    learn.loss_grad = learn.loss_grad * float('inf')


def replaying(learn): return getattr(learn, '_replaying', False)


def no_shared_trunk(name):
    "Return the option with which a method runs the whole network for each teacher, if it has the option."
    return dict(share_trunk=False) if 'share_trunk' in method_options(name) else {}


@ALL
def test_trains_and_costs_what_the_registry_says(name):
    tally = Tally()
    learn = fit(name, cbs=[tally], epochs=12, lr=.1)
    n = len(tally.losses)
    assert tally.steps == n * METHODS[name].steps
    tolerance = 1 / n if METHODS[name].every_batch else 1e-9 # the rest of a period
    assert abs(tally.passes - METHODS[name].passes) <= tolerance, f'{tally.passes} passes per batch'
    assert sum(tally.losses[-3:]) < .8 * sum(tally.losses[:3])
    plain = flat(fit('baseline', epochs=12, lr=.1).model)
    assert (name == 'baseline') == torch.equal(flat(learn.model), plain), 'a method must do something'


@ALL
def test_is_repeatable(name):
    assert torch.equal(flat(fit(name).model, True), flat(fit(name).model, True))


@ALL
def test_first_loss_and_validation_are_those_of_the_baseline(name):
    method, baseline = Tally(), Tally()
    learn = fit(name, cbs=[method], epochs=1)
    fit('baseline', cbs=[baseline], epochs=1)
    assert method.losses[0] == baseline.losses[0]
    before = flat(learn.model, True).clone()
    learn.model.eval()
    with torch.no_grad(): expected = torch.cat([learn.model(x) for x, _ in conv()])
    seen = []
    class Predictions(Callback):
        def after_pred(self): seen.append(self.pred.clone())
    with learn.added_cbs(Predictions()): learn._do_epoch_validate()
    assert torch.equal(torch.cat(seen), expected)
    assert torch.equal(flat(learn.model, True), before)


@WITH_EXTRA_PASS
def test_an_exception_in_the_extra_pass_restores_the_weights(name):
    class Fail(Callback): # in the replay of the second batch, after the weights have moved
        run_valid, order = False, 100
        def after_pred(self):
            if not replaying(self.learn) or self.iter != 1: return
            self.weights = flat(self.model)
            raise RuntimeError('failed on purpose')
    class Unperturbed(Callback): # the weights just before the method perturbs them
        run_valid, order = False, 8
        def after_backward(self): self.weights = flat(self.model)
        def after_step(self): self.weights = flat(self.model)
    cbs = methods(name, **METHODS[name].every_batch)
    net, unperturbed, fail = cnn(bn=False), Unperturbed(), Fail()
    learn = learner(net, [*cbs, unperturbed, fail], as_loader(conv()))
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    assert torch.equal(flat(net), unperturbed.weights)
    if not torch.equal(fail.weights, unperturbed.weights): return # moved in place, and restored
    # teachers on a shared trunk, and a batch that is repeated at the new weights
    assert METHODS[name].passes > 2 or name == 'repeat_batch', 'other passes move the weights'


@ALL
def test_composes_with_gradient_accumulation(name):
    tally = Tally()
    whole = flat(fit(name, cnn(bn=False), conv(bs=8)).model)
    parts = flat(fit(name, cnn(bn=False), conv(bs=4), cbs=[GradientAccumulation(8), tally]).model)
    assert tally.steps == 6 * METHODS[name].steps, 'six steps of two micro-batches in two epochs'
    if per_micro_batch(name): assert not torch.allclose(parts, whole, rtol=1e-9, atol=1e-11)
    else: torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-11)


@ALL
def test_resumes_in_the_middle_of_an_accumulated_batch(name, tmp_path):
    """Eleven batches of 4 and steps of 8: after one epoch, half of the sixth step is done.

    In this step, LookSAM makes its second extra pass."""
    class Stop(Callback):
        def before_epoch(self):
            if self.epoch == 1: raise KeyboardInterrupt
    def trained(file, *more):
        learn = learner(cnn(), [*methods(name), GradientAccumulation(8)], as_loader(conv(n=44, bs=4)))
        learn.fit(2, cbs=[Checkpoint(file), *more])
        return flat(learn.model, True)
    with pytest.raises(KeyboardInterrupt): trained(tmp_path / 'stopped.pt', Stop())
    resumed = trained(tmp_path / 'stopped.pt')
    assert torch.equal(resumed, trained(tmp_path / 'whole.pt'))


@ALL
def test_composes_with_clipping(name):
    norms = []
    class Norm(Callback):
        order, run_valid = 500, False
        def before_step(self):
            each = torch.stack([p.grad.norm() for p in self.model.parameters()])
            norms.append(each.norm().item())
    fit(name, cbs=[GradientClip(.01), Norm()])
    assert max(norms) < .01 * (1 + 1e-6), 'clipped'
    assert min(norms) > .005, 'to the bound'


@ALL
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_composes_with_mixed_precision(name, mode):
    dtypes = set()
    class Dtypes(Callback):
        order, run_valid = 9.9, False # before MixedPrecision turns the logits into float32
        def after_pred(self):
            logits = self.pred[0] if isinstance(self.pred, tuple) else self.pred
            dtypes.add(logits.dtype)
    net = cnn(dtype=torch.float32)
    fit(name, net, conv(dtype=torch.float32), cbs=[DeviceMixedPrecision(mode), Dtypes()])
    assert dtypes == {torch.bfloat16 if mode == 'bf16' else torch.float16}
    exact = flat(fit(name, cnn(dtype=torch.float32), conv(dtype=torch.float32)).model)
    assert torch.isfinite(flat(net)).all()
    assert 0 < (flat(net) - exact).norm() < METHODS[name].half_precision * exact.norm()


@ALL
def test_an_overflow_skips_every_step_of_the_batch(name):
    uses_first_gradient = follows_gradient(name)
    class Overflow(Callback):
        run_valid, order = False, 9.5
        def before_backward(self):
            if self.iter != 1: return
            if not (uses_first_gradient and replaying(self.learn)): overflow(self.learn)
    steps = []
    class Step(Callback):
        order, run_valid = -50, False
        def before_batch(self): steps.append(flat(self.model))
    cbs = [DeviceMixedPrecision('fp16'), Overflow(), Step()]
    learn = fit(name, cnn(dtype=torch.float32), conv(dtype=torch.float32), epochs=1, cbs=cbs)
    assert torch.equal(steps[1], steps[2]), 'the batch that overflowed changed nothing'
    assert not torch.equal(steps[0], steps[1]), 'the batch before it did'
    assert not torch.equal(steps[2], flat(learn.model)), 'the batch after it did'


@ALL
def test_weight_decay_momentum_and_parameter_groups(name):
    def groups(m): return [list(m[0].parameters()), list(m[3].parameters()) + list(m[6].parameters())]
    def momentum(params, lr): return SGD(params, lr=lr, mom=.9)
    def train(lr):
        learn = learner(cnn(bn=False), methods(name), as_loader(conv()), splitter=groups, wd=.1,
                        opt_func=momentum)
        learn.fit(1, lr=lr)
        return learn.model
    def moved(net): return (net[6].weight - cnn(bn=False)[6].weight).norm()
    torch.manual_seed(0)
    same_rate, slow_head = train(.1), train(slice(.1, .001))
    assert moved(slow_head) < .3 * moved(same_rate)


@ALL
def test_a_frozen_body_does_not_move(name):
    net = cnn()
    def groups(m): return [list(m[:3].parameters()), list(m[3:].parameters())]
    learn = learner(net, methods(name), as_loader(conv()), splitter=groups, train_bn=False)
    learn.freeze()
    before = flat(net[:3]).clone()
    learn.fit(2)
    assert not net[0].weight.requires_grad
    assert torch.equal(flat(net[:3]), before)
    assert not torch.equal(flat(net[6]), flat(cnn()[6]))


@ALL
def test_a_native_torch_optimizer(name):
    momentum = .9 if needs_momentum(methods(name)) else 0.
    def sgd(params, lr): return OptimWrapper(params, torch.optim.SGD, lr=lr, momentum=momentum)
    native, fastai = fit(name, opt_func=sgd), fit(name)
    torch.testing.assert_close(flat(native.model), flat(fastai.model), rtol=1e-10, atol=1e-12)


class StopAt(Callback):
    "Ends the fit in the middle of an epoch, as a killed process would."
    order = -50
    def __init__(self, epoch, batch): self.epoch_, self.batch = epoch, batch
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (self.epoch_, self.batch): raise CancelFitException


class SkipTo(Callback):
    "Leaves out the batches before `batch` of the first epoch, as a resumed run does."
    order = -50
    def __init__(self, batch): self.batch = batch
    def before_batch(self):
        if self.training and self.epoch == 0 and self.iter < self.batch: raise CancelBatchException


def states_of(cbs):
    "Return a state per callback; it is empty for a callback without one."
    return [cb.state_dict() if hasattr(cb, 'state_dict') else {} for cb in cbs]


def load_states(cbs, states):
    for cb, state in zip(cbs, states, strict=True):
        if hasattr(cb, 'load_state_dict'): cb.load_state_dict(state)


@ALL
def test_state_survives_a_save_in_mid_epoch(name):
    def momentum(params, lr): return SGD(params, lr=lr, mom=.9)
    whole = fit(name, epochs=3, opt_func=momentum)
    cbs = methods(name)
    first = learner(cnn(), [*cbs, StopAt(1, 1)], as_loader(conv()), opt_func=momentum)
    first.fit(3)
    saved = pickle.dumps([first.model.state_dict(), first.opt.state_dict(), states_of(cbs)])

    weights, opt_state, states = pickle.loads(saved)
    again = methods(name)
    load_states(again, states)
    net = cnn()
    net.load_state_dict(weights)
    second = learner(net, [*again, SkipTo(1)], as_loader(conv()), opt_func=momentum)
    second.create_opt()
    second.opt.load_state_dict(opt_state)
    second.fit(2)
    assert torch.equal(flat(net, True), flat(whole.model, True))


@ALL
def test_training_does_not_change_a_loaded_state(name):
    def momentum(params, lr): return SGD(params, lr=lr, mom=.9)
    def fitted(loaded=None):
        cbs = methods(name)
        if loaded is not None: load_states(cbs, loaded)
        learner(cnn(), cbs, as_loader(conv()), opt_func=momentum).fit(2)
        return states_of(cbs)
    saved = pickle.loads(pickle.dumps(fitted()))
    before = pickle.dumps(saved)
    fitted(saved)
    for state, kept in zip(tree_leaves(saved), tree_leaves(pickle.loads(before)), strict=True):
        assert torch.equal(state, kept) if isinstance(state, torch.Tensor) else state == kept


@ALL
def test_one_cycle_and_cosine_schedules(name):
    class Rates(Callback):
        run_valid = False
        def before_fit(self): self.lrs = []
        def after_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])
    constant = flat(fit(name).model)
    for schedule in ('one cycle', 'cosine'):
        rates = Rates()
        learn = learner(cnn(), [*methods(name), rates], as_loader(conv()))
        if schedule == 'one cycle': learn.fit_one_cycle(2, .1)
        else: learn.fit(2, cbs=ParamScheduler({'lr': SchedCos(.1, 0.)}))
        assert max(rates.lrs) > 2 * min(rates.lrs)
        assert (schedule == 'one cycle') == (rates.lrs[1] > rates.lrs[0])
        assert torch.isfinite(flat(learn.model)).all()
        assert not torch.equal(flat(learn.model), constant)


@ALL
@pytest.mark.parametrize('mix', [MixUp, CutMix], ids=['mixup', 'cutmix'])
def test_composes_with_mixing(name, mix):
    inputs_are_the_batch, batch_is_mixed = [], []
    single = conv(dtype=torch.float32) # fastai mixes in float32
    class Watch(Callback):
        order, run_valid = 100, False
        def before_fit(self): self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self.see)
        def see(self, module, args):
            if not isinstance(module, Net) or not self.training: return
            x = self.learn.xb[0]
            if torch.is_tensor(x): inputs_are_the_batch.append(torch.equal(args[0], x))
        def before_batch(self):
            known = [torch.equal(self.learn.xb[0], x) for x, _ in single]
            batch_is_mixed.append(not any(known))
        def after_fit(self): self.hook.remove()
    def trained(*cbs):
        return fit(name, cnn(dtype=torch.float32), single, cbs=cbs, loss_func=CrossEntropyLossFlat())
    torch.manual_seed(0)
    if METHODS[name].follows_samples or METHODS[name].chooses_samples:
        with pytest.raises(ValueError, match='(?i)mix'): trained(mix(1.))
        return
    learn = trained(mix(1.), Watch())
    assert any(batch_is_mixed)
    trained_batches = 2 * len(single) # two epochs
    # after training, the weight average sends `before_batch` once more for each batch
    extra = len(single) if name == 'weight_average' else 0
    assert len(batch_is_mixed) == trained_batches + extra
    assert len(inputs_are_the_batch) >= trained_batches
    assert all(inputs_are_the_batch), 'every pass of a batch sees the same mixed images'
    assert not torch.equal(flat(learn.model), flat(trained().model))


@ALL
def test_soft_labels_of_a_mixing_loader(name):
    soft = [(x, torch.nn.functional.one_hot(y, 3).double() * .7 + .1) for x, y in conv()]
    if METHODS[name].follows_samples:
        with pytest.raises(ValueError, match='mixed'): fit(name, data=soft)
        return
    from_hard, from_soft = flat(fit(name).model), flat(fit(name, data=soft).model)
    assert not torch.equal(from_hard, from_soft)
    assert torch.isfinite(from_soft).all()


@ONE_OF_EACH_KIND
def test_a_learning_rate_search_does_not_change_the_training_after_it(name, tmp_path):
    def weights_after_training(search):
        data = as_loader(conv(n=64, dtype=torch.float32))
        cbs = methods(name)
        learn = Learner(DataLoaders(data, data), cnn(dtype=torch.float32), lr=.1, path=tmp_path, cbs=cbs,
                        loss_func=torch.nn.CrossEntropyLoss(), opt_func=sgd_for(cbs))
        with learn.no_bar(), learn.no_logging():
            if search:
                learn.lr_find(num_it=20, show_plot=False)
                assert len(learn.recorder.lrs) > 5, 'the search did search'
                for loss in learn.recorder.losses[:5]: assert torch.isfinite(torch.as_tensor(loss))
                assert torch.equal(flat(learn.model, True), flat(cnn(dtype=torch.float32), True))
            learn.fit(2, .05) # the rate of `Learner` is another one
        return flat(learn.model, True)
    assert torch.equal(weights_after_training(True), weights_after_training(False))


@ONE_OF_EACH_KIND
def test_a_compiled_network(name):
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    compiled = fit(name, torch.compile(cnn(), backend=backend), opts=no_shared_trunk(name))
    assert graphs, 'the network was compiled'
    torch.testing.assert_close(flat(compiled.model), flat(fit(name).model), rtol=1e-9, atol=1e-11)


@ONE_OF_EACH_KIND
def test_a_network_that_overwrites_its_last_predictions_and_gradients(name):
    """The network behaves like CUDA graphs: each forward pass overwrites the memory of the last one.

    That memory holds the last prediction and the gradients that its backward pass made."""
    net = cnn()
    predictions, gradients, overwritten = [], [], []
    had_gradient = {}
    def backend(graph, inputs):
        def forward(*args):
            alive = [g for g in (ref() for ref in gradients) if g is not None]
            for t in [*predictions, *alive]: overwritten.append(t.data.fill_(float('nan')))
            gradients.clear()
            for p in net.parameters(): had_gradient[p] = p.grad is not None
            out = graph.forward(*args)
            predictions[:] = [t for t in out if t.requires_grad]
            return out
        return forward
    def gradient_was_made(p):
        if not had_gradient[p]: gradients.append(weakref.ref(p.grad))
    for p in net.parameters(): p.register_post_accumulate_grad_hook(gradient_was_made)
    torch._dynamo.reset()
    momentum = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    options = dict(opts=no_shared_trunk(name), opt_func=momentum)
    compiled = fit(name, torch.compile(net, backend=backend), **options)
    assert overwritten, 'the network was compiled'
    eager = fit(name, **options)
    torch.testing.assert_close(flat(compiled.model), flat(eager.model), rtol=1e-9, atol=1e-11)


@WITH_POLICIES
def test_policies_for_batchnorm_and_dropout(name):
    def updates(bn): return int(fit(name, opts=dict(bn=bn)).model[1].num_batches_tracked)
    kept, updated = updates('keep'), updates('update')
    assert kept == 6, 'two epochs of three batches'
    assert updated > 6
    extra = METHODS[name].passes - 1
    if per_micro_batch(name) and extra >= .5: assert updated == 6 + 6 * round(extra)
    masks = []
    class Mask(Callback):
        run_valid = False
        def before_fit(self): self.hook = self.model[7].register_forward_hook(self.see)
        def see(self, module, inputs, out):
            if module.training: masks[-1].append(out == 0)
        def before_batch(self): masks.append([])
        def after_fit(self): self.hook.remove()
    def trained(rng):
        masks.clear()
        torch.manual_seed(3)
        opts = dict(rng=rng, **no_shared_trunk(name))
        return flat(fit(name, cnn(dropout=.5), cbs=[Mask()], opts=opts).model)
    def repeated():
        pairs = [pair for passes in masks for pair in zip(passes, passes[1:])]
        return [torch.equal(a, b) for a, b in pairs if a.shape == b.shape] # the pass may have fewer samples
    replayed = trained('replay')
    assert repeated()
    assert all(repeated())
    fresh = trained('fresh')
    assert repeated()
    assert not all(repeated())
    assert not torch.equal(replayed, fresh)


@ALL
def test_a_plain_list_of_batches_is_a_loader(name):
    learn = learner(cnn(), methods(name), conv())
    if METHODS[name].follows_samples:
        with pytest.raises(ValueError, match='sample ids'): learn.fit(1)
        return
    learn.fit(2)
    assert torch.equal(flat(learn.model, True), flat(fit(name).model, True))


@ALL
def test_loss_terms_of_others_take_part_in_passes_of_the_same_loss(name):
    "SADT's extra passes have another loss, so a term of another callback is not part of them."
    calls, tally = [], Tally()
    class Count(LossTerm):
        def term(self, logits, rows):
            calls.append(len(logits))
            return .1 * logits.square().mean()
    fit(name, epochs=1, cbs=[Count(), tally], opts=METHODS[name].every_batch)
    if per_micro_batch(name): # every backward has the loss of the batch
        assert sum(calls) == tally.backwards
        assert len(calls) >= 6, 'three batches have an extra pass each'
    else: # each of the three batches once; a repeated batch has its loss twice
        assert calls == [8] * (6 if name == 'repeat_batch' else 3)


def test_looksam_drops_a_direction_that_overflowed():
    class Overflow(Callback):
        run_valid, order = False, 9.5
        def before_backward(self):
            if self.iter == 0 and replaying(self.learn): overflow(self.learn)
    seen = []
    class State(Callback):
        run_valid, order = False, 100
        def after_batch(self):
            look = next(c for c in self.learn.cbs if isinstance(c, LookSAM))
            seen.append((look.steps, look.direction is not None))
    net = cnn(dtype=torch.float32)
    cbs = [DeviceMixedPrecision('fp16'), Overflow(), State()]
    fit('looksam', net, conv(dtype=torch.float32), epochs=1, cbs=cbs)
    expected = [(0, False), (1, True), (2, True)]
    assert seen == expected, 'the skipped step is not counted, and the next one computes a direction'
    assert torch.isfinite(flat(net)).all()


@ONE_OF_EACH_KIND
def test_a_learner_is_exported_after_training_and_loads(name, tmp_path):
    dls = get_dls('digits', bs=30, n_train=60, device='cpu')
    options = dict(teacher=simple_cnn()) if needed(name) else {}
    cbs = methods(name, **options)
    learn = Learner(dls, simple_cnn(dropout=0.), opt_func=sgd_for(cbs), lr=.01, path=tmp_path,
                    default_cbs=False, cbs=[TrainEvalCallback(), *cbs])
    learn.fit(2)
    learn.export('x.pkl')
    x = dls.valid.one_batch()[0]
    loaded = load_learner(tmp_path / 'x.pkl')
    with torch.no_grad(): assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x))
    for c in loaded.cbs:
        for needed_in_training in ('teacher', 'records', 'direction', 'averaged', 'mean'):
            value = getattr(c, needed_in_training, None)
            assert value is None or value == {}, f'{needed_in_training} is not exported'


def numbers_of(options):
    "Return the names of the options whose default is a number, without the seed."
    return [n for n, p in options.items() if type(p.default) in (int, float) and n != 'seed']


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.])
def test_an_option_that_is_no_usable_number_is_refused_when_a_method_is_made(value):
    "NaN passes checks such as `rho < 0`; the first step would then destroy the weights."
    accepted, tried = [], 0
    for name in {*METHODS} - {*DOCUMENTED}: # the examples of pages leave checks out
        for option in numbers_of(method_options(name)):
            tried += 1
            try: make_method(name, **needed(name) | {option: value})
            except ValueError: continue
            accepted.append((name, option))
    assert accepted == [] and tried > 30


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1., 1.5])
@pytest.mark.parametrize(('make', 'option'), [(CropFlip, 'pad'), (Cutout, 'size')])
def test_sizes_of_augmentations_are_whole_numbers(make, option, value):
    with pytest.raises(ValueError, match=f'`{option}` must be a whole number'): make(**{option: value})


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.])
@pytest.mark.parametrize('option', ['lr', 'eps', 'weight_decay'])
def test_options_of_keras_adam_are_finite(option, value):
    with pytest.raises(ValueError, match=f'`{option}` must'): KerasAdam([torch.ones(2)], **{option: value})


@pytest.mark.parametrize('make', [
    lambda nan: make_method('gsam', lr_min=nan), lambda nan: make_method('gsam', lr_max=nan),
    lambda nan: pyramidnet_110(alpha=nan), lambda nan: Divergence(scale=nan),
    lambda nan: kd_loss(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2).long(), .5, nan)])
def test_numbers_of_networks_and_losses_are_not_nan(make):
    with pytest.raises(ValueError, match='must'): make(float('nan'))
