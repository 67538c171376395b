"The search: against an objective that is known, repeatable, continued, blind to the test set, and at equal cost."
import json
import math
import sys

import pytest

optuna = pytest.importorskip('optuna', reason='the search needs pip install sadt_nb[sweep]')

from sadt_nb.experiments import cli, grid
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.runner import RunDiverged, RunError, write_json
from sadt_nb.experiments.sweep import SWEEPS, at_equal_passes, case_of, confirmed, finals, ranges, sweep
from sadt_nb.methods.registry import METHODS

PLAIN = Run(epochs=12, n_train=60, bs=30, valid=.2)
TOP = dict(lr=4e-3, rho=.08)


def height(cfg):
    "A hill over the logarithms of rate and radius, 1 at its top."
    rho = dict(cfg.method_args).get('rho', TOP['rho'])
    return math.exp(-math.log(cfg.lr / TOP['lr'])**2 / 8 - math.log(rho / TOP['rho'])**2 / 8)


@pytest.fixture
def hill(monkeypatch):
    "Runs whose accuracy on validation images is known; on test images it is the opposite."
    trained = []
    def run(cfg, root, **kwargs):
        folder = root / cfg.name
        if (folder / 'result.json').exists(): return json.loads((folder / 'result.json').read_text())
        trained.append(cfg)
        if cfg.lr > 2e-2: raise RunDiverged(f'{cfg.name}: the loss became NaN')
        folder.mkdir(parents=True)
        write_json(folder / 'history.json', [dict(epoch=i + 1, valid_accuracy=height(cfg) * (i + 1) / cfg.epochs, seconds=1.) for i in range(cfg.epochs)])
        write_json(folder / 'result.json', result := dict(status='finished', accuracy=1 - height(cfg), train_seconds=1.))
        return result
    monkeypatch.setattr(grid, 'run', run)
    return trained


def test_the_top_of_a_hill_is_found(hill, tmp_path):
    "Better than as many draws at random are expected to do, by the hill's own numbers."
    found = sweep(dict(plain=PLAIN, sam=PLAIN.but(method='sam')), tmp_path, trials=40, progress=False)
    for label, keys in (('plain', ('lr',)), ('sam', ('lr', 'rho'))):
        f = found[label]
        assert f.value == f.trials['value'].max() == pytest.approx(height(f.best), rel=1e-12) and f.value > .9 and len(f.trials) == 40
        best = dict(lr=f.best.lr, **dict(f.best.method_args))
        for k in keys: assert abs(math.log(best[k] / TOP[k])) < math.log(2.5)
        for k, (low, high) in ranges(PLAIN.but(method='sam')).items():
            if k in keys: assert f.trials[k].between(low * .99, high * 1.01).all()
        diverged = f.trials[f.trials['error'] != '']
        assert (diverged['value'] == 0).all() and (diverged['lr'] > 2e-2).all() and len(diverged) < 15, 'it learns to keep away'


def test_the_same_search_is_read_and_a_longer_one_goes_on(hill, tmp_path):
    cases = dict(sam=PLAIN.but(method='sam'), asam=PLAIN.but(method='asam'))
    a = sweep(cases, tmp_path, trials=8, progress=False)
    done = {c for c in hill if c.lr <= 2e-2}
    hill.clear()
    b = sweep(cases, tmp_path, trials=8, progress=False)
    assert all(c.lr > 2e-2 for c in hill), 'only what failed is tried again'
    for k in cases: assert a[k].trials.equals(b[k].trials)
    hill.clear()
    with pytest.raises(KeyboardInterrupt):
        def stop(*args, **kwargs): raise KeyboardInterrupt()
        real, grid.run = grid.run, lambda cfg, *args, **kwargs: stop() if len(hill) >= 6 else real(cfg, *args, **kwargs)
        try: sweep(cases, tmp_path / 'other', trials=8, progress=False)
        finally: grid.run = real
    c = sweep(cases, tmp_path / 'other', trials=8, progress=False)
    for k in cases: assert a[k].trials.equals(c[k].trials), 'interrupted, it ends as in one go'
    assert {r for r in hill if r.lr <= 2e-2} == done


