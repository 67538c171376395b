"Shared pieces of the tests: small data, small networks, teachers, a Learner without bars."
import os
import warnings

warnings.filterwarnings('ignore', category=FutureWarning, message=r'.*torch\.jit\.script.*')
os.environ.setdefault('MPLBACKEND', 'agg')

import pytest
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from sadt_nb.methods.registry import METHODS
from torch import nn


def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: long matrices, run by make test-all')


def pytest_collection_modifyitems(config, items):
    if 'slow' in (config.getoption('-m') or ''): return
    for item in items:
        if 'slow' in item.keywords: item.add_marker(pytest.mark.skip(reason='long; make test-all runs it'))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    "Bit-exact comparisons are promised for the CPU; a GPU, if there is one, has tests of its own."
    from fastai.torch_core import defaults
    monkeypatch.setattr(defaults, 'use_cuda', False, raising=False)
    torch.manual_seed(0)


def batches(n=24, bs=8, classes=3, dtype=torch.float64, conv=False):
    "A list of (x, y) batches, the same at every call."
    g = torch.Generator().manual_seed(7)
    shape = (n, 2, 6, 6) if conv else (n, 5)
    x, y = torch.randn(shape, generator=g, dtype=dtype), torch.randint(0, classes, (n,), generator=g)
    return list(zip(x.split(bs), y.split(bs)))


def mlp(bn=False, dropout=0., dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8) if bn else nn.Identity(), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)


class Net(nn.Sequential):
    "A type of its own, so that its calls, and those of its copies, can be counted."


def cnn(bn=True, dtype=torch.float64, dropout=0.):
    "Has everything that a method may look for: convolutions, BatchNorm, dense layers."
    torch.manual_seed(1)
    return Net(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4) if bn else nn.Identity(), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
               nn.Linear(16, 3), nn.Dropout(dropout)).to(dtype)


class Elder(Net):
    "A teacher that takes any floating dtype, and is never in the mood to learn."
    def forward(self, x): return nn.Sequential.forward(self.to(x.dtype), x)


def needed(name):
    "Options without which a method cannot be made: a teacher for those that have one."
    if not METHODS[name].taught: return {}
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return dict(teacher=Elder(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.Dropout(.5)))


def as_loader(data, **kw):
    "A fastai DataLoader over the samples of a list of batches, in the same order and batches; it can tell samples apart."
    items = [(x[i], y[i]) for x, y in data for i in range(len(x))]
    return DataLoader(items, bs=len(data[0][0]), **kw)


def learner(net, cbs=(), data=None, opt_func=SGD, lr=.1, **kw):
    data = batches() if data is None else data
    return Learner(DataLoaders(data, data), net, loss_func=kw.pop('loss_func', nn.CrossEntropyLoss()), opt_func=opt_func, lr=lr,
                   default_cbs=False, cbs=[TrainEvalCallback(), *cbs], **kw)


def flat(net, buffers=False):
    "All parameters (and buffers) as one vector."
    ts = list(net.parameters()) + (list(net.buffers()) if buffers else [])
    return torch.cat([t.detach().double().flatten() for t in ts])


@pytest.fixture
def one_thread():
    "As in processes of their own: a sum over two threads has other bits."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
