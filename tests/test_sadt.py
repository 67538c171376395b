"Cases of SADT that its notebook does not test."
import copy

import pytest
import torch
from conftest import batches, cnn, flat, learner, mlp
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from tasks import normal
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.sadt import SADT, layer_noise, sadt_step


def sgd_with_l2(params, lr):
    "SGD with momentum and L2 regularization, whose step writes the penalty into the gradient."
    return SGD(params, lr=lr, mom=.9, wd=.1, decouple_wd=False)


def fit(*cbs, net=None, opt_func=SGD, data=None, epochs=2, **kw):
    "Train with the callbacks, by default the MLP. Return parameters and buffers as one vector."
    net = mlp() if net is None else net
    learner(net, cbs, data, opt_func=opt_func, **kw).fit(epochs)
    return flat(net, True)


def test_without_divergence_sadt_repeats_the_step_even_if_the_step_changes_the_gradient():
    sadt = fit(SADT(kl_weight=0.), opt_func=sgd_with_l2, wd=.1)
    assert torch.equal(sadt, fit(RepeatStep(2), opt_func=sgd_with_l2, wd=.1))


def test_a_parameter_outside_the_divergence_gets_its_first_gradient_twice():
    "The loss sees an extra parameter that the logits, and so the divergence, do not depend on."
    class Extra(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
            self.extra = torch.nn.Parameter(torch.tensor(1., dtype=torch.float64))
        def forward(self, x): return self.net(x)
    def extra_after_training(cb):
        net = Extra()
        class Loss(torch.nn.Module):
            def forward(self, pred, y): return torch.nn.functional.cross_entropy(pred, y) + net.extra**2
        learner(net, [cb], loss_func=Loss(), opt_func=sgd_with_l2, wd=.1).fit(2)
        return net.extra.item()
    sadt = SADT(divergence='categorical') # a loss of one's own does not say what the outputs are
    assert extra_after_training(sadt) == pytest.approx(extra_after_training(RepeatStep(2)), abs=1e-14)


CHANGES = [('noise_scale', 0.), ('kl', 'aux_to_clean'), ('kl_weight', 0.), ('first_step', False),
           ('grad_at', 'up')]


@pytest.mark.parametrize('attribute, value', CHANGES)
def test_attributes_are_read_at_every_batch(attribute, value):
    class Change(Callback):
        run_valid = False
        def before_batch(self):
            if self.iter == 1: setattr(self.sadt, attribute, value)
    def noisy(): return SADT(noise_scale=3e3)
    assert not torch.equal(fit(noisy(), Change(), epochs=1), fit(noisy(), epochs=1))
    first = batches()[:1]
    changed = fit(noisy(), Change(), data=first, epochs=1)
    assert torch.equal(changed, fit(noisy(), data=first, epochs=1)), 'the first batch is as before'


def test_without_noise_the_teachers_of_variants_1_and_2_are_the_network_itself():
    def trained(variant, **kw):
        sadt = SADT(variant, noise_scale=0., kl='clean_to_aux', **kw)
        return fit(sadt, net=cnn(), data=batches(conv=True))
    one_teacher = trained(1, share_trunk=True)
    two_teachers = trained(2, share_trunk=False)
    shared_trunk = trained(2)
    torch.testing.assert_close(two_teachers, shared_trunk, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(one_teacher, shared_trunk), 'two teachers count twice'


def test_layers_are_found_by_name_of_module_or_parameter():
    two = torch.ones(2)
    params = {'body.0.weight': torch.ones(2, 2), 'body.0.bias': two, 'body.01.weight': two}
    def moved(layer): return list(layer_noise(layer, .1)(params, {}, torch.Generator()))
    assert moved('body.0') == ['body.0.weight', 'body.0.bias']
    assert moved('body.0.bias') == ['body.0.bias']
    assert moved('head') == []


def test_a_second_fit_continues_the_noise():
    net = mlp()
    learn = learner(net, [SADT(noise_scale=1e3)])
    learn.fit(1)
    learn.fit(1)
    assert torch.equal(flat(net, True), fit(SADT(noise_scale=1e3), epochs=2))


def test_callbacks_that_sadt_adds_are_removed_after_the_fit():
    learn = learner(mlp(), [SADT()])
    n = len(learn.cbs)
    learn.fit(1)
    assert len(learn.cbs) == n
    assert not hasattr(learn, 'step_grads')


def test_autocast_is_left_after_a_pass_without_backward_and_after_an_error():
    data = batches(dtype=torch.float32)
    enabled = []
    class Look(Callback):
        run_valid = False
        def after_batch(self): enabled.append(torch.is_autocast_enabled('cpu'))
    sadt = SADT(grad_at='up', noise_scale=1e3)
    fit(sadt, DeviceMixedPrecision('bf16'), Look(), net=mlp(dtype=torch.float32), data=data)
    assert len(enabled) == 6
    assert not any(enabled)

    class Fail(Callback):
        run_valid, order = False, 5 # in the replay, before MixedPrecision leaves autocast
        def after_pred(self):
            if getattr(self.learn, '_replaying', False): raise RuntimeError('failed on purpose')
    with pytest.raises(RuntimeError, match='on purpose'):
        fit(SADT(), DeviceMixedPrecision('bf16'), Fail(), net=mlp(dtype=torch.float32), data=data)
    assert not torch.is_autocast_enabled('cpu')


CALLS = [(2, {}, 2), (2, dict(share_trunk=False), 3), (2, dict(grad_at='up'), 5), (1, {}, 2)]


@pytest.mark.parametrize('variant, options, calls', CALLS)
def test_how_often_the_first_layer_runs_per_batch(variant, options, calls):
    """Once for the batch, and once for all teachers that share the trunk, else once per teacher.

    With the gradient at the updated weights each teacher needs two passes: one there, one of its own."""
    net, seen = cnn(), []
    convolve = net[0]._conv_forward # a hook would also count the calls that are answered from memory
    def counted(*args):
        if net.training: seen.append(1)
        return convolve(*args)
    net[0]._conv_forward = counted
    fit(SADT(variant, noise_scale=1e3, **options), net=net, data=batches(conv=True), epochs=1)
    assert len(seen) == 3 * calls, 'three batches'


# Micro-batches in a plain loop: SADT runs their closures again at the step

X, Y = normal(11, 5), torch.arange(11).remainder(3)


def loop_network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def fixed_noise(params, grads, generator): return {n: torch.full_like(p, .3) for n, p in params.items()}


def whole(net, xb): return net(xb)
def in_parts(net, xb): return net[2](net[1](net[0](xb)))


def by_vmap(net, xb):
    params = dict(net.named_parameters())
    return torch.vmap(lambda x: torch.func.functional_call(net, params, (x,)))(xb)


def of(net, xb, yb, share=.5, run=whole):
    out = run(net, xb)
    return out, F.cross_entropy(out, yb) * share


def in_micro_batches(bind, size=4, prepare=lambda xb: xb, run=whole, **kwargs):
    net = loop_network()
    sadt = SADT(perturb=[fixed_noise], **kwargs)
    opt = MethodOptimizer(sadt, torch.optim.SGD(net.parameters(), lr=.1), net)
    for xb, yb in zip(X[:8].split(size), Y[:8].split(size)):
        if bind: opt.backward(lambda xb=xb, yb=yb: of(net, prepare(xb), yb, len(xb) / 8, run))
        else: opt.backward(lambda: of(net, prepare(xb), yb, len(xb) / 8, run)) # noqa: B023, what the test is about
    opt.step()
    for m in net.modules(): assert not m._forward_pre_hooks and not m._forward_hooks # copies would have them
    return flat(net)


def by_definition():
    "SADT's two steps on the batch of 8 samples, in plain PyTorch."
    net = loop_network()
    params = list(net.parameters())
    logits = net(X[:8])
    q = logits.detach().softmax(1)
    g_up = torch.autograd.grad(F.cross_entropy(logits, Y[:8]), params)
    with torch.no_grad():
        for p, g in zip(params, g_up): p -= .1 * g
        w_up = [p.clone() for p in params]
        for p in params: p += .3
    kl = F.kl_div(net(X[:8]).log_softmax(1), q, reduction='batchmean')
    g_aux = torch.autograd.grad(kl, params)
    return torch.cat([(w - .1 * (g + a)).flatten() for w, g, a in zip(w_up, g_up, g_aux)]).detach()


def test_bound_micro_batches_equal_the_whole_batch():
    for size in (2, 4, 8):
        torch.testing.assert_close(in_micro_batches(True, size), by_definition(), rtol=1e-12, atol=1e-14)
    converted = in_micro_batches(True, prepare=torch.clone) # another tensor with equal values
    torch.testing.assert_close(converted, by_definition(), rtol=1e-12, atol=1e-14)
    for run in (in_parts, by_vmap):
        torch.testing.assert_close(in_micro_batches(True, run=run), by_definition(), rtol=1e-12, atol=1e-14)


def test_a_copy_between_two_micro_batches_of_a_network_that_is_called_in_parts():
    net = loop_network()
    opt = MethodOptimizer(SADT(perturb=[fixed_noise]), torch.optim.SGD(net.parameters(), lr=.1), net)
    opt.backward(lambda: of(net, X[:4], Y[:4], run=in_parts))
    copied, other = copy.deepcopy((net, opt))
    assert all(t.grad_fn is None for micro in other.method._micro for call in micro.inputs for t in call)
    opt.backward(lambda: of(net, X[4:8], Y[4:8], run=in_parts))
    opt.step()
    torch.testing.assert_close(flat(net), by_definition(), rtol=1e-12, atol=1e-14)
    for m in copied.modules(): assert not m._forward_pre_hooks and not m._forward_hooks


@pytest.mark.parametrize('size', [2, 3, 4]) # with 3, the last micro-batch is smaller
@pytest.mark.parametrize('grad_at', ['aux', 'up'])
@pytest.mark.parametrize('prepare', [lambda xb: xb, torch.clone])
@pytest.mark.parametrize('run', [whole, in_parts])
def test_a_closure_that_reads_another_micro_batch_is_noticed(size, grad_at, prepare, run):
    with pytest.raises(ValueError, match='bind them: `opt.backward'):
        in_micro_batches(False, size, prepare, run, grad_at=grad_at)
    # one micro-batch cannot read another one, and random inputs are not those of another micro-batch
    in_micro_batches(False, 8, prepare, run, grad_at=grad_at)
    in_micro_batches(True, size, lambda xb: xb + torch.rand_like(xb), run, grad_at=grad_at)


def test_a_closure_with_bound_arguments_takes_no_rows():
    net = loop_network()
    x, y = X[:8], Y[:8]
    opt = MethodOptimizer(ESAM(), torch.optim.SGD(net.parameters(), lr=.1), net)
    with pytest.raises(ValueError, match='selects samples'):
        opt.step(lambda x=x, y=y: F.cross_entropy(net(x), y, reduction='none'))
    opt.step(lambda rows, x=x, y=y: F.cross_entropy(net(x if rows is None else x[rows]),
                                                    y if rows is None else y[rows], reduction='none'))


class Accelerated(torch.optim.SGD):
    "What an optimizer prepared by accelerate shows of gradient accumulation."
    class gradient_state: sync_gradients = False


def test_a_function_refuses_accumulation_by_accelerate():
    net = loop_network()
    before, opt = flat(net), Accelerated(net.parameters(), lr=.1)
    with pytest.raises(ValueError, match='make one `MethodOptimizer` before the loop'):
        sadt_step(net, lambda: of(net, X[:4], Y[:4]), opt, [fixed_noise])
    assert torch.equal(flat(net), before) and all(p.grad is None for p in net.parameters())


# With sigma='rate', the noise is as large as the rate of the first step

class RatesOfSteps(Callback):
    "Stores the rate of the Learner's steps."
    order = 70
    def before_fit(self): self.of_steps = []
    def before_step(self): self.of_steps.append(float(self.opt.hypers[-1]['lr']))


def test_the_noise_has_the_rate_of_the_first_step_of_a_schedule():
    seen, sadt = RatesOfSteps(), SADT(sigma='rate')
    learn = learner(mlp(), [sadt, seen], opt_func=SGD)
    with learn.no_logging(): learn.fit_one_cycle(2, lr_max=.1)
    assert sadt.rate == seen.of_steps[0] == pytest.approx(.1 / 25) and seen.of_steps[1] != seen.of_steps[0]
    learn.fit(1, lr=.02) # a new training
    assert sadt.rate == pytest.approx(.02)
    assert sadt.state_dict()['rate'] == sadt.rate
    resumed = SADT(sigma='rate')
    resumed.load_state_dict(sadt.state_dict())
    learner(mlp(), [resumed], opt_func=SGD).fit(1, lr=.5)
    assert resumed.rate == pytest.approx(.02)


@pytest.mark.parametrize('by_function', [True, False])
def test_the_noise_has_the_rate_of_the_first_step_of_a_loop(by_function):
    "A warm-up: the rate is set before the first step, and grows after each step."
    net, sadt = loop_network(), SADT(sigma='rate')
    base = torch.optim.SGD(net.parameters(), lr=1.)
    opt = base if by_function else MethodOptimizer(sadt, base, net)
    schedule = torch.optim.lr_scheduler.LambdaLR(base, lambda i: .01 * (i + 1)) # sets `initial_lr` to 1
    for _ in range(3):
        if by_function: closure_step(sadt, net, lambda: of(net, X, Y), base)
        else: opt.step(lambda: of(net, X, Y))
        schedule.step()
        assert sadt.rate == pytest.approx(.01)
    assert sadt.noise_factor() == pytest.approx(.01 / 1e-4)
