"The methods that README and tutorial 9 define, read from these pages as they stand."
import ast
import json
from contextlib import contextmanager
from pathlib import Path

import torch
from sadt_nb.core.perturb import global_norm, perturbed
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.methods.registry import METHODS, Method

NBS = Path(__file__).parents[1] / 'nbs'
PAGES = {'readme_method': ('index.ipynb', 'RandomNeighbour'),
         'tutorial_method': ('tutorials/09_your_own_method.ipynb', 'Smoothed')}
NAMES = dict(torch=torch, PerturbedPass=PerturbedPass, global_norm=global_norm, perturbed=perturbed,
             Method=Method)


def fragments(page):
    "Return the trees of the page's code: its code cells, and the Python blocks of its Markdown cells."
    sources = []
    for cell in json.loads((NBS / page).read_text())['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            sources.append(text)
        else:
            for block in text.split('```python\n')[1:]: sources.append(block.split('```')[0])
    trees = []
    for source in sources:
        if '%pip' in source: continue
        if '=Method(' in source: source = f'dict({source})' # a line of the registry
        trees.append(ast.parse(source))
    return trees


def of_kind(trees, kind, test):
    "Return the first node of a kind that passes a test."
    return next(n for tree in trees for n in ast.walk(tree) if isinstance(n, kind) and test(n))


def documented(page, name):
    "Return the `Method` that a page makes from the class of this name, which is on the page, too."
    def registers(call): return ast.unparse(call).startswith(f'Method({name}')
    trees = fragments(page)
    cls = of_kind(trees, ast.ClassDef, lambda node: node.name == name)
    call = of_kind(trees, ast.Call, registers)
    names = dict(NAMES, __name__=__name__) # the class must be found again by pickle
    exec(ast.unparse(cls), names)
    globals()[name] = names[name]
    return eval(ast.unparse(call), names)


# The tests of an installed wheel have no pages beside them
DOCUMENTED = {name: documented(*place) for name, place in PAGES.items()} if NBS.is_dir() else {}


@contextmanager
def registered():
    "Inside, the registry also has the documented methods."
    METHODS.update(DOCUMENTED)
    try: yield
    finally:
        for name in DOCUMENTED: del METHODS[name]
