"What every registered method must do, whatever it is. A new line in the registry is tested by being there."
import pickle
import weakref
from functools import partial

import pytest
import torch
from conftest import Net, as_loader, batches, cnn, flat, learner, needed
from fastai.callback.core import Callback, CancelBatchException, CancelFitException, TrainEvalCallback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import ParamScheduler, SchedCos
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, OptimWrapper
from sadt_nb.core.loss_terms import LossTerm
from sadt_nb.core.passes import ExtraPass
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.data.datasets import get_dls
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.simple_cnn import simple_cnn

# the published values need more steps than a test has
FAST = {'agc': dict(clip=.2), 'saf': dict(lam=2., tau=1., lag=1, start_epoch=1), 'mesa': dict(lam=2., tau=1., beta=.8, start_epoch=0), 'distillation': dict(alpha=.7)}
PER_MICRO_BATCH = {'sam', 'asam', 'esam', 'looksam', 'gsam'} # perturb each micro-batch along its own gradient; their notebooks have that oracle
ALL = pytest.mark.parametrize('name', METHODS)
WITH_EXTRA_PASS = pytest.mark.parametrize('name', [n for n in METHODS if any(isinstance(c, ExtraPass) for c in make_method(n, **needed(n)))])
conv = lambda **kw: batches(conv=True, **kw)


class Tally(Callback):
    "Counts optimizer steps and samples that went forward and backward through the network or a copy of it; records what the Learner shows."
    run_valid = False
    def before_fit(self):
        self.steps, self.forwards, self.backwards, self.samples, self.losses, self.on = 0, 0, 0, 0, [], False
        step = self.opt.step
        def counted(*a, **k): self.steps += 1; return step(*a, **k)
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
    def after_fit(self): self.hook.remove(); del self.opt.step

    @property
    def passes(self): return (self.forwards + 2 * self.backwards) / 3 / self.samples


def methods(name, **opts): return make_method(name, **{**needed(name), **FAST.get(name, {}), **opts})


def fit(name, net=None, data=None, epochs=2, cbs=(), opts={}, **kw):
    net = cnn() if net is None else net
    learn = learner(net, [*methods(name, **opts), *cbs], as_loader(conv() if data is None else data), **kw)
    learn.fit(epochs)
    return learn


@ALL
def test_trains_and_costs_what_the_registry_says(name):
    c = Tally()
    learn = fit(name, cbs=[c], epochs=12, lr=.1)
    n = len(c.losses)
    assert c.steps == n * METHODS[name].steps
    expected = METHODS[name].passes
    assert abs(c.passes - expected) <= (1 / n if name == 'looksam' else 1e-9), f'{c.passes} passes per batch'
    assert sum(c.losses[-3:]) < .8 * sum(c.losses[:3])
    plain = flat(fit('baseline', epochs=12, lr=.1).model)
    assert (name == 'baseline') == torch.equal(flat(learn.model), plain), 'a method must do something'


@ALL
def test_is_repeatable(name):
    assert torch.equal(flat(fit(name).model, True), flat(fit(name).model, True))


@ALL
def test_first_loss_and_validation_are_those_of_the_baseline(name):
    a, b = Tally(), Tally()
    learn = fit(name, cbs=[a], epochs=1)
    fit('baseline', cbs=[b], epochs=1)
    assert a.losses[0] == b.losses[0]
    before = flat(learn.model, True).clone()
    learn.model.eval()
    with torch.no_grad(): expected = torch.cat([learn.model(x) for x, _ in conv()])
    seen = []
    class See(Callback):
        def after_pred(self): seen.append(self.pred.clone())
    with learn.added_cbs(See()): learn._do_epoch_validate()
    assert torch.equal(torch.cat(seen), expected) and torch.equal(flat(learn.model, True), before)


