"Cases of SADT that its notebook does not test."
import pytest
import torch
from conftest import batches, cnn, flat, learner, mlp
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.sadt import SADT, layer_noise


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
