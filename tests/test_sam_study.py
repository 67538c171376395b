"The study of SAM and ASAM: what its text says, what its code runs, and what its logs show."
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cells_of, learning_rates
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.learner import run_loaders
from sadt_nb.experiments.report import load_results
from sadt_nb.experiments.results import evaluate
from sadt_nb.experiments.run_folder import load_model, read_result
from sadt_nb.experiments.runner import run
from sadt_nb.methods.registry import make_method
from sadt_nb.models.registry import make_model
from sadt_nb.papers import pages
from sadt_nb.papers.base import EpochLog, PaperRun
from sadt_nb.papers.claims import OUTCOMES, Claim
from sadt_nb.papers.grids import PAPER_GRIDS, scaled
from sadt_nb.papers.networks import Comparisons, judged
from sadt_nb.papers.pages import beside_logs, comparison, write_pages
from sadt_nb.papers.sam_study_claims import logged_networks, sam_study_claims
from scipy import stats
from torchvision import models

SMALL = Run(epochs=2, n_train=60, bs=30, valid=0., split=0, model_args=dict(dropout=0.))
quiet = dict(progress=False)
pytestmark = pytest.mark.usefixtures('narrow')


def settings(r):
    "Return what a run of this study is made of."
    return dict(epochs=r.epochs, bs=r.bs, lr=r.lr, sched=r.sched, normalize=r.normalize, valid=r.valid,
                model=r.model, opt=r.opt, crop=r.crop, flip=r.flip, **dict(r.opt_args))


def written(epochs, bs, sched, normalize, **opt_args): # what the authors' scripts set, as typed by hand
    return dict(epochs=epochs, bs=bs, lr=.01, sched=sched, normalize=normalize, valid=0., model='resnet18',
                opt='sgd', crop=0, flip=False, **opt_args)


SEEDS_AND_SIZES = [('a', (20, 30, 40), {128}), ('b', (20, 30, 40), {16, 64, 128}), ('c', (1, 2, 3), {128})]


@pytest.mark.parametrize('study, seeds, sizes', SEEDS_AND_SIZES)
def test_the_reading_of_the_code(study, seeds, sizes):
    cells = [c for c in cells_of(f'sam_study/{study}_code') if 'with BatchNorm' not in c.label]
    assert {c.run.seed for c in cells} == set(seeds)
    assert {c.run.bs for c in cells} == sizes
    for c in cells:
        if study == 'c': expected = written(200, 128, 'cosine', '', momentum=.9, weight_decay=5e-4)
        else: expected = written(100, c.run.bs, 'constant', (.5, .5), weight_decay=5e-4)
        assert settings(c.run) == expected, c.label
        assert (c.run.data, c.run.n_train, c.run.select) == ('cifar10', None, 'test')
        cb = make_method(c.run.method, **dict(c.run.method_args))
        name = c.label.split(' · ')[0].split(',')[0]
        radius = {'SGD': [], 'SAM': [('SAM', .05, False)], 'ASAM': [('SAM', .5, True)]}[name]
        assert [(type(m).__name__, m.rho, m.adaptive) for m in cb] == radius, c.label


def shapes(net): return {k: v.shape for k, v in net.state_dict().items()}


def test_the_networks_of_the_code_are_torchvisions():
    first = {s: cells_of(f'sam_study/{s}_code')[0].run for s in 'ac'}
    with torch.device('meta'):
        found = {s: make_model(r.model, 10, **dict(r.model_args)) for s, r in first.items()}
        plain, bare = models.resnet18(), models.resnet18(norm_layer=torch.nn.Identity)
        cifar = make_model('resnet18', 10)
        large = make_model('resnet101', 1000, stem='imagenet')
        assert shapes(large) == shapes(models.resnet101())
        x = torch.empty(2, 3, 32, 32)
        assert [tuple(n(x).shape) for n in (*found.values(), cifar)] == [(2, 1000), (2, 1000), (2, 10)]
    assert (shapes(found['a']), shapes(found['c'])) == (shapes(plain), shapes(bare))
    for (name, a), (other, b) in zip(found['a'].named_modules(), plain.named_modules()):
        assert (name, str(a)) == (other, str(b)), 'strides and poolings as well'
    assert cifar.conv1.stride == (1, 1)
    with pytest.raises(ValueError, match="`stem` must be 'cifar' or 'imagenet', got 'big'"):
        make_model('resnet18', 10, stem='big')


