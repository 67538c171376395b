"The notebooks as documents: the pattern of a method's notebook, links, and readable outputs."
import ast
import inspect
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from sadt_nb.experiments.report import about_images, load_results, published
from sadt_nb.methods.registry import method_card

NBS = Path(__file__).parents[1] / 'nbs'
pytestmark = pytest.mark.skipif(not NBS.exists(), reason='the installed library has no notebooks')
PATTERN = ['Idea', 'By hand', 'The callback', 'It does what', 'Use it', 'Differences']
NOT_METHODS = {'99_registry'}
UNFIT = r'(Warning\b|Traceback|/(?:home|root|tmp|work|Users)/\S+| at 0x[0-9a-f]{6,})'
GLOBAL_DEFAULTS = (r'set_default_dtype|set_default_device|set_default_tensor_type|'
                   r'set_grad_enabled\((?:True|False)\)\n|set_anomaly_enabled')
INSTALL_CELL = """
from importlib.util import find_spec
if not find_spec('sadt_nb'):
    %pip install -q sadt_nb
if not find_spec('sadt_nb'): # before the first release
    %pip install -q git+https://github.com/sadt-nb/sadt_nb
""".strip()


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])
def code_cells(path): return [c for c in cells(path) if c['cell_type'] == 'code']
def markdown_cells(path): return [c for c in cells(path) if c['cell_type'] == 'markdown']
def prose(path): return '\n'.join(map(source, markdown_cells(path)))
def every(): return sorted(NBS.rglob('*.ipynb')) if NBS.exists() else []
def ids(paths): return [str(p.relative_to(NBS)) for p in paths]
def in_folder(name): return [p for p in every() if p.parent.name == name]


def without_number(path): return re.sub(r'^\d+_', '', path.stem)


def is_part(path):
    "Return whether a page belongs to the page of another method, as `sadt_teachers` belongs to `sadt`."
    names = [without_number(p) for p in in_folder('methods')]
    return any(without_number(path).startswith(f'{name}_') for name in names)


METHODS = [p for p in in_folder('methods') if p.stem not in NOT_METHODS and not is_part(p)]


def place_of(heading, headings):
    "Return the index of the first of `headings` that starts with `heading`, or None."
    for i, h in enumerate(headings):
        if h.startswith(heading): return i


@pytest.mark.parametrize('path', METHODS, ids=ids(METHODS))
def test_method_notebooks_follow_the_pattern(path):
    text = prose(path)
    headings = re.findall(r'^## (.+)$', text, re.M)
    places = [place_of(p, headings) for p in PATTERN]
    assert None not in places, headings
    assert places == sorted(places), headings
    assert re.search(r'^# .+\n\n> ', text, re.M), 'a title and one line'


@pytest.mark.parametrize('path', METHODS, ids=ids(METHODS))
def test_method_notebooks_show_their_current_card(path):
    "A notebook must show the card that registry and stored benchmark give now."
    shown = [c for c in code_cells(path) if source(c).startswith('#| echo: false\nmethod_card(')]
    assert len(shown) == 1
    stored = ''.join(shown[0]['outputs'][0]['data']['text/markdown'])
    assert '| extra memory |' in stored
    call = ast.parse(source(shown[0])).body[0].value
    args = map(ast.literal_eval, call.args)
    kwargs = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
    assert stored == method_card(*args, **kwargs)._repr_markdown_(), 'run the notebook again'


ON_CIFAR = ('index', 'guides/21_which_method', 'studies/all_methods_on_cifar', 'studies/distill_cifar',
            'studies/fast_methods', 'studies/few_images', 'studies/flatness', 'studies/sadt_notebook20',
            'studies/sadt_table1', 'studies/sam_study', 'studies/verdicts',
            'tutorials/06_what_makes_sadt_work', 'tutorials/10_94_percent_in_minutes')
ABOUT_JPEG = 'tutorials/10_94_percent_in_minutes' # explains the images


