"Single places that a random change of the library found untested; the right values are computed by hand."
import threading
from contextlib import nullcontext
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from fastai.optimizer import SGD
from matplotlib import pyplot as plt
from sadt_nb.commands import cli
from sadt_nb.core.display import visible
from sadt_nb.core.fits import evaluating
from sadt_nb.core.optim import KerasAdam
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.core.teachers import Ensemble
from sadt_nb.experiments import grid, runner
from sadt_nb.experiments.config import Run, _is_mean_and_std
from sadt_nb.experiments.report import both_readings
from sadt_nb.measures.hessian import _exact_trace
from sadt_nb.methods.gsam import GSAM, gsam_step
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.msam import _decays
from sadt_nb.methods.sam import SAM
from sadt_nb.models.wide_resnet import WideBlock
from sadt_nb.papers import networks, verdict_rows
from torch import nn


def test_a_control_character_is_shown_as_its_escape():
    assert visible('a\x1b[0m\tb\n') == 'a\\x1b[0m\tb\n'


def test_a_gpu_has_the_mixed_precision_of_fastai(monkeypatch):
    monkeypatch.setattr(MixedPrecision, 'before_fit', lambda self: 'of fastai')
    parameter = SimpleNamespace(device=SimpleNamespace(type='cuda'))
    cb = DeviceMixedPrecision()
    cb.learn = SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([parameter])))
    assert cb.before_fit() == 'of fastai'


def test_only_a_held_lock_is_an_evaluation():
    assert not evaluating(SimpleNamespace())
    learn = SimpleNamespace(lock=threading.Lock())
    assert not evaluating(learn)
    with learn.lock: assert evaluating(learn)


def test_an_ensemble_of_three_is_the_mean_of_all():
    factors = [1., 2., 6.]
    members = [nn.Linear(1, 1, bias=False) for _ in factors]
    for m, factor in zip(members, factors): nn.init.constant_(m.weight, factor)
    assert Ensemble(members)(torch.ones(1, 1)).item() == 3.


def test_msam_knows_the_decay_before_the_first_step():
    decaying, plain = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    opt = SGD([decaying, plain], lr=.1, mom=.9, wd=.25, decouple_wd=False)
    opt.state[plain] = dict(do_wd=False)
    assert _decays(opt) == {decaying: .25}


def test_the_first_process_stores_an_interruption(monkeypatch):
    stored = []
    def fit(*_, **__): raise KeyboardInterrupt
    training = SimpleNamespace(learn=SimpleNamespace(fit=fit), recorder=SimpleNamespace(unhook=lambda: None),
                               checkpoint=lambda *_: SimpleNamespace(start=3), interrupt=stored.append)
    monkeypatch.setattr(runner, '_Training', lambda *_: training)
    monkeypatch.setattr(runner, 'distributed_context', lambda _: nullcontext())
    with pytest.raises(KeyboardInterrupt): runner._train(Run(), None, False, None, 'cpu', 1.)
    assert stored == [3]


@pytest.mark.parametrize('pair, right', [((.5, .5), True), ([.5, .5], False), ((.5, .5, .5), False)])
def test_a_mean_and_a_deviation_are_a_tuple_of_two(pair, right):
    assert _is_mean_and_std(pair) is right


def test_the_rows_of_the_demo_figure_fill_its_height(tmp_path):
    accuracies = {'plain training': np.array([50., 60.]), 'plain training, twice the epochs': np.array([40.])}
    runs = {label: [SimpleNamespace(method='baseline')] for label in accuracies}
    cli._demo_figure(runs, accuracies, tmp_path / 'demo.png')
    assert plt.gca().get_ylim() == (1.5, -.5)
    plt.close()


def test_the_time_left_counts_the_epochs_under_way(tmp_path, monkeypatch):
    "A run has done one of 4 epochs in 10 seconds: 30 seconds are left."
    cfg = Run(epochs=4)
    work = grid._Work({}, tmp_path, {})
    work.start, work.running, work.left, work.done = 0., {cfg: 0.}, {cfg: 40}, 0.
    monkeypatch.setattr(grid, '_work', lambda _: 40)
    monkeypatch.setattr(work, 'under_way', lambda _: 1)
    monkeypatch.setattr(grid.time, 'time', lambda: 10.)
    assert work.time_left() == grid.duration(30.)


def test_sam_perturbs_in_the_first_step_of_every_interval():
    assert SAM(interval=2).active()


def test_the_pace_of_a_network_is_its_mean_train_accuracy_in_percent():
    history = [dict(train_accuracy=a, train_loss=1.) for a in (.25, .75)]
    row = dict(run=Run(data='digits'), history=history, accuracy=.5, accuracy_bn=.5, measures={},
               data_facts=dict(train=1000, test=100))
    found = networks.network_numbers(pd.Series(row), 'digits')
    assert (found['pace'], found['fit']) == (50., 75.)


def test_an_unknown_group_is_named():
    groups = dict(a=[dict(accuracy=.5, accuracy_bn=.5)])
    with pytest.raises(ValueError, match="no group is named 'b'; choose one of a"):
        both_readings(groups, [('a', 'b')])


def test_the_step_has_the_alpha_of_the_method():
    for f in (GSAM, gsam_step): assert signature(f).parameters['alpha'].default == .4


@pytest.mark.parametrize('refused, inside, steps', [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_looksam_counts_steps_that_are_made_in_its_part_of_training(refused, inside, steps, monkeypatch):
    cb = LookSAM()
    monkeypatch.setattr(cb, 'in_window', lambda: inside)
    cb.step_ended(made=not refused)
    assert cb.steps == steps


@pytest.mark.parametrize('n', [2, 3])
def test_an_interval_of_two_seeds_has_no_pairing(n, monkeypatch):
    monkeypatch.setattr(verdict_rows, 'evidence_text', lambda e: 'text')
    e = SimpleNamespace(place='here', n=n, outside=(), pairing='by seed', exact=False, setting=None)
    shown = {2: '- here (2 seeds): text.', 3: '- here (3 seeds; interval: by seed): text.'}
    assert verdict_rows._place_lines([e], {}) == [shown[n]]


def test_a_wide_block_of_equal_shapes_has_no_weights_in_its_shortcut():
    assert WideBlock(4, 4).shortcut is None
    assert [WideBlock(4, 4, 2).shortcut.stride, WideBlock(4, 8).shortcut.out_channels] == [(2, 2), 8]


def test_the_rounding_error_of_an_exact_trace():
    "The columns have the norms 5 and 13, so the error is 18 roundings."
    matrix = torch.tensor([[3., 5.], [4., 12.]])
    class Products:
        size, dtype, device, n = 2, torch.float32, 'cpu', 2
        def __call__(self, v): return matrix @ v
    found = _exact_trace(Products())
    assert (found.value, found.error) == (15., 18 * 2.**-23)


def test_the_adam_of_keras_runs_a_closure_as_every_optimizer_of_pytorch():
    w, v = (torch.tensor([2., -1.], dtype=torch.float64, requires_grad=True) for _ in range(2))
    by_closure, by_hand = KerasAdam([w], lr=.1), KerasAdam([v], lr=.1)

    def closure():
        by_closure.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        before = w.detach().square().sum()
        assert torch.equal(by_closure.step(closure), before)
        v.grad = 2 * v.detach()
        assert by_hand.step() is None
        assert torch.equal(w, v)
    assert not torch.equal(w, torch.tensor([2., -1.], dtype=torch.float64))
