"Folders of results: copies, archives, changed members of ensembles, teachers, runs that end in NaN."
import json
import os
import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import narrow_cnn
from fastai.torch_core import defaults
from PIL import Image
from sadt_nb.commands import cli
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments.archive import ARCHIVE, stored_runs
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_ensemble
from sadt_nb.experiments.measure import measure_run
from sadt_nb.experiments.report import labels, load_results, plot_runs, publish, results_table
from sadt_nb.experiments.run_folder import RunDiverged, RunError, load_model, read_result
from sadt_nb.experiments.runner import run
from sadt_nb.models.registry import MODELS
from sadt_nb.papers.any_data import compare, comparison_table, sentence

pytestmark = pytest.mark.usefixtures('narrow')

ZERO = Run(epochs=1, bs=64, n_train=128, valid=0.)
ONE = ZERO.but(seed=1)


def trained(*runs, root):
    for cfg in runs: run(cfg, root, progress=False)
    return root


def logits_by_hand(members, root):
    "Every network sees the test images with the normalisation of its own training."
    found = []
    for m in members:
        mean, std = dict(data=('data', 'data')).get(m.normalize) or m.normalize or (0., 1.)
        test = get_dls('digits', bs=64, valid=m.valid, n_train=m.n_train, seed=m.seed, mean=mean, std=std)[2]
        net = load_model(m, root, 10)
        with torch.no_grad(): found.append(torch.cat([net(x) for x, _ in test]))
    return torch.stack(found).double(), test.dataset.y


@pytest.mark.parametrize('members', [(ZERO.but(normalize='data'), ONE.but(normalize='data')),
                                     (ZERO, ONE.but(normalize=(.4, .3)))], ids=['of the images', 'numbers'])
def test_every_member_of_an_ensemble_has_its_own_normalisation(members, tmp_path):
    root = trained(*members, root=tmp_path)
    found = run_ensemble(members, root)
    logits, y = logits_by_hand(members, root)
    assert found['diversity'] == pytest.approx(logits.var(0, correction=0).mean().item(), rel=1e-6)
    assert found['accuracy'] == (logits.mean(0).argmax(1) == y).double().mean().item()
    alone = {m.name: read_result(m, root)['accuracy'] for m in members}
    assert found['members'] == pytest.approx(alone, abs=1e-12)


def test_an_ensemble_is_evaluated_again_if_a_member_has_other_weights(tmp_path, monkeypatch):
    root = trained(ZERO, ONE, root=tmp_path)
    before = run_ensemble([ZERO, ONE], root)
    def other_cnn(*args, **kwargs): return narrow_cnn(*args, **{**kwargs, 'dropout': 0.})
    monkeypatch.setitem(MODELS, 'simple_cnn', other_cnn)
    run(ONE, root, force=True, progress=False)
    after = run_ensemble([ZERO, ONE], root)
    assert after['diversity'] != before['diversity']
    assert after['members'][ONE.name] == read_result(ONE, root)['accuracy']
    file, = (root / 'ensembles').iterdir()
    file.write_text('{"accuracy": .5')
    assert run_ensemble([ZERO, ONE], root) == after, 'a damaged file is written again'
    for m in (ZERO, ONE): (root / m.name / 'weights.pt').unlink()
    assert run_ensemble([ZERO, ONE], root) == after, 'an unchanged ensemble needs no weights'


def folder(root, classes='ab', n=4, size=32, seed=0):
    "Write an image folder with random images."
    rng = np.random.default_rng(seed)
    for part in ('train', 'test'):
        for c in classes:
            (root / part / c).mkdir(parents=True, exist_ok=True)
            for i in range(n):
                pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / c / f'{i}.png')
    return root


def test_an_ensemble_on_other_test_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    photos, others = folder(tmp_path / 'photos'), folder(tmp_path / 'others', seed=1)
    mine, theirs = [Run(data=str(d), epochs=1, bs=8, valid=0.) for d in (photos, others)]
    root = trained(mine, mine.but(seed=1), theirs, root=tmp_path / 'runs')
    with pytest.raises(ValueError, match='must have the same test images'): run_ensemble([mine, theirs], root)
    shutil.copy(photos / 'test' / 'a' / '0.png', photos / 'test' / 'a' / '1.png')
    with pytest.raises(RunError, match='test data of .* have changed'):
        run_ensemble([mine, mine.but(seed=1)], root)


