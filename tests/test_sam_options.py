"""The options `only`, `m`, `start` and `stop` of methods with an extra pass, against plain PyTorch loops.

The loops were written from the definitions: SAM-ON, m-sharpness, late-phase SAM."""
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import batches, cnn, flat, in_two_processes, learner, micro_batches, mlp, needed
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.learner import Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper
from sadt_nb.core.checkpoint import Checkpoint
from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.passes import ExtraPass
from sadt_nb.core.perturb import chosen_params
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.core.recipe import PartialEpochs
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.cost import run_cost
from sadt_nb.experiments.sweep import at_equal_passes
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.registry import METHODS, make_method, method_options, passes_of
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM
from sadt_nb.models.resnet import resnet20
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

CE = nn.CrossEntropyLoss()
HYPERS = dict(momentum=.9, weight_decay=1e-3)
torch_sgd = partial(OptimWrapper, opt=torch.optim.SGD, **HYPERS)
SIX = batches(n=48, bs=8, conv=True) # six batches
CLOSE = dict(rtol=1e-12, atol=1e-12)


def net(norm='batch'):
    "Return a convolutional network with two normalisation layers, whose names do not say so."
    torch.manual_seed(1)
    norms = {'batch': lambda: nn.BatchNorm2d(4), 'group': lambda: nn.GroupNorm(2, 4), 'none': nn.Identity}
    return nn.Sequential(nn.Conv2d(2, 4, 3), norms[norm](), nn.ReLU(), nn.Conv2d(4, 4, 3), norms[norm](),
                         nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()


IN_NORMS = {'1.weight', '1.bias', '4.weight', '4.bias'}
CHOSEN = {None: lambda n, p: True, 'norm': lambda n, p: n in IN_NORMS,
          'not norm': lambda n, p: n not in IN_NORMS, 'kernels': lambda n, p: p.ndim > 1}


def uphill(model, g, rho, chosen, T):
    "Return the perturbation `rho T² g / ||T g||` of the chosen parameters, by name."
    named = dict(model.named_parameters())
    t = {n: T(n, p.detach()) for n, p in named.items() if chosen(n, p)}
    length = sum(((t[n] * g[n])**2).sum() for n in t).sqrt()
    return {n: rho * t[n]**2 * g[n] / length for n in t}


def sam_T(n, p): return torch.ones_like(p)
def absolute_T(n, p): return p.abs()
def asam_T(n, p): return torch.ones_like(p) if n.endswith('bias') else p.abs() + .01


def gradients(model, x, y):
    loss = CE(model(x), y)
    return dict(zip([n for n, _ in model.named_parameters()],
                    torch.autograd.grad(loss, list(model.parameters()))))


def sharp_gradient(model, x, y, rho, chosen, T, found=None):
    "Return SAM's gradient of a batch: of all parameters, at weights that only the chosen ones have left."
    e = uphill(model, gradients(model, x, y), rho, chosen, T)
    if found is not None: found.append(e)
    named = dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in named.items()}
    with torch.no_grad():
        for n in e: named[n] += e[n]
    g = gradients(model, x, y)
    with torch.no_grad():
        for n, p in named.items(): p.copy_(before[n])
    return g


def by_hand(model, rho, chosen=CHOSEN[None], T=sam_T, m=None, active=lambda i: True, data=SIX, found=None):
    "Train in a plain loop: one step per batch, with the size-weighted mean of the chunks' gradients."
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1, **HYPERS)
    for i, (x, y) in enumerate(data):
        parts = [] # for each chunk, its number of samples and its gradients
        if active(i):
            for xs, ys in micro_batches([(x, y)], m or len(x)):
                parts.append((len(ys), sharp_gradient(model, xs, ys, rho, chosen, T, found)))
        else: parts.append((len(y), gradients(model, x, y)))
        for n, p in model.named_parameters(): p.grad = sum(k / len(y) * g[n] for k, g in parts)
        optimizer.step()
    return flat(model, buffers=True)


def train(cbs, model=None, data=SIX, epochs=1, **kw):
    "Return all weights and statistics after training with a Learner."
    model = net() if model is None else model
    learner(model, cbs, data, opt_func=torch_sgd, **kw).fit(epochs)
    return flat(model, buffers=True)


def kernels(name, parameter): return parameter.ndim > 1


# `only`
@pytest.mark.parametrize('only', ['norm', 'not norm', kernels])
@pytest.mark.parametrize('norm', ['batch', 'group'])
def test_only_is_the_definition(only, norm):
    chosen = CHOSEN['kernels' if only is kernels else only]
    for method, T in ((SAM(.5, only=only), sam_T), (SAM(.5, adaptive=True, only=only), absolute_T),
                      (ASAM(.5, only=only), asam_T)):
        expected = by_hand(net(norm), .5, chosen, T)
        torch.testing.assert_close(train([method], net(norm)), expected, **CLOSE)
        assert not torch.allclose(expected, by_hand(net(norm), .5, T=T), atol=1e-6), 'all weights differ'


