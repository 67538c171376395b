"The search: with a known best point, repeated, continued, without the test set, and at equal cost."
import json
import math
import sys
from importlib.util import find_spec

import pytest
from sadt_nb.commands import cli
from sadt_nb.experiments import grid, runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.learner import make_learner, stored_learner
from sadt_nb.experiments.results import evaluate, reestimated
from sadt_nb.experiments.run_folder import RunDiverged, RunError, read_result, write_json
from sadt_nb.experiments.sweep import OPTION_RANGES, RATES, SWEEPS, at_equal_passes, case_of, confirmed
from sadt_nb.experiments.sweep import finals, ranges, sweep
from sadt_nb.methods.registry import METHODS, method_options

# not imported here: the library imports it for a search, and `pytest -k` reads all files
if find_spec('optuna') is None:
    pytest.skip('the search needs pip install sadt_nb[sweep]', allow_module_level=True)

PLAIN = Run(epochs=12, n_train=60, bs=30, valid=.2)
SAM = PLAIN.but(method='sam')
TOP = dict(lr=4e-3, rho=.08)
DIVERGES_ABOVE = 2e-2 # learning rate
quiet = dict(progress=False)


def height(cfg):
    "Return the height of a hill over the logarithms of rate and radius, 1 at its top."
    rho = dict(cfg.method_args).get('rho', TOP['rho'])
    return math.exp(-math.log(cfg.lr / TOP['lr'])**2 / 8 - math.log(rho / TOP['rho'])**2 / 8)


@pytest.fixture
def hill(monkeypatch):
    """Replace training: the accuracy on validation images is `height`, on test images the opposite.

    Returns the list of all runs that were trained."""
    trained = []
    def run(cfg, root, **kwargs):
        folder = root / cfg.name
        if (folder / 'result.json').exists(): return json.loads((folder / 'result.json').read_text())
        trained.append(cfg)
        if cfg.lr > DIVERGES_ABOVE: raise RunDiverged(f'{cfg.name}: the loss became NaN')
        folder.mkdir(parents=True)
        history = []
        for epoch in range(1, cfg.epochs + 1):
            accuracy = height(cfg) * epoch / cfg.epochs
            history.append(dict(epoch=epoch, valid_accuracy=accuracy, seconds=1.))
        write_json(folder / 'history.json', history)
        tested = 1 - height(cfg)
        result = dict(status='finished', accuracy=tested, accuracy_bn=tested, train_seconds=1.)
        write_json(folder / 'result.json', result)
        return result
    monkeypatch.setattr(grid, 'run', run)
    return trained


def test_the_top_of_a_hill_is_found(hill, tmp_path):
    "The value found is above the average best of the same number of random draws."
    found = sweep(dict(plain=PLAIN, sam=SAM), tmp_path, trials=40, **quiet)
    for label, keys in (('plain', ('lr',)), ('sam', ('lr', 'rho'))):
        f = found[label]
        assert f.value == f.trials['value'].max()
        assert f.value == pytest.approx(height(f.best), rel=1e-12)
        assert f.value > .9
        assert len(f.trials) == 40
        best = dict(lr=f.best.lr, **dict(f.best.method_args))
        for k in keys:
            assert abs(math.log(best[k] / TOP[k])) < math.log(2.5)
            low, high = ranges(SAM)[k]
            assert f.trials[k].between(low * .99, high * 1.01).all()
        diverged = f.trials[f.trials['error'] != '']
        assert (diverged['value'] == 0).all()
        assert (diverged['lr'] > DIVERGES_ABOVE).all()
        assert len(diverged) < 15, 'the search learns to avoid rates that diverge'


