"""The interactive pieces of the website: which cells get one, and the data that it shows.

A code cell with the line `#| explorable: NAME` draws a still picture. On the website the explorable follows
this cell and hides its picture; without scripts, in Jupyter and on GitHub the picture stays. The sources are
in docs/_static/explorables, one file per explorable, and need neither a build nor another host: D3, with
which they draw, stands in docs/_static/d3."""
import json
from pathlib import Path
from typing import Callable, NamedTuple

import nbformat

FOLDER = Path(__file__).parent / '_static' / 'explorables'
D3 = '_static/d3/d3.min.js' # dist/d3.min.js of D3 7.9.0 from npm, 280 kB
LANDSCAPES = Path(__file__).parent / 'landscapes.json' # made by make_landscapes.py


class Explorable(NamedTuple):
    "One interactive piece."
    label: str              # Its name for screen readers
    scripts: tuple          # Names of its files, in the order in which they are loaded, after D3
    has_still: bool = True  # `True`: it takes the place of the cell's picture
    data: Callable|None = None # Returns what it shows, for JSON


def landscapes(): return json.loads(LANDSCAPES.read_text(encoding='utf-8'))


EXPLORABLES = dict(
    one_step=Explorable('One batch of four methods from a point that you move',
                        ('parts', 'steps', 'plane', 'one_step')),
    race=Explorable('A race of five methods from a point that you move',
                    ('parts', 'steps', 'plane', 'race')),
    verdicts=Explorable('The claims, by paper, outcome and method', ('parts', 'verdicts'), False),
    landscapes=Explorable('The losses around three networks, which you turn', ('parts', 'landscapes'),
                          data=landscapes),
)


# Pages


def raw_html(lines):
    "Return a cell that stands on the page as it is."
    fence = '`' * 8
    return nbformat.v4.new_markdown_cell('\n'.join([fence + '{raw} html', *lines, fence]))

def place(name):
    "Return the cell in which an explorable builds itself. Raises `ValueError` for an unknown name."
    known = ', '.join(EXPLORABLES)
    if name not in EXPLORABLES: raise ValueError(f'`#| explorable` must be one of {known}, got {name!r}')
    label = EXPLORABLES[name].label
    data = EXPLORABLES[name].data
    div = f'<div class="explorable" data-explorable="{name}" role="group" aria-label="{label}" hidden></div>'
    lines = [div]
    if data:
        text = json.dumps(data(), ensure_ascii=False).replace('</', '<\\/') # no text may end the element
        lines.append(f'<script type="application/json" id="data-{name}">{text}</script>')
    return raw_html(lines)

def files(names, up):
    "Return the cell that loads D3 and the files of explorables, each once; `up` leads to the site's root."
    root = f'{up}_static/explorables/'
    scripts = dict.fromkeys(f'{root}{s}.js' for name in names for s in EXPLORABLES[name].scripts)
    lines = [f'<link rel="stylesheet" href="{root}explorables.css">']
    lines += [f'<script src="{s}" defer></script>' for s in [up + D3, *scripts]]
    return raw_html(lines)

def with_explorables(cells, up):
    """Return the cells of a page with the explorables that their metadata name, and at the end their files.

    The tag `still_NAME` marks the cell whose picture the explorable replaces."""
    out = []
    names = []
    for cell in cells:
        out.append(cell)
        name = cell.metadata.pop('explorable', None)
        if not name: continue
        names.append(name)
        out.append(place(name))
        if EXPLORABLES[name].has_still: cell.metadata.setdefault('tags', []).append(f'still_{name}')
    return out + [files(names, up)] if names else out