def test_the_perturbation_of_the_chosen_has_length_rho(monkeypatch):
    from sadt_nb.core import perturbed_passes
    lengths, moved = [], []
    real = perturbed_passes.perturbed
    def noted(params, deltas, *args):
        lengths.append(sum((d**2).sum() for d in deltas.values()).sqrt().item())
        moved.append(set(deltas))
        return real(params, deltas, *args)
    monkeypatch.setattr(perturbed_passes, 'perturbed', noted)
    train([SAM(.5, only='norm')])
    assert lengths == pytest.approx([.5] * 6, abs=1e-10)
    assert all(names == IN_NORMS for names in moved)


def test_everything_chosen_has_the_bits_of_no_choice():
    assert torch.equal(train([SAM(.05, only=lambda n, p: True)]), train([SAM(.05)]))


class LlamaRMSNorm(nn.Module):
    "A normalisation layer that has none of PyTorch's as its base."
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
    def forward(self, x): return self.scale * x / x.square().mean(-1, keepdim=True).sqrt()


class BlockWithLayerNorm(nn.Module):
    "No normalisation layer itself: its own parameter is a gain."
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))
        self.inner = nn.LayerNorm(5)
    def forward(self, x): return self.gain * self.inner(x)


KINDS = [nn.BatchNorm1d(5), nn.BatchNorm3d(5), nn.SyncBatchNorm(5), nn.GroupNorm(1, 5), nn.LayerNorm(5),
         nn.InstanceNorm2d(5, affine=True), nn.RMSNorm(5), LlamaRMSNorm()]


@pytest.mark.parametrize('kind', KINDS, ids=lambda k: type(k).__name__)
def test_every_kind_of_normalisation_layer_is_found_by_its_type(kind):
    model = nn.Sequential(nn.Linear(5, 5), kind, nn.Linear(5, 2))
    inside = {f'1.{n}' for n, _ in kind.named_parameters()}
    assert inside and chosen_params(model, 'norm') == inside
    assert chosen_params(model, 'not norm') == {'0.weight', '0.bias', '2.weight', '2.bias'}
    model.batchnorm_by_name = nn.Linear(2, 2) # a name without meaning
    assert chosen_params(model, 'norm') == inside


class Doubled(nn.Module):
    "A parametrization with a parameter of its own."
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.))
    def forward(self, w): return w * self.factor


def doubled(layer, name): parametrize.register_parametrization(layer, name, Doubled())
def normed(layer, name): nn.utils.parametrizations.weight_norm(layer, name, dim=None)
def normed_by_hooks(layer, name): nn.utils.weight_norm(layer, name, dim=None)


@pytest.mark.filterwarnings('ignore:.*weight_norm')
@pytest.mark.parametrize('change', [doubled, normed, normed_by_hooks])
@pytest.mark.parametrize('make', [lambda: nn.LayerNorm(5), LlamaRMSNorm])
def test_a_parametrized_normalisation_layer_is_one(make, change):
    "Its weight is computed from other parameters, which SAM perturbs."
    norm = make()
    name = next(iter(dict(norm.named_parameters())))
    change(norm, name)
    dense = nn.Linear(5, 5)
    doubled(dense, 'weight')
    model = nn.Sequential(dense, norm, nn.Linear(5, 2))
    inside = {f'1.{n}' for n, _ in norm.named_parameters()}
    assert len(inside) > 1 and chosen_params(model, 'norm') == inside
    assert chosen_params(model, 'not norm') == {n for n, _ in model.named_parameters()} - inside


def test_a_block_is_not_a_normalisation_layer():
    assert chosen_params(BlockWithLayerNorm(), 'norm') == {'inner.weight', 'inner.bias'}


class HasUnusedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.unused = net('none'), nn.LayerNorm(3).double()
    def forward(self, x): return self.inner(x)


def test_frozen_and_unused_parameters():
    "Frozen ones are not chosen; without a gradient of a chosen one, the batch has its plain gradient."
    model = net()
    model[1].requires_grad_(False)
    assert chosen_params(model, 'norm') == {'4.weight', '4.bias'}
    assert torch.equal(train([SAM(.5, only='norm')], HasUnusedNorm()), train([], HasUnusedNorm()))


# `m`
@pytest.mark.parametrize('m', [1, 3, 4, 8, 100])
@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_m_is_the_definition(m, norm):
    if norm == 'batch' and m == 1: m = 2
    for method, T in ((SAM(.2, m=m), sam_T), (ASAM(.2, m=m), asam_T)):
        expected = by_hand(net(norm), .2, T=T, m=m)
        torch.testing.assert_close(train([method], net(norm)), expected, **CLOSE)
        whole = by_hand(net(norm), .2, T=T)
        assert torch.allclose(expected, whole, atol=1e-6) == (m >= 8)


@pytest.mark.parametrize('method', [SAM, ASAM])
@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_chunks_are_micro_batches_of_accumulation(method, norm):
    micro = micro_batches(SIX, 2)
    accumulated = train([method(.2), GradientAccumulation(8)], net(norm), micro)
    torch.testing.assert_close(train([method(.2, m=2)], net(norm)), accumulated, **CLOSE)


def test_chunks_of_micro_batches():
    "Accumulation of batches of 8 to steps of 16, each batch in chunks of 4."
    fours = micro_batches(SIX, 4)
    expected = train([SAM(.2), GradientAccumulation(16)], net(), fours)
    torch.testing.assert_close(train([SAM(.2, m=4), GradientAccumulation(16)]), expected, **CLOSE)


