"""Compute the landscapes that the website shows, and store them in docs/landscapes.json.

    python docs/make_landscapes.py

The networks are those of tutorial 7: its own cells define the data, the training and the three kinds, and
seed 0 of each kind is drawn, as in the tutorial's figure but with more points.
This takes about ten seconds on one core."""
import json
from pathlib import Path

import nbformat
import torch
from sadt_nb.experiments.run_folder import provenance
from sadt_nb.measures.landscape import loss_surface

DOCS = Path(__file__).parent
FILE = DOCS / 'landscapes.json'
TUTORIAL = DOCS.parent / 'nbs' / 'tutorials' / '07_reading_a_landscape.ipynb'
POINTS = 31
NEEDED = ('from copy import deepcopy', 'raw = load_digits()', 'def train(', 'kinds = {') # one cell has each
TRAINING = ('\nlearn = ', '\nnets = ') # from here on, these cells train networks


def definitions():
    "Return what the cells of the tutorial define that its figure of three networks needs."
    cells = [c.source for c in nbformat.read(TUTORIAL, 4).cells if c.cell_type == 'code']
    names = {}
    for part in NEEDED:
        source = next(s for s in cells if part in s)
        for line in TRAINING: source = source.partition(line)[0]
        exec(source, names)
    return names

def rounded(values): return [float(f'{v:.4g}') for v in values]

def landscape(names, kind, points=POINTS):
    "Train the network of one kind and return its landscape as plain numbers."
    learn = names['make'](kind, 0)
    s = loss_surface(learn, points=points, dl=names['whole'], progress=False)
    return dict(name=kind, at=rounded(s.x), loss=[rounded(row) for row in s.loss], about=s.about)

def main():
    names = definitions()
    kinds = {k: dict(batch=bs, sam=.1 if sam else None) for k, (bs, sam) in names['kinds'].items()}
    config = dict(tutorial=TUTORIAL.name, seed=0, points=POINTS, span=1., steps=300, samples=len(names['x']),
                  kinds=kinds)
    found = dict(config=config, **provenance(torch.device('cpu')),
                 landscapes=[landscape(names, kind) for kind in names['kinds']])
    FILE.write_text(json.dumps(found) + '\n', encoding='utf-8')

if __name__ == '__main__': main()
