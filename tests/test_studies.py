"The results that are committed as data: complete, unedited by hand as far as their hashes tell, and part of a published table."
import json
import math

import pytest
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments import cli
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.papers import PAPER_GRIDS, paper_grid
from sadt_nb.experiments.report import load_results, published
from sadt_nb.experiments.runner import evaluate, load_model, unpacked
from sadt_nb.experiments.sweep import SWEEPS, case_of

STORED = published()
FOLDERS = sorted(f.parent for f in STORED.glob('*/*/config.json'))

def test_every_stored_run_is_whole_and_is_where_its_configuration_says():
    for folder in FOLDERS:
        run, result, history = Run.from_dict(json.loads((folder / 'config.json').read_text())), *(json.loads((folder / f).read_text()) for f in ('result.json', 'history.json'))
        assert folder.name == run.name, 'the configuration or the way it is hashed has changed'
        assert result['status'] == 'finished' and len(history) == result['epochs'] == math.ceil(run.epochs)
        assert {'torch', 'fastai'} <= result['versions'].keys() and result['hardware']['cpu'] and result['code']['source']
        assert history[-1]['steps'] == result['steps'] and history[-1]['forwards'] == result['forwards']
        assert 0 <= result['accuracy'] <= 1 and 0 <= result['accuracy_bn'] <= 1
        assert {f.name for f in folder.iterdir()} <= {'config.json', 'result.json', 'history.json', 'measures.json', 'weights.safetensors', 'weights.sha256'}


def test_the_stored_bits_of_right_images_are_the_stored_accuracies():
    seen = 0
    for folder in FOLDERS:
        result = json.loads((folder / 'result.json').read_text())
        if 'right' not in result: continue # trained before they were kept
        n = result['data_facts']['test']
        for bits, accuracy in (('right', 'accuracy'), ('right_bn', 'accuracy_bn')):
            assert unpacked(result[bits], n).mean() == pytest.approx(result[accuracy], abs=1e-9), folder
        seen += 1
    assert seen or not any(f.parent.name == 'fast' for f in FOLDERS)


def test_every_stored_run_belongs_to_a_table_or_a_search():
    known = {amp: {p.run.name for name in PAPER_GRIDS for p in paper_grid(name, amp=amp)} for amp in ('', 'bf16')}
    for folder in FOLDERS:
        if folder.name in known['bf16' if folder.parent.name == 'table1' else '']: continue # one precision per folder, so that its rows can be compared
        assert (cases := SWEEPS.get(folder.parent.name)), f'{folder} is of no table, and its folder has the name of no search'
        assert case_of(Run.from_dict(json.loads((folder / 'config.json').read_text())), cases()), folder


def test_published_results_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(load_results('published')) == len(FOLDERS)
    assert len(load_results('published/cifar_small')) == len([f for f in FOLDERS if f.parent.name == 'cifar_small'])
    studies = ', '.join(sorted(f.name for f in STORED.iterdir() if f.is_dir()))
    with pytest.raises(FileNotFoundError, match=f'no published study .flowers.; choose one of {studies}$'): load_results('published/flowers')
    cli.sadt_report('sadt/notebook20', root='published/notebook20')
    assert (tmp_path / 'sadt-notebook20.html').exists() and not (tmp_path / 'published').exists(), 'pages go here, not into the package, and do not hide it'
    (tmp_path / 'published').mkdir()
    with pytest.raises(FileNotFoundError, match='no runs below published'): load_results('published')


@pytest.mark.parametrize('file', sorted(STORED.rglob('weights.safetensors')), ids=lambda f: f.parent.name)
def test_published_weights_have_the_accuracy_that_stands_beside_them(file):
    pytest.importorskip('safetensors', reason='published weights need pip install sadt_nb[weights]')
    run = Run.from_dict(json.loads((file.parent / 'config.json').read_text()))
    try: test = get_dls(run.data, bs=500, device='cpu')[2]
    except FileNotFoundError: pytest.skip('CIFAR-10 is not at hand; set SADT_DATA')
    found = evaluate(load_model(run, file.parents[1], 10), test)
    stored = json.loads((file.parent / 'result.json').read_text())
    assert found['accuracy'] == pytest.approx(stored['accuracy'], abs=3e-4) and found['loss'] == pytest.approx(stored['loss'], rel=1e-3), 'other roundings may turn a few of 10,000 images'
