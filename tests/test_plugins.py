"Methods of other packages: an entry point adds a method, and a broken entry point is left out."
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from sadt_nb.methods import registry
from sadt_nb.methods.registry import METHODS, Methods

EXAMPLE = Path(__file__).parent / 'example_package'


def entry_points_file(groups):
    "Return the text of entry_points.txt for entry points as pyproject.toml declares them."
    lines = []
    for group, points in groups.items():
        lines.append(f'[{group}]\n')
        for name, target in points.items(): lines.append(f'{name} = {target}\n')
    return ''.join(lines)


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """Return a folder that holds the example package as an installer leaves it.

    That is the module, and the entry points that its pyproject.toml declares."""
    tmp_path = tmp_path_factory.mktemp('installed')
    project = tomllib.loads((EXAMPLE / 'pyproject.toml').read_text())['project']
    shutil.copy(EXAMPLE / 'example_method.py', tmp_path)
    name, version = project['name'], project['version']
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    (info / 'entry_points.txt').write_text(entry_points_file(project['entry-points']))
    return tmp_path


IN_TURN = """
import os, sys
import fastai.vision.all, matplotlib.pyplot, pandas, scipy.stats, sklearn.datasets
assert not [m for m in sys.modules if m.startswith('sadt_nb')]
for code in sys.argv[1:]:
    pid = os.fork()
    if not pid:
        exec(code, dict(__name__='__main__'))
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print('exit', status, flush=True)
"""


def python(codes, path, cwd):
    """Run each code in a Python of its own that also imports from `path`. Return their outputs.

    The processes begin as copies of one that has imported fastai, and nothing of this library."""
    search = os.pathsep.join([str(path), os.environ.get('PYTHONPATH', '')])
    env = dict(os.environ, PYTHONPATH=search, PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, '-c', IN_TURN, *codes], cwd=cwd, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=300)
    outputs = done.stdout.split('exit 0\n')
    assert len(outputs) == len(codes) + 1, done.stdout
    return outputs[:-1]


FIRST_IMPORTS = ['from sadt_nb.all import *', 'from sadt_nb.methods.registry import *',
                 'import example_method; from sadt_nb.all import *']


USE = """
from sadt_nb.methods.registry import make_method, METHODS
cb, = make_method('random_neighbour', seed=3, rho=.1)
print(type(cb).__name__, cb.rho, METHODS['random_neighbour'].passes)
try: make_method('random_neighbour', rho=-1)
except ValueError as e: print(e)
"""
TRAIN = """
from sadt_nb.commands.cli import sadt_train
sadt_train(method='random_neighbour', n_train=100, bs=50, epochs=1, root='runs')
from sadt_nb.experiments.report import load_results
r, = load_results('runs').to_dict('records')
print('done', r['method'], r['status'])
"""


@pytest.fixture(scope='module')
def outputs(installed):
    "Return what each of the codes prints in a process that finds the installed package."
    codes = [*(first + USE for first in FIRST_IMPORTS), TRAIN]
    return dict(zip([*FIRST_IMPORTS, 'train'], python(codes, installed, installed)))


@pytest.mark.parametrize('first', FIRST_IMPORTS)
def test_an_installed_package_adds_its_method(outputs, first):
    "The order of imports does not matter."
    assert outputs[first].splitlines() == ['RandomNeighbour 0.1 2', '`rho` must be positive, got -1']


def test_an_installed_method_trains_from_the_command_line(outputs):
    assert 'done random_neighbour finished' in outputs['train'], outputs['train']
    assert '2 steps, 4 passes' in outputs['train'], outputs['train']


def test_without_the_package_there_is_no_such_method(): assert 'random_neighbour' not in METHODS


def entry_points(tmp_path, monkeypatch, **modules):
    "Write modules of these names and texts, and return an entry point for the `METHOD` of each."
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in modules.items(): (tmp_path / f'{name}.py').write_text(text)
    return [EntryPoint(name=n, value=f'{n}:METHOD', group='sadt_nb.methods') for n in modules]


