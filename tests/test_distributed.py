"Every method in two processes (gloo) against the same global batches in one process."
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import batches, cnn, flat, follows_gradient, learner, needed, results_of_two_processes
from documented_methods import DOCUMENTED, registered
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from sadt_nb.core import ranks
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.methods.registry import METHODS, make_method

NEEDS = 'fastai distributes through accelerate: pip install sadt_nb[distributed]'
pytest.importorskip('accelerate', reason=NEEDS)
import distributed_worker as worker

NAMES = [*METHODS, *DOCUMENTED]


@pytest.fixture(autouse=True)
def documented_methods():
    "The methods of README and tutorial 9 take every test, too, as they stand there."
    with registered(): yield


def callbacks(name): return make_method(name, **needed(name), **worker.options(name))


def per_rank(name):
    "Return whether a process perturbs along its own samples, as with micro-batches."
    own = any(isinstance(cb, PerturbedPass) and cb.per_rank for cb in callbacks(name))
    return own and follows_gradient(name)


def messages_of(name, steps):
    "Return how often each batch may average gradients: once per backward whose gradient counts."
    passes = METHODS[name].passes
    # the first pass of these sends none: its gradient is used within the process
    local = any(isinstance(cb, PerturbedPass) and cb.per_rank for cb in callbacks(name))
    every = dict(worker.options(name)).get('k', 1)
    extra = round(passes - 1 if every == 1 else 1)
    counts = []
    for step in range(steps): counts.append(1 - local + (extra if step % every == 0 else 0))
    return counts


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Return the output of `distributed_worker.py`, by method."
    return results_of_two_processes(worker.main, tmp_path_factory)


def one_process(name, micro):
    "Return the weights after the same global batches, as one batch or as two micro-batches."
    dl = worker.AsTwoProcesses(worker.samples(), bs=worker.BS if micro else 2 * worker.BS)
    cbs = callbacks(name)
    if micro: cbs = [*cbs, GradientAccumulation(2 * worker.BS)]
    learn = learner(cnn(bn=False), cbs, None, opt_func=worker.momentum_sgd)
    learn.dls = DataLoaders(dl, worker.Ordered(worker.samples(), bs=8))
    learn.fit(worker.EPOCHS)
    return flat(learn.model)


@pytest.mark.parametrize('name', NAMES)
def test_two_processes_equal_one(name, two_processes):
    got = two_processes[name]
    assert got['same'], 'all processes end with the same weights'
    expected = one_process(name, per_rank(name))
    torch.testing.assert_close(got['weights'], expected, rtol=1e-9, atol=1e-11)
    if per_rank(name):
        big_batch = one_process(name, False)
        differs = not torch.allclose(got['weights'], big_batch, rtol=1e-9, atol=1e-11)
        assert differs, 'm-sharpness differs from the global perturbation'


@pytest.mark.parametrize('name', NAMES)
def test_one_message_per_pass_at_most(name, two_processes):
    got = two_processes[name]
    messages = got['messages']
    expected = messages_of(name, len(messages))
    assert all(n <= most for n, most in zip(messages, expected))
    sent = got['direct'] # `all_reduce` counts all messages, also those of a method that averages by itself
    if METHODS[name].follows_samples: sent -= 2 * worker.EPOCHS # it exchanges its records once per epoch
    assert sent == sum(expected)


def test_the_image_loader_gives_each_process_its_own_half(two_processes):
    got = two_processes['TensorDL']
    first, second = map(set, got['ids'])
    assert len(first) == len(second) == 100
    assert not first & second
    assert got['shapes'] == {((3, 32, 32), torch.float32, True)}


def test_the_context_of_fastai_is_open_inside_ours(monkeypatch):
    events, loaders = [], ['train', 'valid']

    @contextmanager
    def distrib_ctx(sync_bn, cpu):
        events.append(dict(sync_bn=sync_bn, cpu=cpu))
        yield
        events.append('closed')
    monkeypatch.setattr(ranks, 'n_ranks', lambda: 2)
    monkeypatch.setattr(ranks, '_shared_loader_class', lambda: lambda dl, device: f'shared {dl}')
    dls = SimpleNamespace(loaders=loaders, device=torch.device('cpu'))
    with ranks.distributed_context(SimpleNamespace(dls=dls, distrib_ctx=distrib_ctx)):
        events.append(dls.loaders)
    assert events == [dict(sync_bn=False, cpu=True), ['shared train', 'shared valid'], 'closed']
    assert dls.loaders is loaders


@pytest.fixture
def one_rank():
    "A group of this process alone, as `DistributedDataParallel` needs it."
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('per_rank', [True, False])
def test_which_gradients_are_averaged_over_processes(per_rank, one_rank):
    (cb,), flags = make_method('sam'), []
    cb.per_rank = per_rank
    net = torch.nn.parallel.DistributedDataParallel(cnn())
    def note(*_):
        if net.training: flags.append(net.require_backward_grad_sync)
    net.module.register_forward_pre_hook(note)
    learner(net, [cb], batches(conv=True)[:2]).fit(1)
    assert flags == [not per_rank, True] * 2