def test_students_of_different_teachers_are_different_rows(tmp_path):
    def student(*teachers, **changes):
        return ZERO.but(method='distillation', teachers=teachers, **changes)
    sam, adam = ZERO.but(method='sam', seed=3), ZERO.but(seed=3)
    runs = [student(sam), student(sam.but(seed=4), seed=1), student(adam), student(student(adam)),
            student(student(sam)), student(sam, adam), student(adam, adam.but(seed=4)),
            student(adam.but(seed=4), sam.but(seed=5), seed=1), student(adam.but(lr=.1))]
    names = labels(pd.DataFrame(dict(run=runs)))
    assert names[0] == names[1] == 'distillation round 1 (teacher: sam lr=0.001)'
    assert names[2] == 'distillation round 1 (teacher: baseline lr=0.001)'
    assert names[8] == 'distillation round 1 (teacher: baseline lr=0.1)'
    assert names[5] == names[7] == 'distillation 2 teachers (teacher: baseline, sam)'
    assert names[6] == 'distillation 2 teachers (teacher: 2 baseline)'
    assert len({names[i] for i in (0, 2, 3, 4, 5, 6, 8)}) == 7, names
    one_kind = [student(sam), student(sam.but(seed=4), seed=1)]
    assert labels(pd.DataFrame(dict(run=one_kind))) == ['distillation'] * 2


def test_a_copy_of_a_run_is_no_repetition(tmp_path, capsys):
    root = trained(ZERO, ONE, root=tmp_path / 'runs')
    alone = results_table(load_results(root))
    shutil.copytree(root, root / 'a copy')
    unfinished = root / '0' / ZERO.name # is read before the finished run
    unfinished.mkdir(parents=True)
    (unfinished / 'config.json').write_text(json.dumps(ZERO.to_dict()))
    every = load_results(root)
    assert len(every) == 5
    pd.testing.assert_frame_equal(results_table(every), alone)
    assert results_table(every, by=['x', 'y', 'x', 'y', 'x'])['n'].sum() == 2
    ax = plot_runs(every)[0]
    assert ax.get_legend().get_texts()[0].get_text() == 'baseline (n=2)'
    cli.sadt_report(root=root, json=True)
    folders = [r['folder'] for r in json.loads(capsys.readouterr().out)['runs']]
    assert all(os.path.isfile(os.path.join(f, 'config.json')) for f in folders)
    assert len(set(folders)) == 5


def test_a_comparison_counts_a_run_once(tmp_path):
    root = trained(ZERO, ZERO.but(method='weight_average'), root=tmp_path)
    trained(ZERO, root=tmp_path / 'timing')
    runs = {m: [ZERO.but(method=m)] for m in ('baseline', 'weight_average')}
    page = compare(runs, root).files[1].read_text()
    assert '2 of 2 runs are finished' in page


@pytest.fixture
def archive(tmp_path):
    "A folder with an archive of one run, with its weights and a measure."
    pytest.importorskip('safetensors', reason='safetensors is not installed')
    root = trained(ZERO, root=tmp_path / 'runs')
    measure_run(ZERO, root, ['gradient_norm'], samples=64)
    assert publish([ZERO], root, tmp_path / 'archive', weights=[ZERO]) == 1
    return tmp_path / 'archive'


def measured(root): return load_results(root)['measures'][0].keys()


def test_measures_of_an_archived_run_are_shown_and_published(archive, tmp_path):
    before = {k: v for k, v in stored_runs(archive)[0][1].items() if k != 'measures'}
    measure_run(ZERO, archive, ['sharpness'], samples=64)
    assert measured(archive) == {'gradient_norm', 'sharpness'}, 'measures that a call does not name stay'
    for to in (tmp_path / 'second', archive):
        assert publish([ZERO], archive, to) == 1
        assert measured(to) == {'gradient_norm', 'sharpness'}
        parts = stored_runs(to)[0][1]
        assert {k: v for k, v in parts.items() if k != 'measures'} == before
    file = archive / ZERO.name / 'measures.json'
    file.write_text('{"measures')
    left_out = []
    assert stored_runs(archive, left_out) == []
    assert str(file) in left_out[0]


