"Tables made by one command: scaled, measured, estimated, and compared with the paper by a fixed rule."
import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import CancelBatchException
from fastai.learner import Learner
from sadt_nb.commands import cli
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments import cost
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.cost import Cost, Machine, estimated_seconds, measure_cost, measuring_seconds
from sadt_nb.experiments.cost import probe_machine, run_cost
from sadt_nb.experiments.grid import duration, run_grid
from sadt_nb.experiments.measure import MEASURES, PASSES, _surface_as_json, measure_run
from sadt_nb.experiments.report import load_results
from fastai.callback.core import Callback
from sadt_nb.experiments.learner import make_learner, stored_learner
from sadt_nb.experiments.results import unpacked
from sadt_nb.experiments.runner import run
from sadt_nb.measures import hessian
from sadt_nb.measures.landscape import Surface, loss_surface
from sadt_nb.measures.sharpness import sam_sharpness
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.registry import make_model
from sadt_nb.models.weights import weights_checksum
from sadt_nb.papers.base import PaperRun, distilled
from sadt_nb.papers.claims import paired_by_image
from sadt_nb.papers.grids import PAPER_GRIDS, paper_ensembles, paper_grid, scaled
from sadt_nb.papers.networks import BY_IMAGE
from sadt_nb.papers.pages import comparison, interval
from sadt_nb.papers import sizes
from sadt_nb.papers.saf import extra_memory
from sadt_nb.papers.tables import TABLES
from scipy import stats
from torch import nn

SMALL = Run(epochs=2, n_train=60, bs=30, model_args=dict(dropout=0.))
quiet = dict(progress=False)


pytestmark = pytest.mark.usefixtures('narrow')


def stored_weights(cfg, root): return torch.load(root / cfg.name / 'weights.pt', weights_only=True)
def stored_json(cfg, root, name): return json.loads((root / cfg.name / f'{name}.json').read_text())


@pytest.fixture
def miniature(monkeypatch):
    "Return a table of two rates, two methods, three seeds, claims of both signs; seed 0 is also measured."
    claims = {('plain', 1e-3): .5, ('SAM', 1e-3): .6, ('plain', 2e-3): .6, ('SAM', 2e-3): .5}
    methods = dict(plain='baseline', SAM='sam')
    def table():
        cells = []
        for (row, lr), claim in claims.items():
            for seed in range(3):
                cfg = SMALL.but(method=methods[row], lr=lr, seed=seed, epochs=20)
                measures = ('gradient_norm',) if seed == 0 else ()
                label = f'{row} · rate {lr:g} · seed {seed}'
                cells.append(PaperRun(label, cfg, claim, spread=.01, measures=measures))
        return cells
    monkeypatch.setitem(PAPER_GRIDS, 'miniature', table)
    return table


def test_the_interval_is_that_of_a_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    oracle = stats.ttest_rel(a, b).confidence_interval(.95)
    expected = ((a - b).mean(), oracle.low, oracle.high)
    assert interval(a - b) == pytest.approx(expected, rel=1e-12)
    assert np.isnan(interval([1.])[1:]).all()
    assert interval([2., 2.]) == (2., 2., 2.)


MADE_UP = { # row: published accuracy, ours with seeds 0 to 3; the published differences are +4, -4, none, 0
    'plain': (.90, (.850, .852, .848, .850)),
    'seen': (.94, (.890, .893, .887, .890)),
    'smaller': (.94, (.873, .876, .870, .873)),
    'under half': (.94, (.860, .863, .857, .860)),
    'other side': (.94, (.830, .833, .827, .830)),
    'falls as claimed': (.86, (.810, .813, .807, .810)),
    'no claim': (None, (.890, .893, .887, .890)),
    'no difference': (.90, (.890, .893, .887, .890)),
    'scattered': (.94, (.7, .95, .9, .88)),
}


@pytest.fixture
def made_up(monkeypatch):
    "Return a table and results of finished runs with known accuracies on a very large test set."
    def table():
        for row, (claim, ours) in MADE_UP.items():
            method = 'baseline' if row == 'plain' else 'sam'
            for seed in range(len(ours)):
                cfg = Run(method=method, lr=1e-3 + 1e-5 * list(MADE_UP).index(row), seed=seed, epochs=10)
                yield PaperRun(f'{row} · seed {seed}', cfg, claim)
    monkeypatch.setitem(PAPER_GRIDS, 'made up', table)
    rows = []
    for cell in table():
        row, seed = cell.label.split(' · seed ')
        accuracy = MADE_UP[row][1][int(seed)]
        rows.append(dict(run=cell.run, status='finished', accuracy=accuracy, accuracy_bn=accuracy + .01,
                         history=[dict(epoch=1)], measures={}, data_facts=dict(test=10**9, classes=10)))
    return pd.DataFrame(rows)


