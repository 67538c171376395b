"""The methods against oracles written from their definitions.

Nothing here calls the library to compute an expected value: every oracle is a plain loop over batches with
`torch.autograd.grad` and an optimizer of three lines. The library's part is always a callback in a `Learner`.
"""
import copy
import itertools
import math
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, TrainEvalCallback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastcore.foundation import L
from torch import nn

from sadt_nb.all import (AGC, SADT, SAM, GradientCentralization, RepeatBatch, RepeatStep, gradient_ascent,
                         kd_loss, kl_div, layer_noise, perturbed, weight_noise)
from sadt_nb.core.optim import keras_adam
from sadt_nb.core.perturb import global_norm, trainable_params

TOL = dict(rtol=0, atol=1e-9)     # oracle and library order their sums differently, nothing else
LR = .05
KL_DIRECTIONS = ('clean_to_aux', 'aux_to_clean')


# Models, batches, and a Learner that works in float64

def make_mlp(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def random_batches(seed, n, shape, classes, dtype):
    "Return `n` batches of noise with random labels, the same for the same seed; `shape` includes the batch."
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(n):
        x = torch.tensor(rng.normal(size=shape), dtype=dtype)
        y = torch.tensor(rng.integers(0, classes, shape[0]))
        batches.append((x, y))
    return batches


def mlp_batches(n=4, bs=8, dtype=torch.float64):
    return random_batches(2, n, (bs, 5), 3, dtype)


def make_conv_net(classes=10, dtype=torch.float64):
    "Return three convolutions and two dense layers, with biases, and BatchNorm after each but the last."
    torch.manual_seed(3)
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 4, 3), relu1=nn.ReLU(), bn1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 8, 3), relu2=nn.ReLU(), bn2=nn.BatchNorm2d(8),
        conv3=nn.Conv2d(8, 8, 3), relu3=nn.ReLU(), bn3=nn.BatchNorm2d(8), flat=nn.Flatten(),
        dense1=nn.Linear(32, 16), relu4=nn.ReLU(), bn4=nn.BatchNorm1d(16),
        dense2=nn.Linear(16, classes))).to(dtype)


def image_batches(n=4, bs=6, classes=10, dtype=torch.float64):
    return random_batches(4, n, (bs, 1, 8, 8), classes, dtype)


def fit(model, batches, *cbs, epochs=1, opt_func=SGD, lr=LR, wd=0., **kwargs):
    "Train on the batches, which are also the validation data. Return the Learner."
    learn = Learner(DataLoaders(batches, batches), model, loss_func=nn.CrossEntropyLoss(), opt_func=opt_func,
                    lr=lr, wd=wd, default_cbs=False, cbs=[TrainEvalCallback, *cbs], **kwargs)
    learn.fit(epochs)
    return learn