BROKEN = [('plugin_a', 'raise RuntimeError("no driver")', 'RuntimeError: no driver'),
          ('plugin_b', 'METHOD = 3', 'is 3, not a Method'),
          ('plugin_c', 'x = 1', 'AttributeError'),
          ('plugin_d', 'def (', 'SyntaxError'),
          ('plugin_e', 'import sys\nsys.exit("no licence")', 'SystemExit: no licence'),
          ('plugin_f', 'raise KeyboardInterrupt()', 'KeyboardInterrupt'),
          ('plugin_g', 'raise GeneratorExit()', 'GeneratorExit'),
          ('plugin_h', 'def f(): f()\nf()', 'RecursionError'),
          ('plugin_i', """
class Odd(Exception):
    def __str__(self): raise ValueError()
raise Odd()""", 'Odd$'),
          ('plugin_j', """
class Odd:
    def __repr__(self): raise ValueError('no text')
METHOD = Odd()""", 'ValueError: no text')]
IMPORT = 'from sadt_nb.methods.registry import Method\n'
MISTAKES = {
    'None, "no factory"': 'its factory None cannot be called',
    '3, "a number"': 'its factory 3 cannot be',
    'type, "no signature"': 'the options of its factory cannot be read',
    'print, 5': '`summary` must be',
    'print, "", "2"': "`passes` must be of type float, got '2'",
    'print, "", True': '`passes` must be',
    'print, "", float("nan")': '`passes` must be positive and finite',
    'print, "", 0': '`passes` must be',
    'print, "", 1, 1.5': '`steps` must be of type int',
    'print, "", 1, 0': '`steps` must be positive',
    'print, "", memory=None': '`memory` must be of type str',
    'print, "", seeded=1': '`seeded` must be',
    'print, "", few_steps=3': '`few_steps` must be of type dict',
    'print, "", half_precision=0.': '`half_precision` must be positive',
    'print, "", extra_passes=2': '`extra_passes` must be a function or None',
}
BROKEN += [(f'plugin_k{i}', f'{IMPORT}METHOD = Method({arguments})', reason)
           for i, (arguments, reason) in enumerate(MISTAKES.items())]


@pytest.mark.parametrize('name, text, reason', BROKEN)
def test_a_method_that_cannot_be_loaded_is_left_out_with_a_reason(tmp_path, monkeypatch, name, text, reason):
    before = dict(METHODS)
    message = f"method '{name}' of the entry point '{name}:METHOD' is left out: .*{reason}"
    with pytest.warns(UserWarning, match=message):
        assert Methods(dict(before), entry_points(tmp_path, monkeypatch, **{name: text})) == before


def test_the_rest_works_beside_every_broken_method(tmp_path, monkeypatch):
    modules = {f'rest_{name}': text for name, text, _ in BROKEN}
    modules['rest_good'] = IMPORT + 'METHOD = Method(lambda: None, "good")'
    methods = Methods(dict(METHODS), entry_points(tmp_path, monkeypatch, **modules))
    with pytest.warns(UserWarning) as caught: assert [*methods] == [*METHODS, 'rest_good']
    assert len(caught) == len(BROKEN)
    monkeypatch.setattr(registry, 'METHODS', methods)
    assert registry.make_method('rest_good') == []
    assert 'rest_good' in registry.methods_table().index
    assert 'extra memory' in repr(registry.method_card('rest_good'))


def test_our_methods_pass_the_check():
    for name, method in METHODS.items(): registry._check_method(method, name)


def test_damaged_entry_points_are_left_out(monkeypatch):
    def damaged(group): raise ValueError('not enough values to unpack')
    monkeypatch.setattr(registry, 'entry_points', damaged)
    before = dict(METHODS)
    with pytest.warns(UserWarning, match='methods of other packages are left out: ValueError: not enough'):
        assert Methods(dict(before)) == before


def test_an_entry_point_cannot_replace_our_method_and_the_next_one_still_loads(tmp_path, monkeypatch):
    code = '''
from sadt_nb.all import *
from sadt_nb.methods.registry import Method
METHOD = Method(lambda: None, f"one of {len(METHODS) + 1}")'''
    good, = entry_points(tmp_path, monkeypatch, plugin_sam=code)
    bad = EntryPoint(name='sam', value=good.value, group=good.group)
    with pytest.warns(UserWarning, match='a method of this name exists already'):
        added = Methods(dict(METHODS), [bad, good])['plugin_sam']
        ours = Methods(dict(METHODS), [bad, good])['sam']
    assert added.summary == f'one of {len(METHODS) + 1}'
    assert ours is METHODS['sam']


def test_an_entry_point_is_loaded_when_the_methods_are_first_read(tmp_path, monkeypatch):
    code = '''
from sadt_nb.methods.registry import Method
METHOD = Method(lambda: None, "late")'''
    methods = Methods({}, entry_points(tmp_path, monkeypatch, plugin_late=code))
    assert 'plugin_late' not in sys.modules
    assert list(methods) == ['plugin_late']
    assert 'plugin_late' in sys.modules
