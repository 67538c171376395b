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
def test_code_cells_were_run(path):
    "A cell that shows something has its output stored, so that the website and GitHub show it too."
    code = [c for c in cells(path) if c['cell_type'] == 'code' and not re.match(r'#\| *(export|hide)', ''.join(c['source']))]
    for c in code:
        text = ''.join(c['source'])
        if ('plt.' in text and 'ax.set(' in text) or 'print(' in text: assert c['outputs'], text[:80]