def test_the_same_search_is_read_and_a_longer_one_goes_on(hill, tmp_path):
    cases = dict(sam=SAM, asam=PLAIN.but(method='asam'))
    def finished(): return {c for c in hill if c.lr <= DIVERGES_ABOVE}
    first = sweep(cases, tmp_path, trials=8, **quiet)
    done = finished()
    hill.clear()
    again = sweep(cases, tmp_path, trials=8, **quiet)
    assert not finished(), 'only failed runs are tried again'
    for k in cases: assert first[k].trials.equals(again[k].trials)
    hill.clear()
    real = grid.run
    def stop_after_six(cfg, *args, **kwargs):
        if len(hill) >= 6: raise KeyboardInterrupt
        return real(cfg, *args, **kwargs)
    grid.run = stop_after_six
    try:
        with pytest.raises(KeyboardInterrupt): sweep(cases, tmp_path / 'other', trials=8, **quiet)
    finally: grid.run = real
    continued = sweep(cases, tmp_path / 'other', trials=8, **quiet)
    for k in cases: assert first[k].trials.equals(continued[k].trials), 'interrupted, it ends as in one go'
    assert finished() == done


def test_a_full_disk_ends_the_search_and_is_no_result(hill, monkeypatch, tmp_path):
    "The search ends with the error; when the disk has room again, it continues with the same proposals."
    cases = dict(sam=SAM)
    whole = sweep(cases, tmp_path / 'whole', trials=8, **quiet)['sam']
    real = grid.run
    count = []
    def run(cfg, *args, **kwargs):
        count.append(cfg)
        if len(count) == 6: raise RunError('no space left')
        return real(cfg, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(grid, 'run', run)
        with pytest.raises(RunError, match='no space left'): sweep(cases, tmp_path / 'cut', trials=8, **quiet)
    continued = sweep(cases, tmp_path / 'cut', trials=8, **quiet)['sam']
    assert continued.trials.equals(whole.trials)


def test_another_seed_gives_other_proposals(hill, tmp_path):
    a = sweep(dict(sam=SAM), tmp_path, trials=4, seed=0, **quiet)['sam']
    b = sweep(dict(sam=SAM), tmp_path, trials=4, seed=1, **quiet)['sam']
    assert not set(a.trials['run']) & set(b.trials['run'])


def test_every_method_costs_the_same(hill, tmp_path):
    without_teacher = [m for m in METHODS if not METHODS[m].needs_teacher]
    cases = {m: at_equal_passes(PLAIN.but(method=m), PLAIN) for m in without_teacher}
    found = sweep(cases, tmp_path, trials=4, **quiet)
    for m, f in found.items():
        half_an_epoch = METHODS[m].passes / 2
        assert abs(f.passes - 4 * 12) <= 4 * half_an_epoch + 1e-9, m
    assert at_equal_passes(PLAIN.but(method='sadt2', epochs=1), PLAIN.but(epochs=1)).epochs == 1


def test_ranges_may_be_given_and_may_be_linear(hill, tmp_path):
    "`alpha` is a share, which may be 0."
    student = PLAIN.but(method='distillation', teachers=PLAIN.but(split=0), split=0, seed=1)
    spaces = dict(a=dict(alpha=(0., 1.)))
    trials = sweep(dict(a=student), tmp_path, trials=6, spaces=spaces, **quiet)['a'].trials
    assert (trials['run'].map(lambda r: r.lr) == PLAIN.lr).all()
    assert trials['alpha'].between(0, 1).all()
    assert trials['alpha'].nunique() > 3


def test_the_best_runs_are_repeated_with_new_seeds(hill, tmp_path):
    found = sweep(dict(sam=SAM), tmp_path, trials=4, **quiet)
    runs = finals(found, (1, 2, 3))['sam']
    assert [r.seed for r in runs] == [1, 2, 3]
    assert {r.but(seed=0) for r in runs} == {found['sam'].best}
    with pytest.raises(ValueError, match='was searched with seed 0; leave it out of'): finals(found, (0, 1))


@pytest.fixture
def lucky(hill, monkeypatch, tmp_path):
    "Return a search in which seed 0 is lucky far from the top, and a function for a run's true height."
    true_height = height
    def with_luck(cfg):
        luck = .5 if cfg.seed == 0 and cfg.lr > 1e-2 else 0.
        return true_height(cfg) + luck
    monkeypatch.setattr(sys.modules[__name__], 'height', with_luck)
    spaces = dict(plain=dict(lr=(1e-3, 1.9e-2)))
    return sweep(dict(plain=PLAIN), tmp_path, trials=8, spaces=spaces, **quiet), true_height


def best_of_four(found, value):
    "Return the run with the largest value among the four that the search ranks first."
    ranked = found['plain'].trials.sort_values('value', ascending=False)
    return max(list(ranked['run'])[:4], key=value)


def test_confirmation_chooses_the_best_mean_not_the_luckiest_seed(lucky, hill, tmp_path):
    found, true_height = lucky
    expected = best_of_four(found, true_height)
    assert found['plain'].best.lr > 1e-2
    assert expected != found['plain'].best, 'the search itself prefers the lucky run'
    hill.clear()
    runs = confirmed(found, tmp_path, seeds=(1, 2), top=4, **quiet)['plain']
    assert [r.seed for r in runs] == [1, 2]
    assert {r.but(seed=0) for r in runs} == {expected}
    assert len(hill) == 8
    of_one = confirmed(found, tmp_path, seeds=(1, 2), top=1, **quiet)['plain']
    assert of_one == finals(found, (1, 2))['plain']


def test_confirmation_counts_divergence_as_zero_and_passes_errors_on(lucky, monkeypatch, tmp_path):
    found, true_height = lucky
    expected = best_of_four(found, true_height)
    real = grid.run
    def run(cfg, *args, **kwargs):
        if cfg.seed == 4 and cfg.lr == expected.lr: raise RunDiverged('NaN')
        if cfg.seed == 6: raise RunError('no space left')
        return real(cfg, *args, **kwargs)
    monkeypatch.setattr(grid, 'run', run)
    runs = confirmed(found, tmp_path, seeds=(3, 4), top=4, **quiet)['plain']
    assert runs[0].lr != expected.lr, 'divergence counts as 0'
    with pytest.raises(RunError, match='no space left'): confirmed(found, tmp_path, seeds=(5, 6), **quiet)
    with pytest.raises(ValueError, match='was searched with seed 0'): confirmed(found, tmp_path, seeds=(0, 1))
    with pytest.raises(ValueError, match='`top` must be at least 1, got 0'): confirmed(found, tmp_path, top=0)


def test_the_case_of_a_run_is_found(hill, tmp_path):
    cases = SWEEPS['sadt_parts']()
    runs = {label: run for label, (run, _) in cases.items()}
    spaces = {label: space for label, (_, space) in cases.items()}
    found = sweep(runs, tmp_path, trials=1, spaces=spaces, **quiet)
    for label, f in found.items():
        for run in (f.best, f.best.but(seed=3)): assert case_of(run, cases) == label
    first = found['plain'].best
    others = [first.but(epochs=3), first.but(method='gc'), first.but(bs=32),
              found['radius'].best.but(method='sam', method_args={}), first.but(data_args=dict(noise=.4))]
    for other in others: assert case_of(other, cases) is None


MISTAKES = [
    (dict(cases=dict(a=PLAIN.but(valid=0.))), 'needs validation images'),
    (dict(trials=0), 'at least 1'),
    (dict(batch=0), 'at least 1'),
    (dict(spaces=dict(sam=dict(rho=(.5, .1)))), 'range of rho must be two positive numbers'),
    (dict(spaces=dict(sam=dict(lr=(0., .1)))), 'range of lr'),
    (dict(spaces=dict(sam=dict(radius=(.1, .2)))), 'has no option .radius.'),
    (dict(spaces=dict(sam=dict(lr=(1., 2.)))), 
     'all trials diverged; search ranges with lower values; the first error: .*the loss became NaN'),
]


def test_what_cannot_be_searched(hill, monkeypatch, tmp_path):
    defaults = dict(cases=dict(sam=SAM), root=tmp_path, trials=3, progress=False)
    for args, message in MISTAKES:
        with pytest.raises(ValueError, match=message): sweep(**{**defaults, **args})
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(ImportError, match=r'pip install sadt_nb\[sweep\]'): sweep(dict(sam=SAM), tmp_path)


def test_a_search_of_the_studies_by_name(hill, monkeypatch, tmp_path, capsys):
    plain = PLAIN.but(n_train=None)
    sadt = plain.but(method='sadt1', method_args=dict(rng='replay'))
    cases = {'a': (plain, dict(lr=(1e-3, 1e-2))), 'b': (sadt, dict(rho=(.01, 1.)))}
    monkeypatch.setitem(SWEEPS, 'two', lambda: cases)
    cli.sadt_sweep('two', trials=2, seeds=2, root=tmp_path)
    table = capsys.readouterr().out
    assert 'rng=replay' in table
    assert 'rho=' in table
    assert {c.seed for c in hill} == {0, 1, 2}
    assert len(hill) == 8
    with pytest.raises(SystemExit): cli.sadt_sweep('flowers', root=tmp_path)
    assert 'choose one of sadt_parts' in capsys.readouterr().err


def test_the_parts_of_sadt_differ_in_one_thing_and_cost_the_same():
    cases = SWEEPS['sadt_parts']()
    kinds = {run for run, space in cases.values() if not space.keys() & {'rho', 'kl_weight'}}
    assert len(kinds) == 10
    shared = dict(data='noisy_digits', data_args=(('noise', .2),), bs=64, valid=.25, split=0, seed=0)
    for label, (run, _) in cases.items():
        passes = 6 if 'half the passes' in label else 12
        assert abs(run.epochs * METHODS[run.method].passes - passes) < 1e-9, label
        assert {field: getattr(run, field) for field in shared} == shared


def test_from_the_shell_with_real_training(tmp_path, capsys):
    def times_of_weights(): return {f: f.stat().st_mtime_ns for f in tmp_path.glob('*/weights.pt')}
    kwargs = dict(methods='baseline sam', trials=2, epochs=2, n_train=60, bs=30, seeds=2, root=tmp_path)
    cli.sadt_sweep(**kwargs)
    table = capsys.readouterr().out
    assert 'passes searched' in table
    assert 'sam' in table
    assert '±' in table
    runs = [Run.from_dict(json.loads(f.read_text())) for f in tmp_path.glob('*/config.json')]
    assert len(runs) == 2 * (2 + 2)
    assert {r.seed for r in runs} == {0, 1, 2}
    assert {r.epochs for r in runs if r.method == 'sam'} == {1}
    assert all(r.split == 0 for r in runs)
    written = times_of_weights()
    cli.sadt_sweep(**kwargs)
    assert capsys.readouterr().out.splitlines()[-3:] == table.splitlines()[-3:]
    assert times_of_weights() == written
    cli.sadt_sweep(**kwargs, json=True)
    for row in json.loads(capsys.readouterr().out)['rows']:
        tested = [r for r in runs if (r.method, r.lr) == (row['method'], row['lr']) and r.seed]
        stored = [read_result(r, tmp_path)['accuracy_bn'] for r in sorted(tested, key=lambda r: r.seed)]
        assert row['test'] == stored, 'with re-estimated BatchNorm, as the validation accuracy'


def store(cfg, root, lagging, fresh, **more):
    "Store a finished run with two accuracies on validation images."
    folder = root / cfg.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / 'history.json', [dict(epoch=1, valid_accuracy=lagging, seconds=1.)])
    result = dict(status='finished', accuracy=.5, train_seconds=1., valid_accuracy_bn=fresh, **more)
    write_json(folder / 'result.json', result)
    return result


