"""Several optimizers as one: the same steps as one optimizer, and the same state when it is saved."""
import copy
import pickle
from functools import partial

import pytest
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from test_closures import FIRST_STEP, METHODS, batches, closure_for, network, sgd, values
from torch import nn
from torch.nn import functional as F

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.multi_optimizer import MultiOptimizer
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sam import SAM

close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


def halves(net):
    "The weights and the biases of a network."
    params = list(net.parameters())
    return [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]


def two(net, cls=torch.optim.SGD, **options):
    "An optimizer for the weights and one for the biases, as one."
    options = options or dict(lr=.1, momentum=.9, weight_decay=1e-3)
    return MultiOptimizer([cls(params, **options) for params in halves(net)])


def adam_and_sgd(net):
    weights, biases = halves(net)
    groups = [dict(params=weights[:1], lr=.01), dict(params=weights[1:], lr=.02)]
    return MultiOptimizer([torch.optim.Adam(groups), torch.optim.SGD(biases, lr=.1, momentum=.9)])


def train(net, opt, data):
    for x, y in data: opt.step(closure_for(opt.method, net, x, y))


def zeroing_closure(net, opt, x, y):
    "A closure in the style of PyTorch's documentation."
    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss
    return closure


def steps(net, opt, data):
    for x, y in data: opt.step(zeroing_closure(net, opt, x, y))


def method_steps(name, make, max_norm=None):
    net = network(.5 if 'replay' in name else 0.)
    torch.manual_seed(2)
    train(net, MethodOptimizer(METHODS[name](), make(net), net, max_norm=max_norm), batches())
    return values(net)


@pytest.mark.parametrize('max_norm', [None, .1])
@pytest.mark.parametrize('name', METHODS)
def test_two_optimizers_make_the_steps_of_one(name, max_norm):
    close(method_steps(name, two, max_norm), method_steps(name, sgd, max_norm))


@pytest.mark.parametrize('name', [name for name in FIRST_STEP if 'replay' not in name])
def test_the_two_calls_make_the_same_steps(name):
    net, expected = network(), method_steps(name, sgd)
    torch.manual_seed(2)
    opt = MethodOptimizer(METHODS[name](), two(net), net)
    for x, y in batches():
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        if opt.first_step(): F.cross_entropy(net(x), y).backward()
        opt.second_step()
    close(values(net), expected)


def test_micro_batches_and_a_loss_scale():
    def trained(make):
        net = network(norm=False)
        scaler = torch.amp.GradScaler('cpu', init_scale=64.)
        opt = MethodOptimizer(METHODS['wsam'](), make(net), net, scaler)
        for i, (x, y) in enumerate(batches()):
            opt.backward(lambda x=x, y=y: F.cross_entropy(net(x), y) / 2)
            if i % 2 == 0: continue
            opt.step()
            scaler.update()
            opt.zero_grad()
        return values(net)
    close(trained(two), trained(sgd))


def test_a_closure_that_calls_zero_grad_begins_a_new_step():
    net, other = network(), network()
    steps(net, MethodOptimizer(SAM(.1), two(net), net), batches())
    steps(other, MethodOptimizer(SAM(.1), sgd(other), other), batches())
    close(values(net), values(other))


def test_the_radius_of_a_group():
    "A group's own `rho` counts; the `rho` of an Adadelta, which is a decay rate, does not."
    (x, y), = batches(1)
    def trained(make):
        net = network()
        opt = MethodOptimizer(SAM(.1), make(net), net)
        opt.step(lambda: F.cross_entropy(net(x), y))
        return values(net)
    def own_radii(net):
        weights, biases = halves(net)
        return MultiOptimizer([torch.optim.SGD([dict(params=weights, rho=.3)], lr=.1),
                               torch.optim.SGD(biases, lr=.1)])
    def one(net):
        weights, biases = halves(net)
        return torch.optim.SGD([dict(params=weights, rho=.3), dict(params=biases)], lr=.1)
    close(trained(own_radii), trained(one))
    def adadelta_and_sgd(net):
        weights, biases = halves(net)
        return MultiOptimizer([torch.optim.Adadelta(weights), torch.optim.SGD(biases, lr=.1)])
    net = network()
    opt = adadelta_and_sgd(net)
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    kept = [p.detach().clone() for p in net.parameters()]
    with torch.no_grad():
        for p, g in zip(net.parameters(), grads): p += .1 * g / norm
    F.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        for p, w in zip(net.parameters(), kept): p.copy_(w)
    opt.step()
    close(trained(adadelta_and_sgd), values(net))


