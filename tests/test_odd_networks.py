"Extra passes outside the ordinary case: errors, shared states, and gradients that overflow."
import copy
import gc
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from conftest import as_loader, batches, learner, mlp
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.passes import replaying
from sadt_nb.core.states import from_hidden_states, hidden_states
from sadt_nb.core.perturb import _mask_bits_, ascent
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.born_again import KeepBest
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.friendly_sam import FriendlySAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.msam import MSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM
from sadt_nb.methods.wsam import WSAM
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

RATE = .1
METHODS = dict(sam=lambda: SAM(rho=.5, bn='keep'),
               asam=lambda: ASAM(rho=.5, bn='keep'),
               esam=lambda: ESAM(rho=.5, bn='keep'),
               gsam=lambda: GSAM(rho_max=.5, rho_min=.5, bn='keep'),
               looksam=lambda: LookSAM(rho=.5, bn='keep', k=1),
               friendly_sam=lambda: FriendlySAM(rho=.5, bn='keep'),
               wsam=lambda: WSAM(rho=.5, bn='keep'),
               msam=lambda: MSAM(rho=.5),
               sadt=lambda: SADT(rho=.5, bn='keep', divergence='categorical'),
               sadt_up=lambda: SADT(rho=.5, bn='keep', grad_at='up', divergence='categorical'))
every_method = pytest.mark.parametrize('name', METHODS)


# An error in an extra pass

class Broken(Exception): pass


class Fragile(nn.Module):
    "A network that raises an error at weights that are not in `known`."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.known, self.place = object(), None

    def breaks(self, place):
        now = self.body[0].weight
        return self.place == place and not any(torch.equal(now, w) for w in self.known)

    def forward(self, x):
        out = self.body(x)
        if self.breaks('forward'): raise Broken('broken')
        if self.breaks('backward') and out.requires_grad: out.register_hook(broken)
        return out


def broken(grad): raise Broken('broken')


def some_batch():
    torch.manual_seed(1)
    return torch.randn(12, 5, dtype=torch.float64), torch.randint(0, 3, (12,))


def in_learner(net, method):
    x, y = some_batch()
    def loss(out, target, reduction='mean'):
        if net.breaks('loss'): raise Broken('broken')
        return F.cross_entropy(out, target, reduction=reduction)
    def sgd(params, lr): return OptimWrapper(params, torch.optim.SGD, lr=lr, momentum=.9)
    learn = Learner(DataLoaders([(x, y)], [(x, y)]), net, loss, lr=RATE, opt_func=sgd,
                    cbs=[TrainEvalCallback, method], default_cbs=False)
    learn.create_opt()
    step = lambda: learn.fit(1)
    step.momentum = lambda p: learn.opt.opt.state[p]['momentum_buffer']
    step.learn = learn
    return step


def closure_for(net, method):
    x, y = some_batch()
    def closure(*positions): # of ESAM's samples; `None`: all
        rows = slice(None) if positions in ((), (None,)) else positions[0]
        out = net(x[rows])
        if net.breaks('loss'): raise Broken('broken')
        if isinstance(method, ESAM): return F.cross_entropy(out, y[rows], reduction='none')
        loss = F.cross_entropy(out, y[rows])
        return (out, loss) if method.needs_logits else loss
    return closure


def in_method_optimizer(net, method):
    base = torch.optim.SGD(net.parameters(), lr=RATE, momentum=.9)
    opt, closure = MethodOptimizer(method, base, net), closure_for(net, method)
    step = lambda: opt.step(closure)
    step.momentum = lambda p: base.state[p]['momentum_buffer']
    return step


def in_closure_step(net, method):
    base, closure = torch.optim.SGD(net.parameters(), lr=RATE, momentum=.9), closure_for(net, method)
    step = lambda: closure_step(method, net, closure, base)
    step.momentum = lambda p: base.state[p]['momentum_buffer']
    return step


def copies(tensors): return [t.detach().clone() for t in tensors]
def equal(now, then): return all(torch.equal(a, b) for a, b in zip(now, then, strict=True))


def after_plain_step(net, momentum):
    "Return weights and buffers after one step of SGD with momentum, by hand, and change nothing."
    x, y = some_batch()
    params, buffers = list(net.parameters()), copies(net.buffers())
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), params)
    stepped = [p.detach() - RATE * (.9 * momentum(p) + g) for p, g in zip(params, grads)]
    new_buffers = copies(net.buffers())
    for b, old in zip(net.buffers(), buffers): b.copy_(old)
    return stepped, new_buffers