@pytest.mark.parametrize('page', ON_CIFAR)
def test_pages_with_accuracies_on_cifar_say_once_which_images_these_are(page):
    "The text has one source, `about_images`, and no page says it in words of its own."
    path = NBS / f'{page}.ipynb'
    shown = [c for c in code_cells(path) if 'about_images(' in source(c) and 'import (' not in source(c)]
    assert len(shown) == 1
    stored = ''.join(shown[0]['outputs'][0]['data']['text/markdown'])
    assert stored == about_images(load_results('published/cifar_small')), 'run the notebook again'
    assert 'JPEG' in stored
    assert page == ABOUT_JPEG or 'JPEG' not in prose(path)


def stored_on_cifar():
    "Return the names of the packaged studies with accuracies on CIFAR."
    # without folders of costs, which have no accuracies
    names = {f.name for f in published().iterdir() if f.is_dir()} - {'step_cost', 'loops', 'fast_cost'}
    return {n for n in names if about_images(load_results(published(n)))}


def test_all_pages_that_load_accuracies_on_cifar_are_in_the_list():
    "A page is found by the results that it loads, so a new page cannot forget the sentence."
    names, found = stored_on_cifar(), set()
    for path in [NBS / 'index.ipynb', *(p for f in ('guides', 'studies', 'tutorials') for p in in_folder(f))]:
        code = '\n'.join(map(source, code_cells(path)))
        reads = 'load_results(' in code or 'read_result(' in code or 'finished_runs(' in code
        quoted = set(re.findall(r"'(?:published/)?(\w+)'", code))
        if reads and 'accuracy' in code and quoted & names: found.add(page_name(path))
    assert found | {'studies/verdicts'} == set(ON_CIFAR) # the verdicts' page reads results by its claims


def page_name(path): return str(path.relative_to(NBS).with_suffix(''))


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_outputs_are_fit_to_be_read(path):
    for c in cells(path):
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error'
            text = ''.join(o.get('text', [])) + ''.join(o.get('data', {}).get('text/plain', []))
            found = re.search(UNFIT, text)
            assert not found, f'{found.group(0)} in an output of: {source(c)[:80]}'


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_a_notebook_changes_no_default_of_the_process(path):
    """nbdev_test runs many notebooks in one process, and a reader may run two.

    A default that one notebook changes would make results of the next one wrong."""
    code = '\n'.join(map(source, code_cells(path)))
    found = re.findall(GLOBAL_DEFAULTS, code)
    assert not found, found


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_nbdev_reads_the_title_cell(path):
    "In the title's cell, nbdev reads list items with a colon as settings and warns of all unknown ones."
    titles = [source(c) for c in markdown_cells(path) if re.search(r'^# \S', source(c), re.M)]
    found = re.findall(r'^-\s+(\S.*:.*\S)\s*$', titles[0], re.M)
    assert not found, found


def shows_something(text):
    makes_a_figure = 'plt.' in text and 'ax.set(' in text
    return makes_a_figure or 'print(' in text


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_code_cells_were_run(path):
    "A cell that shows something has its output stored, so that the website and GitHub show it, too."
    for c in code_cells(path):
        text = source(c)
        if re.match(r'#\| *(export|hide)', text): continue
        if shows_something(text): assert c['outputs'], text[:80]


def links(path):
    "Return all targets of links in a notebook's Markdown cells."
    text = re.sub(r'```.*?```', '', prose(path), flags=re.S)
    return re.findall(r'\]\(([^)\s]+)\)', text)


def anchors(path):
    "Return the anchors of a notebook's headings, as GitHub and the website make them."
    found = set()
    for c in markdown_cells(path):
        for heading in re.findall(r'^#+ (.+)$', source(c), re.M):
            words = re.sub(r'[^\w\s-]', '', heading).strip().lower()
            found.add(words.replace(' ', '-'))
    return found


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_links_lead_somewhere(path):
    folder = NBS.parent if path.name == 'index.ipynb' else path.parent # the index is README.md as well
    for link in links(path):
        if re.match(r'https://', link): continue
        assert not re.match(r'\w+:', link), f'{link} is neither https nor in the checkout'
        target, _, place = link.partition('#')
        assert not target or (folder / target).exists(), link
        if place and target.endswith('.ipynb'):
            assert place in anchors(folder / target), f'{link}: no such heading'


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_figures_have_an_alt_text(path):
    for c in code_cells(path):
        text = source(c)
        has_figure = any('image/png' in o.get('data', {}) for o in c['outputs'])
        if has_figure and not text.startswith('#| hide'):
            alt = re.search(r'^#\| fig-alt: (.{40,})$', text, re.M)
            assert alt, text[:80]