def test_a_new_training_has_none_of_the_archived_measures(archive, monkeypatch):
    def other_cnn(*args, **kwargs): return narrow_cnn(*args, **{**kwargs, 'dropout': 0.})
    monkeypatch.setitem(MODELS, 'simple_cnn', other_cnn)
    run(ZERO, archive, force=True, progress=False)
    assert not measured(archive)
    assert (archive / ARCHIVE).is_file()


@pytest.mark.parametrize('force', [False, True], ids=['first', 'again'])
def test_a_last_step_that_breaks_the_weights_is_a_divergence(force, tmp_path):
    "One batch an epoch: the loss of every batch is finite."
    cfg = Run(bs=128, n_train=128, valid=.1, epochs=1, opt='sgd', lr=1e38)
    if force:
        (tmp_path / cfg.name).mkdir()
        good = dict(status='finished', accuracy=.5, data_facts={})
        (tmp_path / cfg.name / 'result.json').write_text(json.dumps(good))
    with pytest.raises(RunDiverged, match='test images became NaN or infinite'):
        run(cfg, tmp_path, force=force, progress=False)
    files = {f.name for f in (tmp_path / cfg.name).iterdir()} - {'.lock'}
    if force:
        assert files == {'result.json'}
        assert read_result(cfg, tmp_path) == good
        return
    assert 'weights.pt' not in files
    stored = json.loads((tmp_path / cfg.name / 'result.json').read_text())
    assert stored['status'] == 'diverged'
    assert stored['steps'] == 1


def test_equal_differences_are_no_evidence():
    "With 20 test images, two networks often differ by the same number of images."
    def result(right): return dict(accuracy_bn=right / 20, forwards=8)
    plain, average, sam = [[ZERO.but(method=m, seed=s) for s in range(2)]
                           for m in ('baseline', 'weight_average', 'sam')]
    runs = dict(baseline=plain, weight_average=average, sam=sam)
    right = [10, 11, 10, 11, 11, 12] # the differences 55 - 50 and 60 - 55 also differ by a rounding error
    results = {r: result(n) for r, n in zip([*plain, *average, *sam], right)}
    table = comparison_table(runs, results)
    assert table.loc['sam', 'difference'] == pytest.approx(5)
    assert table.loc['sam', ['low', 'high']].isna().all()
    assert list(table.loc['weight_average', ['low', 'high']]) == [0, 0]
    assert sentence(table) == ('At equal passes, no method is shown to be better than plain training: the '
                               'largest difference is that of sam, +5.00 points, and equal differences give '
                               'no interval.')


@pytest.mark.parametrize('command, option, value, message', [
    ('sadt_compare', '--to', 'a file', '--to: a file cannot be made a folder'),
    ('sadt_compare', '--to', 'a file/below', '--to: a file/below cannot be made a folder'),
    ('sadt_report', '--to', 'a file', '--to: a file cannot be made a folder'),
    ('sadt_demo', '--figure', 'curves.word', '--figure: curves.word has the unknown type word'),
    ('sadt_report', '--figure', 'curves.word', '--figure: curves.word has the unknown type word'),
])
def test_an_output_that_cannot_be_written_is_named_before_the_work(command, option, value, message, tmp_path,
                                                                   monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a file').touch()
    monkeypatch.setattr('sys.argv', [command, option, value])
    def no_work(*args, **kwargs): raise AssertionError('the work began')
    monkeypatch.setattr('sadt_nb.experiments.runner.run', no_work)
    monkeypatch.setattr('sadt_nb.papers.any_data.run', no_work)
    monkeypatch.setattr('sadt_nb.experiments.report.load_results', no_work)
    monkeypatch.setattr(defaults, 'use_cuda', False)
    with pytest.raises(SystemExit): getattr(cli, command)()
    assert message in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {'a file'}


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_the_page_of_a_folder_whose_name_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    name = os.fsencode(folder(tmp_path / 'photos'))
    os.rename(name, name + b'\xfc')
    plain = Run(data=os.fsdecode(name + b'\xfc'), epochs=1, bs=8, valid=0.)
    runs = {m: [plain.but(method=m)] for m in ('baseline', 'weight_average')}
    root = trained(*runs['baseline'], *runs['weight_average'], root=tmp_path / 'runs')
    for file in compare(runs, root).files[:2]: assert 'udcfc' in file.read_text()
