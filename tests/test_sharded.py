"Parameters that are sharded over two processes (FSDP2, tensor parallelism, gloo) against ordinary ones."
import pytest
import torch
from conftest import results_of_two_processes
from torch import distributed

if not distributed.is_available(): pytest.skip('torch without processes', allow_module_level=True)
pytest.importorskip('torch.distributed.tensor', reason='sharded tensors came with torch 2.5')
fsdp = pytest.importorskip('torch.distributed.fsdp')
if not hasattr(fsdp, 'fully_shard'): pytest.skip('FSDP2 came with torch 2.6', allow_module_level=True)

import sharded_worker as worker


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Return what `sharded_worker.py` writes."
    return results_of_two_processes(worker.main, tmp_path_factory)


def one_process(name):
    net = worker.network()
    worker.CASES[name](net, worker.global_batches())
    return worker.full_weights(net)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('kind, name', [(kind, name) for kind in worker.RUNS for name in worker.RUNS[kind]])
def test_sharded_parameters_train_like_ordinary_ones(kind, name, two_processes):
    assert_close(two_processes[kind][name], one_process(name))


@pytest.mark.parametrize('kind', ['by_layer', 'whole', 'never_dropped', 'tensor_parallel'])
def test_forward_passes_alone_see_the_perturbed_and_the_restored_weights(kind, two_processes):
    x = worker.global_batches()[0][0]
    assert_close(two_processes['without_backward'][kind], worker.without_backward(worker.network(), x))


def test_esam_selects_among_each_process_s_samples(two_processes):
    "By hand: the perturbation is that of the global batch, and each process keeps half of its own samples."
    net = worker.network()
    opt = worker.momentum(net)
    params = list(net.parameters())
    for x, y in worker.global_batches():
        losses = worker.losses(net, x, y)
        before = losses()
        grads = torch.autograd.grad(before.mean(), params)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        with torch.no_grad():
            for p, g in zip(params, grads): p += g / norm
        rise = (losses() - before).detach()
        chosen = torch.cat([rise[:4].topk(2).indices, 4 + rise[4:].topk(2).indices])
        opt.zero_grad()
        losses(chosen).mean().backward()
        with torch.no_grad():
            for p, g in zip(params, grads): p -= g / norm
        opt.step()
    assert_close(two_processes['esam_selects'], worker.full_weights(net))


def test_an_infinite_gradient_in_one_process_stops_the_step_in_all(two_processes):
    assert two_processes['overflow'].tolist() == [[1., 512.]] * 2


@pytest.mark.parametrize('name, words', [
    ('fsdp1_orig', 'fully_shard'), ('fsdp1_flat', 'fully_shard'), ('fsdp1_learner', 'fully_shard'),
    ('mesa', 'MESA keeps a copy'), ('sharpness', 'a measure needs all weights'),
    ('direction', 'a direction needs all weights')])
def test_what_cannot_work_is_an_error(name, words, two_processes):
    assert words in two_processes['errors'][name]


def test_reductions_for_all_placements(two_processes):
    found, unfinished = two_processes['reductions']
    for name, (got, right) in found.items(): torch.testing.assert_close(got, right, msg=name)
    assert 'not parts' in unfinished