TUTORIALS = in_folder('tutorials')


def test_the_course_is_complete(): assert [p.stem[:2] for p in TUTORIALS] == [f'{i:02}' for i in range(1, 11)]


@pytest.mark.parametrize('path', TUTORIALS, ids=ids(TUTORIALS))
def test_tutorials_follow_the_pattern(path):
    "A Colab button, an install cell, a lead, exercises with hidden answers, a link to the next tutorial."
    given = cells(path)
    first = source(given[0])
    assert re.search(r'^# .+\n\n> ', first)
    assert f'/blob/main/nbs/tutorials/{path.name})' in first
    assert '(colab.svg)' in first
    assert f'Tutorial {int(path.stem[:2])} of 10' in first
    assert source(given[1]) == INSTALL_CELL
    text = prose(path)
    headings = re.findall(r'^## (.+)$', text, re.M)
    assert headings[-2:] == ['What to take home', 'Exercises']
    exercises = text.split('## Exercises')[1]
    assert exercises.count('<details>') == 2
    assert exercises.count('</details>') == 2
    assert exercises.count('<summary>Answer</summary>') == 2
    later = [p for p in TUTORIALS if p.stem > path.stem]
    if later: assert f']({later[0].name})' in exercises, 'a link to the next tutorial'


def of_the_library(tree):
    "Return what the code imports from the library, by name."
    found = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith('sadt_nb'): continue
        module = import_module(node.module)
        for a in node.names:
            if a.name == '*': found.update({n: getattr(module, n) for n in module.__all__})
            else: found[a.asname or a.name] = getattr(module, a.name)
    return found


@pytest.mark.parametrize('path', TUTORIALS, ids=ids(TUTORIALS))
def test_tutorials_call_the_library_as_it_is(path):
    "Without a run, which test-moved makes: all imported names exist, and all calls fit their options."
    fenced = re.findall(r'```python\n(.*?)```', prose(path), re.S)
    code = [source(c) for c in code_cells(path) if '%pip' not in source(c)]
    tree = ast.parse('\n'.join([*code, *fenced]))
    names = of_the_library(tree)
    assert names
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name): continue
        if node.func.id not in names: continue
        options = {k.arg: k.value for k in node.keywords}
        if None in options or any(isinstance(a, ast.Starred) for a in node.args): continue # unpacked
        inspect.signature(names[node.func.id]).bind(*node.args, **options)


@pytest.mark.slow
@pytest.mark.parametrize('path', TUTORIALS, ids=ids(TUTORIALS))
def test_hidden_answers_run(path, monkeypatch, tmp_path):
    "The code in the answers runs after the notebook's own code."
    monkeypatch.chdir(tmp_path)
    code = [source(c) for c in code_cells(path) if '%pip' not in source(c)]
    exercises = prose(path).split('## Exercises')[1]
    answers = re.findall(r'```python\n(.*?)```', exercises, re.S)
    namespace = {'__name__': '__main__'}
    for text in [*code, *answers]: exec(compile(text, path.stem, 'exec'), namespace)


@pytest.mark.parametrize('has, sources', [
    ({'here'}, []),
    ({'sadt_nb'}, ['sadt_nb']),
    ({'git+https://github.com/sadt-nb/sadt_nb'}, ['sadt_nb', 'git+https://github.com/sadt-nb/sadt_nb'])])
def test_tutorials_install_from_the_index_or_else_from_the_repository(has, sources):
    asked = []
    def installed(name): return bool(has & {'here', *asked})
    statements = re.sub(r'%pip install -q (\S+)', r"asked.append('\1')", INSTALL_CELL)
    first, rest = statements.split('\n', 1)
    assert first == 'from importlib.util import find_spec'
    exec(rest, dict(find_spec=installed, asked=asked))
    assert asked == sources
