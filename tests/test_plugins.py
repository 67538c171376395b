"Methods of other packages: an entry point is all it takes, and a broken one breaks nothing."
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from sadt_nb.methods.registry import METHODS, Methods

EXAMPLE = Path(__file__).parent / 'example_package'


@pytest.fixture
def installed(tmp_path):
    "A folder that holds the example as an installer would have left it: the module, and the entry points that its pyproject.toml declares."
    project = tomllib.loads((EXAMPLE / 'pyproject.toml').read_text())['project']
    shutil.copy(EXAMPLE / 'example_method.py', tmp_path)
    (info := tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info").mkdir()
    (info / 'METADATA').write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (info / 'entry_points.txt').write_text(''.join(f'[{group}]\n' + ''.join(f'{k} = {v}\n' for k, v in points.items()) for group, points in project['entry-points'].items()))
    return tmp_path


def python(code, path, tmp_path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')]), PYTHONWARNINGS='ignore')
    return subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize('first', ['from sadt_nb.all import *', 'from sadt_nb.methods.registry import *', 'import example_method; from sadt_nb.all import *'])
def test_an_installed_package_brings_its_method(installed, tmp_path, first):
    "Whatever is imported first."
    said = python(first + """
from sadt_nb.methods.registry import make_method, METHODS
cb, = make_method('random_neighbour', seed=3, rho=.1)
print(type(cb).__name__, cb.rho, METHODS['random_neighbour'].passes)
try: make_method('random_neighbour', rho=-1)
except ValueError as e: print(e)
""", installed, tmp_path)
    assert said.stdout.splitlines() == ['RandomNeighbour 0.1 2', '`rho` must be positive, got -1'], said.stderr


def test_it_trains_from_the_command_line(installed, tmp_path):
    said = python("""
from sadt_nb.experiments.cli import sadt_train
sadt_train(method='random_neighbour', n_train=100, bs=50, epochs=1, root='runs')
from sadt_nb.experiments.report import load_results
r, = load_results('runs').to_dict('records')
print('done', r['method'], r['status'])
""", installed, tmp_path)
    assert 'done random_neighbour finished' in said.stdout and '2 steps, 4 passes' in said.stdout, said.stdout + said.stderr


def test_without_the_package_there_is_no_such_method(): assert 'random_neighbour' not in METHODS


def points(tmp_path, monkeypatch, **modules):
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in modules.items(): (tmp_path / f'{name}.py').write_text(text)
    return [EntryPoint(name=n, value=f'{n}:METHOD', group='sadt_nb.methods') for n in modules]


@pytest.mark.parametrize('name,text,said', [
    ('plugin_a', 'raise RuntimeError("no driver")', 'RuntimeError: no driver'), ('plugin_b', 'METHOD = 3', 'is 3, not a Method'), ('plugin_c', 'x = 1', 'AttributeError'), ('plugin_d', 'def (', 'SyntaxError')])
def test_what_cannot_be_loaded_is_left_out_with_a_reason(tmp_path, monkeypatch, name, text, said):
    before = dict(METHODS)
    with pytest.warns(UserWarning, match=f"method '{name}' of the entry point '{name}:METHOD' is left out: .*{said}"):
        assert Methods(dict(before), points(tmp_path, monkeypatch, **{name: text})) == before


def test_names_of_ours_stay_ours_and_a_good_one_among_bad_ones_is_taken(tmp_path, monkeypatch):
    p, = points(tmp_path, monkeypatch, plugin_sam='from sadt_nb.all import *\nfrom sadt_nb.methods.registry import Method\nMETHOD = Method(lambda: None, f"one of {len(METHODS) + 1}")')
    bad = EntryPoint(name='sam', value=p.value, group=p.group)
    with pytest.warns(UserWarning, match='there is a method of that name'): found = Methods(dict(METHODS), [bad, p])['plugin_sam'], Methods(dict(METHODS), [bad, p])['sam']
    assert found[0].summary == f'one of {len(METHODS) + 1}' and found[1] is METHODS['sam']


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path, monkeypatch):
    given = points(tmp_path, monkeypatch, plugin_late='from sadt_nb.methods.registry import Method\nMETHOD = Method(lambda: None, "late")')
    methods = Methods({}, given)
    assert 'plugin_late' not in sys.modules
    assert list(methods) == ['plugin_late'] and 'plugin_late' in sys.modules