@WITH_EXTRA_PASS
def test_an_exception_in_the_extra_pass_restores_the_weights(name):
    cbs = methods(name, **({'k': 1} if name == 'looksam' else {}))
    class Fail(Callback): # in the replay of the second batch, after the weights have moved
        run_valid, order = False, 100
        def after_pred(self):
            if getattr(self.learn, '_replaying', False) and self.iter == 1: self.before = flat(self.model); raise RuntimeError('failed on purpose')
    class Watch(Callback):
        run_valid, order = False, 8 # what the weights are just before the method perturbs them
        def after_backward(self): self.w = flat(self.model)
        def after_step(self): self.w = flat(self.model)
    net, watch, fail = cnn(bn=False), Watch(), Fail()
    learn = learner(net, [*cbs, watch, fail], as_loader(conv()))
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    assert torch.equal(flat(net), watch.w)
    if not torch.equal(fail.before, watch.w): return # in-place perturbation: it had moved, and is back
    assert METHODS[name].passes > 2, 'only teachers on a shared trunk leave the weights themselves alone'


@ALL
def test_composes_with_gradient_accumulation(name):
    whole, seen = fit(name, cnn(bn=False), conv(bs=8)), Tally()
    parts = fit(name, cnn(bn=False), conv(bs=4), cbs=[GradientAccumulation(8), seen])
    assert seen.steps == 6 * METHODS[name].steps, 'six steps of two micro-batches in two epochs'
    if name in PER_MICRO_BATCH: assert not torch.allclose(flat(parts.model), flat(whole.model), rtol=1e-9, atol=1e-11)
    else: torch.testing.assert_close(flat(parts.model), flat(whole.model), rtol=1e-9, atol=1e-11)


@ALL
def test_composes_with_clipping(name):
    norms = []
    class Norm(Callback):
        order, run_valid = 500, False
        def before_step(self): norms.append(torch.stack([p.grad.norm() for p in self.model.parameters()]).norm().item())
    fit(name, cbs=[GradientClip(.01), Norm()])
    assert max(norms) < .01 * (1 + 1e-6) and min(norms) > .005, 'clipped, and to the bound'


@ALL
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_composes_with_mixed_precision(name, mode):
    dtypes = set()
    class See(Callback):
        order, run_valid = 9.9, False # before MixedPrecision turns the logits into float32
        def after_pred(self): dtypes.add(self.pred[0].dtype if isinstance(self.pred, tuple) else self.pred.dtype)
    net = cnn(dtype=torch.float32)
    fit(name, net, conv(dtype=torch.float32), cbs=[DeviceMixedPrecision(mode), See()])
    assert dtypes == {torch.bfloat16 if mode == 'bf16' else torch.float16}
    exact = fit(name, cnn(dtype=torch.float32), conv(dtype=torch.float32))
    near = .1 if name == 'looksam' else .05 # LookSAM scales up the small difference of two gradients, rounding errors included
    assert torch.isfinite(flat(net)).all() and 0 < (flat(net) - flat(exact.model)).norm() < near * flat(exact.model).norm()


@ALL
def test_an_overflow_skips_every_step_of_the_batch(name):
    class Overflow(Callback):
        run_valid, order = False, 9.5
        def before_backward(self):
            if self.iter == 1 and not getattr(self.learn, '_replaying', False): self.learn.loss_grad = self.loss_grad * float('inf')
    steps = []
    class Step(Callback):
        order, run_valid = -50, False
        def before_batch(self): steps.append(flat(self.model))
    learn = fit(name, cnn(dtype=torch.float32), conv(dtype=torch.float32), epochs=1, cbs=[DeviceMixedPrecision('fp16'), Overflow(), Step()])
    assert torch.equal(steps[1], steps[2]), 'the batch that overflowed changed nothing'
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[2], flat(learn.model)), 'the others did'


@ALL
def test_weight_decay_momentum_and_parameter_groups(name):
    groups = lambda m: [list(m[0].parameters()), list(m[3].parameters()) + list(m[6].parameters())]
    def train(lr_head):
        learn = learner(cnn(bn=False), methods(name), as_loader(conv()), splitter=groups, wd=.1, opt_func=lambda p, lr: SGD(p, lr=lr, mom=.9))
        learn.fit(1, lr=slice(.1, lr_head) if lr_head != .1 else .1)
        return learn.model
    torch.manual_seed(0)
    a, b = train(.1), train(.001)
    assert (b[6].weight - cnn(bn=False)[6].weight).norm() < .3 * (a[6].weight - cnn(bn=False)[6].weight).norm()