def test_a_chunk_of_the_whole_batch_has_the_bits_of_no_chunks():
    assert torch.equal(train([SAM(.2, m=8)]), train([SAM(.2)]))


@pytest.mark.parametrize('size', [7, 8, 9])
def test_the_last_chunk_of_any_batch(size):
    data = batches(n=27, bs=size, conv=True)
    expected = by_hand(net(), .2, m=4, data=data)
    torch.testing.assert_close(train([SAM(.2, m=4)], data=data), expected, **CLOSE)


class TakesDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()
    def forward(self, pair, d): return self.inner(pair[0] + d['b'])


def test_inputs_in_tuples_and_dicts_are_cut_too():
    data = [((x / 4, 'kept'), dict(b=3 * x / 4), y) for x, y in SIX]
    def fit(m):
        model = TakesDict()
        learn = learner(model, [SAM(.2, m=m)], data, opt_func=torch_sgd)
        learn.fit(1)
        return flat(model, buffers=True)
    torch.testing.assert_close(fit(4), by_hand(net(), .2, m=4), **CLOSE)


class Shown(Callback):
    "Keeps the loss and the size of the prediction that the Learner shows after each batch."
    run_valid = False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append((self.loss.item(), len(self.pred)))


def test_the_learner_shows_loss_and_prediction_of_the_whole_batch():
    chunks, whole = Shown(), Shown()
    train([SAM(.2, m=2), chunks])
    train([SAM(.2), whole])
    assert chunks.seen[0] == whole.seen[0], 'before the first step'
    assert [n for _, n in chunks.seen] == [8] * 6
    assert chunks.seen[1:] != whole.seen[1:]


@pytest.mark.parametrize('rng, same', [('replay', True), ('fresh', False)])
def test_a_chunk_has_its_own_masks_twice(rng, same):
    "At a radius of almost 0, replayed masks give the gradient of the first pass, so chunks do not matter."
    masks = []
    class Dropout(nn.Dropout):
        def forward(self, x):
            out = super().forward(x)
            if self.training: masks.append((out == 0).clone())
            return out
    model = nn.Sequential(nn.Flatten(), Dropout(.5), nn.Linear(72, 3)).double()
    train([SAM(1e-9, m=4, rng=rng)], model, SIX[:1])
    assert [len(mask) for mask in masks] == [8, 4, 4, 4, 4]
    assert torch.equal(masks[1], masks[2]) == torch.equal(masks[3], masks[4]) == same
    assert not torch.equal(masks[1], masks[3])


class Teacher(nn.Module):
    "Counts its passes, and remembers the number of samples."
    def __init__(self):
        super().__init__()
        self.net, self.sizes = net(), []
    def forward(self, x):
        self.sizes.append(len(x))
        return self.net(x)


def test_other_methods_see_the_samples_of_a_chunk():
    "Distillation's teacher predicts the whole batch once; each chunk is compared with its own part."
    micro = micro_batches(SIX, 4)
    def fit(cbs, data):
        teacher = Teacher()
        return train([*make_method('distillation', teacher=teacher), *cbs], net(), data), teacher.sizes
    chunks, sizes = fit([SAM(.2, m=4)], SIX)
    accumulated, _ = fit([SAM(.2), GradientAccumulation(8)], micro)
    torch.testing.assert_close(chunks, accumulated, **CLOSE)
    assert sizes == [8] * 6


def test_mixed_labels_cannot_be_cut():
    cbs = [SAM(m=4), MixUp()]
    with pytest.raises(ValueError, match='`m` does not work with'):
        train(cbs, loss_func=CrossEntropyLossFlat())


# `start` and `stop`
EXTRA = [n for n in METHODS if isinstance((make_method(n, **needed(n)) or [None])[0], ExtraPass)]


def test_every_method_with_an_extra_pass_has_the_options():
    assert len(EXTRA) >= 8
    for name in EXTRA:
        defaults = {k: method_options(name)[k].default for k in ('start', 'stop')}
        assert defaults == dict(start=0., stop=1.), name


class Tape(Callback):
    "Records the weights after each batch, and how many forwards and steps the batch took."
    order, run_valid = 2000, False
    def __init__(self, keep=None): self.keep, self.weights, self.forwards, self.steps = keep, [], [], []

    def before_fit(self):
        def count(module, inputs): self.forwards[-1] += module.training
        self.handle = self.model[0].register_forward_pre_hook(count)
        step = self.opt.step
        def counted(*args, **kwargs):
            self.steps[-1] += 1
            return step(*args, **kwargs)
        self.opt.step = counted

    def before_batch(self):
        self.forwards.append(0)
        self.steps.append(0)

    def after_batch(self):
        self.weights.append(flat(self.model, buffers=True))
        if len(self.weights) == self.keep:
            self.kept = deepcopy(self.model.state_dict()), deepcopy(self.opt.state_dict())

    def after_fit(self):
        self.handle.remove()
        del self.opt.step


def taped(method, keep=None, epochs=2):
    "Return what a `Tape` has recorded of a training."
    torch.manual_seed(3)
    tape = Tape(keep)
    learner(cnn(), [*method, tape], SIX, opt_func=torch_sgd).fit(epochs)
    return tape


def continued_plainly(kept, data):
    "Return the weights after each batch of plain training from stored weights and momentum."
    tape, model = Tape(), cnn()
    learn = learner(model, [tape], data, opt_func=torch_sgd)
    learn.create_opt()
    model.load_state_dict(kept[0])
    learn.opt.load_state_dict(kept[1])
    learn.fit(1)
    return tape.weights


