"Small data, small networks, teachers, and a Learner without progress bars, for all tests."
import gc
import math
import multiprocessing
import os
import socket
import warnings
from contextlib import contextmanager
from functools import lru_cache, partial

warnings.filterwarnings('ignore', category=FutureWarning, message=r'.*torch\.jit\.script.*')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.experiments import cost
from sadt_nb.experiments.learner import make_learner
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.registry import MODELS
from sadt_nb.models.simple_cnn import cnn_of_widths
from sadt_nb.papers import grids
from torch import nn


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: long matrices, run by make test-all')


# The files whose tests take every method by its name, and need no package beside the library's own
METHOD_FILES = ('test_closures.py', 'test_every_method.py', 'test_fast.py', 'test_gradients.py',
                'test_independent_oracles.py', 'test_other_training.py')


def method_alone(config):
    """Return the method that `pytest -k METHOD` names when no path is given, else None.

    pytest would choose every name that contains these letters: for `sam` also "sample" and "same"."""
    keyword = config.getoption('keyword')
    with_path = config.args_source is config.ArgsSource.ARGS
    return keyword if keyword in METHODS and not with_path else None


def pytest_report_header(config):
    method = method_alone(config)
    if method is None: return None
    return (f'tests of the method {method} in {len(METHOD_FILES)} files; '
            f'`pytest tests -k {method}` chooses all names with these letters')


def pytest_ignore_collect(collection_path, config):
    if method_alone(config) is None or collection_path.is_dir(): return None
    return collection_path.name not in METHOD_FILES or None


def _takes(item, method):
    "Return whether the test has the method's name as one of its parameters."
    callspec = getattr(item, 'callspec', None)
    return callspec is not None and any(v == method for v in callspec.params.values() if isinstance(v, str))


def pytest_collection_modifyitems(config, items):
    method = method_alone(config)
    if method is not None:
        others = [item for item in items if not _takes(item, method)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _takes(item, method)]
    if 'slow' in (config.getoption('-m') or ''): return
    skip = pytest.mark.skip(reason='long; make test-all runs it')
    for item in items:
        if 'slow' in item.keywords: item.add_marker(skip)


def covering(values, quick):
    """Return the values as parameters of a test: those in `quick` for make test, the others marked slow.

    The values in `quick` must take every path of the code that the test is about."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


# Networks with a smaller one of the same kinds of layers: resnet50, vit_s32, clip_resnet50, vgg16_slim
LARGE = ('resnet101', 'resnet152', 'vit_b32', 'clip_resnet101', 'vgg16')
SMALL_MODELS = [name for name in MODELS if name not in LARGE]


@pytest.fixture(scope='module', autouse=True)
def quick_collection():
    """Let the garbage collector pass over what is alive at the start of a file.

    The imported packages have half a million objects, and a full collection of them takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    "Run on the CPU, where equal bits are promised; tests/test_gpu.py overrides this."
    from fastai.torch_core import defaults
    monkeypatch.setattr(defaults, 'use_cuda', False, raising=False)
    torch.manual_seed(0)


# A server imports the library once for all processes that tests start, so that these begin at once
context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['sadt_nb.all', 'accelerate', 'pytest'])


