"The comparison on any data: equal passes, seeds from the time, intervals by hand, the command on a folder."
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from sadt_nb.commands import cli
from sadt_nb.experiments.config import Run
from sadt_nb.methods.registry import METHODS, passes_of
from sadt_nb.papers import any_data
from sadt_nb.papers.any_data import comparison_runs, comparison_table, make_plan, seeded, sentence

PLAIN = Run(epochs=12, valid=0.)
# 97.5% and 98.75% quantiles of Student's t with two degrees of freedom, from its closed form
T2 = {p: (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p))) for p in (.975, .9875)}


def compared(**accuracies):
    "Return the table of methods with these accuracies by seed, in percent."
    runs = seeded(comparison_runs([*accuracies], PLAIN), 3)
    results = {}
    for method, group in runs.items():
        for r, a in zip(group, accuracies[method]): results[r] = dict(accuracy_bn=a / 100, forwards=100)
    return comparison_table(runs, results)


def test_every_row_makes_the_passes_of_plain_training():
    names = [m for m in METHODS if not METHODS[m].needs_teacher]
    runs = comparison_runs(names, PLAIN)
    assert [*runs][:2] == ['baseline', 'weight_average']
    assert set(runs) == set(names)
    for method, r in runs.items():
        assert abs(r.epochs * passes_of(method) - 12) <= passes_of(method) / 2
        assert r.but(method='baseline', epochs=12) == PLAIN, 'nothing else differs'
    assert runs['sam'].epochs == 6


@pytest.mark.parametrize('method, epochs, message', [
    ('distillation', 12, 'needs a trained teacher'),
    ('sadt2', 1, '1 epochs .* too few for sadt2.* at least 6')])
def test_methods_that_cannot_be_compared(method, epochs, message):
    with pytest.raises(ValueError, match=message): comparison_runs([method], PLAIN.but(epochs=epochs))


def test_the_intervals_are_those_of_a_paired_t_test_for_all_rows_together():
    table = compared(baseline=(80, 82, 84), weight_average=(80, 83, 84), sam=(83, 84, 88))
    d = np.array([3., 2., 4.])
    half = T2[.9875] * d.std(ddof=1) / math.sqrt(3)
    row = table.loc['sam']
    np.testing.assert_allclose([row.difference, row.low, row.high], [3, 3 - half, 3 + half], rtol=1e-9)
    assert half > T2[.975] * d.std(ddof=1) / math.sqrt(3)
    assert np.isnan(table.loc['baseline'].difference)


def test_an_unfinished_run_leaves_its_pair_out():
    runs = seeded(comparison_runs(['sam'], PLAIN), 3)
    every = [r for group in runs.values() for r in group]
    results = {r: dict(accuracy_bn=.8 + .01 * r.seed, forwards=1) for r in every}
    del results[runs['baseline'][0]]
    results[runs['sam'][0]]['accuracy_bn'] = .1 # has no partner
    row = comparison_table(runs, results).loc['sam']
    assert (row.n, row.difference) == (3, pytest.approx(0))


BASE, SAME = (80, 80.5, 81), (80.1, 80.5, 81)


@pytest.mark.parametrize('accuracies, words', [
    (dict(sam=(80.2, 80.4, 81.3), weight_average=SAME), 'no method is shown to be better .* contains zero'),
    (dict(sam=(70, 70.6, 71), weight_average=(75, 75.4, 76)), r'lies below zero\. sam is worse: -9\.97 '),
    (dict(sam=(70, 70.6, 71), weight_average=SAME), r'contains zero\. sam is worse: -9\.97 points \[.*\]\.$'),
    (dict(sam=(85, 85.6, 86), weight_average=SAME), r'sam is better .* 3 seeds; .* gain of sam is larger'),
    (dict(sam=(85, 85.6, 86), weight_average=(84.9, 85.5, 85.9)), 'sam is better .* without an extra pass'),
    (dict(sam=SAME, weight_average=(85, 85.6, 86)), 'weight_average is better .* needs no extra pass')])
def test_the_sentence_says_what_the_table_shows(accuracies, words):
    said = sentence(compared(baseline=BASE, **accuracies))
    assert re.search(words, said), said


def test_the_sentence_does_without_a_weight_average_that_failed():
    runs = seeded(comparison_runs(['sam'], PLAIN), 3)
    accuracies = dict(baseline=BASE, sam=(85, 85.6, 86))
    results = {}
    for method, values in accuracies.items():
        for r, v in zip(runs[method], values): results[r] = dict(accuracy_bn=v / 100, forwards=1)
    assert sentence(comparison_table(runs, results)).endswith('; a weight average could not be compared.')


def test_the_time_decides_the_seeds_and_the_plan_stays(tmp_path, monkeypatch):
    rows = comparison_runs(['sam'], PLAIN)
    monkeypatch.setattr(any_data, 'seconds_per_run', lambda plain, root: 20.)
    assert make_plan(rows, 5.5, tmp_path).seeds == 5, 'three rows of 20 seconds are a minute per seed'
    assert make_plan(rows, 5.25, tmp_path, workers=2).seeds == 10
    assert make_plan(rows, 1e4, tmp_path).seeds == any_data.MOST_SEEDS
    with pytest.raises(ValueError, match='about 2 min; give --minutes 3 ') as e: make_plan(rows, 1, tmp_path)
    assert make_plan(rows, 3, tmp_path).seeds == 3, e
    monkeypatch.setattr(any_data, 'seconds_per_run', lambda plain, root: 1 / 0)
    assert make_plan(rows, 5.5, tmp_path) == (5, 20.)
    with pytest.raises(ZeroDivisionError): make_plan(comparison_runs(['asam'], PLAIN), 5.5, tmp_path)


@pytest.fixture
def photos(tmp_path):
    "Return a folder of small photos: dark ones and bright ones."
    values = np.random.default_rng(0)
    for part, n in (('train', 16), ('test', 6)):
        for cls, base in (('dark', 60), ('bright', 180)):
            folder = tmp_path / 'photos' / part / cls
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = values.integers(base - 50, base + 50, (16, 16, 3)).astype('uint8')
                Image.fromarray(pixels).save(folder / f'{i}.png')
    return tmp_path / 'photos'


def test_the_command_on_a_folder_announces_compares_and_continues(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(any_data, 'MOST_SEEDS', 2)
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    root = tmp_path / 'runs'
    options = dict(methods='sam', data=str(photos), data_args='size=32', epochs=2, bs=16, minutes=60.,
                   root=root)
    cli.sadt_compare(**options)
    out, err = capsys.readouterr()
    assert '3 rows with 2 seeds each: 6 of 6 runs are left, about ' in err
    assert 'At equal passes' in out
    page, = root.glob('comparison-*.html')
    assert f'page: {page}' in out
    text = page.read_text()
    assert '6 of 6 runs are finished' in text
    assert 'data:image/png;base64' in text
    assert '<title>sam on photos' in text
    written = {f: f.stat().st_mtime_ns for f in root.rglob('result.json')}

    cli.sadt_compare(**options, json=True)
    out, err = capsys.readouterr()
    assert '0 of 6 runs are left' in err
    found = json.loads(out)
    assert found['sentence'] in text
    assert [r['method'] for r in found['rows']] == ['baseline', 'weight_average', 'sam']
    assert [r['passes'] for r in found['rows']] == [4, 4, 4]
    assert {f: f.stat().st_mtime_ns for f in root.rglob('result.json')} == written, 'nothing is trained again'
