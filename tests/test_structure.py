"The structure of the package: imports run one way, and public names and version exist."
import ast
import inspect
import re
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import sadt_nb
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LIB = Path(sadt_nb.__file__).parent
# what a folder may import, besides itself where `SIBLINGS` allows it
BASE = {'core', 'methods', 'measures', 'models', 'data'}
ALLOWED = {'core': set(), 'methods': {'core'}, 'measures': {'core'}, 'models': {'core'}, 'data': {'core'},
           'experiments': BASE, 'papers': BASE | {'experiments'},
           'commands': BASE | {'experiments', 'papers'}}
# methods never import one another; a registry imports its folder, and a method the parts of itself
SIBLINGS = {'core', 'data', 'models', 'experiments', 'papers', 'commands'}


def imported_names(node, path):
    "Return the full names that an import statement imports; none for another statement."
    if isinstance(node, ast.Import): return [a.name for a in node.names]
    if not isinstance(node, ast.ImportFrom): return []
    module = node.module or ''
    # nbdev writes relative imports: one dot is this folder, two dots are the library
    if node.level == 1: return [f'sadt_nb.{path.parent.name}.{module}']
    if node.level > 1: return [f'sadt_nb.{module}']
    return [module]


def edges(path):
    "Return the folders and modules of this library that a file imports."
    for node in ast.walk(ast.parse(path.read_text())):
        for name in imported_names(node, path):
            parts = name.split('.')
            if parts[0] == 'sadt_nb' and len(parts) > 1: yield parts[1], parts[-1]


def is_part(module, of):
    "Return whether a module is a part of the method `of`: `sadt_teachers` is a part of `sadt`."
    return module.startswith(f'{of}_')


def offences(path, folder):
    "Return one line for each import of a file of `folder` that is not allowed."
    for target, module in edges(path):
        if target == folder:
            may_import_siblings = folder in SIBLINGS or path.stem == 'registry'
            if may_import_siblings or is_part(module, path.stem): continue
            yield f'{folder}/{path.stem} imports its sibling {module}'
        elif target not in ALLOWED[folder]: yield f'{folder}/{path.stem} imports {target}'


@pytest.mark.parametrize('folder', sorted(ALLOWED))
def test_imports_run_one_way(folder):
    found = []
    for path in (LIB / folder).glob('*.py'): found += offences(path, folder)
    assert not found, found


def test_the_import_check_can_fail(tmp_path):
    wrong = [('core', 'from sadt_nb.methods.sam import SAM'),
             ('core', 'from ..methods.sam import SAM'),
             ('methods', 'from .sam import SAM'),
             ('methods', 'from sadt_nb.methods.sam import SAM'),
             ('models', 'import sadt_nb.data.loader'),
             ('experiments', 'from sadt_nb.papers.grids import paper_grid'),
             ('papers', 'from ..commands.cli import sadt_grid')]
    for folder, text in wrong:
        file = tmp_path / folder / 'x.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        assert list(offences(file, folder)), text


@pytest.mark.parametrize('module, imported, allowed', [
    ('sam', 'sam_noise', True), ('sam_noise', 'sam', False), ('sam', 'samba', False), ('sam', 'asam', False)])
def test_a_method_imports_parts_of_itself_alone(module, imported, allowed, tmp_path):
    file = tmp_path / 'methods' / f'{module}.py'
    file.parent.mkdir()
    file.write_text(f'from .{imported} import x')
    assert (not list(offences(file, 'methods'))) is allowed


def star_import():
    "Return the names that `from sadt_nb.all import *` imports."
    names = {}
    exec('from sadt_nb.all import *', names)
    return {k: v for k, v in names.items() if not k.startswith('_')}


def test_star_import_brings_every_method_and_its_step():
    names = star_import()
    assert len(names) <= 70
    for name, method in names['METHODS'].items():
        cls = getattr(method.factory, 'func', method.factory) # a preset is a partial of its class
        if inspect.isclass(cls): assert names[cls.__name__] is cls, name
    steps = {n for n in names if n.endswith('_step')}
    assert steps >= {'sam_step', 'asam_step', 'esam_step', 'gsam_step', 'wsam_step', 'sadt_step'}


