"The committed results: complete, with unchanged hashes, and part of a published table."
import hashlib
import json
import math

import pytest
from conftest import cells_of, covering
from sadt_nb.commands import cli
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments.archive import ARCHIVE, PARTS, read_archive, read_part
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.report import load_results, published
from sadt_nb.experiments.results import evaluate, unpacked
from sadt_nb.experiments.run_folder import load_model
from sadt_nb.experiments.sweep import SWEEPS, case_of
from sadt_nb.papers.grids import PAPER_GRIDS

STORED = published()
STUDIES = sorted(f.parent for f in STORED.glob(f'*/{ARCHIVE}'))
RUNS = [] # pairs of a folder, `published/STUDY/RUN`, and the parts of the run
for _study in STUDIES:
    for _name, _parts in read_archive(_study).items():
        if not _name.startswith('ensembles/'): RUNS.append((_study / _name, _parts))


def stored_run(parts): return Run.from_dict(parts['config'])


# seeds of the stored runs that diverged: a control that was expected to be as good as tuned SADT-1
DIVERGED = {('fast_quarter', 'repeat_batch', seed) for seed in (0, 1, 2, 4)}


def test_every_stored_run_is_complete_and_is_named_by_its_configuration():
    diverged = set()
    for folder, parts in RUNS:
        run, result, history = stored_run(parts), parts['result'], parts['history']
        assert folder.name == run.name, 'the configuration or the way it is hashed has changed'
        assert {'torch', 'fastai'} <= result['versions'].keys()
        assert result['hardware']['cpu']
        assert result['code']['source']
        assert parts.keys() <= set(PARTS)
        if result['status'] == 'diverged':
            diverged.add((folder.parent.name, run.method, run.seed))
            assert 'NaN or infinite' in result['error']
            assert len(history) == result['epochs'] < run.epochs
            continue
        assert result['status'] == 'finished'
        assert len(history) == result['epochs'] == math.ceil(run.epochs)
        assert history[-1]['steps'] == result['steps']
        assert history[-1]['forwards'] == result['forwards']
        assert 0 <= result['accuracy'] <= 1
        assert 0 <= result['accuracy_bn'] <= 1
    assert diverged == DIVERGED


def test_a_folder_beside_an_archive_holds_weights_and_nothing_else():
    for study in STUDIES:
        for folder in study.iterdir():
            if not folder.is_dir(): continue
            assert {f.name for f in folder.iterdir()} == {'weights.safetensors', 'weights.sha256'}


# SHA-256 of the content of the 4,099 JSON files that held the results until 28 November 2026
FILES_BEFORE = '36454aa30ae20af854a8e2d4967f9aeebeb4499dfea24207b852cc5eefaa341f'
MOVED = '2026-11-28' # runs that began later were never files


def began_before(parts):
    result = parts['result']
    if 'started' in result: return result['started'] < MOVED
    return 'right' not in result # an ensemble has no time, and those of that time had no such bits


def test_the_archives_hold_what_the_files_held():
    lines = []
    for study in STUDIES:
        for name, parts in read_archive(study).items():
            if not began_before(parts): continue
            for part, content in parts.items():
                key = f'{study.name}/{name}'
                if not name.startswith('ensembles/'): key += f'/{part}'
                lines.append(f'{key} {hashlib.sha256(json.dumps(content).encode()).hexdigest()}')
    assert len(lines) == 4099
    assert hashlib.sha256('\n'.join(sorted(lines)).encode()).hexdigest() == FILES_BEFORE


def test_the_stored_bits_of_right_images_give_the_stored_accuracies():
    seen = 0
    for folder, parts in RUNS:
        result = parts['result']
        if 'right' not in result: continue # older runs have no such bits
        n = result['data_facts']['test']
        for bits, accuracy in (('right', 'accuracy'), ('right_bn', 'accuracy_bn')):
            assert unpacked(result[bits], n).mean() == pytest.approx(result[accuracy], abs=1e-9), folder
        seen += 1
    assert seen or not any(study.name == 'fast' for study in STUDIES)


def names_of_table_runs(amp):
    "Return the names of all runs of all tables, in one precision."
    names = set()
    for grid in PAPER_GRIDS: names |= {p.run.name for p in cells_of(grid, amp=amp)}
    return names


def test_every_stored_run_belongs_to_a_table_or_a_search():
    "A folder holds runs of one precision, so that its rows can be compared."
    float32 = names_of_table_runs('')
    bf16 = names_of_table_runs('bf16')
    for folder, parts in RUNS:
        study = folder.parent.name
        known = bf16 if study == 'table1' else float32
        if folder.name in known: continue
        assert study in SWEEPS, f'{folder} is of no table, and its folder has the name of no search'
        cases = SWEEPS[study]
        assert case_of(stored_run(parts), cases()), folder


def test_published_results_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_results('published')) == len(RUNS)
    of_one_study = [f for f, _ in RUNS if f.parent.name == 'cifar_small']
    assert len(load_results('published/cifar_small')) == len(of_one_study)
    studies = ', '.join(sorted(f.name for f in STORED.iterdir() if f.is_dir()))
    message = f'no published study .flowers.; choose one of {studies}$'
    with pytest.raises(FileNotFoundError, match=message): load_results('published/flowers')
    cli.sadt_report('sadt/notebook20', root='published/notebook20')
    assert (tmp_path / 'sadt-notebook20.html').exists(), 'a page is written into the working folder'
    assert not (tmp_path / 'published').exists(), 'no new folder hides the published results of the package'
    (tmp_path / 'published').mkdir()
    with pytest.raises(FileNotFoundError, match='no runs below published'): load_results('published')


WEIGHTS = sorted(STORED.rglob('weights.safetensors'))


@pytest.mark.parametrize('file', covering(WEIGHTS, WEIGHTS[:1]), ids=lambda f: f.parent.name)
def test_published_weights_have_their_stored_accuracy(file):
    "Rounding errors may change the prediction for a few of 10,000 images."
    pytest.importorskip('safetensors', reason='published weights need pip install sadt_nb[weights]')
    study, name = file.parents[1], file.parent.name
    run = Run.from_dict(read_part(study, name, 'config'))
    try: test = get_dls(run.data, bs=500, device='cpu')[2]
    except FileNotFoundError: pytest.skip('CIFAR-10 is not at hand; set SADT_DATA')
    found = evaluate(load_model(run, study, 10), test)
    stored = read_part(study, name, 'result')
    assert found['accuracy'] == pytest.approx(stored['accuracy'], abs=3e-4)
    assert found['loss'] == pytest.approx(stored['loss'], rel=1e-3)
