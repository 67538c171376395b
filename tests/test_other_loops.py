"""Loops of other fields: attacks, random numbers in the loss, optimizers with modes, other devices."""
import random

import numpy as np
import pytest
import torch
from conftest import sam_gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.sam import SAM

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