def test_verdicts_follow_the_rule_of_the_claims(made_up):
    "The expected verdicts follow from the accuracies in `MADE_UP` by hand."
    shown = comparison('made up', made_up).set_index('row')
    verdicts = '', 'seen', 'smaller than claimed', 'absent', 'opposite', 'seen', '', '', 'no power'
    assert shown['verdict'].to_dict() == dict(zip(MADE_UP, verdicts))
    assert (shown.loc[['seen', 'smaller', 'scattered'], 'smallest effect'] == '2.00').all()
    assert shown.loc['seen', 'published difference'] == '+4.00'
    d = 100 * (np.array(MADE_UP['seen'][1]) - MADE_UP['plain'][1])
    low, high = stats.ttest_1samp(d, 0).confidence_interval(.95)
    assert shown.loc['seen', 'our difference'] == f'+4.00 [{low:+.2f}, {high:+.2f}]'
    assert shown.loc['seen', 'BatchNorm re-estimated'] == shown.loc['seen', 'our difference']
    assert shown.loc['no claim', 'interval for'] == 'new seeds'
    assert 'test images' in shown.loc['seen', 'interval for']


def test_a_difference_that_may_be_chance_has_no_power(made_up, monkeypatch):
    """One row by itself is seen with p = .03; beside thirty rows without an effect it is not.

    The procedure of Benjamini and Hochberg allows p = .05 / 31 for the smallest of 31 p-values."""
    ours = 100 * np.array(MADE_UP['plain'][1])
    t = stats.t.isf(.015, 3)
    step = np.array([-1., 1., -1., 1.])
    found = 2 + step * 2 / t / stats.sem(step)
    def with_rows(others):
        rows = {'plain': (.90, ours), 'lucky': (.93, ours + found)}
        for i in range(others): rows[f'none {i}'] = (.93, ours + step * (1 + i / 100))
        cells, results = [], []
        for i, (row, (claim, values)) in enumerate(rows.items()):
            for seed, value in enumerate(values):
                method = 'baseline' if row == 'plain' else 'sam'
                cfg = Run(method=method, lr=1e-3 + 1e-6 * i, seed=seed, epochs=10)
                cells.append(PaperRun(f'{row} · seed {seed}', cfg, claim))
                results.append(dict(run=cfg, status='finished', accuracy=value / 100, accuracy_bn=value / 100,
                                    history=[dict(epoch=1)], measures={},
                                    data_facts=dict(test=10**9, classes=10)))
        monkeypatch.setitem(PAPER_GRIDS, 'chance', lambda: cells)
        return comparison('chance', pd.DataFrame(results)).set_index('row')['verdict']
    assert with_rows(0)['lucky'] == 'seen'
    assert with_rows(30)['lucky'] == 'no power'


def accuracies(results, cells):
    "Return accuracies in percent, by the label of a cell."
    by_run = {row['run']: 100 * row['accuracy'] for _, row in results.iterrows()}
    return {c.label: by_run[c.run] for c in cells}


def right_or_wrong(results, cells):
    "Return which test images each network classifies correctly, by the label of a cell."
    by_run = {row['run']: unpacked(row['right'], row['data_facts']['test']) for _, row in results.iterrows()}
    return {c.label: by_run[c.run] for c in cells}


def test_a_scaled_table_from_the_shell_to_the_page(miniature, tmp_path, capsys):
    cli.sadt_grid('miniature', root=tmp_path, scale=.1)
    assert '0.1 of the epochs' in capsys.readouterr().out
    results = load_results(tmp_path)
    assert set(results['epochs']) == {2}
    assert (results['measures'].map(bool) == (results['seed'] == 0)).all()
    with pytest.raises(ValueError, match='no run of miniature is finished'): comparison('miniature', results)
    table = comparison('miniature', results, .1)
    acc = accuracies(results, paper_grid('miniature', .1))
    bits = right_or_wrong(results, paper_grid('miniature', .1))
    for place, where, claim in ((1, 'rate 0.001', 10.), (3, 'rate 0.002', -10.)):
        row = table.iloc[place]
        labels = [[f'{what} · {where} · seed {s}' for s in range(3)] for what in ('SAM', 'plain')]
        mean = np.mean([acc[a] - acc[b] for a, b in zip(*labels)])
        low, high = paired_by_image(*[np.stack([bits[label] for label in of]) for of in labels])[1:3]
        assert row['row'] == 'SAM'
        assert row['where'] == where
        assert row['our difference'] == f'{mean:+.2f} [{low:+.2f}, {high:+.2f}]'
        assert row['interval for'] == BY_IMAGE
        assert row['published difference'] == f'{claim:+.2f}'
        assert row['verdict'] == 'outside its regime', 'a tenth of the training'
    cli.sadt_report('miniature', root=tmp_path, to=tmp_path / 'pages', scale=.1)
    printed = capsys.readouterr().out
    for v in table['verdict'].iloc[[1, 3]]: assert v in printed
    page = next((tmp_path / 'pages').glob('*.html')).read_text()
    text = next((tmp_path / 'pages').glob('*.md')).read_text()
    for written in (page, text):
        assert 'scaled to 0.1 of the epochs' in written
        assert '0.1 of the epochs' in written
        assert 'checksum of the test set' in written
        assert 'torch' in written
        assert 'source' in written
    assert 'data:image/png' in page
    assert 'http' not in page
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len(lines) == 2 + 4, 'a header, a rule, and four rows'
    assert len({line.count('|') for line in lines}) == 1, 'all lines have the same number of cells'


