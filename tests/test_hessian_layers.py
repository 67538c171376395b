"The Hessian of networks whose layers have fast forms, against the same networks in elementary operations."
import math
import warnings

import pytest
import torch
from conftest import learner
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sadt_nb.core.fixed_loss import FixedLoss, MissingDerivative, differentiable
from sadt_nb.measures.hessian import _Products, hessian_trace, spectral_density, top_eigenvalues

WIDTH, HEADS = 4, 2


class Body(nn.Module):
    "A body of some kind, followed by a dense layer; `plain` is the same body in elementary operations."
    def __init__(self, body, plain, width=WIDTH):
        super().__init__()
        self.body, self.head, self.plain = body, nn.Linear(width, 3), plain
    def forward(self, x): return self.head(self.body(x))


class Plain(nn.Module):
    "The network `net` with its body in elementary operations; the parameters are those of `net`."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net.head(self.net.plain(self.net.body, x))


def dense(x, layer): return x @ layer.weight.T + layer.bias


class Activation(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.inner, self.f = nn.Linear(2 * WIDTH, WIDTH), f
    def forward(self, x): return self.f(self.inner(x.flatten(1)))


def activation(f, plain): return Body(Activation(f), lambda body, x: plain(dense(x.flatten(1), body.inner)))


def weights_of(q, k):
    e = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).exp()
    return e / e.sum(-1, keepdim=True)


def heads_of(t): return t.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


def attention(a, x):
    q, k, v = (x @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, -1)
    out = weights_of(heads_of(q), heads_of(k)) @ heads_of(v)
    return dense(out.transpose(1, 2).flatten(2), a.out_proj)


class Multihead(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.a, self.options = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), options
    def forward(self, x): return self.a(x, x, x, **self.options)[0].mean(1)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
    def forward(self, x): return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)).mean(1)


def fused_plainly(body, x):
    q, k, v = dense(x, body.qkv).chunk(3, -1)
    return (weights_of(q, k) @ v).mean(1)


def normed(x, layer):
    centred = x - x.mean(-1, keepdim=True)
    size = ((centred**2).mean(-1, keepdim=True) + layer.eps)**.5
    return centred / size * layer.weight + layer.bias


def gelu(x): return x * .5 * (1 + torch.erf(x / math.sqrt(2)))


class Encoder(nn.Module):
    def __init__(self, first):
        super().__init__()
        options = dict(batch_first=True, dropout=.1, activation='gelu', norm_first=first)
        self.e = nn.TransformerEncoderLayer(WIDTH, HEADS, 5, **options)
    def forward(self, x): return self.e(x).mean(1)


def encoded(body, x):
    e = body.e
    def forward(t): return dense(gelu(dense(t, e.linear1)), e.linear2)
    if e.norm_first:
        x = x + attention(e.self_attn, normed(x, e.norm1))
        x = x + forward(normed(x, e.norm2))
    else:
        x = normed(x + attention(e.self_attn, x), e.norm1)
        x = normed(x + forward(x), e.norm2)
    return x.mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(WIDTH, WIDTH, batch_first=True)
    def forward(self, x): return self.rnn(x)[0][:, -1]


def recurrent_plainly(body, x):
    r, h = body.rnn, x.new_zeros(len(x), WIDTH)
    c = h
    for t in range(x.shape[1]):
        a = x[:, t] @ r.weight_ih_l0.T + r.bias_ih_l0
        b = h @ r.weight_hh_l0.T + r.bias_hh_l0
        if isinstance(r, nn.LSTM):
            i, f, g, o = (a + b).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            reset, update = (a + b)[:, :2 * WIDTH].sigmoid().chunk(2, -1)
            new = (a[:, 2 * WIDTH:] + reset * b[:, 2 * WIDTH:]).tanh()
            h = (1 - update) * new + update * h
    return h


class Checkpointed(nn.Module):
    "A block whose activations are computed again in the backward pass."
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.inner = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    def block(self, x): return self.inner(x).tanh()
    def forward(self, x):
        return checkpoint(self.block, self.first(x.flatten(1)), use_reentrant=self.reentrant)


def checkpointed(reentrant):
    def plain(body, x): return dense(dense(x.flatten(1), body.first), body.inner).tanh()
    return Body(Checkpointed(reentrant), plain)


def groups(x, layer):
    x = x.unflatten(1, (layer.num_groups, -1))
    centred = x - x.mean(-1, keepdim=True)
    x = centred / ((centred**2).mean(-1, keepdim=True) + layer.eps)**.5
    return x.flatten(1) * layer.weight + layer.bias


NETS = {
    'multihead': lambda: Body(Multihead(need_weights=False), lambda b, x: attention(b.a, x).mean(1)),
    'multihead weights': lambda: Body(Multihead(), lambda b, x: attention(b.a, x).mean(1)),
    'fused attention': lambda: Body(Fused(), fused_plainly),
    'encoder': lambda: Body(Encoder(False), encoded),
    'encoder, norm first': lambda: Body(Encoder(True), encoded),
    'lstm': lambda: Body(Recurrent(nn.LSTM), recurrent_plainly),
    'gru': lambda: Body(Recurrent(nn.GRU), recurrent_plainly),
    'silu': lambda: activation(F.silu, lambda t: t / (1 + (-t).exp())),
    'mish': lambda: activation(F.mish, lambda t: t * (1 + t.exp()).log().tanh()),
    'gelu': lambda: activation(F.gelu, gelu),
    'layer norm': lambda: Body(Activation(nn.LayerNorm(WIDTH)),
                               lambda b, x: normed(dense(x.flatten(1), b.inner), b.f)),
    'group norm': lambda: Body(Activation(nn.GroupNorm(1, WIDTH)),
                               lambda b, x: groups(dense(x.flatten(1), b.inner), b.f)),
    'checkpointed': lambda: checkpointed(False), 'checkpointed, reentrant': lambda: checkpointed(True),
}
SINGLE = ['multihead', 'fused attention', 'encoder', 'lstm', 'gru', 'silu', 'checkpointed, reentrant']


