"Corners of SADT that the notebook leaves out."
import pytest
import torch
from conftest import batches, cnn, flat, learner, mlp
from fastai.callback.core import Callback
from fastai.optimizer import SGD
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.sadt import SADT, layer_noise

l2 = lambda p, lr: SGD(p, lr=lr, mom=.9, wd=.1, decouple_wd=False) # writes the penalty into the gradient


def fit(*cbs, net=None, opt_func=SGD, data=None, epochs=2, **kw):
    net = mlp() if net is None else net
    learner(net, cbs, data, opt_func=opt_func, **kw).fit(epochs)
    return flat(net, True)


def test_without_divergence_it_is_two_steps_on_one_gradient_even_if_the_step_writes_into_it():
    assert torch.equal(fit(SADT(kl_weight=0.), opt_func=l2, wd=.1), fit(RepeatStep(2), opt_func=l2, wd=.1))


def test_a_parameter_that_no_teacher_reaches_still_gets_its_first_gradient_twice():
    "Only the last layer's logits enter the divergence of a model whose loss also sees an extra parameter."
    class Extra(torch.nn.Module):
        def __init__(self): super().__init__(); self.net, self.extra = mlp(), torch.nn.Parameter(torch.tensor(1., dtype=torch.float64))
        def forward(self, x): return self.net(x)
    def run(cb):
        net = Extra()
        class Loss(torch.nn.Module):
            def forward(self, pred, y): return torch.nn.functional.cross_entropy(pred, y) + net.extra**2
        learner(net, [cb], loss_func=Loss(), opt_func=l2, wd=.1).fit(2)
        return net.extra.item()
    assert run(SADT()) == pytest.approx(run(RepeatStep(2)), abs=1e-14)


@pytest.mark.parametrize('attribute, value', [('noise_scale', 0.), ('kl', 'aux_to_clean'), ('kl_weight', 0.), ('first_step', False), ('grad_at', 'up')])
def test_attributes_are_read_at_every_batch(attribute, value):
    class Change(Callback):
        run_valid = False
        def before_batch(self):
            if self.iter == 1: setattr(self.sadt, attribute, value)
    big = lambda **kw: SADT(noise_scale=3e3, **kw)
    moved, fixed = fit(big(), Change(), epochs=1), fit(big(), epochs=1)
    assert not torch.equal(moved, fixed)
    first = batches()[:1]
    assert torch.equal(fit(big(), Change(), data=first, epochs=1), fit(big(), data=first, epochs=1)), 'the first batch is as before'


def test_without_noise_the_teachers_of_variant_1_and_2_are_the_network_itself():
    a = [fit(SADT(v, noise_scale=0., kl='clean_to_aux', share_trunk=s), net=cnn(), data=batches(conv=True)) for v, s in ((1, True), (2, False))]
    b = fit(SADT(2, noise_scale=0., kl='clean_to_aux'), net=cnn(), data=batches(conv=True))
    torch.testing.assert_close(a[1], b, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(a[0], b), 'two teachers count twice'


def test_layers_are_found_by_name_of_module_or_parameter():
    params = {'body.0.weight': torch.ones(2, 2), 'body.0.bias': torch.ones(2), 'body.01.weight': torch.ones(2)}
    draw = lambda layer: list(layer_noise(layer, .1)(params, {}, torch.Generator()))
    assert draw('body.0') == ['body.0.weight', 'body.0.bias'] and draw('body.0.bias') == ['body.0.bias'] and draw('head') == []


def test_a_second_fit_continues_the_noise():
    sadt, net = SADT(noise_scale=1e3), mlp()
    learn = learner(net, [sadt])
    learn.fit(1); learn.fit(1)
    assert torch.equal(flat(net, True), fit(SADT(noise_scale=1e3), epochs=2))


def test_companions_leave_with_the_fit():
    learn = learner(mlp(), [SADT()])
    n = len(learn.cbs)
    learn.fit(1)
    assert len(learn.cbs) == n and not hasattr(learn, 'step_grads')


def test_autocast_is_left_after_a_pass_without_backward_and_after_an_error():
    data = batches(dtype=torch.float32)
    seen = []
    class Look(Callback):
        run_valid = False
        def after_batch(self): seen.append(torch.is_autocast_enabled('cpu'))
    fit(SADT(grad_at='up', noise_scale=1e3), DeviceMixedPrecision('bf16'), Look(), net=mlp(dtype=torch.float32), data=data)
    assert len(seen) == 6 and not any(seen)

    class Fail(Callback):
        run_valid, order = False, 5 # in the replay, before MixedPrecision leaves autocast
        def after_pred(self):
            if getattr(self.learn, '_replaying', False): raise RuntimeError('failed on purpose')
    with pytest.raises(RuntimeError, match='on purpose'): fit(SADT(), DeviceMixedPrecision('bf16'), Fail(), net=mlp(dtype=torch.float32), data=data)
    assert not torch.is_autocast_enabled('cpu')