@pytest.mark.parametrize('place', ['forward', 'loss', 'backward'])
@pytest.mark.parametrize('loop', [in_learner, in_method_optimizer, in_closure_step])
@every_method
def test_an_error_in_an_extra_pass_leaves_no_perturbed_weights(name, loop, place):
    if name == 'sadt_up' and place != 'forward': pytest.skip('only a forward pass runs at the moved weights')
    if name == 'sadt' and place == 'loss' and loop is in_learner: pytest.skip('teachers do not use the loss')
    net, method = Fragile().train(), METHODS[name]()
    step = loop(net, method)
    for _ in range(2): step()
    before = copies(net.parameters())
    stepped, buffers = after_plain_step(net.train(), step.momentum)
    # SADT makes its first step before its extra pass
    expected = stepped if name.startswith('sadt') else before
    net.known, net.place = [before[0], stepped[0]], place
    last = None
    try: step()
    except Broken as error:
        last = error # as Jupyter keeps it in `sys.last_exc`
        torch.testing.assert_close(copies(net.parameters()), expected, rtol=0, atol=1e-15)
        if not name.startswith('sadt'): assert equal(net.parameters(), before)
    assert last is not None, 'the extra pass raised no error'
    if name != 'msam': torch.testing.assert_close(copies(net.buffers()), buffers, rtol=0, atol=1e-15)
    assert torch.is_grad_enabled()
    assert 'zero_grad' not in vars(net)
    if loop is in_learner: assert not replaying(step.learn)
    net.place = None
    for p in net.parameters(): p.grad = None
    for _ in range(3): step()
    trained, with_buffers = copies(net.parameters()), copies(net.buffers())
    assert not equal(trained, before)
    del last
    gc.collect()
    assert equal(net.parameters(), trained) and equal(net.buffers(), with_buffers)


@pytest.mark.parametrize('place', ['forward', 'loss', 'backward'])
def test_an_error_in_a_chunk_leaves_no_perturbed_weights(place):
    net = Fragile().train()
    step = in_learner(net, SAM(rho=.5, m=4))
    step()
    before = copies(net.parameters())
    net.known, net.place = [before[0]], place
    last = None
    try: step()
    except Broken as error:
        last = error
        assert equal(net.parameters(), before)
    assert last is not None, 'the extra pass raised no error'
    net.place = None
    step()
    trained = copies(net.parameters())
    del last
    gc.collect()
    assert equal(net.parameters(), trained)


# Hidden states: what modules keep in plain attributes

class Tied(nn.Module):
    "A language model whose last layer has the weight of its first layer, in an attribute."
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid = nn.Embedding(6, 4).double(), nn.Linear(4, 4).double()
        self.register_buffer('shift', torch.full((6,), .5, dtype=torch.float64))
        weight = self.emb.weight
        self.out = dict(tuple=(weight,), list=[weight], dict={0: weight}, nested=[dict(w=(weight,))],
                        constant=[weight.detach()], constant_tensor=weight.detach(), view=[weight[:]],
                        alias=[weight, self.shift.view(6)])[kind]

    def weight(self):
        out = self.out
        while not isinstance(out, torch.Tensor): out = out['w'] if 'w' in out else out[0]
        return out

    def forward(self, i): return torch.tanh(self.mid(self.emb(i))) @ self.weight().T + self.shift


def sam_by_hand(params, loss, rho, states=lambda: None, lr=1.):
    "Make a step of SAM in plain PyTorch; `states` is called before the second pass, and again at the end."
    params = list(params)
    before = copies(params)
    g = torch.autograd.grad(loss(), params)
    norm = torch.cat([t.flatten() for t in g]).norm() + 1e-12
    with torch.no_grad():
        for p, t in zip(params, g): p.add_(rho * t / norm)
    states()
    g = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, b, t in zip(params, before, g): p.copy_(b - lr * t)


def sam_in_learner(net, x, y, loss_func, rho):
    learn = Learner(DataLoaders([(x, y)], [(x, y)]), net, loss_func, lr=1., default_cbs=False,
                    opt_func=lambda params, lr: OptimWrapper(params, torch.optim.SGD, lr=lr),
                    cbs=[TrainEvalCallback, SAM(rho)])
    learn.dls = DataLoaders([(x, y)], []) # without validation
    learn.fit(1)