@ALL
def test_a_frozen_body_does_not_move(name):
    net = cnn()
    learn = learner(net, methods(name), as_loader(conv()), splitter=lambda m: [list(m[:3].parameters()), list(m[3:].parameters())], train_bn=False)
    learn.freeze()
    before = flat(net[:3]).clone()
    learn.fit(2)
    assert not net[0].weight.requires_grad and torch.equal(flat(net[:3]), before) and not torch.equal(flat(net[6]), flat(cnn()[6]))


@ALL
def test_a_native_torch_optimizer(name):
    sgd = lambda params, lr: OptimWrapper(params, torch.optim.SGD, lr=lr)
    a, b = fit(name, opt_func=sgd), fit(name)
    torch.testing.assert_close(flat(a.model), flat(b.model), rtol=1e-10, atol=1e-12)


class StopAt(Callback):
    "Ends the fit in the middle of an epoch, as a killed process would."
    order = -50
    def __init__(self, epoch, batch): self.epoch_, self.batch = epoch, batch
    def before_batch(self):
        if self.training and (self.epoch, self.iter) == (self.epoch_, self.batch): raise CancelFitException


class SkipTo(Callback):
    "Leaves out the batches that a resumed epoch has had."
    order = -50
    def __init__(self, batch): self.batch = batch
    def before_batch(self):
        if self.training and self.epoch == 0 and self.iter < self.batch: raise CancelBatchException


@ALL
def test_state_survives_a_save_in_mid_epoch(name):
    momentum = lambda params, lr: SGD(params, lr=lr, mom=.9)
    whole = fit(name, epochs=3, opt_func=momentum)
    cbs = methods(name)
    first = learner(cnn(), [*cbs, StopAt(1, 1)], as_loader(conv()), opt_func=momentum)
    first.fit(3)
    saved = pickle.loads(pickle.dumps([first.model.state_dict(), first.opt.state_dict(), [c.state_dict() if hasattr(c, 'state_dict') else {} for c in cbs]]))
    again = methods(name)
    for c, s in zip(again, saved[2]):
        if hasattr(c, 'load_state_dict'): c.load_state_dict(s)
    net = cnn()
    net.load_state_dict(saved[0])
    second = learner(net, [*again, SkipTo(1)], as_loader(conv()), opt_func=momentum)
    second.create_opt()
    second.opt.load_state_dict(saved[1])
    second.fit(2)
    assert torch.equal(flat(net, True), flat(whole.model, True))


@ALL
def test_one_cycle_and_cosine_schedules(name):
    class Rates(Callback):
        run_valid = False
        def before_fit(self): self.lrs = []
        def after_step(self): self.lrs.append(self.opt.hypers[-1]['lr'])
    constant = flat(fit(name).model)
    for schedule in ('one cycle', 'cosine'):
        learn = learner(cnn(), [*methods(name), r := Rates()], as_loader(conv()))
        if schedule == 'one cycle': learn.fit_one_cycle(2, .1)
        else: learn.fit(2, cbs=ParamScheduler({'lr': SchedCos(.1, 0.)}))
        assert max(r.lrs) > 2 * min(r.lrs) and (schedule == 'one cycle') == (r.lrs[1] > r.lrs[0])
        assert torch.isfinite(flat(learn.model)).all() and not torch.equal(flat(learn.model), constant)


REFUSES_MIXING = {'saf', 'esam'} # one follows single samples, the other chooses among them


