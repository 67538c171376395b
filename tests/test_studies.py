"The results that are committed as data: complete, unedited by hand as far as their hashes tell, and part of a published table."
import json
from pathlib import Path

import pytest
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.papers import PAPER_GRIDS, paper_grid

STORED = Path(__file__).parents[1] / 'nbs' / 'studies' / 'results'
FOLDERS = sorted(f.parent for f in STORED.glob('*/*/config.json'))
pytestmark = pytest.mark.skipif(not FOLDERS, reason='no stored results: this is not a checkout')


def test_every_stored_run_is_whole_and_is_where_its_configuration_says():
    for folder in FOLDERS:
        run, result, history = Run.from_dict(json.loads((folder / 'config.json').read_text())), *(json.loads((folder / f).read_text()) for f in ('result.json', 'history.json'))
        assert folder.name == run.name, 'the configuration or the way it is hashed has changed'
        assert result['status'] == 'finished' and len(history) == result['epochs'] == run.epochs
        assert {'torch', 'fastai'} <= result['versions'].keys() and result['hardware']['cpu'] and result['code']['source']
        assert history[-1]['steps'] == result['steps'] and history[-1]['forwards'] == result['forwards']
        assert 0 <= result['accuracy'] <= 1 and 0 <= result['accuracy_bn'] <= 1
        assert {f.name for f in folder.iterdir()} <= {'config.json', 'result.json', 'history.json', 'weights.pt'}


def test_every_stored_run_belongs_to_a_table():
    known = {p.run.name for name in PAPER_GRIDS for p in paper_grid(name)}
    assert {f.name for f in FOLDERS} <= known