@pytest.mark.parametrize('name', EXTRA)
@pytest.mark.parametrize('start, stop', [(0., .5), (.5, 1.), (.3, .6)])
def test_outside_the_window_every_step_is_plain(name, start, stop):
    """Before `start`, training has the bits of plain training; after `stop`, of plain training from there.

    Two epochs have 12 batches: those from `ceil(12 start)` to before `ceil(12 stop)` lie inside."""
    first, last = math.ceil(12 * start), math.ceil(12 * stop)
    options = needed(name)
    plain = taped([])
    late = taped(make_method(name, start=start, stop=stop, **options), keep=last)
    outside = [*range(first), *range(last, 12)]
    for i in outside: assert (late.forwards[i], late.steps[i]) == (plain.forwards[i], plain.steps[i])
    assert late.forwards[first] > 1
    for i in range(first): assert torch.equal(late.weights[i], plain.weights[i])
    assert not torch.equal(late.weights[first], plain.weights[first])
    if last < 12:
        there = continued_plainly(late.kept, (SIX * 2)[last:])
        assert len(there) == 12 - last
        for a, b in zip(late.weights[last:], there): assert torch.equal(a, b)
    if not start:
        always = taped(make_method(name, **options))
        for i in range(last): assert torch.equal(late.weights[i], always.weights[i])


@pytest.mark.parametrize('start, stop', [(0., 1.), (.8, 1.), (.1, .35), (0., .25)])
def test_the_window_is_the_definition(start, stop):
    def active(i): return math.ceil(12 * start - 1e-9) <= i < math.ceil(12 * stop - 1e-9)
    expected = by_hand(net(), .2, active=active, data=SIX * 2)
    torch.testing.assert_close(train([SAM(.2, start=start, stop=stop)], epochs=2), expected, **CLOSE)


def test_all_options_together():
    def active(i): return i >= 6
    expected = by_hand(net(), .5, CHOSEN['norm'], m=4, active=active, data=SIX * 2)
    method = SAM(.5, only='norm', m=4, start=.5)
    torch.testing.assert_close(train([method], epochs=2), expected, **CLOSE)


@pytest.mark.parametrize('batches_in_all', [3, 7, 10, 49, 1000])
def test_shares_are_exact_in_spite_of_rounding(batches_in_all):
    "fastai adds up shares; ten times 0.1 is a little less than 1."
    for start, stop in ((3, 7), (8, 9), (1, 8)):
        method = SAM(start=start / 10, stop=stop / 10)
        method.learn = type('Learn', (), {})()
        done, inside = 0., []
        for _ in range(batches_in_all):
            method.learn.pct_train = done
            inside.append(method.in_window())
            done += 1 / batches_in_all
        exact = [start * batches_in_all <= 10 * i < stop * batches_in_all for i in range(batches_in_all)]
        assert inside == exact


def test_intervals_count_from_the_start_of_the_window():
    "The first step inside is a SAM step, and then every k-th; LookSAM has no older direction to use."
    for method in (SAM(.2, interval=3, start=.3), LookSAM(.2, k=3, start=.3)):
        forwards = taped([method]).forwards
        assert forwards == [1] * 4 + [2, 1, 1] * 2 + [2, 1]
    assert taped([SAM(.2, interval=3, stop=.5)]).forwards == [2, 1, 1] * 2 + [1] * 6


def test_fractions_of_an_epoch():
    "1.5 epochs have 9 batches: a third of them are 3."
    tape = Tape()
    torch.manual_seed(3)
    cbs = [SAM(.2, start=1/3, stop=2/3), PartialEpochs(1.5), tape]
    learner(cnn(), cbs, SIX, opt_func=torch_sgd).fit(2)
    assert tape.forwards[:9] == [1] * 3 + [2] * 3 + [1] * 3


@pytest.mark.parametrize('name', ['sam', 'looksam', 'sadt1', 'esam'])
@pytest.mark.parametrize('epochs', [3, 2.5])
@pytest.mark.parametrize('stopped_after', [1, 2])
def test_continuing_from_a_checkpoint_across_the_border(name, epochs, stopped_after, tmp_path):
    "The border lies in the second epoch; training stops in the epoch before or after it, and continues."
    def fit(file, stop_in=None):
        class Stop(Callback):
            order, run_valid = 3000, False
            def after_batch(self):
                if self.epoch == stop_in and self.iter == 1: raise KeyboardInterrupt
        torch.manual_seed(3)
        model = cnn()
        options = dict(sam=dict(interval=2), looksam=dict(k=3)).get(name, {})
        cbs = [*make_method(name, start=.5, stop=.9, **options), PartialEpochs(epochs), Stop()]
        learn = learner(model, cbs, SIX, opt_func=torch_sgd)
        learn.fit(3, cbs=Checkpoint(tmp_path / file))
        return flat(model, buffers=True)
    whole = fit('whole.pt')
    with pytest.raises(KeyboardInterrupt): fit('cut.pt', stopped_after)
    assert torch.equal(fit('cut.pt'), whole)


# other loops
def closure(model, batch):
    x, y = batch
    def loss():
        out = model(x)
        return CE(out, y)
    return loss