def test_the_starting_weights_with_the_usual_stem_are_unchanged():
    torch.manual_seed(3)
    now = make_model('resnet18', 10).state_dict()
    torch.manual_seed(3)
    net = models.resnet.ResNet(models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=10)
    net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
    for m in net.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
    assert all(torch.equal(now[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize('sched', ['cosine', 'constant', 'thirds'])
def test_the_rate_rises_in_the_warm_up_and_then_follows_the_schedule(sched):
    cfg = SMALL.but(epochs=6, lr=.1, sched=sched, warmup=1.5, warmup_lr=.01)
    plain = learning_rates(cfg.but(warmup=0., warmup_lr=0.))
    found = learning_rates(cfg)
    assert len(found) == len(plain) == 12, 'two batches per epoch'
    assert found[:3] == pytest.approx([.01, .04, .07], rel=1e-9)
    assert found[3:] == pytest.approx(plain[3:], rel=1e-6)
    quarter = dict(cosine=.1 * (1 + math.cos(math.pi / 4)) / 2).get(sched, .1)
    assert found[3] == pytest.approx(quarter, rel=1e-6)


def test_a_warm_up_leaves_old_keys_alone_and_is_checked():
    assert SMALL.but(warmup=0, warmup_lr=0).key == SMALL.key
    assert Run().key == '44136fa355b3'
    assert SMALL.but(warmup=1).key != SMALL.key
    short = scaled(SMALL.but(epochs=20, warmup=4, warmup_lr=1e-4), .25)
    assert (short.epochs, short.warmup, short.warmup_lr) == (5, 1, 1e-4)
    for changes, message in [(dict(warmup=-1), '`warmup` must not be negative'),
                             (dict(warmup=3), 'not be longer than training, got a warm-up of 3 epochs'),
                             (dict(warmup_lr=.1), '`warmup_lr` needs a warm-up'),
                             (dict(warmup=1, sched='restart'), "sched='restart' has no warm-up")]:
        with pytest.raises(ValueError, match=message): SMALL.but(**changes)


def test_a_run_that_selects_on_test_images_stores_their_accuracy_of_every_epoch(tmp_path):
    cfg = SMALL.but(epochs=4, select='test', seed=1)
    result = run(cfg, tmp_path, **quiet)
    rows = load_results(tmp_path).iloc[0]['history']
    accuracies = [row['test_accuracy'] for row in rows]
    assert result['accuracy_kept'] == max(accuracies)
    assert result['accuracy_last'] == accuracies[-1]
    for epochs in (1, 4): # at a constant rate, a shorter run is the beginning of a longer one
        short = cfg.but(epochs=epochs, sched='constant')
        run(short, tmp_path, **quiet)
    stored = load_results(tmp_path)
    constant = {r['epochs']: r['history'] for _, r in stored.iterrows() if r['sched'] == 'constant'}
    assert constant[1][0]['test_accuracy'] == constant[4][0]['test_accuracy']
    one = cfg.but(epochs=1, sched='constant')
    test = run_loaders(one, 'cpu')[2]
    found = evaluate(load_model(one, tmp_path, 10), test)['accuracy']
    assert found == pytest.approx(constant[4][0]['test_accuracy'], abs=1e-9)
    assert 'test_accuracy' not in run_history(cfg.but(select='last'), tmp_path)[-1]


def run_history(cfg, root):
    run(cfg, root, **quiet)
    results = load_results(root)
    return next(r['history'] for _, r in results.iterrows() if r['run'] == cfg)


@pytest.fixture
def logged(monkeypatch):
    "Return a table of two networks with logs; the published number is that of the last epoch."
    log = EpochLog(.75, .5, .25, .001)
    def table():
        cells = []
        for seed in (1, 2):
            cfg = SMALL.but(epochs=51, n_train=20, bs=20, sched='constant', select='test', seed=seed)
            cells.append(PaperRun(f'plain · seed {seed}', cfg, .5, result='accuracy_last', log=log))
        return cells
    monkeypatch.setitem(PAPER_GRIDS, 'logged', table)
    return table


def store_long_run(cfg, root):
    "Store a run of two epochs as if it had all epochs of `cfg`, each with a test accuracy of its own."
    short = cfg.but(epochs=2)
    run(short, root, **quiet)
    (root / short.name).rename(root / cfg.name)
    rows = json.loads((root / cfg.name / 'history.json').read_text())
    rows = [dict(rows[-1], epoch=i, test_accuracy=i / 100) for i in range(1, cfg.epochs + 1)]
    (root / cfg.name / 'history.json').write_text(json.dumps(rows))
    (root / cfg.name / 'config.json').write_text(json.dumps(cfg.to_dict()))


def test_logs_stand_beside_our_numbers(logged, tmp_path):
    cfg = logged()[0].run
    assert beside_logs('logged').filter(like='ours').eq('-').all(axis=None)
    store_long_run(cfg, tmp_path)
    results = load_results(tmp_path)
    stored, history = read_result(cfg, tmp_path), results['history'][0]
    table = beside_logs('logged', results)
    ours = [f'{100 * v:.2f}' for v in (stored['accuracy_kept'], stored['accuracy_last'],
                                       .5)] + [f'{history[-1]["train_loss"]:.5f}']
    assert table.filter(like='ours').iloc[0].tolist() == ours
    assert table.filter(like='ours').iloc[1].tolist() == ['-'] * 4
    logs = table.filter(like=': log').iloc[0].tolist()
    assert logs == ['75.00', '50.00', '25.00', '0.00100']
    assert table['seed'].tolist() == ['1', '2']
    row = comparison('logged', results).iloc[0]
    assert row['ours'] == f'{100 * stored["accuracy_last"]:.2f}', 'like with like: the last epoch'
    pages = write_pages('logged', tmp_path, tmp_path / 'pages')
    for page in pages[:2]: assert 'epoch 50: log' in page.read_text()
    assert len(beside_logs('sadt/notebook20')) == 0


def test_the_published_numbers_are_those_of_the_logs():
    "Table I is the best of 100 epochs and exchanges two seeds; Table II is the last epoch."
    printed = {(20, 'SAM'): .7122, (20, 'SGD'): .6515, (30, 'SAM'): .7077, (30, 'SGD'): .6403,
               (40, 'SAM'): .7098, (40, 'SGD'): .6417}
    right = {20: 30, 30: 20, 40: 40}
    cells = {c.label: c for c in cells_of('sam_study/a_code')}
    for (seed, name), value in printed.items():
        label = 'SAM, equal epochs' if name == 'SAM' else name
        c = cells[f'{label} · seed {right[seed]}']
        assert c.published == value
        assert abs(c.log.best - value) < 1.5e-4, 'the report prints 70.77, the log has 70.78'
        assert c.run.epochs == 100
    for c in cells_of('sam_study/c_code'):
        if c.log: assert (c.published, c.result) == (c.log.last, 'accuracy_last')
    cells = {c.label: c for c in cells_of('sam_study/a')}
    assert cells['SAM · seed 20'].published is None
    assert cells['SAM · seed 20'].run.epochs == 50
    assert cells['SAM, equal epochs · seed 20'].published == .7077
    for name in PAPER_GRIDS:
        if name.startswith('sam_study/'): assert not any('curves' in c.note for c in cells_of(name))


SGD_128, SAM_128_HALF = np.array([63.75, 64.87, 64.03]), np.array([69.14, 69.72, 69.91])


def test_claims_are_decided_by_the_logs_alone():
    claims = sam_study_claims(Comparisons(logged_networks()))
    by_logs, seen, none = [c.by_own for c in claims], 'seen', 'no power'
    assert by_logs == [seen, none, none, seen, seen, none, 'opposite', none, 'smaller than claimed', none,
                       '', '', '', '']
    theirs = "decided by the authors' own numbers"
    assert [c.outcome == theirs for c in claims] == [o not in ('', none) for o in by_logs]
    assert {c.outcome for c in claims} == {theirs, none, 'not run'} <= OUTCOMES.keys()
    assert [c.outcome == none for c in claims] == [o == none for o in by_logs]
    of_losses = [e.outcome for e in claims[6].own]
    assert of_losses == [seen, none, 'opposite'], 'at batch 16 SAM has the lower training loss'
    assert claims[2].own[2].mean > 1, 'at batch 16 SAM has the larger spread'


def test_the_interval_of_the_logs_holds_for_seeds_and_test_images():
    "By hand: the variance over seeds, and that of 10,000 images on which as many networks differ as can."
    e, = sam_study_claims(Comparisons(logged_networks()))[0].own
    d = SAM_128_HALF - SGD_128
    differ = (100 - SAM_128_HALF.mean()) + (100 - SGD_128.mean()) # the images that one of the two has wrong
    of_images = (100 * differ - d.mean()**2) / 10_000
    of_seeds = d.var(ddof=1) / 3
    df = (of_seeds + of_images)**2 / (of_seeds**2 / 2)
    reach = stats.t.ppf(.975, df) * (of_seeds + of_images)**.5
    assert (e.low, e.high) == pytest.approx((d.mean() - reach, d.mean() + reach), rel=1e-9)
    table_1 = np.mean([70.77, 71.22, 70.98]) - np.mean([64.03, 65.15, 64.17])
    assert e.published.effect == pytest.approx(table_1)


def test_evidence_of_runs_does_not_move_the_verdict_of_logs():
    against = judged('ours', 'x', pd.Series([-3., -3.1, -2.9]))
    favour = judged('theirs', 'x', pd.Series([3., 3.1, 2.9]))
    unclear = judged('theirs', 'x', pd.Series([3., -3.1, 2.9]))
    def claim(ours, *own): return Claim('', '', 'SAM', '', [ours], own=list(own))
    theirs = "decided by the authors' own numbers"
    assert claim(against).outcome == 'opposite'
    assert (claim(against, favour).outcome, claim(against, favour).by_own) == (theirs, 'seen')
    assert (claim(favour, against).outcome, claim(favour, against).by_own) == (theirs, 'opposite')
    assert claim(against, unclear).outcome == 'opposite', 'logs without power do not decide'


@pytest.mark.parametrize('epochs, at_50', [(49, None), (50, .49), (51, .49)])
def test_our_number_beside_the_log_of_epoch_50(epochs, at_50):
    history = [dict(test_accuracy=i / 100, train_loss=1 / (i + 1)) for i in range(epochs)]
    found = pages._logged(dict(accuracy_kept=.8, accuracy_last=.7, history=history))
    assert found[:2] == (.8, .7)
    assert found[3] == 1 / epochs
    assert np.isnan(found[2]) if at_50 is None else found[2] == at_50
