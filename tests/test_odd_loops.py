"""Loops of the user that drop batches, raise errors, copy their optimizer or hold two optimizers."""
import copy
import pickle

import pytest
import torch
from conftest import sam_gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM, sam_step
from sadt_nb.methods.wsam import WSAM


def batch(seed=0, n=16):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=gen, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=gen)


def network(dropout=0.):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def sgd(net): return torch.optim.SGD(net.parameters(), lr=.1)
def wrapped(method, net, **kwargs): return MethodOptimizer(method, sgd(net), net, **kwargs)
def values(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def sam_gradient(net, loss, rho=.05):
    "SAM's gradient as one vector; `net` keeps its weights and gradients."
    _, moved = sam_gradients(net, loss, [rho] * len(list(net.parameters())))
    return torch.cat([g.flatten() for g in moved])


def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def tensor_with_identity(wanted, like):
    "Return `2 * like` in a tensor whose `id` is that of a freed tensor."
    others = [] # keep the other memory in use
    for _ in range(100_000):
        t = 2 * like.detach()
        if id(t) == wanted: return t
        others.append(t)
    pytest.skip('Python did not use the freed memory again')


def test_an_accumulated_gradient_counts_though_it_has_the_identity_of_a_used_one():
    x, y = batch()
    torch.manual_seed(1)
    net = nn.Linear(5, 3, bias=False).double()
    opt = wrapped(SAM(), net)
    def loss(): return F.cross_entropy(net(x), y)
    opt.step(loss)
    used, version = id(net.weight.grad), net.weight.grad._version
    opt.zero_grad()
    own = tensor_with_identity(used, net.weight) # an own term, accumulated before the step
    while own._version < version: own.add_(0.)
    net.weight.grad = own
    before, added = values(net), own.flatten().clone()
    expected = before - .1 * (sam_gradient(net, loss) + added)
    del own
    opt.step(loss)
    close(values(net), expected)


FAILURES = {'first pass': 1, 'second pass': 2}


def failing(net, x, y, at_call, zero=None):
    "A closure that runs out of memory after its own backward, in the given call."
    calls = []
    def closure():
        calls.append(1)
        if zero is not None: zero.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        if len(calls) == at_call: raise RuntimeError('out of memory')
        return loss
    return closure


@pytest.mark.parametrize('call', ['step', 'backward'])
@pytest.mark.parametrize('at', FAILURES)
def test_a_batch_whose_closure_fails_leaves_no_gradient(at, call):
    (x, y), (bad_x, bad_y) = batch(), batch(1)
    net = network()
    opt = wrapped(SAM(), net)
    def half(): return F.cross_entropy(net(x), y) / 2
    expected = values(net) - .1 * 2 * sam_gradient(net, half)
    opt.backward(half) # an earlier micro-batch
    earlier = [p.grad.clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match='out of memory'):
        getattr(opt, call)(failing(net, 10 * bad_x, bad_y, FAILURES[at]))
    for p, g in zip(net.parameters(), earlier): assert torch.equal(p.grad, g)
    opt.step(half)
    close(values(net), expected)


@pytest.mark.parametrize('at', FAILURES)
def test_a_failed_closure_that_zeroes_drops_the_earlier_gradients(at):
    (x, y), (bad_x, bad_y) = batch(), batch(1)
    net = network()
    opt = wrapped(SAM(), net)
    def loss(): return F.cross_entropy(net(x), y)
    expected = values(net) - .1 * sam_gradient(net, loss)
    opt.backward(loss)
    with pytest.raises(RuntimeError, match='out of memory'):
        opt.step(failing(net, 10 * bad_x, bad_y, FAILURES[at], opt))
    opt.step(loss)
    close(values(net), expected)


def test_a_failed_function_leaves_no_gradient():
    (x, y), net = batch(), network()
    with pytest.raises(RuntimeError, match='out of memory'):
        sam_step(net, failing(net, x, y, 1), sgd(net))
    assert all(p.grad is None for p in net.parameters())


def after_first_step(method=None):
    "A network and its optimizer between the two calls, the loss, and the weights before."
    (x, y), net = batch(), network()
    opt, before = wrapped(method or SAM(.5), net), values(net)
    def loss(): return F.cross_entropy(net(x), y)
    loss().backward()
    assert opt.first_step() and not torch.equal(values(net), before)
    return net, opt, loss, before


@pytest.mark.parametrize('call', ['step', 'step(closure)', 'backward(closure)', 'load_state_dict'])
def test_a_call_that_needs_the_own_weights_is_refused_after_first_step(call):
    net, opt, loss, _ = after_first_step()
    calls = {'step': opt.step, 'step(closure)': lambda: opt.step(loss),
             'backward(closure)': lambda: opt.backward(loss),
             'load_state_dict': lambda: opt.load_state_dict(opt.state_dict())}
    moved = values(net)
    opt.zero_grad()
    loss().backward()
    with pytest.raises(ValueError, match='second_step.*cancel_first_step'): calls[call]()
    assert torch.equal(values(net), moved)
    opt.second_step() # still possible


def test_cancelling_a_first_step_puts_the_weights_back_and_drops_the_gradients():
    net, opt, loss, before = after_first_step()
    loss().backward() # an error comes after this backward
    opt.cancel_first_step()
    assert torch.equal(values(net), before)
    expected = before - .1 * sam_gradient(net, loss, .5)
    opt.step(loss)
    close(values(net), expected)
    opt.cancel_first_step() # nothing to cancel
    close(values(net), expected)


def parts_of(net): return net[:3], net[3]


CLOSURES = {
    'one call': lambda net, x: net(x),
    'two calls': lambda net, x: net(x) + net(-x),
    'noise first': lambda net, x: net(x + torch.randn_like(x)),
    'parts': lambda net, x: parts_of(net)[1](parts_of(net)[0](x)),
}
METHODS = {'sam': lambda **kw: SAM(**kw), 'esam': lambda **kw: ESAM(gamma=1, **kw),
           'gsam': lambda **kw: GSAM(**kw), 'sadt': lambda **kw: SADT(1, **kw)}


def masked(dropout=.5):
    "A network with a list that gets the dropout mask of each pass."
    net, masks = network(dropout), []
    net[2].register_forward_hook(lambda module, inputs, out: masks.append(out == 0))
    return net, masks


@pytest.mark.parametrize('forward', CLOSURES)
@pytest.mark.parametrize('name', METHODS)
def test_replay_repeats_the_masks_of_any_closure(name, forward):
    (x, y), (net, masks) = batch(), masked()
    def closure(rows=None):
        out = CLOSURES[forward](net, x)
        if name == 'esam': return F.cross_entropy(out, y, reduction='none')
        return (out, F.cross_entropy(out, y)) if name == 'sadt' else F.cross_entropy(out, y)
    opt = wrapped(METHODS[name](rng='replay'), net)
    for _ in range(2):
        masks.clear()
        opt.step(closure)
        half = len(masks) // 2
        assert half and all(torch.equal(a, b) for a, b in zip(masks[:half], masks[half:]))
        assert not all(torch.equal(masks[0], m) for m in masks) or forward != 'two calls'
    masks.clear()
    wrapped(METHODS[name](rng='fresh'), net).step(closure)
    assert not torch.equal(masks[0], masks[len(masks) // 2])


@pytest.mark.parametrize('forward', ['one call', 'two calls', 'noise first'])
def test_replay_repeats_the_masks_between_the_two_steps(forward):
    (x, y), (net, masks) = batch(), masked()
    opt = wrapped(SAM(rng='replay'), net)
    for late in (False, True, False):
        masks.clear()
        if not late: opt.zero_grad()
        loss = F.cross_entropy(CLOSURES[forward](net, x), y)
        if late: opt.zero_grad() # as in PyTorch's tutorials
        loss.backward()
        net.eval()
        net(x) # an evaluation does not count
        net.train()
        half = len(masks)
        assert opt.first_step()
        F.cross_entropy(CLOSURES[forward](net, x), y).backward()
        opt.second_step()
        del masks[half - 1]
        half -= 1
        assert len(masks) == 2 * half and all(map(torch.equal, masks[:half], masks[half:]))


def test_replay_forgets_the_forward_of_a_skipped_batch():
    (x, y), (net, masks) = batch(), masked()
    opt = wrapped(SAM(rng='replay'), net)
    net(x) # a batch that the loop skips
    opt.zero_grad()
    masks.clear()
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    F.cross_entropy(net(x), y).backward()
    opt.second_step()
    assert torch.equal(*masks)


def test_replay_between_the_two_steps_is_refused_if_the_random_state_is_not_known():
    (x, y), (net, _) = batch(), masked()
    opt, before = wrapped(SAM(rng='replay'), net), values(net)
    F.cross_entropy(CLOSURES['parts'](net, x), y).backward()
    with pytest.raises(ValueError, match="rng='replay'.*step\\(closure\\)"): opt.first_step()
    assert torch.equal(values(net), before)
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    F.cross_entropy(CLOSURES['two calls'](net, x), y).backward()
    with pytest.raises(ValueError, match='1 and 2 times'): opt.second_step()
    assert torch.equal(values(net), before)


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise RuntimeError('out of memory')


@pytest.mark.parametrize('way', ['zero_grad', 'error', 'closure that zeroes'])
def test_sadt_forgets_a_dropped_micro_batch(way):
    (x, y), (bad_x, bad_y) = batch(), batch(1)
    def on(net, x, y):
        out = net(x)
        return out, F.cross_entropy(out, y)
    def train(dropped):
        net = network()
        opt = wrapped(SADT(1, noise_scale=1000.), net)
        def last():
            if way == 'closure that zeroes': opt.zero_grad()
            return on(net, x, y)
        def bad():
            out, loss = on(net, 3 * bad_x, bad_y)
            return out, BadBackward.apply(loss)
        if dropped and way == 'error':
            with pytest.raises(RuntimeError, match='out of memory'): opt.backward(bad)
        elif dropped: opt.backward(lambda: on(net, 3 * bad_x, bad_y))
        if dropped and way == 'zero_grad': opt.zero_grad()
        opt.step(last)
        return values(net)
    assert torch.equal(train(True), train(False))


def to_none(opt, net): net.zero_grad()
def to_zeros(opt, net): net.zero_grad(set_to_none=False)
def base_to_zeros(opt, net): opt.base.zero_grad(set_to_none=False)
def one_by_one(opt, net):
    for p in net.parameters(): p.grad = None


def sadt_closure(net, x, y, share=1., before=lambda: None):
    def closure():
        before()
        out = net(x)
        return out, share * F.cross_entropy(out, y)
    return closure


@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('drop', [to_none, to_zeros, base_to_zeros, one_by_one])
def test_sadt_forgets_micro_batches_whose_gradients_are_gone(drop, inside):
    "`zero_grad` of the network or the base optimizer counts as `zero_grad` of `MethodOptimizer`."
    if inside and drop is one_by_one: pytest.skip('a closure that does not call `zero_grad`')
    (x, y), (bad_x, bad_y) = batch(), batch(1)
    def train(dropped):
        net = network()
        opt = wrapped(SADT(1, noise_scale=1000.), net)
        if dropped: opt.backward(sadt_closure(net, 3 * bad_x, bad_y))
        if dropped and not inside: drop(opt, net)
        calls = []
        def first_only():
            if inside and not calls: drop(opt, net)
            calls.append(1)
        opt.backward(sadt_closure(net, x, y, before=first_only))
        opt.step()
        return values(net)
    assert torch.equal(train(True), train(False))


def test_a_failed_closure_that_zeroes_the_network_drops_sadts_micro_batches():
    (x, y), (bad_x, bad_y) = batch(), batch(1)
    def train(failed):
        net = network()
        opt = wrapped(SADT(1, noise_scale=1000.), net)
        def bad():
            net.zero_grad()
            raise RuntimeError('out of memory')
        if failed:
            opt.backward(sadt_closure(net, 3 * bad_x, bad_y))
            with pytest.raises(RuntimeError, match='out of memory'): opt.backward(bad)
        opt.step(sadt_closure(net, x, y))
        return values(net)
    assert torch.equal(train(True), train(False))


def test_a_micro_batch_with_a_gradient_of_zero_counts():
    "The divergence of a micro-batch has a gradient also if the loss of this micro-batch has none."
    (x, y), (other_x, other_y) = batch(), batch(1)
    def train(*shares):
        net = network()
        opt = wrapped(SADT(1, noise_scale=1000.), net)
        for (a, b), share in zip(((other_x, other_y), (x, y)), shares):
            if share is not None: opt.backward(sadt_closure(net, a, b, share))
        opt.step()
        return values(net)
    with_zero = train(0., .5)
    assert (with_zero - train(None, .5)).norm() > 1e-6, 'the micro-batch counts'
    close(with_zero, train(1e-13, .5))


@pytest.mark.parametrize('drop', [to_none, lambda opt, net: opt.zero_grad()])
def test_wsam_makes_no_step_after_its_gradients_were_dropped(drop):
    x, y = batch()
    net = network()
    opt = wrapped(WSAM(), net)
    before = values(net)
    opt.backward(lambda: F.cross_entropy(net(x), y))
    drop(opt, net)
    opt.step()
    assert torch.equal(values(net), before)


def test_a_step_with_gradients_that_were_set_to_zero_is_refused():
    x, y = batch()
    net = network()
    opt = wrapped(WSAM(), net)
    opt.backward(lambda: F.cross_entropy(net(x), y))
    net.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match='no pass since the last step'): opt.step()


@pytest.mark.parametrize('method', [SAM, GSAM, WSAM, lambda: SAM(interval=2)])
def test_second_step_needs_a_first_step(method):
    x, y = batch()
    net = network()
    opt = wrapped(method(), net)
    def refused():
        before = values(net)
        opt.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with pytest.raises(ValueError, match='`second_step` needs a call of `first_step`'): opt.second_step()
        assert torch.equal(values(net), before)
    for _ in range(3): # with `interval`, the second batch does not move the weights
        refused()
        if opt.first_step():
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
        opt.second_step()
    refused()
    opt.first_step()
    opt.cancel_first_step()
    refused()


def test_second_step_after_a_first_step_that_moved_nothing():
    "A loop that ignores the result of `first_step` runs the batch twice; both gradients are plain and equal."
    x, y = batch()
    net, plain = network(), network()
    opt, base = wrapped(SAM(interval=2), net), sgd(plain)
    opt.step(lambda: F.cross_entropy(net(x), y))
    plain.load_state_dict(net.state_dict())
    F.cross_entropy(plain(x), y).backward()
    base.step()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.first_step()
    opt.zero_grad()
    F.cross_entropy(net(x), y).backward()
    opt.second_step()
    close(values(net), values(plain))


def test_sadt_keeps_earlier_micro_batches_after_an_error():
    (x, y), (bad_x, bad_y) = batch(), batch(1)
    def train(failed):
        net = network()
        opt = wrapped(SADT(1, noise_scale=1000.), net)
        def half(x, y):
            out = net(x)
            return out, F.cross_entropy(out, y) / 2
        opt.backward(lambda: half(x[:8], y[:8]))
        if failed:
            with pytest.raises(RuntimeError, match='out of memory'):
                opt.backward(lambda: (net(bad_x), BadBackward.apply(half(bad_x, bad_y)[1])))
        opt.step(lambda: half(x[8:], y[8:]))
        return values(net)
    assert torch.equal(train(True), train(False))


@pytest.mark.parametrize('way', ['unscale', 'unscale the base', 'scaler.step', 'unscale before second_step'])
def test_gradients_are_not_unscaled_twice(way):
    (x, y), net = batch(), network()
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    opt = wrapped(SAM(), net, scaler=scaler)
    def loss(): return F.cross_entropy(net(x), y)
    before = values(net)
    expected = before - .1 * sam_gradient(net, loss)
    if way == 'unscale before second_step':
        scaler.scale(loss()).backward()
        opt.first_step()
        scaler.scale(loss()).backward()
        finish = opt.second_step
    else:
        opt.backward(loss)
        finish = opt.step
    if way == 'scaler.step':
        with pytest.raises(ValueError, match='unscaled already'): scaler.step(opt)
        return
    scaler.unscale_(opt.base if way == 'unscale the base' else opt)
    with pytest.raises(ValueError, match='unscaled already'): finish()
    if way == 'unscale before second_step': opt.cancel_first_step()
    assert torch.equal(values(net), before)
    scaler.update()
    opt.zero_grad()
    opt.step(loss)
    torch.testing.assert_close(values(net), expected, rtol=1e-8, atol=1e-10)


def trained(method, scheduler=False):
    "A network and its optimizer after a step, and the function that makes the next step."
    (x, y), net = batch(), network()
    opt = wrapped(method, net)
    if scheduler: torch.optim.lr_scheduler.StepLR(opt, 10)
    def step(net, opt):
        def closure():
            out = net(x)
            loss = F.cross_entropy(out, y)
            return (out, loss) if method.needs_logits else loss
        opt.step(closure)
    step(net, opt)
    return net, opt, step


COPIES = {'deepcopy': copy.deepcopy, 'pickle': lambda pair: pickle.loads(pickle.dumps(pair))}


@pytest.mark.parametrize('scheduler', [False, True])
@pytest.mark.parametrize('name', ['sam', 'gsam', 'sadt'])
@pytest.mark.parametrize('way', COPIES)
def test_a_copy_made_after_a_step_trains_its_own_network(way, name, scheduler):
    net, opt, step = trained(METHODS[name](rng='replay'), scheduler)
    other_net, other = COPIES[way]((net, opt))
    before = values(net)
    step(other_net, other)
    assert torch.equal(values(net), before)
    step(net, opt)
    close(values(other_net), values(net))
    assert not torch.equal(values(net), before)


@pytest.mark.parametrize('name', ['sam', 'sadt'])
def test_a_network_is_averaged_after_a_step(name):
    net, _, _ = trained(METHODS[name](rng='replay'))
    close(values(torch.optim.swa_utils.AveragedModel(net).module), values(net))


def test_a_state_between_micro_batches_holds_no_closure():
    (x, y), net = batch(), network()
    opt = wrapped(SADT(1), net)
    def closure():
        out = net(x)
        return out, F.cross_entropy(out, y)
    opt.backward(closure)
    pickle.dumps(opt.state_dict())


# Two networks, two optimizers

def test_the_gradient_of_another_loss_counts_until_zero_grad():
    x, _ = batch()
    z = torch.randn(16, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    def pair():
        torch.manual_seed(2)
        return nn.Linear(4, 5).double(), nn.Linear(5, 1).double()
    def loss_g(g, d): return F.softplus(-d(g(z))).mean()
    def loss_d(g, d): return F.softplus(-d(x)).mean() + F.softplus(d(g(z).detach())).mean()
    def trained(zeroed):
        g, d = pair()
        opt_g, opt_d = wrapped(SAM(), g), wrapped(SAM(), d)
        for _ in range(3):
            opt_g.step(lambda: loss_g(g, d))
            if zeroed: opt_d.zero_grad()
            opt_d.step(lambda: loss_d(g, d))
        return values(g), values(d)
    g, d = pair()
    for _ in range(3):
        sam_step(g, lambda: loss_g(g, d), sgd(g))
        sam_step(d, lambda: loss_d(g, d), sgd(d))
    of_g, of_d = trained(zeroed=True)
    close(of_g, values(g))
    close(of_d, values(d))
    _, of_d = trained(zeroed=False)
    assert (of_d - values(d)).norm() > .01


def test_a_method_with_two_optimizers_is_refused_by_the_first():
    (x, y), method = batch(), SAM()
    nets = network(), network()
    first, second = (wrapped(method, net) for net in nets)
    before = values(nets[0])
    def loss(net): return F.cross_entropy(net(x), y)
    message = 'this SAM object now belongs to another optimizer or Learner; make one SAM object for each'
    with pytest.raises(ValueError, match=message): first.step(lambda: loss(nets[0]))
    loss(nets[0]).backward()
    with pytest.raises(ValueError, match=message): first.first_step()
    assert torch.equal(values(nets[0]), before)
    expected = values(nets[1]) - .1 * sam_gradient(nets[1], lambda: loss(nets[1]))
    second.step(lambda: loss(nets[1]))
    close(values(nets[1]), expected)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('inside', ['all', 'norm'])
def test_only_finds_the_parameters_inside_an_activation_checkpoint(inside, reentrant):
    x, y = batch()
    x.requires_grad_()
    torch.manual_seed(1)
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)
    net = nn.Sequential(*layers).double()
    def run():
        if inside == 'all': return checkpoint(net, x, use_reentrant=reentrant)
        hidden = checkpoint(net[:2], x, use_reentrant=reentrant) # the second norm stays outside
        return net[2:](hidden)
    def loss(): return F.cross_entropy(run(), y)
    names = [n for n, _ in net.named_parameters()]
    chosen = [i for i, n in enumerate(names) if n[0] in '13']
    params = list(net.parameters())
    plain = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(plain, params)
    norm = torch.cat([grads[i].flatten() for i in chosen]).norm()
    moved = copy.deepcopy(net)
    with torch.no_grad():
        for i in chosen: list(moved.parameters())[i].add_(.5 * grads[i] / norm)
    second = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
    expected = values(net) - .1 * torch.cat([g.flatten() for g in second])
    wrapped(SAM(rho=.5, only='norm'), net).step(loss)
    close(values(net), expected)


@pytest.mark.parametrize('options', [dict(variant=1), dict(variant=3), dict(grad_at='up'), dict(rho=.1)])
def test_sadt_takes_sparse_gradients(options):
    "The indices repeat, as the words of a text do; the weights must be those of dense gradients."
    def trained(sparse):
        torch.manual_seed(0)
        net = nn.Embedding(6, 2, sparse=sparse).double()
        opt = torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
        wrapper = MethodOptimizer(SADT(**options, noise_scale=1000., divergence='gaussian'), opt, net)
        def closure():
            rows = net(torch.tensor([1, 2, 3, 2]))
            return rows, (rows - 1).square().mean()
        for _ in range(3): wrapper.step(closure)
        return values(net)
    close(trained(True), trained(False))