def test_a_machine_that_fails_is_no_bad_proposal(hill, monkeypatch, tmp_path):
    "The search ends with the error; once the disk has room, it goes on as if nothing had happened."
    cases = dict(sam=PLAIN.but(method='sam'))
    whole = sweep(cases, tmp_path / 'whole', trials=8, progress=False)['sam']
    with monkeypatch.context() as m:
        real, count = grid.run, []
        def run(cfg, *args, **kwargs):
            count.append(cfg)
            if len(count) == 6: raise RunError('no space left')
            return real(cfg, *args, **kwargs)
        m.setattr(grid, 'run', run)
        with pytest.raises(RunError, match='no space left'): sweep(cases, tmp_path / 'cut', trials=8, progress=False)
    assert sweep(cases, tmp_path / 'cut', trials=8, progress=False)['sam'].trials.equals(whole.trials)


def test_another_seed_proposes_others(hill, tmp_path):
    a, b = (sweep(dict(sam=PLAIN.but(method='sam')), tmp_path, trials=4, seed=s, progress=False)['sam'] for s in (0, 1))
    assert not set(a.trials['run']) & set(b.trials['run'])


def test_every_method_costs_the_same(hill, tmp_path):
    cases = {m: at_equal_passes(PLAIN.but(method=m), PLAIN) for m in METHODS if not METHODS[m].taught}
    found = sweep(cases, tmp_path, trials=4, progress=False)
    for m, f in found.items(): assert abs(f.passes - 4 * 12) <= 4 * METHODS[m].passes / 2 + 1e-9, m
    assert at_equal_passes(PLAIN.but(method='sadt2', epochs=1), PLAIN.but(epochs=1)).epochs == 1


def test_other_ranges_and_a_share(hill, tmp_path):
    taught = PLAIN.but(method='distillation', teachers=PLAIN, split=0, seed=1).but(teachers=PLAIN.but(split=0))
    f = sweep(dict(a=taught), tmp_path, trials=6, spaces=dict(a=dict(alpha=(0., 1.))), progress=False)['a']
    assert (f.trials['run'].map(lambda r: r.lr) == PLAIN.lr).all() and f.trials['alpha'].between(0, 1).all() and f.trials['alpha'].nunique() > 3


def test_fresh_seeds(hill, tmp_path):
    found = sweep(dict(sam=PLAIN.but(method='sam')), tmp_path, trials=4, progress=False)
    runs = finals(found, (1, 2, 3))['sam']
    assert [r.seed for r in runs] == [1, 2, 3] and {r.but(seed=0) for r in runs} == {found['sam'].best}
    with pytest.raises(ValueError, match='was searched with seed 0'): finals(found, (0, 1))


def test_the_best_on_average_and_not_the_luckiest_is_confirmed(hill, monkeypatch, tmp_path):
    "With seed 0 a rate far from the top is lucky; the other seeds say so, and one of them fails there."
    def luck(cfg): return .5 if cfg.seed == 0 and cfg.lr > 1e-2 else 0.
    honest = height
    monkeypatch.setattr(sys.modules[__name__], 'height', lambda cfg: honest(cfg) + luck(cfg))
    found = sweep(dict(plain=PLAIN), tmp_path, trials=8, spaces=dict(plain=dict(lr=(1e-3, 1.9e-2))), progress=False)
    trials = found['plain'].trials
    candidates = list(trials.sort_values('value', ascending=False)['run'])[:4]
    expected = max(candidates, key=honest)
    assert found['plain'].best.lr > 1e-2 and expected != found['plain'].best, 'the search was taken in'
    hill.clear()
    runs = confirmed(found, tmp_path, seeds=(1, 2), top=4, progress=False)['plain']
    assert [r.seed for r in runs] == [1, 2] and {r.but(seed=0) for r in runs} == {expected} and len(hill) == 8
    assert confirmed(found, tmp_path, seeds=(1, 2), top=1, progress=False)['plain'] == finals(found, (1, 2))['plain']
    real = grid.run
    def run(cfg, *args, **kwargs):
        if cfg.seed == 4 and cfg.lr == expected.lr: raise RunDiverged('NaN')
        if cfg.seed == 6: raise RunError('no space left')
        return real(cfg, *args, **kwargs)
    monkeypatch.setattr(grid, 'run', run)
    assert confirmed(found, tmp_path, seeds=(3, 4), top=4, progress=False)['plain'][0].lr != expected.lr, 'divergence counts as 0'
    with pytest.raises(RunError, match='no space left'): confirmed(found, tmp_path, seeds=(5, 6), progress=False)
    with pytest.raises(ValueError, match='was searched with seed 0'): confirmed(found, tmp_path, seeds=(0, 1))
    with pytest.raises(ValueError, match='`top` must be at least 1, got 0'): confirmed(found, tmp_path, top=0)