def weights(model):
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def state(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def assert_close(actual, expected, **tol):
    assert list(actual) == list(expected)
    for k in expected:
        torch.testing.assert_close(actual[k], expected[k], **(tol or TOL), msg=lambda m, k=k: f'{k}: {m}')


def assert_same_bits(actual, expected):
    assert list(actual) == list(expected)
    for k in expected: assert torch.equal(actual[k], expected[k]), k


def distance(a, b):
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def norm_of(tensors):
    "Return the Euclidean norm of all the tensors together."
    return math.sqrt(sum(float((t.double()**2).sum()) for t in tensors))


def added(w, deltas):
    "Return the arrays of `w` plus the changes that `deltas` holds for some of them."
    return {k: w[k] + deltas[k] if k in deltas else w[k] for k in w}


def set_weights(model, w):
    "Copy the arrays of `w` into the parameters of the same names."
    with torch.no_grad():
        for k, p in model.named_parameters(): p.copy_(w[k])


class Trace(Callback):
    """Records the weights at every training forward, and weights and gradients around every optimizer step.

    Each record has the number of its batch."""
    def __init__(self):
        self.forwards = []
        self.steps = []

    def before_fit(self):
        self.hook = self.model.register_forward_pre_hook(self.record_forward)
        step = self.opt.step
        def recording_step(*args, **kwargs):
            grads = {}
            for k, p in self.model.named_parameters():
                if p.grad is not None: grads[k] = p.grad.detach().clone()
            before = weights(self.model)
            result = step(*args, **kwargs)
            self.steps.append((self.batch, before, grads, weights(self.model)))
            return result
        self.opt.step = recording_step

    def after_fit(self): self.hook.remove()

    @property
    def batch(self): return self.learn.epoch*self.learn.n_iter + self.learn.iter

    def record_forward(self, module, args):
        if module.training: self.forwards.append((self.batch, weights(module)))

    def forwards_of(self, batch): return [w for b, w in self.forwards if b == batch]
    def steps_of(self, batch): return [s[1:] for s in self.steps if s[0] == batch]


class EachBatch(Callback):
    "Calls `f(batch number)` before every training batch, first of all callbacks."
    order = -100
    def __init__(self, f): self.f = f
    def before_batch(self):
        if self.training: self.f(self.iter)


# Oracles

def log_probs(z):
    top = z.detach().max(1, keepdim=True).values
    return z - top - (z - top).exp().sum(1, keepdim=True).log()


def cross_entropy(z, y):
    return -log_probs(z)[torch.arange(len(y)), y].mean()


def mean_kl(p, q):
    "Return KL(p || q) in nats of two arrays of logits, averaged over the batch."
    p, q = log_probs(p), log_probs(q)
    return (p.exp()*(p - q)).sum(1).mean()


def mlp_logits(w, x):
    return torch.tanh(x @ w['0.weight'].T + w['0.bias']) @ w['2.weight'].T + w['2.bias']


def grad_of(loss, w):
    "Return the gradient of `loss(w)` with respect to the arrays in `w`."
    w = {k: v.detach().clone().requires_grad_() for k, v in w.items()}
    return dict(zip(w, torch.autograd.grad(loss(w), list(w.values()))))


def mlp_gradient(w, x, y):
    "Return the gradient of the MLP's mean cross-entropy with respect to the arrays in `w`."
    return grad_of(lambda w: cross_entropy(mlp_logits(w, x), y), w)


class EpsilonHatAdam:
    "TensorFlow's Adam, which adds eps to the root of the second moment WITHOUT bias correction."
    def __init__(self, lr, b1=.9, b2=.999, eps=1e-7):
        self.lr, self.b1, self.b2, self.eps = lr, b1, b2, eps
        self.t = 0
        self.m, self.v = {}, {}

    def __call__(self, w, g):
        self.t += 1
        lr = self.lr*math.sqrt(1 - self.b2**self.t)/(1 - self.b1**self.t)
        for k in g:
            self.m[k] = self.b1*self.m.get(k, 0.) + (1 - self.b1)*g[k]
            self.v[k] = self.b2*self.v.get(k, 0.) + (1 - self.b2)*g[k]**2
        return {k: w[k] - lr*self.m[k]/(self.v[k].sqrt() + self.eps) for k in w}


class PlainSGD:
    "Gradient descent, with L2 regularization added to the gradient."
    def __init__(self, lr, l2=0.): self.lr, self.l2 = lr, l2
    def __call__(self, w, g): return {k: w[k] - self.lr*(g[k] + self.l2*w[k]) for k in w}


def clipped(g, limit):
    "Return the gradients with their norm limited as by torch.nn.utils.clip_grad_norm_."
    factor = min(1., limit/(norm_of(g.values()) + 1e-6))
    return {k: d*factor for k, d in g.items()}


def kl_gradient_of_mlp(w_up, w_aux, x, q, direction, grad_at, weight):
    """Return the gradient of the weighted KL term between the clean and the perturbed network.

    With `grad_at='aux'` the logits `q` are fixed and the gradient is taken at `w_aux`. With `'up'` the
    perturbed teacher is fixed and the unperturbed network learns."""
    teacher = mlp_logits(w_aux, x)
    def loss(w):
        student = mlp_logits(w, x)
        clean, aux = (q, student) if grad_at == 'aux' else (student, teacher)
        return weight*(mean_kl(clean, aux) if direction == 'clean_to_aux' else mean_kl(aux, clean))
    return grad_of(loss, w_aux if grad_at == 'aux' else w_up)


def sadt_oracle(w, batches, step, fns, kl='clean_to_aux', kl_weight=1., grad_at='aux', first_step=True,
                clip=None):
    """Train the MLP by SADT, written from its three sentences.

    Return the last weights and, per batch, (w_up, g_up). An option may be a list with one value per batch."""
    def at(option, i): return option[i] if isinstance(option, list) else option
    history = []
    for i, (x, y) in enumerate(batches):
        q = mlp_logits(w, x)
        g_up = mlp_gradient(w, x, y)
        if clip is not None: g_up = clipped(g_up, clip)
        w_up = step(w, g_up) if at(first_step, i) else w
        history.append((w_up, g_up))
        total = dict(g_up)
        for fn in fns:
            w_aux = added(w_up, fn(w_up, g_up, None))
            g_aux = kl_gradient_of_mlp(w_up, w_aux, x, q, at(kl, i), at(grad_at, i), at(kl_weight, i))
            total = {k: total[k] + g_aux[k] for k in total}
        w = step(w_up, total)
    return w, history


def uphill(params, grads, generator):
    "A perturbation that depends on the gradients it gets, so that wrong ones change the result."
    return {k: .4*g.detach() for k, g in grads.items()}


def squeeze_two(params, grads, generator):
    "A perturbation that depends on the weights it gets, and leaves out the other names."
    return {k: -.5*params[k].detach() for k in ('2.weight', '0.bias')}


# 1. SADT with explicit perturbations

def check_sadt(batches=None, epochs=1, **options):
    "Compare a Learner with SADT to the oracle."
    batches = batches or mlp_batches()
    model = make_mlp()
    fns = options.pop('perturb')
    expected, _ = sadt_oracle(weights(model), batches*epochs, EpsilonHatAdam(LR), fns, **options)
    fit(model, batches, SADT(perturb=fns, **options), epochs=epochs, opt_func=keras_adam)
    assert_close(weights(model), expected)


def test_keras_adam_is_epsilon_hat():
    model, batches = make_mlp(), mlp_batches(6)
    step, w = EpsilonHatAdam(LR), weights(model)
    for x, y in batches: w = step(w, mlp_gradient(w, x, y))
    fit(model, batches, opt_func=keras_adam)
    assert_close(weights(model), w)


PERTURBATIONS = {'uphill': [uphill], 'squeeze': [squeeze_two], 'both': [uphill, squeeze_two]}


@pytest.mark.parametrize('first_step', [True, False])
@pytest.mark.parametrize('grad_at', ['aux', 'up'])
@pytest.mark.parametrize('kl_weight', [0., .5, 1.])
@pytest.mark.parametrize('kl', KL_DIRECTIONS)
@pytest.mark.parametrize('fns', PERTURBATIONS.values(), ids=PERTURBATIONS)
def test_sadt_equals_its_definition(fns, kl, kl_weight, grad_at, first_step):
    check_sadt(perturb=fns, kl=kl, kl_weight=kl_weight, grad_at=grad_at, first_step=first_step)


def test_sadt_over_two_epochs():
    # Validation runs in between: it must neither perturb nor step.
    check_sadt(perturb=[uphill, squeeze_two], kl='aux_to_clean', epochs=2)


def test_the_options_of_sadt_matter():
    "No two settings have the same oracle, so the tests above can tell all settings apart."
    names = ('fns', 'kl', 'kl_weight', 'grad_at', 'first_step')
    perturbations = ([uphill], [uphill, squeeze_two])
    values = itertools.product(perturbations, KL_DIRECTIONS, (.5, 1.), ('aux', 'up'), (True, False))
    settings = [dict(zip(names, v)) for v in values]
    settings.append(dict(fns=[uphill], kl_weight=0.))
    w = weights(make_mlp())
    ends = [sadt_oracle(w, mlp_batches(), EpsilonHatAdam(LR), **s)[0] for s in settings]
    assert min(distance(a, b) for a, b in itertools.combinations(ends, 2)) > 1e-5


class Recorded:
    "A perturbation that records each of its calls: function, keywords, weights, gradients, generator."
    def __init__(self, fn, log): self.fn, self.log = fn, log
    def __call__(self, *args, **kwargs):
        params, grads, generator = args
        params = {k: p.detach().clone() for k, p in params.items()}
        grads = {k: g.detach().clone() for k, g in grads.items()}
        self.log.append((self.fn, kwargs, params, grads, generator))
        return self.fn(*args)


def test_what_the_perturbations_are_called_with():
    model, batches = make_mlp(), mlp_batches()
    log = []
    fns = [uphill, squeeze_two]
    _, history = sadt_oracle(weights(model), batches, EpsilonHatAdam(LR), fns)
    recorded = [Recorded(f, log) for f in fns]
    fit(model, batches, SADT(perturb=recorded, kl='clean_to_aux'), opt_func=keras_adam)
    # Once per training batch, in list order; no trial call before training and none in validation.
    assert [c[0] for c in log] == fns*len(batches)
    for i, (_, kwargs, params, grads, generator) in enumerate(log):
        w_up, g_up = history[i//len(fns)]
        assert not kwargs
        assert isinstance(generator, torch.Generator)
        assert_close(params, w_up)      # the second fn gets w_up too, not the first one's teacher
        assert_close(grads, g_up)


def test_an_empty_dict_perturbs_nothing():
    def nothing(params, grads, generator): return {}
    model, batches = make_mlp(), mlp_batches()
    expected, _ = sadt_oracle(weights(model), batches, EpsilonHatAdam(LR), [nothing])
    fit(model, batches, SADT(perturb=[nothing], kl='clean_to_aux'), opt_func=keras_adam)
    assert_close(weights(model), expected)


def test_explicit_perturbations_need_no_layer():
    # The MLP has no convolution, which variant 2 would need.
    for spec in ('paper', 'code'):
        model, batches = make_mlp(), mlp_batches()
        expected, _ = sadt_oracle(weights(model), batches, EpsilonHatAdam(LR), [uphill])
        fit(model, batches, SADT(2, spec=spec, perturb=[uphill], kl='clean_to_aux'), opt_func=keras_adam)
        assert_close(weights(model), expected)


def test_perturbations_get_the_gradients_that_the_optimizer_used():
    model, batches = make_mlp(), mlp_batches()
    log = []
    expected, history = sadt_oracle(weights(model), batches, PlainSGD(LR), [uphill], clip=.1)
    fit(model, batches, SADT(perturb=[Recorded(uphill, log)], kl='clean_to_aux'), GradientClip(.1))
    for (_, _, _, grads, _), (_, g_up) in zip(log, history):
        assert_close(grads, g_up)
        assert float(global_norm(grads.values())) < .1001      # the limit was reached: clipping is at work
    assert_close(weights(model), expected)


def test_a_step_that_changes_the_gradients_in_place():
    # fastai's L2 regularization adds wd w to p.grad; the second step must not repeat the first one's share.
    model, batches = make_mlp(), mlp_batches()
    expected, _ = sadt_oracle(weights(model), batches, PlainSGD(LR, l2=.3), [uphill])
    fit(model, batches, SADT(perturb=[uphill], kl='clean_to_aux'), opt_func=sgd_l2, wd=.3, wd_bn_bias=True)
    assert_close(weights(model), expected)


SCHEDULES = [('kl_weight', [1., 0., .3, 2.]), ('grad_at', ['aux', 'up', 'up', 'aux']),
             ('kl', [*KL_DIRECTIONS, *KL_DIRECTIONS]), ('first_step', [True, False, False, True])]


@pytest.mark.parametrize('name,values', SCHEDULES)
def test_sadt_reads_its_hyperparameters_at_every_batch(name, values):
    model, batches = make_mlp(), mlp_batches(len(values))
    expected, _ = sadt_oracle(weights(model), batches, EpsilonHatAdam(LR), [uphill], **{name: values})
    sadt = SADT(perturb=[uphill], kl='clean_to_aux')
    fit(model, batches, sadt, EachBatch(lambda i: setattr(sadt, name, values[i])), opt_func=keras_adam)
    assert_close(weights(model), expected)


def test_frozen_parameters_are_neither_trained_nor_perturbed():
    model, batches = make_mlp(), mlp_batches()
    log = []
    model[0].bias.requires_grad_(False)
    before = model[0].bias.clone()
    fit(model, batches, SADT(perturb=[Recorded(uphill, log)], kl='clean_to_aux'))
    assert torch.equal(model[0].bias, before)
    for _, _, params, grads, _ in log:
        assert list(params) == ['0.weight', '2.weight', '2.bias']
        assert list(grads) == ['0.weight', '2.weight', '2.bias']


def test_noise_has_a_generator_of_its_own():
    def trained(global_seed):
        "Return the last weights and the noise of every batch."
        draws = []
        def gaussian(params, grads, generator):
            def noise(p): return .1*torch.randn(p.shape, dtype=p.dtype, generator=generator)
            draws.append({k: noise(p) for k, p in params.items()})
            return draws[-1]
        model = make_mlp()
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        fit(model, mlp_batches(), SADT(perturb=[gaussian], kl='clean_to_aux'))
        assert torch.equal(torch.get_rng_state(), before)
        return weights(model), draws
    first, draws = trained(10)
    second, _ = trained(11)
    assert_same_bits(first, second)
    assert distance(draws[0], draws[1]) > 1e-2      # a new draw at every batch


def test_sadt_under_gradient_accumulation_equals_the_big_batch():
    model, batches = make_mlp(), mlp_batches(4, bs=8)
    log = []
    joined = [tuple(torch.cat(ts) for ts in zip(*batches[i:i + 2])) for i in (0, 2)]
    fns = [uphill, squeeze_two]
    expected, _ = sadt_oracle(weights(model), joined, EpsilonHatAdam(LR), fns)
    sadt = SADT(perturb=[Recorded(f, log) for f in fns], kl='clean_to_aux')
    fit(model, batches, sadt, GradientAccumulation(16), opt_func=keras_adam)
    assert_close(weights(model), expected)
    assert [c[0] for c in log] == fns*2


# 2. SADT's presets on a network with BatchNorm

CONV_NAMES = [k for k, _ in make_conv_net().named_parameters()]
KERNELS = [k for k, p in make_conv_net().named_parameters() if p.ndim > 1]
TEACHERS = {1: 1, 2: 2, 3: 1}


def train_preset(variant, spec, n=20, **options):
    "Train the convolutional network by a preset of SADT. Return network, batches and trace."
    model, batches, trace = make_conv_net(), image_batches(n), Trace()
    fit(model, batches, SADT(variant, spec=spec, **options), trace)
    return model, batches, trace


def moves(trace, n):
    "Yield for each batch a list with (w_up, w_aux, g_up, names that differ) of each teacher."
    for b in range(n):
        _, g_up, w_up = trace.steps_of(b)[0]
        teachers = []
        for aux in trace.forwards_of(b)[1:]:
            moved = tuple(k for k in aux if not torch.equal(aux[k], w_up[k]))
            teachers.append((w_up, aux, g_up, moved))
        yield teachers


def assert_gaussian(samples, std):
    "Check that the first, second and fourth moment are those of N(0, std), within five standard errors."
    n, samples = len(samples), samples.double()
    assert abs(float(samples.mean())) < 5*std/math.sqrt(n)
    assert abs(float(samples.std())/std - 1) < 5/math.sqrt(2*n)
    fourth_moment = float((samples/std).pow(4).mean())
    assert abs(fourth_moment - 3) < 5*math.sqrt(96/n)     # not merely any noise of that variance


@pytest.mark.parametrize('spec,moved', [('paper', CONV_NAMES), ('code', KERNELS)])
def test_variant_1_adds_noise_to_the_weights(spec, moved):
    _, _, trace = train_preset(1, spec)
    deltas = {k: [] for k in moved}
    for (w_up, aux, _, names), in moves(trace, 20):
        assert list(names) == moved
        for k in moved: deltas[k].append((aux[k] - w_up[k]).flatten())
    for k in moved:
        assert_gaussian(torch.cat(deltas[k]), 1e-4)
        assert not torch.allclose(deltas[k][0], deltas[k][1], rtol=0, atol=1e-7)     # new in every batch


def test_variant_2_of_the_paper_moves_the_last_conv_and_the_last_dense_layer():
    _, _, trace = train_preset(2, 'paper')
    groups = {('conv3.weight', 'conv3.bias'): [], ('dense2.weight', 'dense2.bias'): []}
    for teachers in moves(trace, 20):
        assert [t[3] for t in teachers] == list(groups)       # in the order in which the paper names them
        for w_up, aux, _, names in teachers:
            groups[names] += [(aux[k] - w_up[k]).flatten() for k in names]
    for deltas in groups.values(): assert_gaussian(torch.cat(deltas), 1e-4)


def test_variant_2_of_the_code_moves_two_biases():
    _, _, trace = train_preset(2, 'code')
    factors, deltas = [], []
    for (up1, aux1, _, names1), (up2, aux2, _, names2) in moves(trace, 20):
        assert names1 == ('dense2.bias',)
        assert names2 == ('conv2.bias',)
        factors.append(aux1['dense2.bias']/up1['dense2.bias'])      # TIMES N(0, 0.1)
        deltas.append(aux2['conv2.bias'] - up2['conv2.bias'])       # plus N(0, 0.1)
    assert_gaussian(torch.cat(factors), .1)
    assert_gaussian(torch.cat(deltas), .1)


@pytest.mark.parametrize('spec,noisy', [('paper', CONV_NAMES), ('code', KERNELS)])
def test_variant_3_climbs_along_the_noisy_gradient(spec, noisy):
    _, _, trace = train_preset(3, spec)
    noise = {k: [] for k in CONV_NAMES}
    for (w_up, aux, g_up, names), in moves(trace, 20):
        for k in CONV_NAMES: noise[k].append(((aux[k] - w_up[k])/1e-3 - g_up[k]).flatten())
    for k in CONV_NAMES:
        if k in noisy: assert_gaussian(torch.cat(noise[k]), 1e-4)
        else: assert float(torch.cat(noise[k]).abs().max()) < 1e-11


def kl_gradient(model, at, x, q, direction):
    "Return the gradient of the KL term at the weights `at`, computed on a training copy of the model."
    model = copy.deepcopy(model).train()
    set_weights(model, at)
    aux = model(x)
    loss = mean_kl(q, aux) if direction == 'clean_to_aux' else mean_kl(aux, q)
    return dict(zip(at, torch.autograd.grad(loss, list(model.parameters()))))


PRESET_KL = {(1, 'paper'): 'clean_to_aux', (2, 'paper'): 'aux_to_clean', (3, 'paper'): 'clean_to_aux',
             (1, 'code'): 'clean_to_aux', (2, 'code'): 'aux_to_clean', (3, 'code'): 'aux_to_clean'}


def logits_at(model, w, x):
    "Return the model's logits at the weights `w`, in training mode, computed on a copy of the model."
    model = copy.deepcopy(model).train()
    model.load_state_dict(w, strict=False)
    return model(x).detach()


@pytest.mark.parametrize('variant,spec', PRESET_KL)
def test_presets_make_the_second_step_from_w_up_with_the_sum_of_all_gradients(variant, spec):
    model, batches, trace = train_preset(variant, spec, n=4)
    for b, (x, _) in enumerate(batches):
        (w, g_up, w_up), (start, g_final, end) = trace.steps_of(b)
        first, *teachers = trace.forwards_of(b)
        assert_same_bits(first, w)
        assert_same_bits(start, w_up)                  # the perturbation is gone, to the last bit
        assert len(teachers) == TEACHERS[variant]
        q = logits_at(model, w, x)
        sums = {d: dict(g_up) for d in KL_DIRECTIONS}
        for aux in teachers:
            for d in KL_DIRECTIONS:
                g = kl_gradient(model, aux, x, q, d)
                sums[d] = {k: sums[d][k] + g[k] for k in g}
        assert distance(*sums.values()) > 1e-6         # the two directions can be told apart
        assert_close(g_final, sums[PRESET_KL[variant, spec]])


def record_in_training(module, record):
    "Call `record` with the input and the output of every forward of the module in training mode."
    def hook(module, args, out):
        if module.training: record(args[0].detach(), out.detach())
    module.register_forward_hook(hook)


@pytest.mark.parametrize('bn', ['keep', 'update'])
@pytest.mark.parametrize('variant,spec', PRESET_KL)
def test_bn_statistics_under_sadt(variant, spec, bn):
    # The last BatchNorm lies behind every layer that a preset of variant 2 moves, except one. The layers
    # before the first moved one give both teachers the same statistics. This test does not say whether
    # 'update' counts those once or twice.
    model, batches = make_conv_net(), image_batches(4)
    seen = []
    record_in_training(model.bn4, lambda z, out: seen.append(z))
    options = {} if bn == 'keep' else {'bn': bn}       # 'keep' is the default
    fit(model, batches, SADT(variant, spec=spec, **options))
    passes = 1 + TEACHERS[variant]
    counted = seen if bn == 'update' else seen[::passes]
    mean, var = torch.zeros(16, dtype=torch.float64), torch.ones(16, dtype=torch.float64)
    for z in counted:
        mean = .9*mean + .1*z.mean(0)
        var = .9*var + .1*z.var(0)
    assert len(seen) == passes*len(batches)
    assert int(model.bn4.num_batches_tracked) == len(counted)
    assert_close(dict(mean=model.bn4.running_mean, var=model.bn4.running_var), dict(mean=mean, var=var))
    if bn == 'keep' or variant != 2:
        assert {int(v) for k, v in model.named_buffers() if 'tracked' in k} == {len(counted)}


def inplace_net():
    return nn.Sequential(OrderedDict(
        first=nn.Linear(5, 6), relu1=nn.ReLU(inplace=True), middle=nn.Linear(6, 6),
        relu2=nn.ReLU(inplace=True), last=nn.Linear(6, 3)))


def repeating_net():
    "Return a network with one layer under two names."
    layer = nn.Linear(6, 6)
    return nn.Sequential(OrderedDict(
        first=nn.Linear(5, 6), tanh1=nn.Tanh(), middle=layer, tanh2=nn.Tanh(), again=layer,
        tanh3=nn.Tanh(), last=nn.Linear(6, 3)))


class Residual(nn.Module):
    "Layers registered in another order than they are called in, some of them twice."
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.bn = nn.BatchNorm1d(6)
        self.middle = nn.Linear(6, 6)
        self.first = nn.Linear(5, 6)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h + torch.relu(self.middle(h))
        return self.last(self.bn(h + torch.tanh(self.middle(h)))) + self.last(h)


@pytest.mark.parametrize('order', [('middle', 'last'), ('last', 'middle')])
@pytest.mark.parametrize('build', [make_conv_net, inplace_net, Residual, repeating_net])
def test_noise_on_single_layers_of_any_network(build, order):
    "Variant 2 may compute once what its teachers share, but must not change the gradients or the module."
    torch.manual_seed(6)
    model, trace = build().double(), Trace()
    convolutional = build is make_conv_net
    batches = image_batches(3) if convolutional else mlp_batches(3)
    names = {'middle': 'conv3', 'last': 'dense2'} if convolutional else {}
    registered = dict(model.named_parameters(remove_duplicate=False))
    fresh = copy.deepcopy(model)
    noise = [layer_noise(names.get(n, n), .1) for n in order]
    fit(model, batches, SADT(perturb=noise, kl='clean_to_aux'), trace)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert [k for k in registered if after[k] is not registered[k]] == []
    for b, (x, _) in enumerate(batches):
        (w, g_up, _), (_, g_final, _) = trace.steps_of(b)
        q = logits_at(fresh, w, x)
        for aux in trace.forwards_of(b)[1:]:
            g = kl_gradient(fresh, aux, x, q, 'clean_to_aux')
            g_up = {k: g_up[k] + g[k] for k in g}
        assert_close(g_final, g_up)


def test_the_preset_functions_by_themselves():
    rng = torch.Generator().manual_seed(0)
    big = torch.zeros(60, 50, dtype=torch.float64)
    bias = torch.zeros(1000, dtype=torch.float64)
    params = OrderedDict([('a.weight', big), ('a.bias', bias), ('b.weight', big.clone())])
    grads = {k: torch.full_like(p, 2.) for k, p in params.items()}
    def sampled(fn): return {k: d for k, d in fn(params, grads, rng).items() if d.abs().max() > 0}
    every = sampled(weight_noise(.3))
    kernels = sampled(weight_noise(.3, min_ndim=2))
    layer = sampled(layer_noise('a', .2))
    assert list(every) == list(params)
    assert list(kernels) == ['a.weight', 'b.weight']
    assert list(layer) == ['a.weight', 'a.bias']
    for d in [*every.values(), *kernels.values()]: assert_gaussian(d.flatten(), .3)
    for d in layer.values(): assert_gaussian(d.flatten(), .2)
    for k, d in sampled(gradient_ascent(.5, .1)).items(): assert_gaussian(d.flatten()/.5 - 2., .1)


# 3. SAM

def climb_(params, g, rho, adaptive):
    "Move the parameters in place to SAM's perturbed point, at distance `rho` along the gradient."
    scaled = [p.abs()*d for p, d in zip(params, g)] if adaptive else g
    scale = rho/(torch.stack([d.norm() for d in scaled]).norm() + 1e-12)
    with torch.no_grad():
        for p, d in zip(params, g): p += (p**2 if adaptive else 1.)*d*scale


def copy_all_(targets, sources):
    with torch.no_grad():
        for t, s in zip(targets, sources): t.copy_(s)


def sam_loop(model, batches, rho=.05, lr=LR, adaptive=False, interval=1, micro=1, mom=0., frozen_bn=False):
    """Train a real module by SAM with two passes per batch; BatchNorm's statistics move as in training.

    `rho` may be a list with one value per batch; `micro` batches make one step of the optimizer."""
    model = model.train()
    params, velocity = list(model.parameters()), None
    for i, (x, y) in enumerate(batches):
        def grads(x=x, y=y): return torch.autograd.grad(F.cross_entropy(model(x), y), params)
        g = grads()
        if (i//micro) % interval == 0:
            start = [p.detach().clone() for p in params]
            buffers = [b.clone() for b in model.buffers()]
            climb_(params, g, rho[i] if isinstance(rho, list) else rho, adaptive)
            g = grads()
            copy_all_(params, start)
            if frozen_bn: copy_all_(model.buffers(), buffers)
        if i % micro == 0: total = [d/micro for d in g]
        else: total = [t + d/micro for t, d in zip(total, g)]
        if i % micro < micro - 1: continue
        if velocity is None: velocity = total
        else: velocity = [mom*v + t for v, t in zip(velocity, total)]
        with torch.no_grad():
            for p, v in zip(params, velocity): p.add_(v, alpha=-lr)
    return model


def check_sam(sam, *cbs, exact=False, dtype=torch.float64, epochs=1, n=4, **oracle):
    "Compare a Learner with SAM to the oracle with these options. Return network and trace."
    model, batches, trace = make_conv_net(dtype=dtype), image_batches(n, dtype=dtype), Trace()
    expected = sam_loop(copy.deepcopy(model), batches*epochs, **oracle)
    sgd = partial(SGD, mom=oracle.get('mom', 0.))
    fit(model, batches, sam, *cbs, trace, epochs=epochs, opt_func=sgd)
    if exact: assert_same_bits(state(model), state(expected))
    else: assert_close(state(model), state(expected))
    return model, trace


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('rho,mom', [(.05, 0.), (.5, .9)])
def test_sam_bit_for_bit(rho, mom, dtype):
    model, trace = check_sam(SAM(rho), rho=rho, mom=mom, exact=True, dtype=dtype, epochs=2)
    # By default, the second pass moves BatchNorm's averages once more.
    assert int(model.bn1.num_batches_tracked) == 2*8
    # The weights at the second pass are at distance rho.
    for b in range(8):
        w, perturbed_w = trace.forwards_of(b)
        e = torch.cat([(perturbed_w[k] - w[k]).flatten() for k in w])
        assert float(e.norm()) == pytest.approx(rho, rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_sam_with_adam():
    model, batches = make_mlp(), mlp_batches()
    step, w = EpsilonHatAdam(LR), weights(model)
    for x, y in batches:
        g = mlp_gradient(w, x, y)
        norm = norm_of(g.values())
        perturbed_w = {k: w[k] + .05*g[k]/(norm + 1e-12) for k in w}
        w = step(w, mlp_gradient(perturbed_w, x, y))
    fit(model, batches, SAM(.05), opt_func=keras_adam)
    assert_close(weights(model), w)


def test_adaptive_sam():
    model, trace = check_sam(SAM(2., adaptive=True), rho=2., adaptive=True)
    # conv1.bias is not zero, BatchNorm's beta is at first: T = |w| leaves it where it is.
    first, second = trace.forwards_of(0)
    assert torch.equal(first['bn1.bias'], second['bn1.bias'])
    assert not torch.equal(first['conv1.bias'], second['conv1.bias'])


def test_sam_every_second_step():
    model, trace = check_sam(SAM(.1, interval=2), rho=.1, interval=2, n=5)
    assert [len(trace.forwards_of(b)) for b in range(5)] == [2, 1, 2, 1, 2]
    assert int(model.bn1.num_batches_tracked) == 8


def test_sam_with_frozen_bn_statistics():
    model, _ = check_sam(SAM(.1, bn='keep'), rho=.1, frozen_bn=True)
    assert int(model.bn1.num_batches_tracked) == 4


@pytest.mark.parametrize('adaptive', [False, True])
def test_sam_perturbs_every_micro_batch_along_its_own_gradient(adaptive):
    sam = SAM(.3, adaptive=adaptive)
    model, trace = check_sam(sam, GradientAccumulation(12), rho=.3, adaptive=adaptive, micro=2, epochs=2)
    assert int(model.bn1.num_batches_tracked) == 2*8
    assert len(trace.steps) == 4


def test_the_interval_of_sam_counts_optimizer_steps():
    check_sam(SAM(.3, interval=2), GradientAccumulation(12), rho=.3, interval=2, micro=2, n=8)


def test_sam_reads_rho_at_every_batch():
    sam, rhos = SAM(.05), [.05, .3, .1, .2]
    check_sam(sam, EachBatch(lambda i: setattr(sam, 'rho', rhos[i])), rho=rhos)


def dropout_masks(cb):
    "Return for each of three batches the dropout masks of the first and of the second pass."
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Dropout(.5), nn.Linear(40, 3)).double()
    masks = []
    record_in_training(model[2], lambda z, out: masks.append(out == 0))
    fit(model, mlp_batches(3), cb)
    return list(zip(masks[::2], masks[1::2]))


@pytest.mark.parametrize('method', [partial(SAM, .05), partial(SADT, 1)], ids=['sam', 'sadt'])
def test_dropout_masks_of_the_two_passes(method):
    fresh, again = dropout_masks(method()), dropout_masks(method(rng='replay'))
    assert len(fresh) == len(again) == 3
    for first, second in fresh: assert not torch.equal(first, second)
    for first, second in again: assert torch.equal(first, second)
    assert not torch.equal(again[0][0], again[1][0])


# 4. Transformations of the gradient, and repeated steps

def training_loop(model, batches, transform, step):
    "Train a real module, with a transformation of (weights, gradients) before each step."
    model = model.train()
    for x, y in batches:
        w = weights(model)
        g = dict(zip(w, torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))))
        set_weights(model, step(w, transform(w, g)))
    return model


def centralized(w, g):
    "Subtract from each gradient of a kernel the mean over the inputs of each unit."
    out = {}
    for k, d in g.items():
        d = d.numpy().copy()
        if d.ndim > 1:
            for unit in d: unit -= unit.mean()
        out[k] = torch.from_numpy(d)
    return out


def sgd_l2(params, lr): return SGD(params, lr, decouple_wd=False)


@pytest.mark.parametrize('wd', [0., .2])
def test_gradient_centralization(wd):
    # The gradient is centralized before weight decay is added.
    model, batches, trace = make_conv_net(), image_batches(), Trace()
    expected = training_loop(copy.deepcopy(model), batches, centralized, PlainSGD(LR, l2=wd))
    fit(model, batches, GradientCentralization(), trace, opt_func=sgd_l2, wd=wd, wd_bn_bias=True)
    assert_close(state(model), state(expected))
    for _, _, g, _ in trace.steps:
        for k in KERNELS: assert float(g[k].flatten(1).mean(1).abs().max()) < 1e-12


def test_gradient_centralization_comes_before_clipping():
    def centralized_and_clipped(w, g): return clipped(centralized(w, g), .5)
    model, batches = make_conv_net(), image_batches()
    expected = training_loop(copy.deepcopy(model), batches, centralized_and_clipped, PlainSGD(LR))
    fit(model, batches, GradientCentralization(), GradientClip(.5))
    assert_close(state(model), state(expected))


def agc_oracle(clip, eps, exclude, counts):
    "Return AGC as a function of (weights, gradients); `counts` counts units above and below their limit."
    def clip_unit_(d, p):
        limit = clip*max(math.sqrt((p**2).sum()), eps)
        norm = math.sqrt((d**2).sum())
        counts[norm > limit] += 1
        if norm > limit: d *= limit/max(norm, 1e-6)

    def transform(w, g):
        out = {}
        for k, d in g.items():
            d, p = d.numpy().copy(), w[k].numpy()
            units = zip(d, p) if d.ndim > 1 else [(d, p)]
            if not any(e in k for e in exclude):
                for unit, unit_weights in units: clip_unit_(unit, unit_weights)
            out[k] = torch.from_numpy(d)
        return out
    return transform


AGC_OPTIONS = [(.01, 1e-3, ()), (.1, 1e-3, ()), (.1, .5, ()), (.05, 1e-3, ('dense2', 'bn'))]


@pytest.mark.parametrize('clip,eps,exclude', AGC_OPTIONS)
def test_agc(clip, eps, exclude):
    model, batches = make_conv_net(), image_batches()
    counts = {True: 0, False: 0}
    with torch.no_grad(): model.dense1.bias.zero_()      # smaller than eps
    oracle = agc_oracle(clip, eps, exclude, counts)
    expected = training_loop(copy.deepcopy(model), batches, oracle, PlainSGD(LR))
    fit(model, batches, AGC(clip, eps, exclude))
    assert_close(state(model), state(expected))
    assert counts[True] > 100
    assert clip == .01 or counts[False] > 0      # both branches, except with the strictest limit


def test_the_defaults_of_agc():
    default, explicit = make_conv_net(), make_conv_net()
    batches = image_batches()
    fit(default, batches, AGC())
    fit(explicit, batches, AGC(.01, 1e-3, ()))
    assert_same_bits(state(default), state(explicit))


def test_agc_reads_its_hyperparameters_at_every_batch():
    model, batches = make_conv_net(), image_batches()
    clips, counts = [.1, .01, .5, .05], {True: 0, False: 0}
    expected, agc = copy.deepcopy(model), AGC(1.)
    for clip, batch in zip(clips, batches):
        training_loop(expected, [batch], agc_oracle(clip, 1e-3, (), counts), PlainSGD(LR))
    fit(model, batches, agc, EachBatch(lambda i: setattr(agc, 'clip', clips[i])))
    assert_close(state(model), state(expected))


def repeated(step, n):
    def steps(w, g):
        for _ in range(n): w = step(w, g)
        return w
    return steps


@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('name', ['adam', 'l2'])
def test_repeat_step(name, n):
    # With L2, fastai changes p.grad in the step: every step must nevertheless start from the same gradient.
    if name == 'adam': step, opt_func, wd = EpsilonHatAdam(LR), keras_adam, 0.
    else: step, opt_func, wd = PlainSGD(LR, l2=.3), sgd_l2, .3
    model, batches, trace = make_conv_net(), image_batches(), Trace()
    expected = training_loop(copy.deepcopy(model), batches, lambda w, g: g, repeated(step, n))
    fit(model, batches, RepeatStep(n), trace, opt_func=opt_func, wd=wd, wd_bn_bias=True)
    assert_close(state(model), state(expected))
    assert len(trace.steps) == n*len(batches)
    assert len(trace.forwards) == len(batches)


@pytest.mark.parametrize('weight', [0., 1., 4.])
@pytest.mark.parametrize('name', ['adam', 'l2'])
def test_repeat_batch(name, weight):
    "The second gradient is computed at the weights after the first step; both steps add their own decay."
    if name == 'adam': step, opt_func, wd = EpsilonHatAdam(LR), keras_adam, 0.
    else: step, opt_func, wd = PlainSGD(LR, l2=.3), sgd_l2, .3
    model, batches, trace = make_conv_net(), image_batches(), Trace()
    expected = copy.deepcopy(model).train()
    def gradient(x, y):
        loss = F.cross_entropy(expected(x), y)
        return dict(zip(weights(expected), torch.autograd.grad(loss, list(expected.parameters()))))
    for x, y in batches:
        first = gradient(x, y)
        set_weights(expected, step(weights(expected), first))
        if weight: new = gradient(x, y)
        else: new = first
        second = {k: g + weight*(new[k] - g) for k, g in first.items()}
        set_weights(expected, step(weights(expected), second))
    fit(model, batches, RepeatBatch(weight), trace, opt_func=opt_func, wd=wd, wd_bn_bias=True)
    assert_close(state(model), state(expected))
    assert len(trace.steps) == 2*len(batches)
    assert len(trace.forwards) == len(batches)*(2 if weight else 1)


def test_repeat_step_is_sadt_without_the_kl_term():
    repeating, sadt = make_mlp(), make_mlp()
    batches = mlp_batches()
    fit(repeating, batches, RepeatStep(), opt_func=keras_adam)
    fit(sadt, batches, SADT(perturb=[uphill], kl='clean_to_aux', kl_weight=0.), opt_func=keras_adam)
    assert_close(weights(repeating), weights(sadt))


# 5. Losses, norms, perturbed weights

def np_probs(z, tau=1.):
    e = np.exp((z - z.max(1, keepdims=True))/tau)
    return e/e.sum(1, keepdims=True)


def np_kl(p, q): return (p*np.log(p/q)).sum(1).mean()


def logits(seed, n=6, c=5): return np.random.default_rng(seed).normal(size=(n, c))*2


@pytest.mark.parametrize('tau', [1., .5, 4.])
def test_kl_div(tau):
    t, s = logits(0), logits(1)
    expected = np_kl(np_probs(t, tau), np_probs(s, tau))
    assert float(kl_div(torch.tensor(t), torch.tensor(s), tau)) == pytest.approx(expected, abs=1e-12)
    assert float(kl_div(torch.tensor(s), torch.tensor(t), tau)) != pytest.approx(expected, rel=1e-3)


def test_kl_div_has_the_gradients_of_its_definition():
    t, s = torch.tensor(logits(0), requires_grad=True), torch.tensor(logits(1), requires_grad=True)
    ours = torch.autograd.grad(kl_div(t, s), (t, s))
    defined = torch.autograd.grad(mean_kl(t, s), (t, s))
    for a, b in zip(ours, defined): torch.testing.assert_close(a, b, **TOL)
    # In the student's logits it is known in closed form.
    g, = torch.autograd.grad(kl_div(t.detach(), s), s)
    np.testing.assert_allclose(g.numpy(), (np_probs(logits(1)) - np_probs(logits(0)))/len(s), atol=1e-12)


def test_kl_div_of_logits_far_apart():
    # softmax().log() would be -inf here.
    t = torch.tensor([[1000., 0., 0.]]).double()
    s = torch.tensor([[0., 1000., 0.]]).double().requires_grad_()
    value = kl_div(t, s)
    value.backward()
    assert value.item() == pytest.approx(1000.)
    assert torch.isfinite(s.grad).all()
    assert float(kl_div(t, t)) == 0.


@pytest.mark.parametrize('alpha', [0., .2, 1.])
@pytest.mark.parametrize('tau', [1., 4.])
def test_kd_loss(alpha, tau):
    t, s, y = logits(0), logits(1), np.array([0, 4, 2, 1, 1, 3])
    ce = -np.log(np_probs(s)[np.arange(6), y]).mean()
    expected = alpha*ce + (1 - alpha)*tau**2*np_kl(np_probs(t, tau), np_probs(s, tau))
    actual = kd_loss(torch.tensor(t), torch.tensor(s), torch.tensor(y), alpha, tau)
    assert float(actual) == pytest.approx(expected, abs=1e-12)


def test_global_norm():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=s) for s in [(3, 4), (5,), (2, 2, 2), ()]]
    expected = math.sqrt(sum((a**2).sum() for a in arrays))
    tensors = [torch.tensor(a) for a in arrays]
    assert float(global_norm(tensors)) == pytest.approx(expected, abs=1e-12)
    assert float(global_norm(iter(tensors))) == pytest.approx(expected, abs=1e-12)


