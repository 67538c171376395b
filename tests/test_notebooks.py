"The notebooks as documents: the pattern of a method's notebook, and outputs that a reader may see."
import ast
import json
import re
from pathlib import Path

import pytest
from sadt_nb.methods.registry import method_card

NBS = Path(__file__).parents[1] / 'nbs'
pytestmark = pytest.mark.skipif(not NBS.exists(), reason='the notebooks are not part of the installed library')
PATTERN = ['Idea', 'By hand', 'The callback', 'It does what', 'Use it', 'Differences']
NOT_METHODS = {'99_registry'}


def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def every(): return sorted(NBS.rglob('*.ipynb')) if NBS.exists() else []
def ids(paths): return [str(p.relative_to(NBS)) for p in paths]


METHODS = [p for p in every() if p.parent.name == 'methods' and p.stem not in NOT_METHODS]


@pytest.mark.parametrize('path', METHODS, ids=ids(METHODS))
def test_method_notebooks_follow_the_pattern(path):
    text = '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')
    heads = re.findall(r'^## (.+)$', text, re.M)
    places = [next((i for i, h in enumerate(heads) if h.startswith(p)), None) for p in PATTERN]
    assert None not in places and places == sorted(places), heads
    assert re.search(r'^# .+\n\n> ', text, re.M), 'a title and one line'


@pytest.mark.parametrize('path', METHODS, ids=ids(METHODS))
def test_method_notebooks_show_their_card_of_today(path):
    "The card is made of the registry and the stored benchmark; what a notebook shows is what they say now."
    shown = [c for c in cells(path) if c['cell_type'] == 'code' and ''.join(c['source']).startswith('#| echo: false\nmethod_card(')]
    assert len(shown) == 1 and '| extra memory |' in (stored := ''.join(shown[0]['outputs'][0]['data']['text/markdown']))
    call = ast.parse(''.join(shown[0]['source'])).body[0].value
    card = method_card(*map(ast.literal_eval, call.args), **{k.arg: ast.literal_eval(k.value) for k in call.keywords})
    assert stored == card._repr_markdown_(), 'run the notebook again'


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_outputs_are_fit_to_be_read(path):
    for c in cells(path):
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error'
            text = ''.join(o.get('text', [])) + ''.join(o.get('data', {}).get('text/plain', []))
            found = re.search(r'(Warning\b|Traceback|/(?:home|root|tmp|work|Users)/\S+| at 0x[0-9a-f]{6,})', text)
            assert not found, f'{found.group(0)} in an output of: {"".join(c["source"])[:80]}'


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_a_notebook_leaves_the_process_as_it_was(path):
    "nbdev_test runs many notebooks in one process, and a reader may run two: a default changed in one is a wrong result in the next."
    code = '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code')
    assert not (found := re.findall(r'set_default_dtype|set_default_device|set_default_tensor_type|set_grad_enabled\((?:True|False)\)\n|set_anomaly_enabled', code)), found


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_nbdev_reads_the_title_cell(path):
    "In the cell of the title nbdev takes list items with a colon for settings, and warns of those that are none."
    title = next(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown' and re.search(r'^# \S', ''.join(c['source']), re.M))
    assert not (found := re.findall(r'^-\s+(\S.*:.*\S)\s*$', title, re.M)), found


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_code_cells_were_run(path):
    "A cell that shows something has its output stored, so that the website and GitHub show it too."
    code = [c for c in cells(path) if c['cell_type'] == 'code' and not re.match(r'#\| *(export|hide)', ''.join(c['source']))]
    for c in code:
        text = ''.join(c['source'])
        if ('plt.' in text and 'ax.set(' in text) or 'print(' in text: assert c['outputs'], text[:80]


def links(path):
    "Where the Markdown cells of a notebook lead, and the folder that relative links start from: the index is README.md, too."
    text = '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown')
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    return re.findall(r'\]\(([^)\s]+)\)', text), NBS.parent if path.name == 'index.ipynb' else path.parent


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_links_lead_somewhere(path):
    found, folder = links(path)
    for link in found:
        if re.match(r'https://', link): continue
        assert not re.match(r'\w+:', link), f'{link} is neither https nor in the checkout'
        target, _, place = link.partition('#')
        assert not target or (folder / target).exists(), link
        if place and target.endswith('.ipynb'):
            heads = {re.sub(r'[^\w\s-]', '', h).strip().lower().replace(' ', '-') for c in cells(folder / target) if c['cell_type'] == 'markdown' for h in re.findall(r'^#+ (.+)$', ''.join(c['source']), re.M)}
            assert place in heads, f'{link}: no such heading'


@pytest.mark.parametrize('path', every(), ids=ids(every()))
def test_figures_have_an_alt_text(path):
    for c in cells(path):
        source = ''.join(c['source'])
        if c['cell_type'] == 'code' and not source.startswith('#| hide') and any('image/png' in o.get('data', {}) for o in c['outputs']):
            alt = re.search(r'^#\| fig-alt: (.{40,})$', source, re.M)
            assert alt, source[:80]


TUTORIALS = [p for p in every() if p.parent.name == 'tutorials']


def test_the_course_is_complete(): assert [p.stem[:2] for p in TUTORIALS] == [f'{i:02}' for i in range(1, 10)]


@pytest.mark.parametrize('path', TUTORIALS, ids=ids(TUTORIALS))
def test_tutorials_follow_the_pattern(path):
    "A button and a cell for readers elsewhere, a lead, exercises with hidden answers, a way on."
    given = cells(path)
    first = ''.join(given[0]['source'])
    assert re.search(r'^# .+\n\n> ', first) and f'/blob/main/nbs/tutorials/{path.name})' in first and '(colab.svg)' in first
    assert f'Tutorial {int(path.stem[:2])} of 9' in first
    assert ''.join(given[1]['source']) == "from importlib.util import find_spec\nif not find_spec('sadt_nb'):\n    %pip install -q sadt_nb"
    text = '\n'.join(''.join(c['source']) for c in given if c['cell_type'] == 'markdown')
    heads = re.findall(r'^## (.+)$', text, re.M)
    assert heads[-2:] == ['What to take home', 'Exercises']
    exercises = text.split('## Exercises')[1]
    assert exercises.count('<details>') == exercises.count('</details>') == exercises.count('<summary>Answer</summary>') == 2
    following = next((p for p in TUTORIALS if p.stem > path.stem), None)
    assert following is None or f']({following.name})' in exercises, 'the way on'


@pytest.mark.slow
@pytest.mark.parametrize('path', TUTORIALS, ids=ids(TUTORIALS))
def test_hidden_answers_run(path, monkeypatch, tmp_path):
    "The code in the answers, after the notebook's own."
    monkeypatch.chdir(tmp_path)
    code = [''.join(c['source']) for c in cells(path) if c['cell_type'] == 'code' and '%pip' not in ''.join(c['source'])]
    answers = re.findall(r'```python\n(.*?)```', '\n'.join(''.join(c['source']) for c in cells(path) if c['cell_type'] == 'markdown').split('## Exercises')[1], re.S)
    space = {'__name__': '__main__'}
    for source in [*code, *answers]: exec(compile(source, path.stem, 'exec'), space)