def test_a_part_of_a_table_in_another_precision(miniature, tmp_path, capsys):
    "The runs have that precision, do not count for the table in float32, and every page names it."
    cli.sadt_grid('miniature', root=tmp_path, scale=.1, amp='bf16', only='sam seed 1')
    assert 'plain' not in capsys.readouterr().out
    results = load_results(tmp_path)
    assert {(r.method, r.seed, r.amp) for r in results['run']} == {('sam', 1, 'bf16')}
    assert len(results) == 2
    with pytest.raises(ValueError, match=r'sadt_grid miniature --scale 0.1$'):
        comparison('miniature', results, .1)
    with pytest.raises(ValueError, match=r'sadt_grid miniature --amp bf16$'):
        comparison('miniature', results, amp='bf16')
    assert comparison('miniature', results, .1, 'bf16')['n'].tolist() == ['0 of 3', '1 of 3'] * 2
    pages = tmp_path / 'pages'
    cli.sadt_report('miniature', root=tmp_path, to=pages, scale=.1, amp='bf16')
    expected = {f'miniature-0.1-bf16{suffix}' for suffix in ('.html', '.md', '.png')}
    assert {f.name for f in pages.iterdir()} == expected
    text = (pages / 'miniature-0.1-bf16.md').read_text()
    title = '# miniature: published and ours, scaled to 0.1 of the epochs, in bf16\n'
    assert text.startswith(title)
    assert text.count('0.1 of the epochs; in bf16') == 4


def test_mistakes_in_the_options_of_a_grid(miniature, tmp_path, capsys):
    cases = [(dict(amp='fp8'), 'bf16'),
             (dict(only='sam seeds'), "'sam seeds'; the first label is 'plain · rate 0.001 · seed 0'")]
    for options, message in cases:
        with pytest.raises(SystemExit) as e: cli.sadt_grid('miniature', root=tmp_path, **options)
        assert e.value.code == 2
        assert message in capsys.readouterr().err


def test_another_precision_holds_for_teachers_too(monkeypatch):
    student = SMALL.but(method='distillation', split=0, seed=1, teachers=SMALL.but(split=0))
    monkeypatch.setitem(PAPER_GRIDS, 'one student', lambda: [PaperRun('student', student)])
    cell, = paper_grid('one student', amp='bf16')
    assert cell.run == student.but(amp='bf16', teachers=SMALL.but(split=0, amp='bf16'))
    assert cell.run != student


def test_one_repetition_gives_no_verdict(miniature, tmp_path):
    run_grid([c.run for c in paper_grid('miniature', .1, only='seed 1')], tmp_path, **quiet)
    table = comparison('miniature', load_results(tmp_path), .1)
    assert table['verdict'].tolist() == ['', 'outside its regime'] * 2
    assert table['n'].tolist() == ['1 of 3'] * 4


