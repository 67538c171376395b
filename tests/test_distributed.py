"Every method in two processes (gloo) against the same global batches in one."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import cnn, flat, learner, needed
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.optimizer import SGD
from sadt_nb.methods.registry import METHODS, make_method

pytest.importorskip('accelerate', reason='fastai distributes through accelerate: pip install sadt_nb[distributed]')
import distributed_worker as worker

PER_RANK = {'sam', 'asam', 'esam', 'gsam'} # each process perturbs along its own samples, as if they were a micro-batch


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    out = tmp_path_factory.mktemp('ddp') / 'results.pt'
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONWARNINGS': 'ignore', 'CUDA_VISIBLE_DEVICES': ''}
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(Path(__file__).with_name('distributed_worker.py')), str(out)],
                       env=env, capture_output=True, text=True, timeout=900)
    assert r.returncode == 0, r.stderr[-3000:]
    return torch.load(out, weights_only=False)


def one_process(name, micro):
    "The weights after the same global batches, as one batch or as two micro-batches."
    dl = worker.AsTwoProcesses(worker.samples(), bs=worker.BS if micro else 2 * worker.BS)
    cbs = [GradientAccumulation(2 * worker.BS)] if micro else []
    learn = learner(cnn(bn=False), [*make_method(name, **needed(name), **worker.OPTIONS.get(name, {})), *cbs], None, opt_func=lambda p, lr: SGD(p, lr=lr, mom=.9))
    learn.dls = DataLoaders(dl, worker.Ordered(worker.samples(), bs=8))
    learn.fit(worker.EPOCHS)
    return flat(learn.model)


@pytest.mark.parametrize('name', METHODS)
def test_two_processes_equal_one(name, two_processes):
    got = two_processes[name]
    assert got['same'], 'all processes end with the same weights'
    torch.testing.assert_close(got['weights'], one_process(name, name in PER_RANK), rtol=1e-9, atol=1e-11)
    if name in PER_RANK: assert not torch.allclose(got['weights'], one_process(name, False), rtol=1e-9, atol=1e-11), 'm-sharpness differs from the global perturbation'


@pytest.mark.parametrize('name', METHODS)
def test_one_message_per_pass_at_most(name, two_processes):
    got, passes = two_processes[name], {'sam': 1, 'asam': 1, 'esam': 1, 'gsam': 0, 'sadt1': 2, 'sadt2': 3, 'sadt3': 2}.get(name, 1)
    if name == 'looksam': assert got['messages'] == [2, 1, 2, 1, 2, 1, 2, 1, 2][:len(got['messages'])], 'two passes at every second step'
    else: assert set(got['messages']) == {passes}
    expected = len(got['messages']) if name == 'gsam' else 2 * worker.EPOCHS if name == 'saf' else 0 # GSAM averages what it has decomposed; SAF exchanges records per epoch
    assert got['direct'] - sum(got['messages']) == expected, 'the averaging of gradients calls the same function'


def test_the_image_loader_gives_each_process_its_own_half(two_processes):
    got = two_processes['TensorDL']
    first, second = map(set, got['ids'])
    assert len(first) == len(second) == 100 and not first & second
    assert got['shapes'] == {((3, 32, 32), torch.float32, True)}