def made_up(monkeypatch, accuracy, **more):
    "Replace training: running averages always give 25%, re-estimated statistics `accuracy(cfg)`."
    def run(cfg, root, **kwargs): return store(cfg, root, .25, accuracy(cfg), **more)
    monkeypatch.setattr(grid, 'run', run)


def test_settings_are_chosen_on_re_estimated_statistics(monkeypatch, tmp_path):
    made_up(monkeypatch, height)
    found = sweep(dict(plain=PLAIN), tmp_path, trials=12, **quiet)['plain']
    assert found.value == pytest.approx(height(found.best)) and found.value == found.trials['value'].max()
    assert found.trials['value'].nunique() > 6
    fresh = confirmed(dict(plain=found), tmp_path, seeds=[1, 2], top=3, **quiet)['plain']
    tried = sorted(found.trials.sort_values('value')['run'][-3:], key=height)
    assert fresh[0].but(seed=tried[-1].seed) == tried[-1]


def test_a_search_that_chooses_nothing_says_so(monkeypatch, tmp_path):
    made_up(monkeypatch, lambda cfg: .25)
    with pytest.warns(UserWarning, match='all 4 settings have the same accuracy on validation images, 25.0%'):
        sweep(dict(plain=PLAIN), tmp_path, trials=4, **quiet)