@ALL
@pytest.mark.parametrize('mix', [MixUp, CutMix], ids=['mixup', 'cutmix'])
def test_composes_with_mixing(name, mix):
    inputs, mixed, single = [], [], conv(dtype=torch.float32) # fastai mixes in float32
    class Watch(Callback):
        order, run_valid = 100, False
        def before_fit(self): self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self.see)
        def see(self, module, args):
            if isinstance(module, Net) and torch.is_tensor(self.learn.xb[0]) and self.training: inputs.append(torch.equal(args[0], self.learn.xb[0]))
        def before_batch(self): mixed.append(not any(torch.equal(self.learn.xb[0], x) for x, _ in single))
        def after_fit(self): self.hook.remove()
    torch.manual_seed(0)
    make = lambda *cbs: fit(name, cnn(dtype=torch.float32), single, cbs=cbs, loss_func=CrossEntropyLossFlat())
    if name in REFUSES_MIXING:
        with pytest.raises(ValueError, match='(?i)mix'): make(mix(1.))
        return
    learn = make(mix(1.), Watch())
    assert any(mixed) and len(inputs) >= len(mixed) and all(inputs), 'every pass of a batch sees the same mixed images'
    assert not torch.equal(flat(learn.model), flat(make().model))


@ALL
def test_soft_labels_of_a_mixing_loader(name):
    soft = [(x, torch.nn.functional.one_hot(y, 3).double() * .7 + .1) for x, y in conv()]
    if name == 'saf':
        with pytest.raises(ValueError, match='mixed'): fit(name, data=soft)
        return
    hard, softly = fit(name), fit(name, data=soft)
    assert not torch.equal(flat(hard.model), flat(softly.model)) and torch.isfinite(flat(softly.model)).all()


@ALL
def test_a_learning_rate_search_leaves_no_trace(name, tmp_path):
    def make(search):
        data = as_loader(conv(n=64, dtype=torch.float32))
        cbs = methods(name)
        learn = Learner(DataLoaders(data, data), cnn(dtype=torch.float32), loss_func=torch.nn.CrossEntropyLoss(), opt_func=SGD, lr=.1, path=tmp_path, cbs=cbs)
        with learn.no_bar(), learn.no_logging():
            if search:
                learn.lr_find(num_it=20, show_plot=False)
                assert len(learn.recorder.lrs) > 5 and all(torch.isfinite(torch.as_tensor(l)) for l in learn.recorder.losses[:5]), 'the search did search'
                assert torch.equal(flat(learn.model, True), flat(cnn(dtype=torch.float32), True))
            learn.fit(2)
        return flat(learn.model, True)
    assert torch.equal(make(True), make(False))


@ALL
def test_a_compiled_network(name):
    graphs = []
    def backend(graph, inputs): graphs.append(graph); return graph.forward
    torch._dynamo.reset()
    compiled = fit(name, torch.compile(cnn(), backend=backend), opts=dict(share_trunk=False) if name == 'sadt2' else {})
    assert graphs, 'the network was compiled'
    torch.testing.assert_close(flat(compiled.model), flat(fit(name).model), rtol=1e-9, atol=1e-11)