def test_scaling_shortens_teachers_and_keeps_falls_of_the_rate():
    teacher = SMALL.but(epochs=90, sched='step', split=0)
    student = teacher.but(method='distillation', teachers=teacher, seed=1)
    short = scaled(student, .2)
    assert short.epochs == 18
    assert short.sched == 'thirds'
    assert short.teachers[0] == scaled(teacher, .2)
    assert scaled(student, 1) is student
    assert scaled(teacher, .001).epochs == 1
    for bad in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r'\(0, 1\]'): scaled(student, bad)
    seen = []
    class RecordRate(Callback):
        order = 70 # after the scheduler
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.opt.hypers[-1]['lr']))
            raise CancelBatchException()
    make_learner(scaled(teacher, .2)).fit(18, cbs=RecordRate())
    for epoch, rate in seen: assert rate == pytest.approx(1e-3 * .1**(epoch // 6), rel=1e-12)
    assert len(seen) == 36


@pytest.mark.parametrize('model', ['resnet18', 'simple_cnn', 'wide_resnet_28_10'])
def test_flops_of_a_forward_equal_a_count_by_layer(model):
    "Layer by layer: two operations for each product of a kernel and an output."
    net = make_model(model, 10).eval()
    operations = []
    def listen(m, inputs, out):
        per_output = m.weight[0].numel()
        operations.append(2 * per_output * out.numel())
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.register_forward_hook(listen)
    with torch.no_grad(): net(torch.zeros(1, 3, 32, 32))
    one = run_cost(Run(data='cifar10', model=model, epochs=1, bs=100, valid=.1))
    assert one.passes == 450
    assert one.flops == 45_000 * 3 * sum(operations)


def test_costs_add_up():
    base = Run(data='cifar10', epochs=3, bs=128, valid=.1, split=0)
    c = run_cost(base)
    assert run_cost(base.but(method='sadt2')).flops == pytest.approx(3 * c.flops)
    assert run_cost(base.but(epochs=6)).passes == 2 * c.passes
    two_teachers = base.but(method='distillation', teachers=(base, base.but(seed=1)))
    with_forwards = c.flops * (1 + 2 / 3) # a teacher makes a forward, which is a third of a pass
    assert run_cost(two_teachers).flops == pytest.approx(with_forwards)
    expected = 2 * (c.passes * .1 + c.flops / 1e9)
    assert estimated_seconds([base, base], Machine(.1, 1e9)) == pytest.approx(expected)
    unknown = Run(data='some/folder')
    with pytest.raises(ValueError, match='number of images in some/folder is unknown'): run_cost(unknown)


def test_the_stored_sizes_are_those_of_the_tables(monkeypatch):
    "All but the operations, which are counted in the next test."
    monkeypatch.setattr(cost, '_forward_flops', lambda *args: 0)
    for name in TABLES:
        stored = sizes.size_of(name)
        now = sizes.table_size(name)
        assert (stored.runs, stored.needs) == (now.runs, now.needs), name
        assert stored.passes == pytest.approx(now.passes, rel=1e-12), name
        assert [group[:3] for group in stored.measures] == [group[:3] for group in now.measures], name


@pytest.mark.slow
def test_the_stored_operations_are_those_of_the_tables():
    for name in TABLES: assert sizes.size_of(name) == sizes.table_size(name), name


def test_a_table_that_needs_a_missing_package_says_so(monkeypatch):
    monkeypatch.setattr(sizes, 'find_spec', lambda package: None)
    row = cli._size('distill/figure9', Machine(.005, 1e11), 1000)
    assert row['error'] == 'needs open_clip, which is not installed'
    assert row['training_seconds'] > 0
    assert 'error' not in cli._size('sadt/notebook20', Machine(.005, 1e11), 1000)


def test_the_time_of_measures_grows_with_images_and_network():
    run = Run(data='cifar10', bs=100)
    one = measure_cost(run, ['trace'], 250)
    assert one.passes == 3 * PASSES['trace']
    assert measure_cost(run, ['trace', 'surface'], 250).flops / one.flops == pytest.approx(320 / 160)
    assert measure_cost(run, ['trace'], 1000).flops == 4 * one.flops
    assert measure_cost(run.but(epochs=99), ['trace'], 250) == one
    few = run.but(n_train=125)
    assert measure_cost(few, ['trace'], 250).flops == one.flops / 2, 'no more samples than images'
    plain = run_cost(run.but(n_train=250, epochs=1, valid=0.)).flops
    assert one.flops == pytest.approx(160 * plain)
    assert measure_cost(run, []) == Cost(0, 0)
    seconds = 2 * (one.passes * .1 + one.flops / 1e9)
    both = {run: ['trace'], run.but(seed=1): ['trace']}
    assert measuring_seconds(both, Machine(.1, 1e9), 250) == pytest.approx(seconds)


@pytest.mark.parametrize('study', ['flatness_digits', 'cifar_cnn'])
def test_passes_of_measures_are_those_of_stored_runs(study):
    "The seconds of a stored measure, in passes of the same training. Short times are rounded too coarsely."
    found = {}
    for _, r in load_results(f'published/{study}').iterrows():
        if r['status'] != 'finished': continue
        for name, m in r['measures'].items():
            if m['seconds'] < 2 or name in ('calibration_error', 'eigenvalue'): continue
            seconds_per_image = r['train_seconds'] / r['forwards'] / r['bs']
            found.setdefault(name, []).append(m['seconds'] / m['samples'] / seconds_per_image)
    assert found.keys() >= {'trace', 'average_sharpness', 'spectrum', 'surface'}
    for name, passes in found.items(): assert .6 < np.median(passes) / PASSES[name] < 1.6, name
    assert PASSES.keys() == MEASURES.keys()


@pytest.mark.parametrize('width', [8, 32])
def test_passes_of_the_largest_eigenvalue_are_those_of_all_its_products(width, monkeypatch):
    """Each product is counted where it is computed, and takes about four passes.

    The stored runs were measured before a last Lanczos process looked for repeated eigenvalues."""
    product, calls = hessian._double_backward, []
    def counted(*args, **kwargs):
        calls.append(1)
        return product(*args, **kwargs)
    monkeypatch.setattr(hessian, '_double_backward', counted)
    torch.manual_seed(0)
    dls = get_dls('digits', bs=128, device='cpu')
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.ReLU(), nn.Linear(width, 10))
    net(dls.one_batch()[0])
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), lr=.01)
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    net.eval()
    found = MEASURES['eigenvalue'](learn, samples=500)
    assert found.converged and found.n == len(calls)
    assert .75 < 4 * len(calls) / PASSES['eigenvalue'] < 1.33