@pytest.mark.parametrize('best, warned', [(.11, True), (.14, False)])
def test_a_search_at_chance_says_so(best, warned, monkeypatch, tmp_path, recwarn):
    "Guessing among ten classes exceeds 12.9% on 400 images in one of forty runs."
    made_up(monkeypatch, lambda cfg: best * height(cfg), data_facts=dict(classes=10, valid=400))
    sweep(dict(plain=PLAIN), tmp_path, trials=4, **quiet)
    said = [w for w in recwarn if 'which guessing can reach' in str(w.message)]
    assert bool(said) == warned


def test_a_run_stores_the_accuracy_that_is_selected_on(tmp_path):
    cfg = Run(epochs=2, n_train=200, bs=50, valid=.3, lr=1e-2, model_args=dict(dropout=0.))
    result = runner.run(cfg, tmp_path, progress=False)
    learn = stored_learner(cfg, tmp_path)
    again = make_learner(cfg, root=tmp_path).dls
    network = reestimated(learn.model, again.train.new(drop_last=True))
    assert result['valid_accuracy_bn'] == evaluate(network, again.valid)['accuracy']
    assert result['data_facts']['valid'] == len(again.valid.dataset) and result['data_facts']['classes'] == 10
    assert read_result(cfg, tmp_path)['valid_accuracy_bn'] == result['valid_accuracy_bn']
    unsplit = runner.run(cfg.but(valid=0.), tmp_path, progress=False)
    assert 'valid_accuracy_bn' not in unsplit


def test_the_ranges_of_the_options():
    "Most lie a factor of ten around the default; the others are typed a second time."
    around = dict(sam='rho', asam='rho', esam='rho', looksam='rho', friendly_sam='rho', wsam='rho', saf='lam',
                  mesa='lam')
    typed = dict(agc=dict(clip=(.001, 1)), msam=dict(rho=(.03, 10)), gsam=dict(rho_max=(.05, .5)),
                 distillation=dict(alpha=(.05, .95)),
                 **{f'sadt{i}': dict(noise_scale=(.1, 1000)) for i in (1, 2, 3)})
    assert OPTION_RANGES.keys() == around.keys() | typed.keys()
    for method, expected in typed.items(): assert OPTION_RANGES[method] == expected, method
    for method, option in around.items():
        default = method_options(method)[option].default
        assert OPTION_RANGES[method] == {option: pytest.approx((default / 10, default * 10))}, method
    assert RATES == pytest.approx((1 / 30, 30))