def wrapped(method, **kw):
    torch.manual_seed(3)
    model = net().train()
    base = torch.optim.SGD(model.parameters(), lr=.1, **HYPERS)
    return model, MethodOptimizer(method, base, model, **kw)


@pytest.mark.parametrize('two_calls', [False, True])
@pytest.mark.parametrize('only', [None, 'norm'])
def test_the_wrapper_makes_the_steps_of_the_callback(two_calls, only):
    model, opt = wrapped(SAM(.2, only=only, start=.5, stop=.8), total_steps=12)
    for batch in SIX * 2:
        loss = closure(model, batch)
        if not two_calls: opt.step(loss)
        else:
            opt.zero_grad()
            loss().backward()
            if opt.first_step():
                opt.zero_grad()
                loss().backward()
            opt.second_step()
    expected = train([SAM(.2, only=only, start=.5, stop=.8)], epochs=2)
    torch.testing.assert_close(flat(model, buffers=True), expected, **CLOSE)


def test_the_wrapper_resumes_within_the_window():
    def go(upto, state=None, of=None):
        model, opt = wrapped(SAM(.2, interval=2, start=.5), total_steps=12)
        first = 0
        if state:
            model.load_state_dict(state[0])
            opt.load_state_dict(state[1])
            first = of
        for batch in (SIX * 2)[first:upto]: opt.step(closure(model, batch))
        return deepcopy(model.state_dict()), deepcopy(opt.state_dict())
    whole, _ = go(12)
    for cut in (3, 6, 9):
        resumed, _ = go(12, go(cut), cut)
        for n, t in whole.items(): assert torch.equal(t, resumed[n])


def test_loops_say_what_they_need():
    def one_step(method): return closure_step(method, net(), None, torch.optim.SGD(net().parameters()))
    for make in (wrapped, one_step):
        with pytest.raises(ValueError, match='total_steps'): make(SAM(start=.5))
        with pytest.raises(ValueError, match='total_steps'): make(LookSAM(stop=.5))
        with pytest.raises(ValueError, match='`m` needs a fastai Learner.*micro-batch'): make(SAM(m=4))
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match='total_steps'): wrapped(SAM(start=.5), total_steps=bad)


# bad values
def nothing(name, parameter): return False


@pytest.mark.parametrize('options, words', [
    (dict(only='norms'), "`only` must be 'norm', 'not norm', a function"),
    (dict(only=3), '`only` must be'),
    (dict(m=0), '`m` must be at least 1, got 0'),
    (dict(m=-4), '`m` must be at least 1'),
    (dict(m=2.5), '`m` must be a whole number, got 2.5'),
    (dict(m='4'), '`m` must be a whole number of samples'),
    (dict(m=True), '`m` must be a whole number of samples'),
    (dict(start=-.1), '`start` must be a share of training, from 0 to 1, got -0.1'),
    (dict(stop=1.5), '`stop` must be a share'),
    (dict(start='late'), '`start` must be a share'),
    (dict(start=float('nan')), '`start` must be a share'),
    (dict(start=.5, stop=.5), '`start` must be below `stop`'),
    (dict(start=.7, stop=.5), '`start` must be below `stop`')])
@pytest.mark.parametrize('name', ['sam', 'asam'])
def test_bad_values_are_errors_by_name(name, options, words):
    with pytest.raises(ValueError, match=words): make_method(name, **options)
    with pytest.raises(ValueError): Run(method=name, method_args=options)


@pytest.mark.parametrize('only, words', [('norm', "'norm'"), (nothing, 'nothing')])
def test_nothing_chosen_is_an_error_before_training(only, words):
    model = net('none')
    before = flat(model)
    with pytest.raises(ValueError, match=f'`only`, which is {words}, chooses none of the 6'):
        train([SAM(only=only)], model)
    assert torch.equal(flat(model), before)


def test_defaults_have_no_part_in_the_key_and_functions_no_place_in_a_run():
    assert Run(method='sam').key == Run(method='sam', method_args={}).key
    options = dict(only='norm', m=32, start=.5, stop=.9)
    run = Run(method='sam', method_args=options)
    assert dict(run.method_args) == options
    assert Run.from_dict(run.to_dict()) == run
    with pytest.raises(ValueError, match='method_args only'):
        Run(method='sam', method_args=dict(only=nothing))