def test_star_import_hides_no_name_of_fastai():
    import fastai.vision.all as fastai_names
    theirs = vars(fastai_names)
    hidden = [n for n, v in star_import().items() if n in theirs and theirs[n] is not v]
    assert not hidden, hidden


def test_every_folder_of_the_library_has_its_rules():
    folders = {f.parent.name for f in LIB.glob('*/*.py')}
    assert folders == ALLOWED.keys()


def test_version_and_typing_marker():
    assert re.fullmatch(r'\d+\.\d+\.\d+', sadt_nb.__version__)
    assert sadt_nb.__version__ == version('sadt_nb')
    assert (LIB / 'py.typed').exists()


# Requirements and workflows of the checkout; an installed wheel has neither

ROOT = LIB.parent
in_checkout = pytest.mark.skipif(not (ROOT / 'settings.ini').is_file(), reason='only in the checkout')


def requirements(name):
    "Return the requirements of settings.ini under `name`."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return [Requirement(r) for r in ini['DEFAULT'][name].split()]


@in_checkout
def test_every_requirement_has_a_lower_bound():
    "`make test-lowest` installs them. PyTorch before 2.10 runs code from files with `weights_only=True`."
    lower = {}
    for r in requirements('requirements'):
        bounds = [s.version for s in r.specifier if s.operator == '>=']
        assert len(bounds) == 1, r
        lower[r.name] = Version(bounds[0])
    assert lower['torch'] >= Version('2.10'), 'CVE-2026-24747'


@in_checkout
def test_the_constraints_satisfy_the_requirements():
    lines = (ROOT / 'constraints.txt').read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith('#')]
    versions = {}
    for r in pinned:
        spec, = r.specifier
        assert spec.operator == '==', r
        versions[canonicalize_name(r.name)] = spec
    for r in requirements('requirements') + requirements('dev_requirements'):
        spec = versions[canonicalize_name(r.name)]
        assert r.specifier.contains(spec.version), r
    assert versions['torch'].contains(versions['torch'].version + '+cpu'), 'the wheels for CPUs alone'


@in_checkout
def test_workflows_use_actions_of_one_commit():
    found = []
    for file in (ROOT / '.github' / 'workflows').glob('*.yaml'):
        found += re.findall(r'uses: *(\S+)', file.read_text())
    assert found
    for action in found: assert re.fullmatch(r'[\w/-]+@[0-9a-f]{40}', action), action


@pytest.mark.parametrize('keyword, source, chosen', [
    ('sam', 'TESTPATHS', 'sam'), ('sam', 'INVOCATION_DIR', 'sam'), # `pytest -k sam`
    ('sam', 'ARGS', None),                                         # `pytest tests -k sam`
    ('sampl', 'TESTPATHS', None), ('sam or asam', 'TESTPATHS', None), ('', 'TESTPATHS', None)])
def test_a_method_without_a_path_chooses_the_tests_of_this_method(keyword, source, chosen):
    sources = pytest.Config.ArgsSource
    deselected = []
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    config = SimpleNamespace(getoption={'keyword': keyword, '-m': ''}.get, ArgsSource=sources,
                             args_source=sources[source], hook=hook)
    assert conftest.method_alone(config) == chosen

    file = Path(conftest.__file__)
    for name in conftest.METHOD_FILES:
        path = file.parent / name
        assert path.exists()
        assert conftest.pytest_ignore_collect(path, config) is None
    assert conftest.pytest_ignore_collect(file.parent, config) is None
    assert conftest.pytest_ignore_collect(Path(__file__), config) is (True if chosen else None)

    def item(**params): return SimpleNamespace(callspec=SimpleNamespace(params=params), keywords=())
    of_sam, of_asam, of_no_method = item(name='sam', n=2), item(name='asam'), SimpleNamespace(keywords=())
    items = [of_sam, of_asam, of_no_method]
    conftest.pytest_collection_modifyitems(config, items)
    assert items == ([of_sam] if chosen else [of_sam, of_asam, of_no_method])
    assert len(items) + len(deselected) == 3