def network(name, dtype=torch.float64):
    torch.manual_seed(1)
    return NETS[name]().to(dtype).eval()


def data(dtype=torch.float64):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(7, 2, WIDTH, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (7,), generator=g)
    return [(x[:4].to(dtype), y[:4]), (x[4:].to(dtype), y[4:])]


def exact(net):
    "Return the gradient and the Hessian of the mean loss, from elementary operations."
    plain, params = Plain(net), dict(net.named_parameters())
    sizes = [p.numel() for p in params.values()]
    x, y = (torch.cat(t) for t in zip(*data()))
    def loss(w):
        parts = {f'net.{n}': v.view(p.shape) for (n, p), v in zip(params.items(), w.split(sizes))}
        return F.cross_entropy(functional_call(plain, parts, (x,)), y)
    flat = torch.cat([p.detach().flatten() for p in params.values()])
    return torch.func.grad(loss)(flat), hessian(loss)(flat)


def products(net, dtype=torch.float64):
    with _Products(learner(net, data=data(dtype)), None, None, False, '', None) as h:
        return torch.stack([h(v) for v in torch.eye(h.size, dtype=dtype)])


@pytest.mark.parametrize('name', NETS)
def test_gradient_and_hessian_are_those_of_elementary_operations(name):
    net = network(name)
    g, H = exact(net)
    loss = FixedLoss(learner(net, data=data()))
    got = torch.cat([t.flatten() for t in loss.gradient()[1].values()])
    torch.testing.assert_close(got, g, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(products(net), H, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize('name', SINGLE)
def test_single_precision_has_other_kernels_and_the_same_hessian(name):
    _, H = exact(network(name))
    got = products(network(name, torch.float32), torch.float32).double()
    assert (got - H).norm() < 1e-5 * H.norm()


@pytest.mark.parametrize('name', ['multihead', 'silu', 'lstm', 'checkpointed, reentrant'])
def test_every_measure_of_curvature_takes_these_networks(name):
    net = network(name)
    exact_values = torch.linalg.eigvalsh(exact(net)[1]).flip(0)
    learn = learner(net, data=data())
    trace = hessian_trace(learn, progress=False)
    assert abs(trace.value - exact_values.sum()) < 1e-9
    top = top_eigenvalues(learn, 2, progress=False)
    torch.testing.assert_close(top.values, exact_values[:2], rtol=1e-4, atol=1e-6)
    density = spectral_density(learn, progress=False)
    assert abs(density.nodes[0][-1] - exact_values[0]) < 1e-6


def test_curvlinops_agrees():
    "An implementation of others, where forward mode is right."
    curvlinops = pytest.importorskip('curvlinops', reason='curvlinops is not installed')
    net = network('gelu')
    loss, (params, batches) = nn.CrossEntropyLoss(), (list(net.parameters()), data())
    op = curvlinops.HessianLinearOperator(net, loss, params, batches, check_deterministic=False)
    v = torch.randn(sum(p.numel() for p in params), dtype=torch.float64)
    with _Products(learner(net, data=data()), None, None, False, '', None) as h:
        torch.testing.assert_close(h(v), op @ v, rtol=1e-10, atol=1e-12)


# What cannot be differentiated
class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g): return 3 * ctx.saved_tensors[0]**2 * g


class CTC(nn.Module):
    reduction = 'mean'
    def forward(self, pred, y):
        steps = pred.log_softmax(-1).expand(5, *pred.shape)
        lengths = torch.full((len(pred),), 5), torch.ones(len(pred), dtype=torch.long)
        return F.ctc_loss(steps, y[:, None].clamp(min=1), *lengths)


def once_only(): return Body(Activation(Cubed.apply), None), nn.CrossEntropyLoss()
def ctc(): return Body(Activation(torch.tanh), None), CTC()


@pytest.mark.parametrize('make', [once_only, ctc])
def test_a_missing_second_derivative_is_an_error_with_advice(make):
    net, loss = make()
    learn = learner(net.double().eval(), data=data(), loss_func=loss)
    FixedLoss(learn).gradient() # the first exists
    with pytest.raises(MissingDerivative, match='twice.*write this layer or loss with elementary') as e:
        hessian_trace(learn, progress=False)
    assert 'github' not in str(e.value) and 'aten::' not in str(e.value)


def test_an_error_of_the_network_stays_what_it_is():
    class Fails(nn.Module):
        def forward(self, x): raise RuntimeError('shapes 3 and 4 do not fit')
    learn = learner(Body(Fails(), None).double().eval(), data=data())
    with pytest.raises(RuntimeError, match='^shapes 3 and 4 do not fit$'):
        hessian_trace(learn, progress=False)


def test_kernels_come_back():
    "Also after an error."
    net, flags = network('lstm'), (torch.backends.cudnn, torch.backends.mkldnn)
    before = [f.enabled for f in flags]
    with pytest.raises(KeyError), differentiable(net, twice=True):
        assert not any(f.enabled for f in flags)
        raise KeyError
    assert [f.enabled for f in flags] == before
    with differentiable(network('silu'), twice=True): assert [f.enabled for f in flags] == before


def test_reentrant_blocks_train_as_before_afterwards():
    net = network('checkpointed, reentrant')
    hessian_trace(learner(net, data=data()), progress=False)
    x, y = data()[0]
    F.cross_entropy(net(x), y).backward()
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match='use_reentrant'):
        torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
