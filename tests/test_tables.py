"Tables as one command: scaled, measured, estimated, and held against the paper by a fixed rule."
import json
import time

import numpy as np
import pytest
import torch
from fastai.callback.core import CancelBatchException
from sadt_nb.experiments import cli
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.cost import Machine, estimated_seconds, run_cost
from sadt_nb.experiments.grid import duration, run_grid
from sadt_nb.experiments.measure import measure_run
from sadt_nb.experiments.pages import comparison, interval, verdict
from sadt_nb.experiments.papers import PAPER_GRIDS, PaperRun, extra_memory, paper_grid, scaled
from sadt_nb.experiments.report import load_results
from sadt_nb.experiments.runner import Callback, make_learner, run, stored_learner
from sadt_nb.measures.landscape import loss_surface
from sadt_nb.measures.sharpness import sam_sharpness
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.registry import make_model
from scipy import stats
from torch import nn

SMALL = Run(epochs=2, n_train=60, bs=30, model_args=dict(dropout=0.))
quiet = dict(progress=False)


@pytest.fixture
def miniature(monkeypatch):
    "A table of two places, two methods and three repetitions, with claims of both signs; one figure measures."
    def table():
        return [PaperRun(f'{what} · rate {lr:g} · seed {s}', SMALL.but(method=method, lr=lr, seed=s, epochs=20), claim, spread=.01, measures=('gradient_norm',) if s == 0 else ())
                for lr, claims in ((1e-3, (.5, .6)), (2e-3, (.6, .5))) for (what, method), claim in zip((('plain', 'baseline'), ('SAM', 'sam')), claims) for s in range(3)]
    monkeypatch.setitem(PAPER_GRIDS, 'miniature', table)
    return table


def test_the_interval_is_that_of_a_paired_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    oracle = stats.ttest_rel(a, b).confidence_interval(.95)
    assert interval(a - b) == pytest.approx(((a - b).mean(), oracle.low, oracle.high), rel=1e-12)
    assert np.isnan(interval([1.])[1:]).all() and interval([2., 2.]) == (2., 2., 2.)
    assert verdict(.1, 2., 2.) == 'reproduced' and verdict(.1, 0., 2.) == verdict(-.1, -2., 0.) == 'not decidable here' and verdict(0., 1., 2.) == ''


def test_a_scaled_table_from_the_shell_to_the_page(miniature, tmp_path, capsys):
    cli.sadt_grid('miniature', root=tmp_path, scale=.1)
    said = capsys.readouterr()
    assert '0.1 of the epochs' in said.out
    results = load_results(tmp_path)
    assert set(results['epochs']) == {2} and (results['measures'].map(bool) == (results['seed'] == 0)).all()
    with pytest.raises(ValueError, match='no run of miniature is finished'): comparison('miniature', results)
    table = comparison('miniature', results, .1)
    acc = {c.label: 100 * next(r for _, r in results.iterrows() if r['run'] == c.run)['accuracy'] for c in paper_grid('miniature', .1)}
    for (_, row), where in zip(table.iloc[[1, 3]].iterrows(), ('rate 0.001', 'rate 0.002')):
        d = [acc[f'SAM · {where} · seed {s}'] - acc[f'plain · {where} · seed {s}'] for s in range(3)]
        low, high = stats.ttest_1samp(d, 0).confidence_interval(.95)
        assert row['row'] == 'SAM' and row['where'] == where and row['our difference'] == f'{np.mean(d):+.2f} [{low:+.2f}, {high:+.2f}]'
        claim = {'rate 0.001': 10., 'rate 0.002': -10.}[where]
        assert row['published difference'] == f'{claim:+.2f}' and row['verdict'] == verdict(claim, low, high)
    cli.sadt_report('miniature', root=tmp_path, to=tmp_path / 'pages', scale=.1)
    said = capsys.readouterr().out
    for v in table['verdict'].iloc[[1, 3]]: assert v in said
    page, text = (next((tmp_path / 'pages').glob(f'*{s}')).read_text() for s in ('.html', '.md'))
    for t in (page, text): assert 'scaled to 0.1 of the epochs' in t and '0.1 of the epochs' in t and 'checksum of the test set' in t and 'torch' in t and 'source' in t
    assert 'data:image/png' in page and 'http' not in page
    lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len(lines) == 2 + 4 and len({line.count('|') for line in lines}) == 1, 'a header, a rule, and four rows of as many cells'