def test_durations_are_written_in_two_units_at_most():
    seconds = (3, 99, 130, 5999, 12_000, 1e6)
    assert [duration(s) for s in seconds] == ['3 s', '99 s', '2 min', '1 h 40 min', '3 h 20 min', '12 days']


def test_tracked_sharpness_is_right_and_changes_no_weight(tmp_path):
    tracked = SMALL.but(epochs=4, track=2, crop=2, flip=True, model_args=dict(dropout=.2))
    plain = tracked.but(track=0)
    a = run(tracked, tmp_path, **quiet)
    b = run(plain, tmp_path, **quiet)
    weights = stored_weights(plain, tmp_path)
    assert all(torch.equal(v, weights[k]) for k, v in stored_weights(tracked, tmp_path).items())
    assert a['accuracy'] == b['accuracy']
    assert 'tracked' not in b
    assert [r['epoch'] for r in a['tracked']] == [2, 4]
    expected = sam_sharpness(stored_learner(tracked, tmp_path), samples=1000)
    assert a['tracked'][-1]['sharpness'] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match='`track`'): SMALL.but(track=-1)


def test_a_stored_surface_is_the_surface(tmp_path):
    run(SMALL, tmp_path, **quiet)
    m = measure_run(SMALL, tmp_path, ('surface',), samples=20)['measures']['surface']
    s = loss_surface(stored_learner(SMALL, tmp_path), points=5, samples=20, progress=False)
    loss = np.array(m['loss'])
    assert loss.shape == (25, 25)
    assert np.allclose(loss[::6, ::6], s.loss, rtol=1e-5), 'each sixth point of each axis'
    assert m['x'][::6] == pytest.approx(s.x.tolist(), abs=1e-12)
    assert m['value'] == pytest.approx(loss.mean() - loss[12, 12], abs=5e-6), 'the losses are rounded'
    assert m['about'] == s.about
    json.dumps(m, allow_nan=False)
    measured = measure_run(SMALL, tmp_path, ('gradient_norm',), 20, force=True)['measures']
    assert set(measured) == {'surface', 'gradient_norm'}


def test_the_centre_of_a_stored_surface_with_an_even_number_of_points():
    "Between the points around the middle, a plane has the mean of their losses."
    x = np.linspace(-1, 1, 4)
    plane = 5 + x[:, None] + 2 * x
    found = _surface_as_json(Surface(x, x, plane + np.eye(4)[:, ::-1] * [3, 0, 0, 3], 'made up'))
    assert found['value'] == pytest.approx(6 / 16) # the corners are above the plane


def test_a_measure_trains_a_run_again_only_if_it_needs_the_weights(tmp_path):
    weights = tmp_path / SMALL.name / 'weights.pt'
    def time_of_training(): return stored_json(SMALL, tmp_path, 'result')['wall_seconds']
    def measures(): return stored_json(SMALL, tmp_path, 'measures')['measures']
    def grid(*names): return run_grid([SMALL], tmp_path, measures={SMALL: names}, samples=20, **quiet)
    grid('gradient_norm')
    first = time_of_training()
    weights.unlink()
    grid('gradient_norm')
    assert time_of_training() == first, 'all results are stored, so nothing is trained'
    assert not weights.exists()
    grid('gradient_norm', 'sharpness')
    assert time_of_training() != first
    assert set(measures()) == {'gradient_norm', 'sharpness'}
    before = measures()['gradient_norm']['value']
    with pytest.raises(ValueError, match='unknown measure'): grid('flatness')
    state = torch.load(weights, weights_only=True)
    other = {k: v * 2 for k, v in state.items()}
    torch.save(other, weights) # these are not the weights of the result
    grid('gradient_norm')
    assert measures()['gradient_norm']['value'] == before
    result = stored_json(SMALL, tmp_path, 'result') | dict(weights_crc32=weights_checksum(other))
    (weights.parent / 'result.json').write_text(json.dumps(result)) # as if another machine had trained it
    grid('gradient_norm')
    assert set(measures()) == {'gradient_norm'}, 'measures of two networks are not stored together'
    assert measures()['gradient_norm']['value'] != before


