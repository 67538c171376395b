"""Loops of other fields: attacks, random numbers in the loss, optimizers with modes, other devices."""
import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import learner, sam_gradients
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.multi_optimizer import MultiOptimizer
from sadt_nb.core.states import rng_policy
from sadt_nb.measures.landscape import random_direction
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.controls import RepeatBatch
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM

RHO, LR = .05, .1


def batch(n=16):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=gen, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=gen)


def network(*middle):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *middle, nn.Linear(8, 3)).double()


def sgd(net): return torch.optim.SGD(net.parameters(), lr=LR)
def values(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def after_sam(net, loss):
    "Return the weights after one step of SAM, by hand."
    _, moved = sam_gradients(net, loss, [RHO] * len(list(net.parameters())))
    return values(net) - LR * torch.cat([g.flatten() for g in moved])


def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


# --- a closure that calls `backward` for another purpose
def attacked(net, x, y, zero):
    "Return the loss of adversarial examples, found with `backward`; `zero` drops the parameters' gradients."
    delta = torch.zeros_like(x, requires_grad=True)
    F.cross_entropy(net(x + delta), y).backward()
    zero()
    return F.cross_entropy(net(x + .1 * delta.grad.sign()), y)


def attacked_without_backward(net, x, y):
    delta = torch.zeros_like(x, requires_grad=True)
    slope, = torch.autograd.grad(F.cross_entropy(net(x + delta), y), delta)
    return F.cross_entropy(net(x + .1 * slope.sign()), y)


@pytest.mark.parametrize('calls_backward', [False, True])
@pytest.mark.parametrize('zeroed_by', ['wrapper', 'base', 'network'])
@pytest.mark.parametrize('set_to_none', [False, True])
def test_an_attack_inside_the_closure(set_to_none, zeroed_by, calls_backward):
    (x, y), net, other = batch(), network(), network()
    base = sgd(net)
    opt = MethodOptimizer(SAM(RHO), base, net)
    owner = dict(wrapper=opt, base=base, network=net)[zeroed_by]
    def closure():
        loss = attacked(net, x, y, lambda: owner.zero_grad(set_to_none=set_to_none))
        if calls_backward: loss.backward()
        return loss
    opt.step(closure)
    close(values(net), after_sam(other, lambda: attacked_without_backward(other, x, y)))


def test_an_attack_whose_gradients_stay_is_refused():
    (x, y), net = batch(), network()
    before = values(net)
    opt = MethodOptimizer(SAM(RHO), sgd(net), net)
    with pytest.raises(ValueError, match='not on the loss that it returns'):
        opt.step(lambda: attacked(net, x, y, lambda: None))
    assert torch.equal(values(net), before)
    assert all(p.grad is None for p in net.parameters())
    backward = torch.autograd.backward
    assert backward.__module__ == 'torch.autograd', 'the function of PyTorch is back'


def in_parts(net, x, y, returned):
    "Call `backward` on two parts of a loss, as in reinforcement learning; return one of several values."
    out = net(x)
    policy = F.cross_entropy(out, y)
    value = out.square().mean()
    policy.backward(retain_graph=True)
    (value / 2).backward()
    loss = policy + value / 2
    values = dict(sum=loss, part=policy, detached=loss.detach(), number=loss.item(), scaled=3 * value)
    return values[returned]


@pytest.mark.parametrize('roots', ['tensor', 'iterator', 'edge'])
def test_a_backward_from_tensors_and_from_edges(roots):
    (x, y), net, other = batch(), network(), network()
    opt = MethodOptimizer(SAM(RHO), sgd(net), net)
    def closure():
        loss = F.cross_entropy(net(x), y)
        if roots == 'tensor': torch.autograd.backward(loss)
        if roots == 'iterator': torch.autograd.backward(iter([loss / 2, loss / 2]))
        if roots == 'edge': torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
        return loss
    opt.step(closure)
    close(values(net), after_sam(other, lambda: F.cross_entropy(other(x), y)))


@pytest.mark.parametrize('returned', ['sum', 'part', 'detached', 'number', 'scaled'])
def test_a_closure_with_several_backward_calls(returned):
    (x, y), net, other = batch(), network(), network()
    opt = MethodOptimizer(SAM(RHO), sgd(net), net)
    opt.step(lambda: in_parts(net, x, y, returned))
    def loss():
        out = other(x)
        return F.cross_entropy(out, y) + out.square().mean() / 2
    close(values(net), after_sam(other, loss))


def test_a_closure_of_esam_that_calls_backward_itself():
    (x, y), net, other = batch(), network(), network()
    opt = MethodOptimizer(ESAM(RHO, beta=1., gamma=1.), sgd(net), net)
    def closure(rows=None):
        losses = F.cross_entropy(net(x), y, reduction='none')
        losses.mean().backward()
        return losses
    opt.step(closure)
    close(values(net), after_sam(other, lambda: F.cross_entropy(other(x), y)))


# --- random numbers that the loop or the closure draws itself
def noisy_passes(net, loss):
    "Make one step of SAM in two calls; return each pass's own noise and its dropout mask."
    masks, draws = [], []
    handle = net[2].register_forward_hook(lambda module, inputs, out: masks.append((out != 0).double()))
    opt = MethodOptimizer(SAM(RHO, rng='replay'), sgd(net), net)
    for first in (True, False):
        draws.append(torch.rand(16, 8))
        loss().backward()
        draws.append(torch.rand(16, 8))
        if not first: continue
        opt.first_step()
        opt.zero_grad()
    opt.second_step()
    handle.remove()
    return draws, masks


def test_noise_of_the_loop_is_independent_of_the_repeated_masks():
    (x, y), net = batch(), network(nn.Dropout(.5))
    torch.manual_seed(0)
    draws, masks = noisy_passes(net, lambda: F.cross_entropy(net(x), y))
    assert torch.equal(*masks)
    for i, noise in enumerate(draws):
        both = torch.stack([noise.double().flatten(), masks[0].flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < .3, 'with 128 numbers, three standard deviations'
        assert not any(torch.equal(noise, other) for other in draws[:i])


class Nested(nn.Module):
    "A network whose forward calls itself, and draws numbers after that."
    def __init__(self):
        super().__init__()
        self.layer, self.drawn = nn.Linear(5, 3).double(), []
    def forward(self, x, depth=2):
        out = self(x, depth - 1) if depth else self.layer(x)
        self.drawn.append(torch.rand(()).item())
        return out


def test_a_network_that_calls_itself_repeats_its_numbers():
    (x, y), net = batch(), Nested()
    opt = MethodOptimizer(SAM(RHO, rng='replay'), sgd(net), net)
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.second_step()
    assert net.drawn[:3] == net.drawn[3:]


def test_an_error_in_a_repeated_forward_leaves_the_random_state_of_the_loop():
    (x, y), net = batch(), network(nn.Dropout(.5))
    opt = MethodOptimizer(SAM(RHO, rng='replay'), sgd(net), net)
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    now = torch.get_rng_state()
    with pytest.raises(RuntimeError): net(x[:, :4])
    assert torch.equal(torch.get_rng_state(), now)
    opt.cancel_first_step()


def test_masks_repeat_inside_a_network_in_evaluation_mode():
    (x, y), net = batch(), network(nn.Dropout(.5))
    net.eval() # as in fine-tuning with the running averages of BatchNorm
    net[2].train()
    _, masks = noisy_passes(net, lambda: F.cross_entropy(net(x), y))
    assert torch.equal(*masks)


@pytest.mark.parametrize('rng', ['replay', 'fresh'])
def test_a_closure_repeats_the_numbers_of_every_generator(rng):
    (x, y), net, drawn = batch(), network(), []
    opt = MethodOptimizer(SAM(RHO, rng=rng), sgd(net), net)
    def closure():
        drawn.append((np.random.rand(), random.random(), torch.rand(()).item()))
        return F.cross_entropy(net(drawn[-1][0] * x), y)
    for _ in range(2): opt.step(closure)
    for first, second in ((drawn[0], drawn[1]), (drawn[2], drawn[3])):
        assert [a == b for a, b in zip(first, second)] == 3 * [rng == 'replay']
    assert all(a != b for a, b in zip(drawn[0], drawn[2])), 'a new step has new numbers'


class Drawing(nn.Module):
    "Multiplies its inputs by a number; keeps the numbers of all generators, forward by forward."
    def __init__(self):
        super().__init__()
        self.drawn = []
    def forward(self, x):
        self.drawn.append((np.random.rand(), random.random(), torch.rand(()).item()))
        return x * self.drawn[-1][0]


def in_learner(net, method, *cbs): learner(net, [method, *cbs], [batch()]).fit(1)


def in_two_steps(net, method):
    x, y = batch()
    opt = MethodOptimizer(method, sgd(net), net)
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    F.cross_entropy(net(x), y).backward()
    opt.second_step()


@pytest.mark.parametrize('rng', ['replay', 'fresh'])
@pytest.mark.parametrize('train, method, pairs', [
    (in_learner, SAM, [(0, 1)]), (in_learner, SADT, [(0, 1)]), (in_learner, RepeatBatch, [(0, 1)]),
    (in_learner, partial(SAM, m=8), [(1, 2), (3, 4)]), # the first and the second pass of each chunk
    (in_two_steps, SAM, [(0, 1)])], ids=['sam', 'sadt', 'repeat_batch', 'chunks', 'two steps'])
def test_a_network_repeats_the_numbers_of_every_generator(train, method, pairs, rng):
    layer = Drawing()
    train(network(layer), method(rng=rng))
    for first, second in pairs:
        same = [a == b for a, b in zip(layer.drawn[first], layer.drawn[second])]
        assert same == 3 * [rng == 'replay']
    assert len(set(layer.drawn)) == len(layer.drawn) - (len(pairs) if rng == 'replay' else 0)


def test_a_checkpoint_between_micro_batches_has_every_generator(tmp_path):
    "It is read with weights_only=True, which allows tensors and numbers, but no arrays."
    layer = Drawing()
    method = SADT(rng='replay')
    saved = []
    class Save(Callback):
        run_valid = False
        def after_batch(self):
            if not self.iter: saved.append(method.state_dict())
    x, y = batch()
    data = list(zip(x.split(8), y.split(8)))
    learner(network(layer), [method, GradientAccumulation(16), Save()], data).fit(1)
    torch.save(saved[0], tmp_path / 'state.pt')
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    again = SADT(rng='replay')
    again.load_state_dict(state)
    micro, = again._micro
    with rng_policy('replay', micro.rng_state, torch.device('cpu')): layer(x)
    assert layer.drawn[-1] == layer.drawn[0] == layer.drawn[2] != layer.drawn[1]


def test_a_step_of_lightning_repeats_the_numbers_of_every_generator():
    lightning = pytest.importorskip('lightning')
    from sadt_nb.core.lightning import MethodCallback
    (x, y), drawn = batch(), []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
        def training_step(self, batch):
            drawn.append((np.random.rand(), random.random(), torch.rand(()).item()))
            return F.cross_entropy(self.net(batch[0] * drawn[-1][0]), batch[1])
        def configure_optimizers(self): return sgd(self.net)

    trainer = lightning.Trainer(
        accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=2, callbacks=[MethodCallback(SAM(RHO, rng='replay'))])
    trainer.fit(Module(), DataLoader(TensorDataset(x, y), 8))
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3] and drawn[0] != drawn[2]


# --- optimizers of other libraries
class ScheduleFree(torch.optim.SGD):
    "Schedule-free SGD (Defazio et al. 2024): the weights are y in training, and the average x in evaluation."
    beta, steps, mode = .9, 0, 'eval' # as in the authors' package, the loop must call `train` first

    def zero_grad(self): # without an option, as in some libraries
        for group in self.param_groups:
            for p in group['params']: p.grad = None

    @torch.no_grad()
    def _change(self, mode, weight):
        if self.mode != mode:
            for p in self.param_groups[0]['params']:
                if 'z' in self.state[p]: p.lerp_(self.state[p]['z'], weight)
        self.mode = mode

    def train(self): self._change('train', 1 - self.beta)
    def eval(self): self._change('eval', 1 - 1 / self.beta)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.mode == 'train'
        self.steps += 1
        for p in self.param_groups[0]['params']:
            z = self.state[p].setdefault('z', p.clone())
            p.lerp_(z, 1 - 1 / self.beta) # x
            z.sub_(LR * p.grad)
            p.lerp_(z, 1 / self.steps) # the new x
            p.lerp_(z, 1 - self.beta) # the new y


def schedule_free_by_hand(net, loss, n):
    "Return x after `n` steps of schedule-free SGD with SAM's gradient."
    x = z = values(net)
    for t in range(1, n + 1):
        y = .1 * z + .9 * x
        torch.nn.utils.vector_to_parameters(y, net.parameters())
        z = z + after_sam(net, loss) - y
        x = x + (z - x) / t
    return x


def prepared(opt):
    accelerate = pytest.importorskip('accelerate')
    return accelerate.Accelerator(cpu=True).prepare(opt)


@pytest.mark.parametrize('inside', ['alone', 'several', 'accelerate'])
def test_an_optimizer_with_two_modes(inside):
    (x, y), net, other = batch(), network(), network()
    base = ScheduleFree(net.parameters(), lr=LR)
    used = MultiOptimizer([base]) if inside == 'several' else base
    opt = MethodOptimizer(SAM(RHO), used, net)
    modes = prepared(opt) if inside == 'accelerate' else opt
    for _ in range(3):
        modes.train()
        opt.step(lambda: F.cross_entropy(net(x), y))
        opt.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        modes.eval()
    close(values(net), schedule_free_by_hand(other, lambda: F.cross_entropy(other(x), y), 3))


def test_only_an_optimizer_with_modes_has_them():
    net = network()
    opt = MethodOptimizer(SAM(RHO), MultiOptimizer([sgd(net)]), net)
    for o in (opt, opt.base, copy.deepcopy(opt)):
        assert not hasattr(o, 'train') and not hasattr(o, 'eval') and not hasattr(o, 'other')


def test_modes_do_not_change_between_the_two_calls():
    (x, y), net = batch(), network()
    base = ScheduleFree(net.parameters(), lr=LR)
    opt = MethodOptimizer(SAM(RHO), base, net)
    opt.train()
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    with pytest.raises(ValueError, match='cancel_first_step'): opt.eval()
    opt.cancel_first_step()
    opt.eval()
    assert base.mode == 'eval'


# --- another device or precision
METHODS = {
    'sam': SAM, 'asam': ASAM, 'esam': partial(ESAM, gamma=1.), 'gsam': GSAM, 'looksam': partial(LookSAM, k=2),
    'friendly sam': FriendlySAM, 'wsam': WSAM, 'msam': MSAM, 'sadt': SADT}


def steps(opt, net, n, dtype=torch.float64):
    x, y = batch()
    def closure():
        out = net(x.to(dtype))
        loss = F.cross_entropy(out, y)
        return (out, loss) if isinstance(opt.method, SADT) else loss
    for _ in range(n): opt.step(closure)


def momentum(net): return torch.optim.SGD(net.parameters(), lr=LR, momentum=.9)


@pytest.mark.parametrize('name', METHODS)
def test_a_state_is_loaded_in_another_precision(name):
    net, other = network().float(), network()
    opt = MethodOptimizer(METHODS[name](), momentum(net), net)
    steps(opt, net, 3, torch.float32)
    other.load_state_dict(net.state_dict())
    loaded = MethodOptimizer(METHODS[name](), momentum(other), other)
    loaded.load_state_dict(opt.state_dict())
    for t in tree_leaves((vars(loaded.method).get('direction'), vars(loaded.method).get('mean'))):
        assert t is None or t.dtype == torch.float64, 'as the momentum'
    steps(opt, net, 2, torch.float32)
    steps(loaded, other, 2)
    torch.testing.assert_close(values(net).double(), values(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, key', [('looksam', 'direction'), ('friendly sam', 'mean')])
def test_a_state_that_does_not_fit_is_refused_when_a_loop_loads_it(name, key):
    net, other = network(), network()
    opt = MethodOptimizer(METHODS[name](), momentum(net), net)
    steps(opt, net, 3)
    state = opt.state_dict()
    state['method'][key] = {n: t[:1] for n, t in state['method'][key].items()}
    loaded = MethodOptimizer(METHODS[name](), momentum(other), other)
    with pytest.raises(ValueError, match='does not fit the model'): loaded.load_state_dict(state)
    assert not loaded.base.state, 'the base is as it was'


def test_the_noise_of_another_kind_of_device_begins_anew():
    net = network()
    opt = MethodOptimizer(SADT(noise_scale=100., seed=3), sgd(net), net)
    steps(opt, net, 1)
    expected = values(net)
    net = network()
    opt = MethodOptimizer(SADT(noise_scale=100., seed=3), sgd(net), net)
    state = opt.state_dict()
    state['method']['generator'] = torch.zeros(16, dtype=torch.uint8) # of CUDA's generator
    opt.load_state_dict(state)
    with pytest.warns(UserWarning, match='another kind of device'): steps(opt, net, 1)
    assert torch.equal(values(net), expected)
    assert len(opt.state_dict()['method']['generator']) > 16


@pytest.mark.parametrize('name', METHODS)
def test_another_default_device_changes_nothing(name):
    net, other = network(), network()
    steps(MethodOptimizer(METHODS[name](), momentum(other), other), other, 3)
    x, y = batch()
    opt = MethodOptimizer(METHODS[name](), momentum(net), net)
    def closure():
        out = net(x)
        loss = F.cross_entropy(out, y)
        return (out, loss) if name == 'sadt' else loss
    with torch.device('meta'): # its tensors have no values, so none may be made without a device
        for _ in range(3): opt.step(closure)
    assert torch.equal(values(net), values(other))


def test_a_direction_on_another_default_device():
    net = network()
    expected = random_direction(net, seed=0)
    with torch.device('meta'): got = random_direction(net, seed=0)
    for n, d in expected.items(): assert torch.equal(got[n], d)