def test_global_norm_adds_up_the_repeated_indices_of_sparse_tensors():
    indices, values = torch.tensor([[0, 2, 2]]), torch.tensor([[1., 2.], [3., 4.], [5., 6.]]).double()
    sparse = torch.sparse_coo_tensor(indices, values, (4, 2))
    dense = torch.tensor([2., -1.]).double()
    expected = math.sqrt(1 + 4 + 8**2 + 10**2 + 4 + 1) # the rows at index 2 add up to [8, 10]
    assert float(global_norm([sparse, dense])) == pytest.approx(expected, abs=1e-12)


def test_trainable_params():
    model = make_conv_net()
    model.conv1.weight.requires_grad_(False)
    found = trainable_params(model)
    assert list(found) == CONV_NAMES[1:]
    for k, p in list(model.named_parameters())[1:]: assert found[k] is p


def bits(model): return {k: p.detach().clone().view(torch.int64) for k, p in model.named_parameters()}


@pytest.mark.parametrize('size', [1., 1e-16, 1e30, float('inf'), float('nan')])
def test_perturbed_restores_the_exact_bits(size):
    model = make_mlp()
    with torch.no_grad(): model[0].bias.copy_(torch.tensor([-0., 0., 1e-310, .1, 3., -1e300, 1.]))
    before, w = bits(model), weights(model)
    # the other parameters are omitted
    deltas = {'0.weight': torch.randn(7, 5).double()*size, '0.bias': torch.randn(7).double()*size}
    with perturbed(dict(model.named_parameters()), deltas):
        for k, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), w[k] + deltas.get(k, 0.), rtol=0, atol=0, equal_nan=True)
    assert_same_bits(bits(model), before)
    with pytest.raises(KeyError, match='stop'):
        with perturbed(dict(model.named_parameters()), deltas): raise KeyError('stop')
    assert_same_bits(bits(model), before)