def test_schedulers_keep_the_rates_of_the_groups():
    net = network()
    opt = adam_and_sgd(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: .5**step)
    opt.step()
    schedule.step()
    assert [group['lr'] for group in opt.param_groups] == [.005, .01, .05]
    sgd_alone = opt.optimizers[1]
    inner = torch.optim.lr_scheduler.StepLR(sgd_alone, 1, gamma=.1)
    opt.step()
    inner.step()
    torch.testing.assert_close([group['lr'] for group in opt.param_groups], [.005, .01, .005])


def test_hooks_of_the_optimizers_inside_run_once_per_step():
    net = network()
    opt = two(net)
    calls = []
    opt.register_step_pre_hook(lambda *args: calls.append('all'))
    for i, inner in enumerate(opt.optimizers):
        inner.register_step_post_hook(lambda *args, i=i: calls.append(i))
    wrapper = MethodOptimizer(SAM(.1), opt, net)
    train(net, wrapper, batches(2))
    assert calls == ['all', 0, 1] * 2


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('way', ['state', 'deepcopy', 'pickle'])
def test_training_continues_from_a_state_and_from_a_copy(way, wrapped):
    def make(net):
        opt = adam_and_sgd(net)
        return MethodOptimizer(SAM(.1), opt, net) if wrapped else opt
    data = batches(4)
    whole = network()
    steps(whole, make(whole), data)
    net = network()
    opt = make(net)
    steps(net, opt, data[:2])
    if way == 'state':
        state = pickle.loads(pickle.dumps((net.state_dict(), opt.state_dict())))
        net = network()
        opt = make(net)
        net.load_state_dict(state[0])
        opt.load_state_dict(state[1])
    elif way == 'deepcopy': net, opt = copy.deepcopy((net, opt))
    else: net, opt = pickle.loads(pickle.dumps((net, opt)))
    steps(net, opt, data[2:])
    assert torch.equal(values(net), values(whole))


def test_the_state_has_the_form_of_one_optimizer():
    "So a state can be loaded into one optimizer with the same groups, and the other way round."
    net, other = network(), network()
    def groups(net): return [dict(params=part) for part in halves(net)]
    def one(net): return torch.optim.SGD(groups(net), lr=.1, momentum=.9)
    joined, single = two(net, lr=.1, momentum=.9), one(other)
    steps(net, joined, batches(2))
    steps(other, single, batches(2))
    first, second = joined.state_dict(), single.state_dict()
    assert first['param_groups'] == second['param_groups']
    for number, entry in second['state'].items():
        assert torch.equal(first['state'][number]['momentum_buffer'], entry['momentum_buffer'])
    swapped = one(net)
    swapped.load_state_dict(first)
    back = two(other, lr=.3)
    back.load_state_dict(second)
    steps(net, swapped, batches(2))
    steps(other, back, batches(2))
    assert torch.equal(values(net), values(other))


def test_the_hooks_of_a_state():
    opt = two(network())
    calls = []
    opt.register_state_dict_post_hook(lambda opt, state: state | dict(extra=1))
    opt.register_load_state_dict_pre_hook(lambda opt, state: calls.append('before'))
    opt.register_load_state_dict_post_hook(lambda opt: calls.append('after'))
    state = opt.state_dict()
    assert state['extra'] == 1
    opt.load_state_dict(state)
    assert calls == ['before', 'after']