# the first backward computes only what is perturbed
class Counts(Callback):
    "Counts which gradients each backward of a Learner leaves, as names."
    order, run_valid = 8, False
    def before_fit(self): self.seen = []
    def after_backward(self):
        self.seen.append({n for n, p in self.model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize('m', [None, 4])
def test_the_first_backward_computes_the_chosen_gradients_only(m):
    counts, everything = Counts(), {n for n, _ in net().named_parameters()}
    train([SAM(.5, only='norm', m=m, stop=.5), counts])
    chunk = [IN_NORMS, everything]
    per_batch = chunk if m is None else [set(), *chunk, *chunk] # no backward of the whole batch
    assert counts.seen == per_batch * 3 + [everything] * 3


def test_a_shorter_first_backward_changes_no_bit(monkeypatch):
    for options in (dict(only='norm'), dict(only='not norm', m=4), dict(only=kernels, adaptive=True)):
        short = train([SAM(.5, **options)])
        with monkeypatch.context() as patch:
            patch.setattr(SAM, 'first_inputs', lambda self: None)
            assert torch.equal(train([SAM(.5, **options)]), short)


ESAM_SHORT = dict(rho=.5, beta=.6, whole_norm=False)


def drawn(steps, seed=0):
    "Return the names of the parameters that ESAM perturbs in each step."
    names, g = [n for n, _ in net().named_parameters()], torch.Generator().manual_seed(seed)
    draws = [torch.rand(len(names), generator=g) for _ in range(steps)]
    return [{n for n, u in zip(names, step) if u < .6} for step in draws]


@pytest.mark.parametrize('gamma', [1., .5])
def test_esam_s_first_backward_computes_the_drawn_gradients_only(gamma):
    counts, everything = Counts(), {n for n, _ in net().named_parameters()}
    train([ESAM(gamma=gamma, stop=.5, **ESAM_SHORT), counts])
    expected = []
    for names in drawn(3): expected += [names, everything]
    assert counts.seen == expected + [everything] * 3
    assert all(0 < len(names) < len(everything) for names in drawn(3))


@pytest.mark.parametrize('gamma', [1., .5])
def test_esam_s_shorter_first_backward_changes_no_bit(gamma, monkeypatch):
    def trained(accumulate):
        cbs = [GradientAccumulation(16)] if accumulate else []
        return train([ESAM(gamma=gamma, **ESAM_SHORT), *cbs], epochs=2)
    for accumulate in (False, True):
        short = trained(accumulate)
        with monkeypatch.context() as patch:
            patch.setattr(ESAM, 'first_inputs', lambda self: None)
            assert torch.equal(trained(accumulate), short)
    assert not torch.allclose(train([ESAM(.5, .6, gamma)]), train([ESAM(gamma=gamma, **ESAM_SHORT)]))


def test_esam_divides_by_the_norm_of_the_drawn_gradients():
    "In each step, SAM with these parameters and the radius `rho / beta` makes the same gradient."
    model, draws = net(), drawn(6)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=.1, **HYPERS)
    for (x, y), names in zip(SIX, draws):
        g = sharp_gradient(model, x, y, .5 / .6, lambda n, p, names=names: n in names, sam_T)
        for n, p in model.named_parameters(): p.grad = g[n]
        optimizer.step()
    expected = flat(model, buffers=True)
    torch.testing.assert_close(train([ESAM(gamma=1., **ESAM_SHORT)]), expected, **CLOSE)
    other, opt = wrapped(ESAM(gamma=1., **ESAM_SHORT))
    for batch in SIX: opt.step(closure(other, batch))
    torch.testing.assert_close(flat(other, buffers=True), expected, **CLOSE)


def test_esam_s_wrapper_computes_the_drawn_gradients_only():
    model, opt = wrapped(ESAM(gamma=1., **ESAM_SHORT))
    seen = []
    for p in model.parameters(): p.register_hook(lambda g: seen.append(1))
    opt.step(closure(model, SIX[0]))
    assert len(seen) == len(drawn(1)[0]) + 10


def test_a_callback_that_replaces_the_backward_is_left_in_place():
    calls = []
    class Counted(Callback):
        order = -5
        def before_fit(self):
            real = self.learn._backward
            def backward():
                calls.append(self.learn.loss_grad)
                return real()
            self.learn._backward = self.backward = backward
        def after_batch(self):
            if self.training: assert self.learn._backward is self.backward
    expected = train([SAM(.5, only='norm')])
    assert torch.equal(train([SAM(.5, only='norm'), Counted()]), expected)
    assert len(calls) == 12


def test_a_cancelled_batch_leaves_the_learner_as_it_was():
    class Cancels(Callback):
        order, run_valid = 20, False
        def before_backward(self):
            if self.iter == 2 and not getattr(self.learn, '_replaying', False): raise CancelBatchException
    model = net()
    learn = learner(model, [SAM(.5, only='norm'), Cancels()], SIX, opt_func=torch_sgd)
    learn.fit(1)
    assert '_backward' not in vars(learn)


def test_the_wrapper_computes_the_chosen_gradients_only():
    model, opt = wrapped(SAM(.5, only='norm'))
    seen = []
    for p in model.parameters(): p.register_hook(lambda g: seen.append(1))
    opt.step(closure(model, SIX[0]))
    assert len(seen) == 4 + 10


def test_the_wrapper_with_a_choice_that_the_batch_does_not_use():
    model = HasUnusedNorm()
    opt = MethodOptimizer(SAM(.5, only='norm'), torch.optim.SGD(model.parameters(), lr=.1, **HYPERS), model)
    for batch in SIX: opt.step(closure(model.train(), batch))
    torch.testing.assert_close(flat(model, buffers=True), train([], HasUnusedNorm()), **CLOSE)
    other = net()
    with pytest.raises(ValueError, match='does the closure run this network'):
        opt.step(closure(other, SIX[0]))


# what it costs
def test_the_cost_follows_the_options():
    expected = {('sam', 'start', .8): 1.2, ('sam', 'interval', 4): 1.25, ('looksam', 'k', 10): 1.1,
                ('esam', 'gamma', 1.): 2, ('esam', 'gamma', .25): 1 + 1/3 + .25, ('sam', 'm', 32): 7/3,
                ('esam', 'whole_norm', False): 1.7, ('esam', 'spec', 'code'): 1.7,
                ('asam', 'only', 'norm'): 5/3, ('sam', 'only', 'not norm'): 2, ('gsam', 'stop', .25): 1.25,
                ('sadt2', 'start', .5): 2, ('sadt2', 'rho', .1): 2, ('sadt1', 'kl_weight', 0): 1,
                ('sadt1', 'perturb', (1, 2, 3)): 4, ('sadt3', 'grad_at', 'up'): 7/3, ('saf', 'lag', 2): 1}
    for (name, option, value), passes in expected.items():
        assert passes_of(name, **{option: value}) == pytest.approx(passes), (name, option)
    assert passes_of('sam', start=.5, stop=.75, interval=2, only='norm', m=8) == pytest.approx(1.125)
    for name, method in METHODS.items(): assert passes_of(name) == pytest.approx(method.passes), name
    with pytest.raises(ValueError, match="no option 'k'"): passes_of('sam', k=3)
    with pytest.raises(ValueError, match='unknown method'): passes_of('sma')


def test_plans_count_the_options():
    run = Run(data='cifar10', method='sam', epochs=10, n_train=1000, bs=100)
    late = run.but(method_args=dict(start=.8))
    plain = run.but(method='baseline')
    assert [run_cost(r).passes for r in (plain, run, late)] == pytest.approx([100, 200, 120])
    assert at_equal_passes(late, plain).epochs == 8
    assert at_equal_passes(plain, late).epochs == 12


def operations(method, data):
    "Return the floating point operations of training, without validation."
    learn = learner(resnet20(10), method, data, opt_func=torch_sgd)
    learn.dls.loaders[1] = []
    with FlopCounterMode(display=False) as counter: learn.fit(1)
    return counter.get_total_flops()


@pytest.mark.parametrize('name, options', [
    ('sam', {}), ('sam', dict(only='norm')), ('asam', dict(only='norm', m=4)), ('sam', dict(m=4)),
    ('sam', dict(start=.5)), ('sam', dict(only='norm', m=2, stop=.5)), ('looksam', dict(k=2)),
    ('esam', dict(gamma=.25))])
def test_counted_operations_are_those_of_the_registry(name, options):
    "PyTorch's counter knows nothing of passes. The first layer has no gradient of its input."
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 3, 32, 32, generator=g), torch.arange(8)) for _ in range(4)]
    ratio = operations(make_method(name, **options), data) / operations([], data)
    assert ratio == pytest.approx(passes_of(name, **options), rel=.02)