def test_a_part_of_a_table_in_another_precision(miniature, tmp_path, capsys):
    "It is trained in it, it is not taken for the table itself, and every page says so."
    cli.sadt_grid('miniature', root=tmp_path, scale=.1, amp='bf16', only='sam seed 1')
    assert 'plain' not in capsys.readouterr().out
    results = load_results(tmp_path)
    assert {(r.method, r.seed, r.amp) for r in results['run']} == {('sam', 1, 'bf16')} and len(results) == 2
    with pytest.raises(ValueError, match=r'sadt_grid miniature --scale 0.1$'): comparison('miniature', results, .1)
    with pytest.raises(ValueError, match=r'sadt_grid miniature --amp bf16$'): comparison('miniature', results, amp='bf16')
    assert comparison('miniature', results, .1, 'bf16')['n'].tolist() == ['0 of 3', '1 of 3'] * 2
    cli.sadt_report('miniature', root=tmp_path, to=tmp_path / 'pages', scale=.1, amp='bf16')
    assert {f.name for f in (tmp_path / 'pages').iterdir()} == {f'miniature-0.1-bf16{s}' for s in ('.html', '.md', '.png')}
    text = (tmp_path / 'pages' / 'miniature-0.1-bf16.md').read_text()
    assert text.startswith('# miniature: published and ours, scaled to 0.1 of the epochs, in bf16\n') and text.count('0.1 of the epochs; in bf16') == 4
    for wrong, said in ((dict(amp='fp8'), 'bf16'), (dict(only='sam seeds'), "'sam seeds'; its first is 'plain · rate 0.001 · seed 0'")):
        with pytest.raises(SystemExit) as e: cli.sadt_grid('miniature', root=tmp_path, **wrong)
        assert e.value.code == 2 and said in capsys.readouterr().err
    student = SMALL.but(method='distillation', split=0, seed=1, teachers=SMALL.but(split=0))
    PAPER_GRIDS['miniature'] = lambda: [PaperRun('student', student)]
    (cell,) = paper_grid('miniature', amp='bf16')
    assert cell.run == student.but(amp='bf16', teachers=SMALL.but(split=0, amp='bf16')) != student


def test_one_repetition_decides_nothing(miniature, tmp_path):
    run_grid([c.run for c in miniature() if c.label.endswith('seed 1')], tmp_path, **quiet)
    table = comparison('miniature', load_results(tmp_path))
    assert table['verdict'].tolist() == ['', 'not decidable here'] * 2 and table['n'].tolist() == ['1 of 3'] * 4