def sam_in_loop(net, x, y, loss_func, rho):
    opt = MethodOptimizer(SAM(rho), torch.optim.SGD(net.parameters(), lr=1.), net)
    opt.zero_grad()
    opt.step(lambda: loss_func(net(x), y))


def sam_in_two_steps(net, x, y, loss_func, rho):
    opt = MethodOptimizer(SAM(rho), torch.optim.SGD(net.parameters(), lr=1.), net)
    opt.zero_grad()
    loss_func(net(x), y).backward()
    opt.first_step()
    opt.zero_grad()
    loss_func(net(x), y).backward()
    opt.second_step()


every_loop = pytest.mark.parametrize('sam', [sam_in_learner, sam_in_loop, sam_in_two_steps])


def assert_same_weights(net, by_hand):
    torch.testing.assert_close(copies(net.parameters()), copies(by_hand.parameters()), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('kind', ['tuple', 'list', 'dict', 'nested', 'constant', 'constant_tensor', 'view',
                                  'alias'])
@every_loop
def test_a_weight_in_an_attribute_is_no_hidden_state(kind, sam):
    x, y = torch.arange(12) % 6, torch.arange(12) // 2
    net, by_hand = Tied(kind), Tied(kind)
    kept = net.weight()
    sam(net, x, y, F.cross_entropy, .5)
    sam_by_hand(by_hand.parameters(), lambda: F.cross_entropy(by_hand(x), y), .5)
    assert_same_weights(net, by_hand)
    assert net.weight() is kept


class Expert(nn.Module):
    def __init__(self, losses):
        super().__init__()
        self.linear, self.losses = nn.Linear(4, 4).double(), losses

    def forward(self, x):
        out = self.linear(x).tanh()
        self.losses.append(out.square().mean())
        return out


class Mixture(nn.Module):
    "Layers that add their auxiliary losses to one list; `where` says which attribute has it."
    def __init__(self, where):
        super().__init__()
        torch.manual_seed(0)
        losses = []
        self.losses = dict(plain=losses, nested=dict(parts=[losses]), tuple=(losses, 1))[where]
        self.shared = losses
        self.a, self.b = Expert(losses), Expert(losses)

    def forward(self, x):
        self.shared.clear()
        out = self.b(self.a(x))
        assert self.a.losses is self.b.losses is self.shared
        return out, sum(self.shared)


def with_auxiliary(out, y): return F.mse_loss(out[0], y) + out[1]


@pytest.mark.parametrize('where', ['plain', 'nested', 'tuple'])
@every_loop
def test_modules_share_a_list_in_every_pass(where, sam):
    torch.manual_seed(1)
    x, y = torch.randn(8, 4).double(), torch.randn(8, 4).double()
    net, by_hand = Mixture(where), Mixture(where)
    losses, seen = net.shared, []
    def loss_func(out, y):
        seen.append(list(net.shared))
        return with_auxiliary(out, y)
    for _ in range(2):
        sam(net, x, y, loss_func, .5)
        assert net.shared is net.a.losses is net.b.losses is losses
        # after a step, the list holds what the first pass has put there
        assert all(now is then for now, then in zip(losses, seen[-2], strict=True))
        sam_by_hand(by_hand.parameters(), lambda: with_auxiliary(by_hand(x), y), .5)
    assert_same_weights(net, by_hand)


class Features(nn.Module):
    "Puts its features into a dictionary, which the loss function reads."
    def __init__(self, features):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 4).double()
        self.features = features

    def forward(self, x):
        self.features['h'] = self.first(x).tanh()
        return self.last(self.features['h'])


@pytest.mark.parametrize('sam', [sam_in_learner, sam_in_loop, sam_in_two_steps])
def test_the_loss_reads_the_features_of_the_present_pass(sam):
    torch.manual_seed(1)
    x, y = torch.randn(8, 4).double(), torch.randn(8, 4).double()
    features, of_hand = {}, {}
    net, by_hand = Features(features), Features(of_hand)
    def loss_func(out, y): return F.mse_loss(out, y) + features['h'].square().mean()
    def loss_by_hand(): return F.mse_loss(by_hand(x), y) + of_hand['h'].square().mean()
    for _ in range(2):
        sam(net, x, y, loss_func, .5)
        sam_by_hand(by_hand.parameters(), loss_by_hand, .5)
    assert net.features is features
    assert_same_weights(net, by_hand)