def test_a_state_that_does_not_fit_changes_nothing():
    opt = adam_and_sgd(network())
    before = copy.deepcopy(opt.state_dict())
    for other in (two(network()), MultiOptimizer(adam_and_sgd(network()).optimizers[::-1])):
        with pytest.raises(ValueError, match='same optimizers in the same order'):
            opt.load_state_dict(other.state_dict())
    assert opt.state_dict() == before


def test_the_state_dicts_of_distributed_checkpoints():
    dcp = pytest.importorskip('torch.distributed.checkpoint.state_dict')
    data = batches(4)
    def wrapped():
        net = network()
        return net, MethodOptimizer(SAM(.1), adam_and_sgd(net), net)
    whole, opt = wrapped()
    train(whole, opt, data)
    first, opt = wrapped()
    train(first, opt, data[:2])
    saved = dcp.get_optimizer_state_dict(first, opt)
    second, resumed = wrapped()
    second.load_state_dict(first.state_dict())
    dcp.set_optimizer_state_dict(second, resumed, saved)
    train(second, resumed, data[2:])
    assert torch.equal(values(second), values(whole))


def test_groups_that_are_added_later():
    weights, biases = halves(network())
    opt = MultiOptimizer([torch.optim.SGD(weights[:1], lr=.1), torch.optim.SGD(biases, lr=.2)])
    opt.optimizers[0].add_param_group(dict(params=weights[1:], lr=.3))
    assert [group['lr'] for group in opt.param_groups] == [.1, .3, .2]
    with pytest.raises(ValueError, match='one of `optimizers`'): opt.add_param_group(dict(params=weights))


def test_a_state_is_for_reading_only():
    opt = two(network())
    with pytest.raises(TypeError): opt.state[opt.param_groups[0]['params'][0]] = {}


def test_in_a_learner():
    data = batches()
    def trained(make):
        net = network()
        torch.manual_seed(2)
        learn = Learner(DataLoaders(data, data), net, loss_func=nn.CrossEntropyLoss(), lr=.1,
                        opt_func=lambda params, lr: OptimWrapper(opt=make(net)), default_cbs=False,
                        cbs=[TrainEvalCallback, METHODS['sadt1']()])
        learn.fit(1)
        return values(net)
    close(trained(two), trained(sgd))


def test_accelerate_prepares_it():
    accelerate = pytest.importorskip('accelerate', reason='pip install sadt_nb[integrations]')
    accelerator = accelerate.Accelerator(cpu=True)
    def trained(make):
        net = network()
        wrapper = MethodOptimizer(SAM(.1), make(net), net)
        net, opt = accelerator.prepare(net, wrapper)
        for x, y in batches():
            def closure(x=x, y=y):
                loss = F.cross_entropy(net(x), y)
                accelerator.backward(loss)
                return loss
            wrapper.backward(closure)
            opt.step()
            opt.zero_grad()
        return values(accelerator.unwrap_model(net))
    close(trained(two), trained(sgd))


@pytest.mark.parametrize('bad, error, match', [
    ([], ValueError, 'empty'), (['SGD'], TypeError, 'str'), (None, TypeError, 'NoneType')])
def test_bad_input(bad, error, match):
    with pytest.raises(error, match=match): MultiOptimizer(bad)


def test_an_optimizer_that_cannot_share_gradients():
    net = network()
    weights, biases = halves(net)
    with pytest.raises(ValueError, match='LBFGS'):
        MultiOptimizer([torch.optim.SGD(weights, lr=.1), torch.optim.LBFGS(biases)])
    with pytest.raises(ValueError, match='shape'):
        MultiOptimizer([torch.optim.SGD(weights, lr=.1), sgd(net)])
    with pytest.raises(ValueError, match='MSAM'): MethodOptimizer(MSAM(.1), two(net), net)
