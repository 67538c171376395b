"Write README.md from the index notebook: its prose, visible code and stored outputs."
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parents[1]
images = root / 'docs' / 'index_files'

nb = nbformat.read(root / 'nbs' / 'index.ipynb', as_version=4)
cells = []
alts = []
for cell in nb['cells']:
    source = cell['source']
    is_code = cell['cell_type'] == 'code'
    if is_code and re.search(r'^#\|\s*hide\b', source, re.M): continue
    if re.search(r'^#\|\s*echo: false', source, re.M): cell['metadata']['tags'] = ['output-only']
    alt = re.search(r'^#\| fig-alt: (.+)', source, re.M)
    if alt: alts.append(alt.group(1))
    cell['source'] = re.sub(r'^#\|.*\n?', '', source, flags=re.M)
    if is_code and not cell['source'].strip(): continue
    cells.append(cell)
nb['cells'] = cells
nb['metadata']['language_info'] = {'name': 'python'} # nbdev_clean removes it, and code fences need it


def next_alt(match): return f'![{alts.pop(0)}]'


config = Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={'output-only'}))
exporter = MarkdownExporter(config=config)
body, resources = exporter.from_notebook_node(nb, resources=dict(output_files_dir='docs/index_files'))
images.mkdir(exist_ok=True)
wanted = {Path(name).name: data for name, data in resources['outputs'].items()}
for old in images.iterdir():
    if old.name not in wanted: old.unlink()
for name, data in wanted.items(): (images / name).write_bytes(data)
body = re.sub(r'<style scoped>.*?</style>\n?', '', body, flags=re.S)
body = re.sub(r'!\[png\]', next_alt, body)
body = re.sub(r'\n{3,}', '\n\n', body).strip() + '\n'
note = '<!-- Written by docs/make_readme.py from nbs/index.ipynb; edit the notebook. -->\n\n'
(root / 'README.md').write_text(note + body, encoding='utf-8')