class Cell(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.linear, self.state = nn.Linear(4, 4).double(), state


class Recurrent(nn.Module):
    "Two cells that share a state; each changes the state that the other reads."
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        state = torch.zeros(8, 4, dtype=torch.float64)
        if kind == 'list': state = [state]
        if kind == 'long': state = [state] + [0.] * 999 # one more, and it is no state
        self.cells = nn.ModuleList([Cell(state), Cell(state)])
        self.kind = kind
        self.outer = state

    def forward(self, x):
        for cell in self.cells:
            h = cell.state[0] if isinstance(cell.state, list) else cell.state
            new = torch.tanh(cell.linear(x + h))
            if self.kind == 'tensor': h.copy_(new.detach())
            else: cell.state[0] = new.detach()
            x = new
        if self.kind == 'long' and len(self.outer) < 1001: self.outer.append(1.)
        return x


@pytest.mark.parametrize('kind', ['list', 'tensor', 'long'])
@pytest.mark.parametrize('sam', [sam_in_learner, sam_in_loop])
def test_modules_share_a_state_in_every_pass(kind, sam):
    torch.manual_seed(1)
    x, y = torch.randn(8, 4).double(), torch.randn(8, 4).double()
    net, by_hand = Recurrent(kind), Recurrent(kind)
    def state(n): return n.outer if kind == 'tensor' else n.outer[0]
    steps = 1 if kind == 'long' else 3
    for _ in range(steps):
        shared = net.outer
        sam(net, x, y, F.mse_loss, .5)
        assert net.outer is shared and all(cell.state is shared for cell in net.cells)
        start, left = state(by_hand).clone(), []
        def put(value):
            if kind == 'tensor': by_hand.outer.copy_(value)
            else: by_hand.outer[0] = value
        def second_pass(start=start, left=left):
            left.append(state(by_hand).clone())
            put(start.clone())
        sam_by_hand(by_hand.parameters(), lambda: F.mse_loss(by_hand(x), y), .5, second_pass)
        put(left[0])
        torch.testing.assert_close(state(net), state(by_hand), rtol=1e-12, atol=1e-13)
    assert len(net.outer) == (1001 if kind == 'long' else len(by_hand.outer))
    assert_same_weights(net, by_hand)


def test_a_list_that_contains_itself_is_no_endless_search():
    net = Mixture('plain')
    net.shared.append(net.shared)
    states = hidden_states(net)
    net.shared[:] = [torch.ones(1)]
    with from_hidden_states(states): assert net.shared[0] is net.shared and len(net.shared) == 1
    assert torch.equal(net.shared[0], torch.ones(1))


# Gradients that overflow

FIRST_GRADIENT = dict(sam=lambda: SAM(rho=.5), asam=lambda: ASAM(rho=.5),
                      adaptive=lambda: SAM(rho=.5, adaptive=True), esam=lambda: ESAM(rho=.5),
                      esam_all=lambda: ESAM(rho=.5, gamma=1.), gsam=lambda: GSAM(rho_max=.5, rho_min=.5),
                      looksam=lambda: LookSAM(rho=.5, k=2), friendly_sam=lambda: FriendlySAM(rho=.5),
                      wsam=lambda: WSAM(rho=.5), wsam_coupled=lambda: WSAM(rho=.5, decouple=False))


class Overflows(torch.autograd.Function):
    "Passes values on; the gradient is infinite or NaN if `factor` is."
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()
    @staticmethod
    def backward(ctx, g): return g * ctx.factor, None


class OverflowingNet(nn.Module):
    "The gradients of the first layer overflow in the passes that `factors` says; the forward is finite."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, 6).double(), nn.BatchNorm1d(6).double()
        self.last, self.factors = nn.Linear(6, 3).double(), iter(())

    def forward(self, x):
        out = self.first(x)
        if torch.is_grad_enabled(): out = Overflows.apply(out, next(self.factors, 1.))
        return self.last(self.norm(out).tanh())