def test_every_run_of_a_search_tells_its_case(hill, tmp_path):
    cases = SWEEPS['sadt_parts']()
    found = sweep({k: r for k, (r, _) in cases.items()}, tmp_path, trials=1, spaces={k: s for k, (_, s) in cases.items()}, progress=False)
    for label, f in found.items():
        for run in (f.best, f.best.but(seed=3)): assert case_of(run, cases) == label
    first = found['plain'].best
    for other in (first.but(epochs=3), first.but(method='gc'), first.but(bs=32), found['radius'].best.but(method='sam', method_args={}), first.but(data_args=dict(noise=.4))): assert case_of(other, cases) is None


def test_what_cannot_be_searched(hill, monkeypatch, tmp_path):
    sam = dict(sam=PLAIN.but(method='sam'))
    for bad, said in ((dict(cases=dict(a=PLAIN.but(valid=0.))), 'needs validation images'), (dict(cases=sam, trials=0), 'at least 1'), (dict(cases=sam, batch=0), 'at least 1'),
                      (dict(cases=sam, spaces=dict(sam=dict(rho=(.5, .1)))), 'range of rho'), (dict(cases=sam, spaces=dict(sam=dict(lr=(0., .1)))), 'range of lr'),
                      (dict(cases=sam, spaces=dict(sam=dict(radius=(.1, .2)))), 'has no option .radius.'), (dict(cases=sam, spaces=dict(sam=dict(lr=(1., 2.)))), 'all trials diverged; the first said: .*the loss became NaN')):
        with pytest.raises(ValueError, match=said): sweep(**{**dict(root=tmp_path, trials=3, progress=False), **bad})
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'pip install sadt_nb\[sweep\]'): sweep(sam, tmp_path)


def test_a_search_of_the_studies_by_name(hill, monkeypatch, tmp_path, capsys):
    plain = PLAIN.but(n_train=None)
    monkeypatch.setitem(SWEEPS, 'two', lambda: {'a': (plain, dict(lr=(1e-3, 1e-2))), 'b': (plain.but(method='sadt1', method_args=dict(rng='replay')), dict(rho=(.01, 1.)))})
    cli.sadt_sweep('two', trials=2, seeds=2, root=tmp_path)
    table = capsys.readouterr().out
    assert 'rng=replay' in table and 'rho=' in table and {c.seed for c in hill} == {0, 1, 2} and len(hill) == 8
    with pytest.raises(SystemExit): cli.sadt_sweep('flowers', root=tmp_path)
    assert 'choose one of sadt_parts' in capsys.readouterr().err


def test_the_parts_of_sadt_differ_in_one_thing_and_cost_the_same():
    cases = SWEEPS['sadt_parts']()
    assert len({run for run, space in cases.values() if 'rho' not in space and 'kl_weight' not in space}) == 10
    for label, (run, space) in cases.items():
        assert abs(run.epochs * METHODS[run.method].passes - (6 if 'half the passes' in label else 12)) < 1e-9, label
        assert {f: getattr(run, f) for f in ('data', 'data_args', 'bs', 'valid', 'split', 'seed')} == dict(data='noisy_digits', data_args=(('noise', .2),), bs=64, valid=.25, split=0, seed=0)


def test_from_the_shell_with_real_training(tmp_path, capsys):
    kwargs = dict(methods='baseline sam', trials=2, epochs=2, n_train=60, bs=30, seeds=2, root=tmp_path)
    cli.sadt_sweep(**kwargs)
    table = capsys.readouterr().out
    assert 'passes searched' in table and 'sam' in table and '±' in table
    runs = [Run.from_dict(json.loads(f.read_text())) for f in tmp_path.glob('*/config.json')]
    assert len(runs) == 2 * (2 + 2) and {r.seed for r in runs} == {0, 1, 2} and {r.epochs for r in runs if r.method == 'sam'} == {1} and all(r.split == 0 for r in runs)
    written = {f: f.stat().st_mtime_ns for f in tmp_path.glob('*/weights.pt')}
    cli.sadt_sweep(**kwargs)
    assert capsys.readouterr().out.splitlines()[-3:] == table.splitlines()[-3:] and written == {f: f.stat().st_mtime_ns for f in tmp_path.glob('*/weights.pt')}