def test_scaling_shortens_teachers_and_keeps_falls_of_the_rate():
    teacher = SMALL.but(epochs=90, sched='step', split=0)
    student = teacher.but(method='distillation', teachers=teacher, seed=1)
    short = scaled(student, .2)
    assert (short.epochs, short.sched, short.teachers[0]) == (18, 'thirds', scaled(teacher, .2)) and scaled(student, 1) is student and scaled(teacher, .001).epochs == 1
    for bad in (0, 1.5, -1):
        with pytest.raises(ValueError, match=r'\(0, 1\]'): scaled(student, bad)
    seen = []
    class See(Callback):
        order = 70 # after the scheduler
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.opt.hypers[-1]['lr']))
            raise CancelBatchException()
    make_learner(scaled(teacher, .2)).fit(18, cbs=See())
    assert all(lr == pytest.approx(1e-3 * .1**(epoch // 6), rel=1e-12) for epoch, lr in seen) and len(seen) == 36


@pytest.mark.parametrize('model', ['resnet18', 'simple_cnn', 'wide_resnet_28_10'])
def test_operations_are_counted_right(model):
    "Layer by layer: two operations for each product of a kernel and an output."
    net, count = make_model(model, 10).eval(), []
    def listen(m, inputs, out):
        per_output = m.weight[0].numel()
        count.append(2 * per_output * out.numel())
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)): m.register_forward_hook(listen)
    with torch.no_grad(): net(torch.zeros(1, 3, 32, 32))
    one = run_cost(Run(data='cifar10', model=model, epochs=1, bs=100, valid=.1))
    assert one.passes == 450 and one.flops == 45_000 * 3 * sum(count)


def test_costs_add_up():
    base = Run(data='cifar10', epochs=3, bs=128, valid=.1, split=0)
    c = run_cost(base)
    assert run_cost(base.but(method='sadt2')).flops == pytest.approx(3 * c.flops) and run_cost(base.but(epochs=6)).passes == 2 * c.passes
    two = base.but(method='distillation', teachers=(base, base.but(seed=1)))
    assert run_cost(two).flops == pytest.approx(c.flops * (1 + 2 / 3)), 'a teacher makes a forward, a third of a pass'
    assert estimated_seconds([base, base], Machine(.1, 1e9)) == pytest.approx(2 * (c.passes * .1 + c.flops / 1e9))
    with pytest.raises(ValueError, match='how many images'): run_cost(Run(data='some/folder'))
    assert [duration(s) for s in (3, 99, 130, 5999, 12_000, 1e6)] == ['3 s', '99 s', '2 min', '1 h 40 min', '3 h 20 min', '12 days']


def test_tracking_does_not_disturb_and_is_right(tmp_path):
    tracked = SMALL.but(epochs=4, track=2, crop=2, flip=True, model_args=dict(dropout=.2))
    a, b = run(tracked, tmp_path, **quiet), run(tracked.but(track=0), tmp_path, **quiet)
    wa, wb = (torch.load(tmp_path / c.name / 'weights.pt', weights_only=True) for c in (tracked, tracked.but(track=0)))
    assert all(torch.equal(wa[k], wb[k]) for k in wa) and a['accuracy'] == b['accuracy'] and 'tracked' not in b
    assert [r['epoch'] for r in a['tracked']] == [2, 4]
    assert a['tracked'][-1]['sharpness'] == pytest.approx(sam_sharpness(stored_learner(tracked, tmp_path), samples=1000), rel=1e-4)
    with pytest.raises(ValueError, match='`track`'): SMALL.but(track=-1)


def test_a_stored_surface_is_the_surface(tmp_path):
    run(SMALL, tmp_path, **quiet)
    m = measure_run(SMALL, tmp_path, ('surface',), samples=20)['measures']['surface']
    s = loss_surface(stored_learner(SMALL, tmp_path), points=25, samples=20, progress=False)
    assert np.allclose(m['loss'], s.loss, rtol=1e-5) and m['x'] == s.x.tolist() and m['value'] == pytest.approx(s.loss.mean() - s.loss[12, 12], rel=1e-5) and m['about'] == s.about
    json.dumps(m, allow_nan=False)
    assert set(measure_run(SMALL, tmp_path, ('gradient_norm',), 20, force=True)['measures']) == {'surface', 'gradient_norm'}


def test_what_is_measured_is_trained_again_only_if_it_must(tmp_path):
    weights, started = tmp_path / SMALL.name / 'weights.pt', lambda: json.loads((tmp_path / SMALL.name / 'result.json').read_text())['wall_seconds']
    def grid(*names, samples=20): return run_grid([SMALL], tmp_path, measures={SMALL: names}, samples=samples, **quiet)
    grid('gradient_norm')
    first = started()
    weights.unlink()
    grid('gradient_norm')
    assert started() == first and not weights.exists(), 'everything is there'
    grid('gradient_norm', 'sharpness')
    measured = json.loads((tmp_path / SMALL.name / 'measures.json').read_text())['measures']
    assert started() != first and set(measured) == {'gradient_norm', 'sharpness'}
    before = measured['gradient_norm']['value']
    with pytest.raises(ValueError, match='unknown measure'): grid('flatness')
    state = torch.load(weights, weights_only=True)
    torch.save({k: v * 2 for k, v in state.items()}, weights) # as if another machine had trained it to another end
    grid('gradient_norm')
    other = json.loads((tmp_path / SMALL.name / 'measures.json').read_text())['measures']
    assert set(other) == {'gradient_norm'} and other['gradient_norm']['value'] != before, 'numbers of two networks do not mix'


def test_what_saf_and_mesa_hold_is_counted(tmp_path, monkeypatch, capsys):
    "Against a count by hand, and in the table beside the published and the computed number."
    saf, mesa, plain = (SMALL.but(method=m, epochs=2, method_args=o) for m, o in (('saf', dict(start_epoch=0, lag=3)), ('mesa', dict(start_epoch=0)), ('baseline', {})))
    n, weights = SMALL.n_train, sum(t.nbytes for t in make_model(SMALL.model, 10).state_dict().values())
    held = {c.method: run(c, tmp_path, progress=False)['method_bytes'] for c in (saf, mesa, plain)}
    assert held == dict(saf=3 * n * (10 * 2 + 2), mesa=weights, baseline=0)
    cells = lambda: [PaperRun(f'{c.method} · digits', c, memory=2**20 * 7., formula=extra_memory(n, 10, weights // 4)[c.method]) for c in (saf, mesa)]
    monkeypatch.setitem(PAPER_GRIDS, 'memory', cells)
    cli.sadt_report('memory', root=tmp_path, to=tmp_path / 'pages')
    assert 'held MB' in capsys.readouterr().out
    table = comparison('memory', load_results(tmp_path))
    assert table['published MB'].tolist() == ['7', '7'] and table['held MB'].tolist() == [f'{held[m] / 2**20:,.0f}' for m in ('saf', 'mesa')]


def test_memory_of_the_published_table():
    published = {c.label: (c.memory / 2**20, c.formula / 2**20) for c in paper_grid('saf/table2')}
    assert published.keys() == {'saf · imagenet · resnet50', 'mesa · imagenet · resnet50', 'saf · cifar100 · resnet18'}
    for label, (said, computed) in published.items(): assert abs(said - computed) < .006 * said, label


HYPERPARAMETERS = { # SAF paper, Tables 4 and 5: epochs, batch, rate, weight decay (of SAF and MESA if another), rho, beta, lambda of SAF and MESA, starting epoch, optimizer
    'resnet18': (200, 128, .05, (5e-4, 5e-4), .05, .9995, (.3, .8), 5, 'sgd'), 'resnet101': (200, 128, .05, (5e-4, 5e-4), .05, .9995, (.3, .8), 5, 'sgd'),
    'wide_resnet_28_10': (200, 128, .05, (1e-3, 1e-3), .1, .9995, (.3, .8), 5, 'sgd'), 'pyramidnet_110': (200, 128, .05, (5e-4, 5e-4), .2, .9995, (.3, .8), 5, 'sgd'),
    ('imagenet', 'resnet50'): (90, 4096, 1.4, (3e-5, 1e-4), .05, .9998, (.3, .3), 10, 'sgd'), ('imagenet', 'resnet101'): (90, 4096, 1.4, (3e-5, 3e-5), .05, .9998, (.3, .3), 10, 'sgd'),
    ('imagenet', 'resnet152'): (90, 4096, 1.4, (3e-5, 3e-5), .05, .9998, (.3, .3), 10, 'sgd'), ('imagenet', 'vit_s32'): (300, 4096, 3e-3, (.3, .3), .05, .9998, (.3, .3), 150, 'adamw'),
}


@pytest.mark.parametrize('table', ['saf/table1', 'saf/table3'])
def test_hyperparameters_of_the_saf_paper(table):
    cells, seen = paper_grid(table), set()
    for r in (c.run for c in cells):
        epochs, bs, lr, decay, rho, beta, lam, start, opt = HYPERPARAMETERS[(r.data, r.model) if r.data == 'imagenet' else r.model]
        seen.add((r.data, r.model))
        late = r.method in ('saf', 'mesa')
        assert (r.epochs, r.bs, r.lr, r.opt, r.sched, dict(r.opt_args)['weight_decay']) == (epochs, bs, lr, opt, 'cosine', decay[late]), r
        assert r.flip and (r.resized_crop == .08 if r.data == 'imagenet' else r.crop == 4)
        method = make_method(r.method, **dict(r.method_args))
        of = {type(m).__name__: m for m in method}
        if r.method == 'sam': assert of['SAM'].rho == rho
        if r.method == 'saf': assert (of['SAF'].lam, of['SAF'].tau, of['SAF'].lag, of['SAF'].start_epoch) == (lam[0], 5, 3, start)
        if r.method == 'mesa': assert (of['MESA'].lam, of['MESA'].tau, of['MESA'].beta, of['MESA'].start_epoch) == (lam[1], 5, beta, start)
    assert len(seen) == (4 if table == 'saf/table1' else 8)


def test_the_control_of_fewer_epochs_has_those_of_the_methods():
    "Plain runs that differ from the table's in nothing but their epochs, which are those that others get at equal passes."
    table, short = paper_grid('compare/digits'), paper_grid('compare/digits_short')
    assert {c.run.epochs for c in short} == {c.run.epochs for c in table} - {15}
    plain = {c.run.seed: c.run for c in table if c.label.startswith('baseline · equal epochs')}
    assert len(short) == 4 * len(plain) and all(c.run == plain[c.run.seed].but(epochs=c.run.epochs) for c in short)


@pytest.mark.parametrize('table, epochs, seeds', [('compare/digits', 15, 5), ('compare/cifar_small', 15, 3)])
def test_all_methods_side_by_side(table, epochs, seeds):
    cells = paper_grid(table)
    assert len(cells) == 3 * seeds * len(METHODS)
    for c in cells:
        name, where, _ = c.label.split(' · ')
        m, r = METHODS[name], c.run
        done = dict(zip(('equal epochs', 'equal steps', 'equal passes'), (1, m.steps, m.passes)))[where] * r.epochs
        assert r.method == name and abs(done - epochs) <= max(1, m.steps, m.passes) / 2 + 1e-9, c.label
        assert all(t.seed != r.seed and t.method == 'baseline' and t in {d.run for d in cells} for t in r.teachers), 'teachers are runs of the table, with other seeds'
    assert len({(c.run.lr, c.run.opt, c.run.bs, c.run.split, c.run.select, c.run.data_args) for c in cells}) == 1


AIRBENCH = { # authors' code: widths, epochs, rate, decay, momentum, smoothing, shift, Cutout, depth, momentum of BatchNorm in PyTorch's sense
    'fast/94': ((64, 256, 256), 9.9, 11.5, .0153, .85, .2, 2, 0, 2, .4),
    'fast/96': ((128, 384, 512), 37, 9., .012, .85, .2, 4, 12, 3, .1),
}


@pytest.mark.parametrize('table', AIRBENCH)
def test_the_fast_presets_are_what_their_authors_ran(table):
    widths, epochs, lr, decay, momentum, smoothing, shift, cutout, depth, bn = AIRBENCH[table]
    r = paper_grid(table)[0].run
    net = make_model(r.model, **dict(r.model_args))
    convs = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)]
    assert tuple(dict.fromkeys(m.out_channels for m in convs[1:])) == tuple(dict.fromkeys(widths))
    assert len(convs) == 1 + 3 * depth
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.momentum, m.eps) for m in norms} == {(bn, 1e-12)}
    assert (r.method, r.epochs, r.bs, r.lr, r.opt, r.sched) == ('baseline', epochs, 1024, lr, 'decoupled_sgd', 'triangle')
    assert dict(r.opt_args) == dict(momentum=momentum, weight_decay=decay)
    assert (r.label_smoothing, r.crop, r.cutout, r.cutout_inside) == (smoothing, shift, cutout, bool(cutout))
    assert (r.pad_mode, r.flip, r.normalize, r.lookahead, r.drop_last) == ('reflect', 'alternate', 'data', 5, True)
    assert (r.valid, r.n_train, r.amp, r.views) == (0, None, 'bf16', 2)