def test_perturbed_leaves_autograd_alone():
    # Gradients taken inside the block are those at the perturbed weights, and stay in .grad afterwards.
    model, (x, y) = make_mlp(), mlp_batches(1)[0]
    w = weights(model)
    deltas = uphill(None, w, None)
    expected = mlp_gradient(added(w, deltas), x, y)
    with perturbed(dict(model.named_parameters()), deltas): F.cross_entropy(model(x), y).backward()
    assert_close({k: p.grad for k, p in model.named_parameters()}, expected)
    for p in model.parameters():
        assert p.requires_grad
        assert p.is_leaf


# 6. Mixed precision, really switched on

class CpuMixedPrecision(MixedPrecision):
    "fastai's callback on the CPU; the original names 'cuda', and without such a device does nothing."
    def before_fit(self):
        half = self.amp_mode == AMPMode.FP16
        self.autocast = torch.autocast('cpu', dtype=torch.float16 if half else torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', **{**self.kwargs, 'enabled': half})
        self.scales = L()


class ScaleLog(Callback):
    "The loss scale before every training batch, and the weights after it."
    def __init__(self):
        self.scales = []
        self.weights = []
    def before_batch(self):
        if self.training: self.scales.append(self.learn.scaler.get_scale())
    def after_batch(self):
        if self.training: self.weights.append(weights(self.model))


def amp_mlp():
    "Return the MLP in float32, and a list that collects the dtype of its logits in training."
    model, dtypes = make_mlp(torch.float32), []
    record_in_training(model[2], lambda z, out: dtypes.append(out.dtype))
    return model, dtypes


def amp_grads(model, at, x, loss, dtype, scale=1.):
    """Return the logits at the weights `at` under autocast, and the gradient of `loss(logits)`.

    The loss is scaled by a power of two, which is exact."""
    model = copy.deepcopy(model).train()
    set_weights(model, at)
    with torch.autocast('cpu', dtype=dtype): z = model(x)
    z = z.float()
    grads = torch.autograd.grad(loss(z)*scale, list(model.parameters()))
    return z.detach(), {k: g/scale for k, g in zip(at, grads)}


def amp_oracle(method, model, batches, dtype, scale):
    "Train by SAM or SADT under autocast with loss scaling. Return the last weights."
    w, step = weights(model), PlainSGD(LR)
    for x, y in batches:
        def ce(z, y=y): return F.cross_entropy(z, y)
        q, g = amp_grads(model, w, x, ce, dtype, scale)
        if method == 'sam':
            norm = norm_of(g.values())
            perturbed_w = {k: w[k] + .5*g[k]/norm for k in w}
            w = step(w, amp_grads(model, perturbed_w, x, ce, dtype, scale)[1])
        else:
            w = step(w, g)
            def kl(z, q=q): return mean_kl(q, z)
            g_aux = amp_grads(model, added(w, uphill(w, g, None)), x, kl, dtype, scale)[1]
            w = step(w, {k: g[k] + g_aux[k] for k in w})
    return w


def amp_method(method, **options):
    return SAM(.5) if method == 'sam' else SADT(perturb=[uphill], kl='clean_to_aux', **options)


@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
@pytest.mark.parametrize('method', ['sam', 'sadt'])
def test_both_passes_run_under_autocast(method, mode):
    dtype, scale = (torch.bfloat16, 1.) if mode == 'bf16' else (torch.float16, 2.**10)
    model, dtypes = amp_mlp()
    batches = mlp_batches(4, dtype=torch.float32)
    expected = amp_oracle(method, copy.deepcopy(model), batches, dtype, scale)
    cb = CpuMixedPrecision(mode) if mode == 'bf16' else CpuMixedPrecision(mode, init_scale=scale)
    dtypes.clear()
    fit(model, batches, cb, amp_method(method))
    assert dtypes == [dtype]*8
    assert not torch.is_autocast_enabled('cpu')       # no context was left open
    assert_close(weights(model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('method,steps_per_batch', [('sam', 1), ('sadt', 2), ('repeat', 2)])
def test_an_overflow_in_the_first_pass_skips_every_step_of_the_batch(method, steps_per_batch):
    model, dtypes = amp_mlp()
    batches = mlp_batches(14, dtype=torch.float32)
    trace, log = Trace(), ScaleLog()
    start = weights(model)
    cb = RepeatStep(2) if method == 'repeat' else amp_method(method)
    fit(model, batches, CpuMixedPrecision('fp16', init_scale=2.**26), cb, trace, log)
    assert set(dtypes) == {torch.float16}
    ran = [len(trace.steps_of(b)) for b in range(14)]
    skipped = [n == 0 for n in ran]
    assert set(ran) == {0, steps_per_batch}         # all steps of a batch, or none
    assert skipped[:2] == [True, True]
    assert skipped.count(False) > 2
    for now, before, skip in zip(log.weights, [start, *log.weights], skipped):
        if skip: assert_same_bits(now, before)
        else: assert distance(now, before) > 0
    # The scaler backs off exactly once for every batch that overflowed.
    assert log.scales == [2.**(26 - sum(skipped[:i])) for i in range(14)]
    assert distance(weights(model), start) > 1e-3
    for p in model.parameters(): assert torch.isfinite(p).all()


def test_an_overflow_in_the_second_pass_skips_the_second_step_only():
    model, _ = amp_mlp()
    batches = mlp_batches(2, dtype=torch.float32)
    trace, log = Trace(), ScaleLog()
    amp = CpuMixedPrecision('fp16', init_scale=2.**10)
    fit(model, batches, amp, amp_method('sadt', kl_weight=1e9), trace, log)
    (before, g_up, w_up), = trace.steps_of(0)
    assert_same_bits(log.weights[0], w_up)                     # w_up, restored, and no step from it
    assert_close(w_up, PlainSGD(LR)(before, g_up), rtol=0, atol=1e-7)
    assert log.scales == [2.**10, 2.**9]                       # the scaler noticed the overflow


# The documented way to import everything

def test_star_import():
    names = {}
    exec('from sadt_nb.all import *', names)
    public = '''perturbed replay ExtraPass kl_div kd_loss
                GradientCentralization AGC SAM SADT RepeatStep METHODS
                weight_noise layer_noise gradient_ascent'''.split()
    assert [n for n in public if n not in names] == []