def test_counted_operations_of_esam_s_shorter_backward():
    "The registry has the mean over the draws, so the count needs many of them."
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(2, 3, 32, 32, generator=g), torch.arange(2)) for _ in range(12)]
    plain = operations([], data)
    options = dict(gamma=1., beta=.3, whole_norm=False)
    ratio = operations(make_method('esam', **options), data) / plain
    assert ratio == pytest.approx(passes_of('esam', **options), rel=.02)
    assert ratio < 1.8, 'the whole first backward makes it 2'


# two processes
@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Return the output of `sam_options_worker.py`, by case."
    pytest.importorskip('accelerate', reason='fastai distributes through accelerate')
    out = tmp_path_factory.mktemp('ddp') / 'results.pt'
    import sam_options_worker as options
    in_two_processes(options.main, out)
    return torch.load(out, weights_only=False)


@pytest.mark.parametrize('case', ['only', 'm', 'm and only', 'late'])
def test_two_processes_are_micro_batches_of_one(case, two_processes):
    import distributed_worker as worker
    import sam_options_worker as options
    got = two_processes[case]
    assert got['same'], 'all processes end with the same weights'
    dl = worker.AsTwoProcesses(worker.samples(), bs=worker.BS)
    learn = learner(cnn(bn=False), [options.CASES[case](), GradientAccumulation(2 * worker.BS)],
                    opt_func=worker.momentum_sgd)
    learn.dls.loaders = [dl, worker.Ordered(worker.samples(), bs=8)]
    learn.fit(worker.EPOCHS)
    torch.testing.assert_close(got['weights'], flat(learn.model), rtol=1e-9, atol=1e-11)
    by_backward, in_all = sum(got['messages']), got['direct']
    assert in_all == len(got['messages']), 'one message per batch'
    assert by_backward == (0 if 'm' in case else in_all), 'chunks are averaged at the end'


# Lightning
def test_lightning_knows_how_long_training_is():
    lightning = pytest.importorskip('lightning')
    from sadt_nb.core.lightning import MethodCallback
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.net = net()
        def training_step(self, batch): return CE(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.net.parameters(), lr=.1, **HYPERS)
    def fit(method, **kw):
        module = Module()
        trainer = lightning.Trainer(
            precision='64-true', accelerator='cpu', callbacks=[MethodCallback(method)], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            **dict(max_epochs=2) | kw)
        trainer.fit(module, torch.utils.data.DataLoader(SIX, batch_size=None))
        return flat(module.net, buffers=True)
    options = dict(only='norm', interval=2, start=.4, stop=.9)
    expected = train([SAM(.5, **options)], epochs=2)
    torch.testing.assert_close(fit(SAM(.5, **options)), expected, **CLOSE)
    with pytest.raises(ValueError, match='Trainer with a limit'): fit(SAM(start=.5), max_epochs=-1)
    with pytest.raises(ValueError, match='`m` needs a fastai Learner'): fit(SAM(m=4))


