"""The table of the page "In your loop": every method, on every kind of task, in every loop."""
import gc
import json
from contextlib import suppress
from importlib import import_module

import any_loop
import pytest
import torch
from any_loop import LOOPS, OWN, SAME, TABLE, TASKS, Case, methods, outcome, plain, values
from tasks import task

NEEDS = {'accelerate': 'accelerate', 'Lightning': 'lightning', 'Lightning, manual': 'lightning',
         'Hugging Face': 'transformers', 'skorch': 'skorch', 'timm': 'timm'}


@pytest.fixture(scope='module', autouse=True)
def imported():
    "Import the packages of all loops, and let the collector, which some of them call, pass over them."
    for package in NEEDS.values():
        with suppress(ImportError): import_module(package)
    with suppress(ImportError): any_loop.hugging_face(Case('sam', 'text')) # imports more
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='module')
def table(): return json.loads(TABLE.read_text())


@pytest.fixture(scope='module')
def expected():
    kept = {}
    def weights(method, name):
        if (method, name) not in kept: kept[method, name] = any_loop.expected_of(method, name)
        return kept[method, name]
    return weights


def test_the_table_has_every_cell(table):
    assert list(table) == methods()
    for of_method in table.values():
        assert list(of_method) == TASKS
        for of_task in of_method.values(): assert list(of_task) == list(LOOPS)


@pytest.mark.parametrize('loop', LOOPS)
@pytest.mark.parametrize('method', methods())
def test_the_table_is_true(table, expected, method, loop):
    if loop in NEEDS: pytest.importorskip(NEEDS[loop], reason='pip install sadt_nb[integrations]')
    for name in TASKS:
        assert outcome(method, name, loop, expected(method, name)) == table[method][name][loop]


@pytest.mark.parametrize('name', TASKS)
def test_the_loop_that_others_are_compared_with_makes_sam_steps(name):
    "SAM by hand: the gradient at `w + rho g / ||g||`, in SGD with momentum."
    net, loss = task(name)[0], task(name)[2]
    params = list(net.parameters())
    speed = [torch.zeros_like(p) for p in params]
    for x, y in Case('sam', name).batches():
        def gradient(x=x, y=y): return torch.autograd.grad(loss(net(x), y), params)
        g = gradient()
        length = torch.sqrt(sum(t.square().sum() for t in g))
        with torch.no_grad():
            start = [p.clone() for p in params]
            for p, t in zip(params, g): p.add_(.1 * t / length)
        uphill = gradient()
        with torch.no_grad():
            for p, w, v, t in zip(params, start, speed, uphill): p.copy_(w - .1 * v.mul_(.9).add_(t))
    torch.testing.assert_close(any_loop.pytorch(Case('sam', name)), values(net), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('name', TASKS)
@pytest.mark.parametrize('method', methods())
def test_no_method_is_plain_training(table, method, name):
    assert table[method][name]['fastai'] in (SAME, OWN)
    assert (any_loop.fastai(Case(method, name)) - plain(name)).abs().max() > 1e-6