@pytest.mark.parametrize('name', ['94', '96', 'small'])
def test_the_fast_presets_have_every_method_and_control(name):
    cells = paper_grid(f'fast/{name}')
    plain = {c.run.seed: c.run for c in cells if c.label.startswith('baseline ·')}
    for seed, base in plain.items():
        mine = {c.label.removesuffix(f' · seed {seed}'): c.run for c in cells if c.label.endswith(f' · seed {seed}')}
        assert set(METHODS) <= set(mine) and {mine[m].method for m in METHODS} == set(METHODS)
        assert all(mine[m].epochs == base.epochs for m in METHODS)
        radii = {dict(r.method_args).get('rho', .05) for r in mine.values() if r.method == 'sam'}
        assert radii == {.05, .1}
        longer = sorted(r.epochs / base.epochs for label, r in mine.items() if label.startswith('baseline, '))
        assert longer == pytest.approx([4 / 3, 2, 3], abs=.01)
        (teacher,) = mine['distillation'].teachers
        assert teacher == plain[teacher.seed] and teacher.seed != seed
    noisy = paper_grid(f'fast/{name}_noise40')
    assert [c.label for c in noisy] == [c.label for c in cells]
    for c, d in zip(cells, noisy):
        assert d.run.data == 'noisy_cifar10' and dict(d.run.data_args) == dict(noise=.4)
        if not c.run.teachers:
            assert d.run == c.run.but(data='noisy_cifar10', data_args=dict(noise=.4))