def test_memory_of_saf_and_mesa_is_counted(tmp_path, monkeypatch, capsys):
    "The memory equals a count by hand; the table shows it beside the published and the computed number."
    cases = dict(saf=SMALL.but(method='saf', method_args=dict(start_epoch=0, lag=3)),
                 mesa=SMALL.but(method='mesa', method_args=dict(start_epoch=0)),
                 baseline=SMALL)
    n = SMALL.n_train
    weights = sum(t.nbytes for t in make_model(SMALL.model, 10).state_dict().values())
    held = {m: run(cfg, tmp_path, progress=False)['method_bytes'] for m, cfg in cases.items()}
    assert held == dict(saf=3 * n * (10 * 2 + 2), mesa=weights, baseline=0)
    formula = extra_memory(n, 10, weights // 4)
    def cell(m): return PaperRun(f'{m} · digits', cases[m], memory=2**20 * 7., formula=formula[m])
    monkeypatch.setitem(PAPER_GRIDS, 'memory', lambda: [cell('saf'), cell('mesa')])
    cli.sadt_report('memory', root=tmp_path, to=tmp_path / 'pages')
    assert 'held MB' in capsys.readouterr().out
    table = comparison('memory', load_results(tmp_path))
    assert table['published MB'].tolist() == ['7', '7']
    assert table['held MB'].tolist() == [f'{held[m] / 2**20:,.0f}' for m in ('saf', 'mesa')]


def test_memory_of_the_published_table():
    published = {c.label: (c.memory / 2**20, c.formula / 2**20) for c in paper_grid('saf/table2')}
    expected = {'saf · imagenet · resnet50', 'mesa · imagenet · resnet50', 'saf · cifar100 · resnet18'}
    assert published.keys() == expected
    for label, (stated, computed) in published.items(): assert abs(stated - computed) < .006 * stated, label


def table_column(epochs, bs, lr, decay, rho, beta, lam, start_epoch, opt='sgd', decay_saf=None):
    "Return one column of Tables 4 and 5 of the SAF paper; `lam` is that of SAF and of MESA."
    decay_saf = decay if decay_saf is None else decay_saf # of SAF and MESA
    return dict(epochs=epochs, bs=bs, lr=lr, decay=decay, decay_saf=decay_saf, rho=rho, beta=beta, lam=lam,
                start_epoch=start_epoch, opt=opt)


HYPERPARAMETERS = {
    ('cifar', 'resnet18'): table_column(200, 128, .05, 5e-4, .05, .9995, (.3, .8), 5),
    ('cifar', 'resnet101'): table_column(200, 128, .05, 5e-4, .05, .9995, (.3, .8), 5),
    ('cifar', 'wide_resnet_28_10'): table_column(200, 128, .05, 1e-3, .1, .9995, (.3, .8), 5),
    ('cifar', 'pyramidnet_110'): table_column(200, 128, .05, 5e-4, .2, .9995, (.3, .8), 5),
    ('imagenet', 'resnet50'): table_column(90, 4096, 1.4, 3e-5, .05, .9998, (.3, .3), 10, decay_saf=1e-4),
    ('imagenet', 'resnet101'): table_column(90, 4096, 1.4, 3e-5, .05, .9998, (.3, .3), 10),
    ('imagenet', 'resnet152'): table_column(90, 4096, 1.4, 3e-5, .05, .9998, (.3, .3), 10),
    ('imagenet', 'vit_s32'): table_column(300, 4096, 3e-3, .3, .05, .9998, (.3, .3), 150, opt='adamw'),
}


@pytest.mark.parametrize('table', ['saf/table1', 'saf/table3'])
def test_hyperparameters_of_the_saf_paper(table):
    runs = [c.run for c in paper_grid(table)]
    for r in runs:
        on_imagenet = r.data == 'imagenet'
        o = HYPERPARAMETERS['imagenet' if on_imagenet else 'cifar', r.model]
        decay = o['decay_saf'] if r.method in ('saf', 'mesa') else o['decay']
        assert (r.epochs, r.bs, r.lr, r.opt) == (o['epochs'], o['bs'], o['lr'], o['opt']), r
        assert r.sched == 'cosine', r
        assert dict(r.opt_args)['weight_decay'] == decay, r
        assert r.flip
        if on_imagenet: assert r.resized_crop == .08
        else: assert r.crop == 4
        cbs = {type(cb).__name__: cb for cb in make_method(r.method, **dict(r.method_args))}
        if r.method == 'sam': assert cbs['SAM'].rho == o['rho']
        if r.method == 'saf':
            saf = cbs['SAF']
            assert (saf.lam, saf.tau, saf.lag, saf.start_epoch) == (o['lam'][0], 5, 3, o['start_epoch'])
        if r.method == 'mesa':
            mesa = cbs['MESA']
            expected = (o['lam'][1], 5, o['beta'], o['start_epoch'])
            assert (mesa.lam, mesa.tau, mesa.beta, mesa.start_epoch) == expected
    assert len({(r.data, r.model) for r in runs}) == (4 if table == 'saf/table1' else 8)


def test_the_control_of_fewer_epochs_has_those_of_the_methods():
    "There are plain runs for each number of epochs that methods have at equal passes, with no other change."
    table = paper_grid('compare/digits')
    short = paper_grid('compare/digits_short')
    assert {c.run.epochs for c in short} == {c.run.epochs for c in table} - {15}
    plain = {c.run.seed: c.run for c in table if c.label.startswith('baseline · equal epochs')}
    assert len(short) == 4 * len(plain)
    for c in short: assert c.run == plain[c.run.seed].but(epochs=c.run.epochs)


@pytest.mark.parametrize('table, epochs, seeds', [('compare/digits', 15, 5), ('compare/cifar_small', 15, 3)])
def test_all_methods_side_by_side(table, epochs, seeds):
    "Teachers are runs of the table with other seeds."
    cells = paper_grid(table)
    runs = {c.run for c in cells}
    assert len(cells) == 3 * seeds * len(METHODS)
    for c in cells:
        name, where, _ = c.label.split(' · ')
        m = METHODS[name]
        per_epoch = {'equal epochs': 1, 'equal steps': m.steps, 'equal passes': m.passes}[where]
        assert c.run.method == name, c.label
        assert abs(per_epoch * c.run.epochs - epochs) <= max(1, m.steps, m.passes) / 2 + 1e-9, c.label
        for teacher in c.run.teachers:
            assert teacher.seed != c.run.seed
            assert teacher.method == 'baseline'
            assert teacher in runs
    shared = {(r.lr, r.opt, r.bs, r.split, r.select, r.data_args) for r in runs}
    assert len(shared) == 1


AIRBENCH = { # from the authors' code; bn: the momentum of BatchNorm as PyTorch defines it
    'fast/94': dict(widths=(64, 256, 256), epochs=9.9, lr=11.5, decay=.0153, momentum=.85, smoothing=.2,
                    shift=2, cutout=0, depth=2, bn=.4, sched='triangle'),
    'fast/96': dict(widths=(128, 384, 512), epochs=37, lr=9., decay=.012, momentum=.85, smoothing=.2,
                    shift=4, cutout=12, depth=3, bn=.1, sched='triangle_to_zero'),
}


def in_order(values): return tuple(dict.fromkeys(values)) # without repetitions


@pytest.mark.parametrize('table', AIRBENCH)
def test_the_fast_presets_are_what_their_authors_ran(table):
    o = AIRBENCH[table]
    r = paper_grid(table)[0].run
    net = make_model(r.model, **dict(r.model_args))
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert in_order(m.out_channels for m in convs[1:]) == in_order(o['widths'])
    assert len(convs) == 1 + 3 * o['depth']
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(o['bn'], 1e-12)}
    assert (r.method, r.epochs, r.bs, r.lr) == ('baseline', o['epochs'], 1024, o['lr'])
    assert (r.opt, r.sched) == ('decoupled_sgd', o['sched'])
    assert dict(r.opt_args) == dict(momentum=o['momentum'], weight_decay=o['decay'])
    assert (r.label_smoothing, r.crop, r.cutout) == (o['smoothing'], o['shift'], o['cutout'])
    assert r.cutout_inside == bool(o['cutout'])
    assert (r.pad_mode, r.flip, r.normalize) == ('reflect', 'alternate', 'data')
    assert (r.lookahead, r.drop_last) == (5, True)
    assert (r.valid, r.n_train, r.amp, r.views) == (0, None, 'bf16', 2)