def _as_rank(rank, port, main, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', CUDA_VISIBLE_DEVICES='',
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    main(*args)


def in_two_processes(main, *args, seconds=300):
    "Call a function of a module in two processes, with the environment variables that torchrun sets."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    ranks = [context.Process(target=_as_rank, args=(rank, port, main, args)) for rank in range(2)]
    for p in ranks: p.start()
    for p in ranks: p.join(seconds)
    codes = [p.exitcode for p in ranks]
    for p in ranks: p.kill()
    assert codes == [0, 0], codes


def results_of_two_processes(main, tmp_path_factory):
    "Return what a function stores that is called in two processes with the name of a file."
    out = tmp_path_factory.mktemp('two_processes') / 'results.pt'
    in_two_processes(main, out)
    return torch.load(out, weights_only=False)


@lru_cache(None)
def cells_of(name, scale=1., amp=''):
    "Return the cells of a preset, which many tests read, as a tuple."
    return tuple(grids.paper_grid(name, scale, amp))


def batches(n=24, bs=8, classes=3, dtype=torch.float64, conv=False):
    "Return a list of (x, y) batches, the same at every call."
    g = torch.Generator().manual_seed(7)
    shape = (n, 2, 6, 6) if conv else (n, 5)
    x = torch.randn(shape, generator=g, dtype=dtype)
    y = torch.randint(0, classes, (n,), generator=g)
    return list(zip(x.split(bs), y.split(bs)))


def mlp(bn=False, dropout=0., dtype=torch.float64):
    "Return a network of two dense layers for inputs of five numbers, with the same weights at every call."
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(8) if bn else nn.Identity()
    return nn.Sequential(nn.Linear(5, 8), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)


class Net(nn.Sequential):
    "A `Sequential` of its own type, so that a test can count the calls of the network and of its copies."


def cnn(bn=True, dtype=torch.float64, dropout=0.):
    "Return a network with all layers that a method looks for: convolutions, BatchNorm, dense layers."
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(4) if bn else nn.Identity()
    body = [nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    return Net(*body, nn.Linear(16, 3), nn.Dropout(dropout)).to(dtype)


def narrow_cnn(classes=10, bottleneck=False, init='torch', dropout=.3):
    "Return `simple_cnn` with a sixteenth of its width."
    return cnn_of_widths(4, (32, 16), classes, bottleneck, init, dropout)


@pytest.fixture
def narrow(monkeypatch):
    """Let runs with `simple_cnn` train `narrow_cnn`, where the width does not matter; this is faster.

    Other processes train `simple_cnn`, unless they change `MODELS` as well."""
    monkeypatch.setitem(MODELS, 'simple_cnn', narrow_cnn)
    own_counts = lru_cache(None)(cost._forward_flops.__wrapped__) # the library remembers them by name
    monkeypatch.setattr(cost, '_forward_flops', own_counts)


class AnyDtypeTeacher(Net):
    "A teacher that converts itself to the dtype of its input."
    def forward(self, x): return nn.Sequential.forward(self.to(x.dtype), x)


def needed(name):
    "Return the options that the method requires: a teacher if it needs one, else no options."
    if not METHODS[name].needs_teacher: return {}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
        return dict(teacher=AnyDtypeTeacher(*body, nn.Linear(64, 3), nn.Dropout(.5)))


def as_loader(data, **kw):
    "Return a fastai DataLoader that makes the same batches from samples, each with an id for methods."
    items = [(x[i], y[i]) for x, y in data for i in range(len(x))]
    return DataLoader(items, bs=len(data[0][0]), **kw)


def micro_batches(data, size):
    "Return batches of `size` samples, into which each batch of `data` is cut."
    parts = []
    for x, y in data: parts += zip(x.split(size), y.split(size))
    return parts


def learning_rates(cfg):
    "Return the learning rate of every training batch of a run, without training."
    seen = []
    class Seen(Callback):
        order = 70 # after the scheduler
        def before_batch(self):
            if self.training: seen.append(self.opt.hypers[-1]['lr'])
            raise CancelBatchException()
    make_learner(cfg, 'cpu').fit(math.ceil(cfg.epochs), cbs=Seen())
    return seen


def needs_momentum(cbs): return any(getattr(cb, 'needs_momentum', False) for cb in cbs)


def sgd_for(cbs):
    "Return the optimizer with which the callbacks are tested: plain SGD, with momentum where they need it."
    return partial(SGD, mom=.9) if needs_momentum(cbs) else SGD


def learner(net, cbs=(), data=None, opt_func=None, lr=.1, **kw):
    "Return a Learner without default callbacks; it trains and validates on `data`, any iterable of batches."
    data = batches() if data is None else data
    opt_func = opt_func or sgd_for(cbs)
    kw.setdefault('loss_func', nn.CrossEntropyLoss())
    return Learner(DataLoaders(data, data), net, opt_func=opt_func, lr=lr, default_cbs=False,
                   cbs=[TrainEvalCallback(), *cbs], **kw)


@contextmanager
def evaluating_within(learn):
    "Inside, an event of a training batch may call `learn.validate`; then the epoch goes on where it was."
    names = 'epoch', 'n_iter', 'dl', 'iter', 'pct_train', 'train_iter'
    held = {k: getattr(learn, k) for k in names}
    yield
    for k, v in held.items(): setattr(learn, k, v)
    learn.model.train()
    learn.training = True


class EvaluateInEpoch(Callback):
    "Calls `learn.validate` within each epoch, which sends `before_fit` and `after_fit`, too."
    order, run_valid = 2000, False
    def __init__(self, data, iteration=1):
        self.data, self.iteration = data, iteration
    def after_batch(self):
        if self.iter != self.iteration: return
        with evaluating_within(self.learn): self.learn.validate(dl=self.data)


def follows_gradient(name):
    """Return whether the gradient of the first pass has an effect, in a method with an extra pass or without.

    The perturbation of a `PerturbedPass` may be drawn without it: then other labels leave it as it is."""
    seen = []
    def record(cb):
        perturbation = cb.perturbation
        def recorded(params, grads):
            deltas = dict(perturbation(params, grads))
            seen[-1].append(torch.cat([d.flatten() for d in deltas.values()]))
            return deltas
        cb.perturbation = recorded
    (x, y), = batches(n=8, conv=True)
    for labels in (y, 2 - y):
        seen.append([])
        cbs = make_method(name, **needed(name))
        for cb in cbs:
            if isinstance(cb, PerturbedPass): record(cb)
        learner(cnn(bn=False), cbs, as_loader([(x, labels)])).fit(1)
    first, second = seen
    return not first or not all(torch.equal(a, b) for a, b in zip(first, second))


def flat(net, buffers=False):
    "Return all parameters (and buffers) as one vector of doubles."
    ts = list(net.parameters()) + (list(net.buffers()) if buffers else [])
    return torch.cat([t.detach().double().flatten() for t in ts])


@pytest.fixture
def one_thread():
    "Compute on one thread, as separate processes do, because sums over two threads have other bits."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


class Overflow(nn.Module):
    "A network whose loss is infinite in one of its passes."
    def __init__(self, net, bad):
        super().__init__()
        self.net, self.bad, self.calls = net, bad, 0
    def forward(self, x):
        self.calls += 1
        return self.net(x) * (math.inf if self.calls == self.bad else 1.)


def sam_gradients(net, loss, radii):
    "Gradients before and after SAM's perturbation in plain PyTorch, with a radius for each parameter."
    params = list(net.parameters())
    grads = torch.autograd.grad(loss(), params)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, g, rho in zip(params, grads, radii): p += rho * g / norm
    moved = torch.autograd.grad(loss(), params)
    with torch.no_grad():
        for p, w in zip(params, before): p.copy_(w)
    return grads, moved