# with other features
@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
@pytest.mark.parametrize('options', [dict(only='norm'), dict(m=4), dict(m=4, only='norm')])
def test_mixed_precision(mode, options):
    "In half precision, chunks are still micro-batches, and a shorter first backward still changes nothing."
    data = [(x.float(), y) for x, y in SIX]
    class Logits(Callback):
        def after_pred(self): self.dtypes = {*getattr(self, 'dtypes', ()), self.pred.dtype}
    def fit(cbs, data):
        model, logits = net().float(), Logits()
        learner(model, [*cbs, DeviceMixedPrecision(mode), logits], data, opt_func=torch_sgd).fit(1)
        assert dict(bf16=torch.bfloat16, fp16=torch.float16)[mode] in logits.dtypes
        return flat(model)
    got = fit([SAM(.2, **options)], data)
    m = options.get('m', 8)
    micro = micro_batches(data, m)
    whole_backward = SAM(.2, only=options.get('only'))
    whole_backward.first_inputs = lambda: None
    expected = fit([whole_backward, GradientAccumulation(8)], micro)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('options', [dict(first_step=False), dict(variant=2), dict(perturb=None, rho=.1)])
def test_variants_of_sadt_are_plain_after_the_window(options):
    late = taped([SADT(**options, stop=.5)], keep=6)
    there = continued_plainly(late.kept, SIX)
    for a, b in zip(late.weights[6:], there, strict=True): assert torch.equal(a, b)


def test_a_search_for_a_rate_is_made_with_the_method():
    "The window is a share of the search, too, but the curve must not change within it."
    def losses(method):
        torch.manual_seed(3)
        learn = learner(cnn().float(), [method], [(x.float(), y) for x, y in SIX])
        learn.add_cb(Recorder())
        learn.lr_find(num_it=12, show_plot=False, stop_div=False)
        return torch.stack(learn.recorder.losses)
    assert torch.equal(losses(SAM(.2, start=.5)), losses(SAM(.2)))


def test_a_network_that_keeps_a_state_of_every_sample_can_be_cut():
    "Each chunk continues from the states of its own samples."
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.state = nn.Linear(5, 3).double(), torch.zeros(8, 3, dtype=torch.float64)
        def forward(self, x):
            out = self.layer(x) + self.state
            self.state = out.detach()
            return out
    class Part(nn.Module):
        def __init__(self, layer, start):
            super().__init__()
            self.layer, self.start = layer, start
        def forward(self, x): return self.layer(x) + self.start
    data = batches(n=24, bs=8)
    def cut(m):
        torch.manual_seed(0)
        model = Keeps()
        learn = learner(model, [SAM(.2, m=m)], data, opt_func=torch_sgd)
        learn.dls.loaders[1] = []
        learn.fit(1)
        return flat(model), model.state
    torch.manual_seed(0)
    model = Keeps()
    optimizer = torch.optim.SGD(model.parameters(), lr=.1, **HYPERS)
    for x, y in data:
        start, after, parts = model.state, None, []
        with torch.no_grad(): after = model(x)
        for rows in (slice(0, 4), slice(4, 8)):
            part = Part(model.layer, start[rows])
            parts.append(sharp_gradient(part, x[rows], y[rows], .2, CHOSEN[None], sam_T))
        for n, p in model.named_parameters(): p.grad = sum(g[n] for g in parts) / 2
        model.state = after
        optimizer.step()
    weights, state = cut(4)
    torch.testing.assert_close(weights, flat(model), **CLOSE)
    torch.testing.assert_close(state, model.state, **CLOSE)


# The radius of GSAM

def radii(cb, *more, fit=None, lrs=None):
    "Return GSAM's radius in every training batch, while the learning rate goes through `lrs`."
    seen = []
    class Look(Callback):
        order, run_valid = 70, False
        def before_batch(self):
            if lrs: self.opt.set_hyper('lr', lrs[self.iter])
            seen.append(self.gsam.rho)
    learn = learner(mlp(dtype=torch.float32), [cb, Look(), *more], batches(dtype=torch.float32))
    if fit: fit(learn)
    else: learn.fit(1)
    return seen


def test_the_radius_of_gsam_stays_between_its_two_limits():
    "It is linear in the rate between `lr_min` and `lr_max`, and constant outside."
    gsam = GSAM(rho_max=.3, rho_min=.1, lr_max=.2, lr_min=.1)
    assert radii(gsam, lrs=[.05, .15, .4]) == pytest.approx([.1, .2, .3], rel=1e-9)


def test_a_search_for_the_learning_rate_leaves_the_radius_alone():
    "Its rate rises a millionfold; the loss is that of the largest radius at all rates."
    gsam = GSAM(rho_max=.3, rho_min=.1)
    def search(learn): learn.lr_find(num_it=12, show_plot=False, stop_div=False)
    found = radii(gsam, Recorder(), fit=search)
    assert len(found) == 12
    assert set(found) == {.3}
    scheduled = radii(GSAM(rho_max=.3, rho_min=.1), Recorder(), fit=lambda learn: learn.fit_one_cycle(2))
    assert max(scheduled) > min(scheduled)
