"What every registered method must do, whatever it is. A new line in the registry is tested by being there."
import copy
import pickle

import pytest
import torch
from conftest import CPUMixedPrecision, batches, cnn, flat, learner
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.learner import Learner, load_learner
from fastai.optimizer import SGD, OptimWrapper
from sadt_nb.core.passes import ExtraPass
from sadt_nb.data.datasets import get_dls
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.simple_cnn import simple_cnn

FAST = {'agc': dict(clip=.2)} # the published bound of 0.01 needs more steps than a test has
ALL = pytest.mark.parametrize('name', METHODS)
WITH_EXTRA_PASS = pytest.mark.parametrize('name', [n for n, m in METHODS.items() if m.passes > 1])
conv = lambda **kw: batches(conv=True, **kw)


class Tally(Callback):
    "Counts optimizer steps and forward calls, and records what the Learner shows."
    run_valid = False
    def before_fit(self):
        self.steps, self.forwards, self.losses = 0, 0, []
        step = self.opt.step
        def counted(*a, **k): self.steps += 1; return step(*a, **k)
        self.opt.step = counted
        self.hook = self.model.register_forward_pre_hook(lambda *_: self.add())
    def add(self): self.forwards += self.model.training
    def after_batch(self): self.losses.append(self.loss.item())
    def after_fit(self): self.hook.remove(); del self.opt.step


def fit(name, net=None, data=None, epochs=2, cbs=(), opts={}, **kw):
    net = cnn() if net is None else net
    learn = learner(net, [*make_method(name, **opts), *cbs], conv() if data is None else data, **kw)
    learn.fit(epochs)
    return learn


@ALL
def test_trains_and_costs_what_the_registry_says(name):
    c = Tally()
    learn = fit(name, cbs=[c], epochs=12, lr=.1, opts=FAST.get(name, {}))
    n = len(c.losses)
    assert c.steps == n * METHODS[name].steps and c.forwards == n * METHODS[name].passes
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
    cbs = make_method(name)
    assert isinstance(cbs[0], ExtraPass)
    class Fail(Callback): # in the replay of the second batch, after the weights have moved
        run_valid, order = False, 100
        def after_pred(self):
            if getattr(self.learn, '_replaying', False) and self.iter == 1: self.before = flat(self.model); raise RuntimeError('failed on purpose')
    class Watch(Callback):
        run_valid, order = False, 8 # what the weights are just before the method perturbs them
        def after_backward(self): self.w = flat(self.model)
        def after_step(self): self.w = flat(self.model)
    net, watch, fail = cnn(bn=False), Watch(), Fail()
    learn = learner(net, [*cbs, watch, fail], conv())
    with pytest.raises(RuntimeError, match='on purpose'): learn.fit(1)
    assert torch.equal(flat(net), watch.w)
    if not torch.equal(fail.before, watch.w): return # in-place perturbation: it had moved, and is back
    assert METHODS[name].passes > 2, 'only teachers on a shared trunk leave the weights themselves alone'


@ALL
def test_composes_with_gradient_accumulation(name):
    whole, seen = fit(name, cnn(bn=False), conv(bs=8)), Tally()
    parts = fit(name, cnn(bn=False), conv(bs=4), cbs=[GradientAccumulation(8), seen])
    assert seen.steps == 6 * METHODS[name].steps, 'six steps of two micro-batches in two epochs'
    if name != 'sam': # SAM perturbs every micro-batch along its own gradient; its notebook has that oracle
        torch.testing.assert_close(flat(parts.model), flat(whole.model), rtol=1e-9, atol=1e-11)


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
    dtypes, scales = set(), []
    class See(Callback):
        order, run_valid = 9.9, False # before MixedPrecision turns the logits into float32
        def after_pred(self): dtypes.add(self.pred[0].dtype if isinstance(self.pred, tuple) else self.pred.dtype)
    net = cnn(dtype=torch.float32)
    learn = fit(name, net, conv(dtype=torch.float32), cbs=[CPUMixedPrecision(mode), See()])
    assert dtypes == {torch.bfloat16 if mode == 'bf16' else torch.float16}
    exact = fit(name, cnn(dtype=torch.float32), conv(dtype=torch.float32))
    assert torch.isfinite(flat(net)).all() and 0 < (flat(net) - flat(exact.model)).norm() < .05 * flat(exact.model).norm()


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
    learn = fit(name, cnn(dtype=torch.float32), conv(dtype=torch.float32), epochs=1, cbs=[CPUMixedPrecision('fp16'), Overflow(), Step()])
    assert torch.equal(steps[1], steps[2]), 'the batch that overflowed changed nothing'
    assert not torch.equal(steps[0], steps[1]) and not torch.equal(steps[2], flat(learn.model)), 'the others did'


@ALL
def test_weight_decay_momentum_and_parameter_groups(name):
    groups = lambda m: [list(m[0].parameters()), list(m[3].parameters()) + list(m[6].parameters())]
    def train(lr_head):
        learn = learner(cnn(bn=False), make_method(name), conv(), splitter=groups, wd=.1, opt_func=lambda p, lr: SGD(p, lr=lr, mom=.9))
        learn.fit(1, lr=slice(.1, lr_head) if lr_head != .1 else .1)
        return learn.model
    torch.manual_seed(0)
    a, b = train(.1), train(.001)
    assert (b[6].weight - cnn(bn=False)[6].weight).norm() < .3 * (a[6].weight - cnn(bn=False)[6].weight).norm()


@ALL
def test_a_frozen_body_does_not_move(name):
    net = cnn()
    for p in net[0].parameters(): p.requires_grad_(False)
    before = flat(net[0]).clone()
    fit(name, net)
    assert torch.equal(flat(net[0]), before) and not torch.equal(flat(net[6]), flat(cnn()[6]))


@ALL
def test_a_native_torch_optimizer(name):
    sgd = lambda params, lr: OptimWrapper(params, torch.optim.SGD, lr=lr)
    a, b = fit(name, opt_func=sgd), fit(name)
    torch.testing.assert_close(flat(a.model), flat(b.model), rtol=1e-10, atol=1e-12)


@ALL
def test_state_survives_a_save_in_mid_run(name):
    "Two epochs equal one, a saved and loaded state, and one more."
    whole = fit(name, cnn(), epochs=2)
    cbs = make_method(name)
    first = learner(cnn(), cbs, conv())
    first.fit(1)
    state = pickle.loads(pickle.dumps([c.state_dict() if hasattr(c, 'state_dict') else {} for c in cbs]))
    again = make_method(name)
    for c, s in zip(again, state):
        if hasattr(c, 'load_state_dict'): c.load_state_dict(s)
    second = learner(copy.deepcopy(first.model), again, conv())
    second.fit(1)
    assert torch.equal(flat(second.model, True), flat(whole.model, True))


@ALL
def test_a_learner_is_exported_after_training_and_loads(name, tmp_path):
    dls = get_dls('digits', bs=30, n_train=60, device='cpu')
    learn = Learner(dls, simple_cnn(dropout=0.), opt_func=SGD, lr=.01, path=tmp_path, default_cbs=False, cbs=[TrainEvalCallback(), *make_method(name)])
    learn.fit(1)
    learn.export('x.pkl')
    x = dls.valid.one_batch()[0]
    with torch.no_grad(): assert torch.equal(load_learner(tmp_path / 'x.pkl').model.eval()(x), learn.model.eval()(x))