@ALL
def test_a_network_that_overwrites_what_its_last_pass_gave(name):
    "As CUDA graphs do: the next forward writes into the memory of the last prediction and of the gradients that its backward made."
    net, predictions, gradients, overwritten = cnn(), [], [], []
    def backend(graph, inputs):
        def forward(*args):
            old = [*predictions, *(g for ref in gradients if (g := ref()) is not None)]
            for t in old: overwritten.append(t.data.fill_(float('nan')))
            gradients.clear()
            had.update({p: p.grad is not None for p in net.parameters()})
            out = graph.forward(*args)
            predictions[:] = [t for t in out if t.requires_grad]
            return out
        return forward
    had = {}
    def made(p):
        if not had[p]: gradients.append(weakref.ref(p.grad))
    for p in net.parameters(): p.register_post_accumulate_grad_hook(made)
    torch._dynamo.reset()
    how = dict(opts=dict(share_trunk=False) if name == 'sadt2' else {}, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    compiled = fit(name, torch.compile(net, backend=backend), **how)
    assert overwritten, 'the network was compiled'
    torch.testing.assert_close(flat(compiled.model), flat(fit(name, **how).model), rtol=1e-9, atol=1e-11)


@WITH_EXTRA_PASS
def test_policies_for_batchnorm_and_dropout(name):
    moved = {}
    for bn in ('keep', 'update'): moved[bn] = int(fit(name, opts=dict(bn=bn)).model[1].num_batches_tracked)
    assert moved['keep'] == 6 and moved['update'] > 6, 'two epochs of three batches'
    if name in ('sam', 'asam', 'gsam', 'esam'): assert moved['update'] == 12
    masks = []
    class Mask(Callback):
        run_valid = False
        def before_fit(self): self.hook = self.model[7].register_forward_hook(lambda m, i, o: masks[-1].append(o == 0) if m.training else None)
        def before_batch(self): masks.append([])
        def after_fit(self): self.hook.remove()
    extra = dict(gamma=1) if name == 'esam' else dict(share_trunk=False) if name == 'sadt2' else {}
    results = {}
    for rng in ('replay', 'fresh'):
        masks.clear(); torch.manual_seed(3)
        results[rng] = flat(fit(name, cnn(dropout=.5), cbs=[Mask()], opts=dict(rng=rng, **extra)).model)
        again = [torch.equal(a, b) for m in masks for a, b in zip(m, m[1:])]
        assert again and (all(again) if rng == 'replay' else not all(again))
    assert not torch.equal(results['replay'], results['fresh'])


@ALL
def test_a_plain_list_of_batches_is_a_loader(name):
    learn = learner(cnn(), methods(name), conv())
    if name == 'saf':
        with pytest.raises(ValueError, match='sample ids'): learn.fit(1)
        return
    learn.fit(2)
    assert torch.equal(flat(learn.model, True), flat(fit(name).model, True))


@ALL
def test_loss_terms_of_others_take_part_in_passes_of_the_same_loss(name):
    calls = []
    class Count(LossTerm):
        def term(self, logits, rows): calls.append(len(logits)); return .1 * logits.square().mean()
    fit(name, epochs=1, cbs=[Count()], opts=dict(k=1) if name == 'looksam' else {})
    assert calls == ([8, 4] if name == 'esam' else [8, 8] if name in PER_MICRO_BATCH else [8]) * 3, 'SADT replays another loss'


def test_looksam_drops_a_direction_that_overflowed():
    class Overflow(Callback):
        run_valid, order = False, 9.5
        def before_backward(self):
            if self.iter == 0 and getattr(self.learn, '_replaying', False): self.learn.loss_grad = self.loss_grad * float('inf')
    seen = []
    class See(Callback):
        run_valid, order = False, 100
        def after_batch(self):
            look = next(c for c in self.learn.cbs if isinstance(c, LookSAM))
            seen.append((look.steps, look.direction is not None))
    net = cnn(dtype=torch.float32)
    fit('looksam', net, conv(dtype=torch.float32), epochs=1, cbs=[DeviceMixedPrecision('fp16'), Overflow(), See()])
    assert seen == [(0, False), (1, True), (2, True)], 'the refused step is not counted, and the next one looks'
    assert torch.isfinite(flat(net)).all()


@ALL
def test_a_learner_is_exported_after_training_and_loads(name, tmp_path):
    dls = get_dls('digits', bs=30, n_train=60, device='cpu')
    learn = Learner(dls, simple_cnn(dropout=0.), opt_func=SGD, lr=.01, path=tmp_path, default_cbs=False,
                    cbs=[TrainEvalCallback(), *methods(name, **(dict(teacher=simple_cnn()) if needed(name) else {}))])
    learn.fit(2)
    learn.export('x.pkl')
    x = dls.valid.one_batch()[0]
    loaded = load_learner(tmp_path / 'x.pkl')
    with torch.no_grad(): assert torch.equal(loaded.model.eval()(x), learn.model.eval()(x))
    for c in loaded.cbs: assert not any(getattr(c, k, None) is not None for k in ('teacher', 'records', 'direction')), 'what only training needs stays at home'