@pytest.mark.parametrize('name', ['94', '96', 'small'])
def test_the_fast_presets_have_every_method_and_control(name):
    cells = paper_grid(f'fast/{name}')
    plain = {c.run.seed: c.run for c in cells if c.label.startswith('baseline ·')}
    for seed, base in plain.items():
        suffix = f' · seed {seed}'
        mine = {c.label.removesuffix(suffix): c.run for c in cells if c.label.endswith(suffix)}
        assert set(METHODS) <= set(mine)
        assert {mine[m].method for m in METHODS} == set(METHODS)
        assert all(mine[m].epochs == base.epochs for m in METHODS)
        radii = {dict(r.method_args).get('rho', .05) for r in mine.values() if r.method == 'sam'}
        assert radii == {.05, .1}
        longer = sorted(r.epochs / base.epochs for label, r in mine.items() if label.startswith('baseline, '))
        assert longer == pytest.approx([4 / 3, 2, 3], abs=.01)
        teacher, = mine['distillation'].teachers
        assert teacher == plain[teacher.seed]
        assert teacher.seed != seed


@pytest.mark.parametrize('name', ['94', '96', 'small'])
def test_the_fast_presets_with_wrong_labels_differ_in_the_data_only(name):
    cells = paper_grid(f'fast/{name}')
    noisy = paper_grid(f'fast/{name}_noise40')
    assert [c.label for c in noisy] == [c.label for c in cells]
    for c, d in zip(cells, noisy):
        assert d.run.data == 'noisy_cifar10'
        assert dict(d.run.data_args) == dict(noise=.4)
        if not c.run.teachers:
            assert d.run == c.run.but(data='noisy_cifar10', data_args=dict(noise=.4))