def scaled_loop(net, method):
    "Return a step in a plain loop with a loss scale."
    x, y = some_batch()
    scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    base = torch.optim.SGD(net.parameters(), lr=RATE)
    opt = MethodOptimizer(method, base, net, scaler=scaler)
    def closure(*positions): # of ESAM's samples; `None`: all
        rows = slice(None) if positions in ((), (None,)) else positions[0]
        reduction = 'none' if isinstance(method, ESAM) and method.gamma < 1 else 'mean'
        loss = F.cross_entropy(net(x[rows]), y[rows], reduction=reduction)
        return loss
    def step():
        opt.step(closure)
        scaler.update()
    step.skipped = lambda: scaler.get_scale() < 8.
    return step


def scaled_learner(net, method):
    "Return a step of a Learner with a loss scale; autocast leaves float64 alone."
    x, y = some_batch()
    def sgd(params, lr): return OptimWrapper(params, torch.optim.SGD, lr=lr)
    mixed = DeviceMixedPrecision(init_scale=8.)
    learn = Learner(DataLoaders([(x, y)], []), net, nn.CrossEntropyLoss(), lr=RATE, opt_func=sgd,
                    default_cbs=False, cbs=[TrainEvalCallback, method, mixed])
    def step(): learn.fit(1)
    step.skipped = lambda: mixed.skipped
    return step


def state_tensors(value):
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize('factors', [(torch.inf,) * 3, (torch.nan,) * 3, (torch.inf, 1.), (torch.nan, 1.)],
                         ids=['infinite', 'nan', 'infinite once', 'nan once'])
@pytest.mark.parametrize('loop', [scaled_loop, scaled_learner])
@pytest.mark.parametrize('name', FIRST_GRADIENT)
def test_a_gradient_that_overflows_changes_nothing_but_the_scale(name, loop, factors):
    net, method = OverflowingNet().train(), FIRST_GRADIENT[name]()
    step = loop(net, method)
    step()
    if name == 'looksam': step() # the next step is a SAM step again
    assert not step.skipped()
    before = copies(net.parameters())
    by_hand = copy.deepcopy(net).train() # a fit ends in evaluation
    by_hand(some_batch()[0]) # the first pass changes BatchNorm's statistics as in plain training
    net.factors = iter(factors)
    step()
    assert step.skipped(), 'the scaler has not seen the overflow'
    assert equal(net.parameters(), before)
    torch.testing.assert_close(copies(net.buffers()), copies(by_hand.buffers()), rtol=1e-12, atol=1e-13)
    assert all(t.isfinite().all() for t in state_tensors(method.state_dict()))
    net.factors = iter(())
    for _ in range(3): step()
    assert all(t.isfinite().all() for t in [*net.parameters(), *net.buffers()])
    assert not equal(net.parameters(), before)


def test_bits_are_masked_without_a_change_of_other_values():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        t = torch.tensor([[1.5, -0., torch.inf], [torch.nan, -3e-5, 7.]], dtype=dtype)
        kept, dropped, strided = t.clone(), t.clone(), t.clone().T
        _mask_bits_([kept], torch.tensor(True))
        _mask_bits_([dropped, strided], torch.tensor(False))
        assert torch.equal(kept.view(torch.uint8), t.view(torch.uint8))
        assert not dropped.any() and not strided.any()


@pytest.mark.parametrize('adaptive', [False, True])
def test_the_ascent_of_a_gradient_that_is_not_finite_is_zero(adaptive):
    for bad in (torch.inf, -torch.inf, torch.nan):
        grads = dict(a=torch.tensor([1., bad]), b=torch.ones(3, dtype=torch.float32))
        scales = dict(a=torch.ones(2)) if adaptive else None
        assert not any(d.any() for d in ascent(grads, .5, scales).values())
    complex_grad = torch.tensor([complex(torch.inf, 1.)])
    assert not ascent(dict(w=complex_grad), .5)['w'].any()


# Networks that return a dictionary, a tuple or an object

@dataclass
class Output:
    logits: torch.Tensor


class ModelOutput(OrderedDict):
    "Like the outputs of Hugging Face's models: a dictionary with attributes."
    @property
    def logits(self): return self['logits']


OUTPUTS = dict(dict=lambda z: {'logits': z}, tuple=lambda z: (z, z), list=lambda z: [z], Output=Output,
               ModelOutput=lambda z: ModelOutput(logits=z))

def logits_of(out):
    if isinstance(out, (tuple, list)): return out[0]
    return out['logits'] if isinstance(out, dict) else out.logits


