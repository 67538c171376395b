"""The gallery of a section: one card per notebook, with a picture, the lead, the cost, the minutes to read.

The picture is the first figure that the notebook stores. docs/minutes.json has the measured time of a whole
notebook, written by `python docs/gallery.py LOG` from the log of `nbdev_test --timing --flags slow`."""
import base64
import io
import json
import re
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
MINUTES = ROOT / 'docs' / 'minutes.json'
WIDTH = 560           # of a picture, in pixels
WORDS_A_MINUTE = 200
LINES_A_MINUTE = 40   # of code


def first_figure(nb):
    "Return the first figure that a notebook stores as PNG, and its description; `None` if there is none."
    for cell in nb.cells:
        for output in cell.get('outputs', []):
            if 'image/png' not in output.get('data', {}): continue
            found = re.search(r'^#\|\s*fig-alt:\s*(.+)$', cell.source, re.M)
            return base64.b64decode(output['data']['image/png']), found.group(1) if found else ''
    return None

def thumbnail(png, path):
    "Write a small version of a figure on white ground."
    image = Image.open(io.BytesIO(png)).convert('RGBA')
    ground = Image.new('RGBA', image.size, 'white')
    ground.alpha_composite(image)
    ground.thumbnail((WIDTH, 2 * WIDTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    ground.convert('RGB').save(path, optimize=True)

def minutes_to_read(nb):
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type == 'markdown')
    code = [line for c in nb.cells if c.cell_type == 'code' for line in c.source.splitlines() if line.strip()]
    return max(1, round(words / WORDS_A_MINUTE + len(code) / LINES_A_MINUTE))

def costs():
    "Return the passes per batch of the methods that a notebook defines, by the stem of its page."
    from sadt_nb.methods.registry import METHODS
    found = {}
    for name, method in METHODS.items():
        if name == 'baseline': continue
        factory = getattr(method.factory, 'func', method.factory)
        stem = factory.__module__.rpartition('.')[2]
        found.setdefault(stem, set()).add(round(method.passes, 2))
    return found

def cost(stem, known):
    "Return the cost of the methods of a page as text; '' for a page that defines none."
    if stem not in known: return ''
    passes = ' or '.join(f'{p:g}' for p in sorted(known[stem]))
    return f'{passes} pass{"" if passes == "1" else "es"} per batch'

def times(nb, stem):
    "Return the minutes to read a notebook and, where it was measured, the time to run it."
    parts = [f'{minutes_to_read(nb)} min to read']
    measured = json.loads(MINUTES.read_text())['seconds'] if MINUTES.exists() else {}
    if stem in measured:
        seconds = measured[stem]
        parts.append(f'{seconds:.0f} s to run' if seconds < 100 else f'{seconds / 60:.0f} min to run')
    return parts

def card(stem, title, lead, nb, folder, known):
    "Return the lines of one card, and write its picture below `folder`."
    options = [f':link: {stem}', ':link-type: doc']
    figure = first_figure(nb)
    if figure:
        png, alt = figure
        thumbnail(png, folder / 'thumbnails' / f'{stem}.png')
        options += [f':img-top: thumbnails/{stem}.png', f':img-alt: {alt}']
    facts = [cost(stem, known), *times(nb, stem)]
    foot = ' · '.join(fact for fact in facts if fact)
    return [f':::{{grid-item-card}} {title}', *options, '', lead, '', '{.facts}', foot, ':::', '']

def gallery(cards):
    return ['::::{grid} 1 2 2 2', ':gutter: 3', ':class-container: gallery', '', *cards, '::::']

def main(log):
    "Read the seconds of each notebook from a log, and write them with the machine that measured them."
    from sadt_nb.experiments.runner import hardware
    found = re.findall(r'Completed .*?/?(?:\d+_)?(\w+)\.ipynb\D+([\d.]+)', Path(log).read_text())
    seconds = {stem: round(float(s), 1) for stem, s in found}
    MINUTES.write_text(json.dumps(dict(hardware=hardware(), seconds=seconds), indent=1) + '\n')

if __name__ == '__main__': main(sys.argv[1])