@pytest.mark.parametrize('name', ['94', 'narrow'])
def test_the_rounds_of_the_fast_presets(name):
    "Each round learns from the round before; all networks of a preset start from other weights."
    runs = {c.label: c.run for c in paper_grid(f'fast/{name}_rounds')}
    baseline = next(c.run for c in paper_grid(f'fast/{name}') if c.label == 'baseline · seed 0')
    assert len(runs) == len({r.seed for r in runs.values()}) == 20
    for seed in range(0, 50, 10):
        teacher = runs[f'teacher · seed {seed}']
        assert teacher == baseline.but(seed=seed)
        for r in (1, 2, 3):
            student = runs[f'alpha 0.5, round {r} · seed {seed}']
            assert student.teachers == (teacher,)
            assert (student.method, dict(student.method_args)) == ('distillation', dict(alpha=.5))
            alone = student.but(method='baseline', method_args={}, teachers=())
            assert alone == baseline.but(seed=student.seed)
            teacher = student


@pytest.mark.parametrize('name', ['fast/94_rounds', 'fast/narrow_rounds'])
def test_the_ensembles_of_rounds_meet_independent_ensembles_of_the_same_size(name):
    runs = {c.label: c.run for c in paper_grid(name)}
    found = {e.label: e.members for e in paper_ensembles(name)}
    assert len(found) == 5 * 3 * 2
    used = []
    for seed in range(0, 50, 10):
        teacher = runs[f'teacher · seed {seed}']
        for k in (1, 2, 3):
            chain = [teacher, *(runs[f'alpha 0.5, round {r} · seed {seed}'] for r in range(1, k + 1))]
            assert [*found[f'alpha 0.5, rounds 0 to {k} · seed {seed}']] == chain
            independent = found[f'independent, {k + 1} members · seed {seed}']
            assert independent[0] == teacher
            assert len(set(independent)) == k + 1 and not any(m.teachers for m in independent)
            used += independent
    assert {used.count(m) for m in used} == {2 + 3 + 4}, 'every teacher is in as many ensembles'


def changed_fields(a, b): return {f for f in a.to_dict() if getattr(a, f) != getattr(b, f)}


def test_the_steps_of_the_fast_recipe_end_in_the_recipe():
    steps = [c.run for c in paper_grid('fast/steps') if c.run.seed == 0]
    changes = [len(changed_fields(a, b)) for a, b in zip(steps, steps[1:])]
    assert changes == [2, 1, 1, 1, 1, 1, 2], 'one part at a time'
    assert steps[-1] in {c.run for c in paper_grid('fast/search')}


def test_flatness_shares_its_runs_with_the_comparison():
    "Runs in both tables are trained once; flatness adds only the rounds and the run of twice the epochs."
    compared = {c.run for c in paper_grid('compare/cifar_small') if 'equal epochs' in c.label}
    own = {c.label.split(' · ')[0] for c in paper_grid('flatness/simple_cnn') if c.run not in compared}
    assert own == {'twice the epochs', 'round 1', 'round 2'}


def test_time_with_all_workers_busy(tmp_path):
    table1 = pytest.importorskip('benchmarks.table1', reason='only a checkout has the benchmarks')
    # three at once from 2 to 3, two at once from 1 to 9; one ends as another begins
    spans = [(0., 10.), (1., 4.), (4., 9.), (2., 3.)]
    assert [table1.at_full_concurrency(spans, n) for n in (1, 2, 3, 4)] == [10., 8., 1., 0.]
    cfg = SMALL.but(epochs=1)
    before = time.time()
    r = run(cfg, tmp_path, **quiet)
    (begin, end), = table1.timeline([cfg], tmp_path)
    assert before - .1 <= begin
    assert begin < end
    assert end <= time.time() + .1
    assert end - begin == pytest.approx(r['wall_seconds'])


def test_the_probe_finds_overhead_and_speed_of_a_machine(monkeypatch):
    "A machine on which a pass takes 250 ms and the time of three forward passes for each image."
    speed, per_image = 1e12, cost._forward_flops('resnet20', (), 10, 32)
    def seconds(net, bs, device, n): return .25 + 3 * per_image * bs / speed
    monkeypatch.setattr(cost, '_seconds_per_pass', seconds)
    found = probe_machine('cpu')
    assert (found.overhead, found.rate) == (pytest.approx(.25), pytest.approx(speed))


def test_long_times_are_given_in_days():
    for days, text in ((3, '3 days'), (3.5, '4 days'), (60.51, '61 days')):
        assert duration(days * 86400) == text
    assert duration(3 * 365.25 * 86400) == '3 years'


def test_a_default_temperature_is_left_out_of_a_student():
    "Then the student has the key that it had before the option existed."
    teacher = Run(valid=0.)
    for given, stored in ((None, None), (2., 2.), (4., None)):
        options = dict(distilled(teacher, 1, alpha=.25, temperature=given).method_args)
        assert options == (dict(alpha=.25) if stored is None else dict(alpha=.25, temperature=stored))
