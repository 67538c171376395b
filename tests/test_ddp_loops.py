"A loop in two processes (gloo) with options of `DistributedDataParallel`, against SAM by hand."
import pytest
import torch
from conftest import results_of_two_processes, sam_gradients
from torch import distributed
from torch.nn import functional as F

if not distributed.is_available(): pytest.skip('torch without processes', allow_module_level=True)

import ddp_loop_worker as worker

FIRST_PASS_ALONE = ['sam', 'asam', 'gsam', 'esam', 'wsam'] # it does not average gradients over processes


def close(got, expected): torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    "Return what each of the two processes has computed."
    return results_of_two_processes(worker.main, tmp_path_factory)


def test_micro_batches_in_two_processes_are_those_of_sam_by_hand(results):
    net = worker.network()
    opt = worker.momentum(net)
    for step in range(worker.STEPS):
        opt.zero_grad()
        for k in range(worker.MICRO):
            for rank in range(2):
                x, y = worker.micro_batch(step, k, rank)
                def loss(x=x, y=y): return F.cross_entropy(net(x), y) / (2 * worker.MICRO)
                _, moved = sam_gradients(net, loss, [.1] * 4)
                for p, g in zip(net.parameters(), moved): p.grad = g if p.grad is None else p.grad + g
        opt.step()
    for got in results: close(got['sam', 'plain', False], worker.weights(net))


@pytest.mark.parametrize('no_sync', [False, True])
@pytest.mark.parametrize('option', ['plain', 'views', 'unused'])
@pytest.mark.parametrize('name', list(worker.METHODS))
def test_no_option_changes_the_weights(name, option, no_sync, results):
    expected = results[0][name, 'plain', False]
    for got in results: close(got[name, option, no_sync], expected)


@pytest.mark.parametrize('no_sync', [False, True])
@pytest.mark.parametrize('name', list(worker.METHODS))
def test_a_static_graph_is_refused_only_where_pytorch_fails(name, no_sync, results):
    for got in results:
        outcome = got[name, 'static', no_sync]
        if name in FIRST_PASS_ALONE: assert 'static_graph=True' in outcome
        else: close(outcome, results[0][name, 'plain', False])


@pytest.mark.parametrize('name', list(worker.HEADS))
def test_processes_may_use_different_layers(name, results):
    net = worker.Tasks()
    total = {}
    for rank in range(2):
        x, y = worker.batch(rank)
        task = [p for n, p in net.named_parameters() if 'heads' not in n or f'heads.{rank}.' in n]
        def loss(rank=rank, x=x, y=y): return F.cross_entropy(net(x, rank), y)
        grads = torch.autograd.grad(loss(), task)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        with torch.no_grad():
            for p, g in zip(task, grads): p += .1 * g / norm
        moved = torch.autograd.grad(loss(), task)
        with torch.no_grad():
            for p, g in zip(task, grads): p -= .1 * g / norm
        for p, g in zip(task, moved): total[p] = total.get(p, 0) + g / 2
    with torch.no_grad():
        for p, g in total.items(): p -= .1 * g
    for got in results:
        weights, has_gradient = got['tasks', name]
        close(weights, worker.weights(net))
        if name != 'sam': # with SAM, PyTorch averages
            assert has_gradient == [p in total for p in net.parameters()], 'no process has the last task'
