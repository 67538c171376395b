"Every method in two processes (gloo) against the same global batches in one process."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cnn, flat, learner, needed
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from sadt_nb.methods.registry import METHODS, make_method

NEEDS = 'fastai distributes through accelerate: pip install sadt_nb[distributed]'
pytest.importorskip('accelerate', reason=NEEDS)
import distributed_worker as worker

# a process perturbs along its own samples, as with micro-batches
PER_RANK = {'sam', 'asam', 'esam', 'gsam', 'wsam'}
# one for all other methods
PASSES = dict(sam=1, asam=1, esam=1, gsam=0, wsam=0, friendly_sam=2, sadt1=2, sadt2=3, sadt3=2)


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "Return the output of `distributed_worker.py`, by method."
    out = tmp_path_factory.mktemp('ddp') / 'results.pt'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    script = Path(__file__).with_name('distributed_worker.py')
    command = [*torchrun, str(script), str(out)]
    r = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, r.stderr[-3000:]
    return torch.load(out, weights_only=False)


def one_process(name, micro):
    "Return the weights after the same global batches, as one batch or as two micro-batches."
    dl = worker.AsTwoProcesses(worker.samples(), bs=worker.BS if micro else 2 * worker.BS)
    cbs = make_method(name, **needed(name), **worker.OPTIONS.get(name, {}))
    if micro: cbs = [*cbs, GradientAccumulation(2 * worker.BS)]
    learn = learner(cnn(bn=False), cbs, None, opt_func=worker.momentum_sgd)
    learn.dls = DataLoaders(dl, worker.Ordered(worker.samples(), bs=8))
    learn.fit(worker.EPOCHS)
    return flat(learn.model)


@pytest.mark.parametrize('name', METHODS)
def test_two_processes_equal_one(name, two_processes):
    got = two_processes[name]
    assert got['same'], 'all processes end with the same weights'
    expected = one_process(name, name in PER_RANK)
    torch.testing.assert_close(got['weights'], expected, rtol=1e-9, atol=1e-11)
    if name in PER_RANK:
        big_batch = one_process(name, False)
        differs = not torch.allclose(got['weights'], big_batch, rtol=1e-9, atol=1e-11)
        assert differs, 'm-sharpness differs from the global perturbation'


@pytest.mark.parametrize('name', METHODS)
def test_one_message_per_pass_at_most(name, two_processes):
    got = two_processes[name]
    messages = got['messages']
    if name == 'looksam':
        assert messages == [2, 1, 2, 1, 2, 1, 2, 1, 2][:len(messages)], 'two passes at every second step'
    else:
        assert set(messages) == {PASSES.get(name, 1)}
    expected = 0
    if name in ('gsam', 'wsam'): expected = len(messages) # they average gradients themselves
    if name == 'saf': expected = 2 * worker.EPOCHS # it exchanges its records once per epoch
    other = got['direct'] - sum(messages) # `all_reduce` also averages the gradients
    assert other == expected


def test_the_image_loader_gives_each_process_its_own_half(two_processes):
    got = two_processes['TensorDL']
    first, second = map(set, got['ids'])
    assert len(first) == len(second) == 100
    assert not first & second
    assert got['shapes'] == {((3, 32, 32), torch.float32, True)}