def test_the_steps_of_the_fast_recipe_end_in_the_recipe():
    steps = [c.run for c in paper_grid('fast/steps') if c.run.seed == 0]
    changes = [{f for f in a.to_dict() if getattr(a, f) != getattr(b, f)} for a, b in zip(steps, steps[1:])]
    assert [len(c) for c in changes] == [2, 1, 1, 1, 1, 1, 2], 'one part at a time'
    assert steps[-1] in {c.run for c in paper_grid('fast/search')}


def test_flatness_shares_its_runs_with_the_comparison():
    "Whatever both of them train is trained once; only rounds and twice the epochs are flatness's own."
    compared = {c.run for c in paper_grid('compare/cifar_small') if 'equal epochs' in c.label}
    own = {c.label.split(' · ')[0] for c in paper_grid('flatness/simple_cnn') if c.run not in compared}
    assert own == {'twice the epochs', 'round 1', 'round 2'}


def test_time_with_all_workers_busy(tmp_path):
    table1 = pytest.importorskip('benchmarks.table1', reason='benchmarks are beside the tests in a checkout only')
    spans = [(0., 10.), (1., 4.), (4., 9.), (2., 3.)] # three at once from 2 to 3, two at once from 1 to 9; one ends as another begins
    assert [table1.at_full_concurrency(spans, n) for n in (1, 2, 3, 4)] == [10., 8., 1., 0.]
    cfg = SMALL.but(epochs=1)
    before = time.time()
    r = run(cfg, tmp_path, **quiet)
    [(begin, end)] = table1.timeline([cfg], tmp_path)
    assert before - .1 <= begin < end <= time.time() + .1 and end - begin == pytest.approx(r['wall_seconds'])
