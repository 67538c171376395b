"""The gallery of a section: one card per notebook, with a picture, the lead, the cost, the minutes it takes.

The picture is the first figure that the notebook stores. docs/minutes.json has the measured time of whole
notebooks, with the cells that are marked slow. `python docs/gallery.py` measures the notebooks that it lacks,
`python docs/gallery.py nbs/methods/20_sam.ipynb` measures this one again."""
import base64
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
MINUTES = ROOT / 'docs' / 'minutes.json'
WIDTH = 560           # of a picture, in pixels
WORDS_A_MINUTE = 200
LINES_A_MINUTE = 40   # of code
TIMED = ('tutorials', 'methods') # sections whose notebooks compute what they show


def stem_of(nb): return re.sub(r'^\d+_', '', nb.stem)

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
    words = lines = 0
    for cell in nb.cells:
        if cell.cell_type == 'markdown': words += len(cell.source.split())
        if cell.cell_type == 'code': lines += sum(bool(line.strip()) for line in cell.source.splitlines())
    return max(1, round(words / WORDS_A_MINUTE + lines / LINES_A_MINUTE))

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

def downloads(nb):
    "Return the names of the data sets that a notebook's code loads from outside the installed packages."
    from sadt_nb.data.datasets import DATASETS
    code = '\n'.join(c.source for c in nb.cells if c.cell_type == 'code')
    loaded = re.findall(r"""(?:\bdata=|get_dls\(|load_data\()\s*['"](\w+)['"]""", code)
    return [name for name in DATASETS if name in loaded and 'digits' not in name]

def cost(stem, known, nb):
    "Return the cost of the methods that a page defines as text, for another page what the page needs to run."
    if stem in known:
        passes = ' or '.join(f'{p:g}' for p in sorted(known[stem]))
        return f'{passes} pass{"" if passes == "1" else "es"} per batch'
    data = downloads(nb)
    return f'CPU, downloads {" and ".join(data)}' if data else 'CPU, no download'

def measured():
    "Return the seconds of each notebook and the processor, by the stem of its page, from docs/minutes.json."
    return json.loads(MINUTES.read_text()) if MINUTES.exists() else {}

def about_times():
    "Return a sentence about the times on the cards; '' where no notebook was measured."
    if not measured(): return ''
    processors = sorted({m['hardware'] for m in measured().values()})
    return ('The cards give the time to read a page, and the time to run all of its cells on one core '
            f'({" or ".join(processors)}).')

def to_run(seconds):
    "Return a measured time as text, rounded as a time on another machine may differ."
    if seconds < 50: return f'about {max(5, 5 * round(seconds / 5))} s to run'
    return f'about {round(seconds / 60) or 1} min to run'

def times(nb, stem):
    "Return the minutes to read a notebook and, where it was measured, the time to run it."
    seconds = measured().get(stem, {}).get('seconds')
    return [f'{minutes_to_read(nb)} min to read', *([to_run(seconds)] if seconds else [])]

def card(stem, title, lead, nb, folder, known):
    "Return the lines of one card, and write its picture below `folder`."
    options = [f':link: {stem}', ':link-type: doc']
    figure = first_figure(nb)
    if figure:
        png, alt = figure
        thumbnail(png, folder / 'thumbnails' / f'{stem}.png')
        options += [f':img-top: thumbnails/{stem}.png', f':img-alt: {alt}']
    facts = [cost(stem, known, nb), *times(nb, stem)]
    foot = ' · '.join(fact for fact in facts if fact)
    return [f':::{{grid-item-card}} {title}', *options, '', lead, '', '{.facts}', foot, ':::', '']

def gallery(cards):
    return ['::::{grid} 1 2 2 2', ':gutter: 3', ':class-container: gallery', '', *cards, '::::']

def seconds_to_run(nb):
    "Run all cells of a notebook in a process of its own, with one thread; return its CPU seconds."
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    command = ['nbdev_test', '--path', str(nb), '--n_workers', '0', '--flags', 'slow']
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1)

def main(notebooks):
    "Measure notebooks, by default those of tutorials and methods without a time, and store the seconds."
    from sadt_nb.experiments.run_folder import _cpu_name
    known = measured()
    chosen = [Path(nb) for nb in notebooks]
    if not chosen:
        every = [nb for folder in TIMED for nb in sorted((ROOT / 'nbs' / folder).glob('*.ipynb'))]
        chosen = [nb for nb in every if stem_of(nb) not in known]
    for nb in chosen:
        seconds = seconds_to_run(nb.resolve())
        known[stem_of(nb)] = dict(seconds=seconds, hardware=_cpu_name())
        lines = [f'{json.dumps(stem)}: {json.dumps(known[stem])}' for stem in sorted(known)]
        MINUTES.write_text('{' + ',\n '.join(lines) + '}\n')
        print(f'{nb.name}: {seconds} s', flush=True)

if __name__ == '__main__': main(sys.argv[1:])