class Packed(nn.Module):
    "A network whose outputs stand in a container."
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = mlp(), kind
    def forward(self, x): return OUTPUTS[self.kind](self.net(x))


class Unpacked(nn.Module):
    "What the error's message advises."
    def __init__(self, packed):
        super().__init__()
        self.packed = packed
    def forward(self, x): return logits_of(self.packed(x))


class TakesLogits(Callback):
    "As fastai's `RNNCallback`: the first of several outputs is the prediction."
    order = -1
    def after_pred(self): self.learn.pred = logits_of(self.pred)


COMPARING = dict(SADT=lambda **kw: SADT(1, noise_scale=1000., **kw),
                 MESA=lambda **kw: MESA(start_epoch=0, **kw),
                 SAF=lambda **kw: SAF(start_epoch=1, lag=1, **kw),
                 Distillation=lambda **kw: Distillation(mlp(), **kw))
LATE = dict(COMPARING, MESA=lambda **kw: MESA(**kw), SAF=lambda **kw: SAF(**kw))

def packed_loss(out, y): return F.cross_entropy(logits_of(out), y)
def loader(): return as_loader(batches())


@pytest.mark.parametrize('divergence', ['categorical', lambda teacher, student, temperature: student.mean()])
@pytest.mark.parametrize('kind', OUTPUTS)
@pytest.mark.parametrize('name', COMPARING)
def test_a_network_without_a_tensor_of_logits_is_refused(name, kind, divergence):
    "Also where the term begins only in a later epoch."
    learn = learner(Packed(kind), [LATE[name](divergence=divergence)], loader(), loss_func=packed_loss)
    before = [p.clone() for p in learn.model.parameters()]
    words = f'{name} needs one tensor of logits from the network, got {kind}; return the logits alone'
    with pytest.raises(ValueError, match=words): learn.fit(1)
    for p, w in zip(learn.model.parameters(), before): assert torch.equal(p, w)


@pytest.mark.parametrize('name', COMPARING)
def test_the_advised_module_trains_as_the_network_of_tensors(name):
    def train(net):
        learn = learner(net, [COMPARING[name](divergence='categorical')], loader())
        learn.fit(2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(train(Unpacked(Packed('dict'))), train(mlp()))


@pytest.mark.parametrize('name', ['SADT', 'SAF', 'Distillation'])
def test_a_callback_may_take_the_logits(name):
    def train(net, *cbs):
        learn = learner(net, [COMPARING[name](divergence='categorical'), *cbs], loader())
        learn.fit(2)
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.equal(train(Packed('dict'), TakesLogits()), train(mlp()))


def test_a_teacher_without_a_tensor_of_logits_is_refused():
    for teacher in (Packed('dict'), [Packed('dict')], [mlp(), Packed('dict')]):
        learn = learner(mlp(), [Distillation(teacher)])
        before = learn.model[0].weight.clone()
        words = 'needs one tensor of logits from the (teacher|member), got dict'
        with pytest.raises(ValueError, match=words): learn.fit(1)
        assert torch.equal(learn.model[0].weight, before)
    learn = learner(Packed('tuple'), [MESA(start_epoch=0), TakesLogits()])
    with pytest.raises(ValueError, match='MESA needs one tensor of logits from the network, got tuple'):
        learn.fit(1)


def test_keep_best_refuses_a_network_without_a_tensor_of_logits():
    learn = learner(Packed('tuple'), [KeepBest()], loss_func=packed_loss)
    with pytest.raises(ValueError, match='KeepBest needs one tensor of logits'): learn.fit(1)


@pytest.mark.parametrize('kind', OUTPUTS)
def test_a_closure_without_a_tensor_of_logits_is_refused(kind):
    net, (x, y) = Packed(kind), batches()[0]
    before = net.net[0].weight.clone()
    opt = MethodOptimizer(SADT(1, divergence='categorical'), torch.optim.SGD(net.parameters(), lr=.1), net)
    def closure(f):
        out = net(x)
        return f(out), packed_loss(out, y)
    with pytest.raises(ValueError, match=f'SADT needs one tensor of logits .*, got {kind}'):
        opt.step(lambda: closure(lambda out: out))
    assert torch.equal(net.net[0].weight, before)
    opt.step(lambda: closure(logits_of))
    assert not torch.equal(net.net[0].weight, before)
