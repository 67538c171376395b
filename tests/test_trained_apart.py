"""Students and teachers that were trained with different code or hardware, and the pages that say so."""
import json
from pathlib import Path

import pandas as pd
import pytest
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.report import load_results, pairs_with_teachers, published, trained_apart
from sadt_nb.papers.base import distilled

STUDIES = Path(__file__).parents[1] / 'nbs' / 'studies'
# Presets with students, by the name of the stored results
WITH_STUDENTS = {'digits': ['distill_digits'], 'cifar_cnn': ['all_methods_on_cifar', 'flatness'],
                 'flatness_resnet20': ['flatness'], 'flatness_digits': ['flatness'],
                 'cifar_small': ['distill_cifar'], 'fast_narrow': ['fast_methods'],
                 'fast_rounds': ['distill_cifar'],
                 'compare_digits': ['all_methods_on_noisy_digits'],
                 'digits_temperature': ['distill_digits']}
NO_RUNS = 'step_cost', 'loops', 'fast_cost' # measurements of time and memory


def made(source, cpu='x', gpu=None): return dict(code=dict(source=source), hardware=dict(cpu=cpu, gpu=gpu))


def test_pairs_with_other_code_or_hardware_are_counted_once():
    same, code = (made('a'), made('a')), (made('a'), made('b'))
    machine, both = (made('a'), made('a', gpu='y')), (made('a'), made('b', 'z'))
    found = trained_apart([same, code, code, machine, both])
    assert found.startswith('Of 5 pairs of student and teacher, 4 were trained under different conditions: '
                            '3 with different versions of the source code, 2 on different hardware.')


def test_equal_pairs_have_no_difference():
    assert trained_apart([(made('a'), made('a'))], 'pairs of A and B') == (
        'Both networks of each of the 1 pairs of A and B were trained with the same source code '
        'and on the same kind of hardware.')


def test_no_pair_is_refused():
    with pytest.raises(ValueError, match='`pairs` must have at least one pair'): trained_apart([])


def test_each_student_is_paired_with_each_of_its_finished_teachers():
    first, second, lost = (Run(seed=s, split=0) for s in (0, 1, 2))
    student = distilled((first, second, lost), 7)
    rows = [dict(run=r, status='finished') for r in (first, second, student)]
    rows.append(dict(run=lost, status='failed'))
    found = pairs_with_teachers(pd.DataFrame(rows))
    assert [(a['run'], b['run']) for a, b in found] == [(student, first), (student, second)]


FOLDERS = sorted(p.name for p in published().iterdir() if p.is_dir() and p.name not in NO_RUNS)


@pytest.mark.parametrize('folder', FOLDERS)
def test_all_stored_students_have_a_study(folder):
    "The list of studies is complete: no other stored results have students beside their teachers."
    records = load_results(f'published/{folder}')
    assert bool(pairs_with_teachers(records)) == (folder in WITH_STUDENTS)


@pytest.mark.skipif(not STUDIES.exists(), reason='the installed library has no notebooks')
def test_every_study_of_students_says_how_many_were_trained_apart():
    for name in sorted({n for names in WITH_STUDENTS.values() for n in names}):
        cells = json.loads((STUDIES / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
        code = [c for c in cells if c['cell_type'] == 'code']
        shown = [c for c in code if 'trained_apart(' in ''.join(c['source'])]
        assert len(shown) == 1, name
        assert 'student and teacher' in str(shown[0]['outputs']), name
        assert 'with the same code' not in json.dumps(cells), name
