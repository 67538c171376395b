"""Build the website into _build/html: notebooks through nbdev's doclinks, then Sphinx with MyST-NB, every warning an error.

The pages are the notebooks with their stored outputs; nothing is executed. An exported cell keeps its source and gets the signatures and
parameter tables of what it defines, read from the library itself."""
import ast, inspect, re, shutil, sys
from importlib import import_module
from pathlib import Path, PurePosixPath

import nbformat
from fastcore.docments import docments, empty
from nbdev.doclinks import NbdevLookup
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
NBS, SOURCE, OUT = ROOT / 'nbs', ROOT / '_proc', ROOT / '_build'
SECTIONS = dict( # folder of notebooks to title and what is there, in the order of the sidebar
    tutorials=('Tutorials', 'A course of nine notebooks, each about a minute of computing: read them in order, or start where you are.'),
    methods=('Methods', 'One notebook for each method: the idea, ten lines by hand, the callback, tests against the paper, what it costs.'),
    measures=('Measures', 'How flat, how robust, how well calibrated, how alike: one line each, with an honest error.'),
    models=('Models', 'The networks of the papers.'),
    data=('Data', 'Data sets that live on the device, and augmentation for whole batches.'),
    experiments=('Experiments', 'Configurations, runs that continue after anything, grids, reports, the tables of the papers.'),
    studies=('Studies', "Stored results, read and discussed; the papers' numbers stand beside ours."),
    core=('Core', 'What all methods are made of: exact perturbation, extra passes, divergences, checkpoints.'))
OPEN = ('tutorials', 'methods', 'core', 'studies') # where the source of an exported cell is shown at once; elsewhere it unfolds
DOCS = dict(citing='docs/citing.md', contributing='CONTRIBUTING.md', changelog='CHANGELOG.md', security='SECURITY.md') # pages that are Markdown in the checkout


def page(nb):
    "A notebook's page: its place without the numbers that give the reading order."
    path = nb.relative_to(NBS)
    return (path.parent / re.sub(r'^\d+_', '', path.stem)).as_posix()

def notebooks(): return [nb for folder in SECTIONS for nb in sorted((NBS / folder).glob('*.ipynb'))]
def pages(): return {(NBS / 'index.ipynb'): 'index', **{nb: page(nb) for nb in notebooks()}}


# ---- what the library defines --------------------------------------------------------------------------------------

def exported():
    "The full names of everything public, module by module."
    for file in sorted(p for p in (ROOT / 'sadt_nb').rglob('*.py') if p.stem not in ('all', '_modidx', '__init__')):
        module = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
        for name in getattr(import_module(module), '__all__', ()): yield f'{module}.{name}'

def typed(value):
    "A default as it would be typed."
    if isinstance(value, float): return f'{value:g}'
    if inspect.isclass(value) or inspect.isroutine(value): return value.__name__
    text = repr(value)
    return '...' if ' at 0x' in text or len(text) > 60 else text

def type_name(anno):
    if anno in (empty, inspect._empty, None, type(None)): return '' # of a default of None nothing follows
    return anno if isinstance(anno, str) else anno.__name__ if inspect.isclass(anno) and not getattr(anno, '__args__', None) else re.sub(r'(?:\w+\.)+(?=\w)', '', str(anno))

def documented(fn):
    try: return docments(fn, full=True)
    except (TypeError, ValueError, OSError): return {}

def signature(fn):
    try: params = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError): return '()'
    parts, star = [], False
    for p in params:
        if p.name == 'self': continue
        if p.kind is p.VAR_POSITIONAL: star = True
        if p.kind is p.KEYWORD_ONLY and not star: parts.append('*'); star = True
        parts.append({p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '') + p.name + ('' if p.default is p.empty else f'={typed(p.default)}'))
    return f'({", ".join(parts)})'

def code(text):
    "Inline code that may stand in a cell of a table."
    return f'`{text}`'.replace('|', '\\|') if text else ''

def parameters(fn, links):
    "The table of parameters, and what is returned."
    known = {k: v for k, v in documented(fn).items() if k != 'self'}
    rows = [(code(k), code(type_name(v.anno)), code(typed(v.default)) if v.default not in (empty, inspect._empty) else '', links.text((v.docment or '').replace('\n', ' ')).replace('|', '\\|'))
            for k, v in known.items() if k != 'return']
    lines = ['| parameter | type | default | meaning |', '|---|---|---|---|', *(f'| {" | ".join(r)} |' for r in rows)] if any(r[3] or r[1] for r in rows) else []
    back = known.get('return')
    if back and (back.docment or back.anno not in (empty, inspect._empty, None)):
        lines += ['', f'**Returns** {code(type_name(back.anno))} {links.text(back.docment or "")}'.rstrip()]
    return lines

def api(module, name, links):
    "What `module` defines as `name`, as directives of Sphinx's domain for Python; an empty string for plain values."
    obj = getattr(import_module(module), name, None)
    if not callable(obj) or getattr(obj, '__module__', None) != module: return ''
    text = lambda o: links.text(inspect.getdoc(o) or '') if getattr(o, '__doc__', None) else ''
    if not inspect.isclass(obj):
        return '\n'.join([f':::{{py:function}} {name}{signature(obj)}', f':module: {module}', '', text(obj), '', *parameters(obj, links), ':::'])
    own = obj.__dict__.get('__doc__')
    lines = [f'::::{{py:class}} {name}{signature(obj)}', f':module: {module}', '', links.text(inspect.cleandoc(own)) if own and not own.startswith(f'{name}(') else '', '', *parameters(obj, links)]
    for member, fn in vars(obj).items():
        if member.startswith('_') or not inspect.isfunction(fn) or not fn.__doc__: continue
        lines += ['', f':::{{py:method}} {member}{signature(fn)}', '', text(fn), '', *parameters(fn, links), ':::']
    return '\n'.join([*lines, '::::'])


# ---- links ---------------------------------------------------------------------------------------------------------

class Links:
    "Doclinks and links between notebooks, as links between pages."
    def __init__(self, cfg):
        self.cfg, self.lookup, self.pages, self.full_names = cfg, NbdevLookup(), pages(), list(exported())
        short = [full.rpartition('.')[2] for full in self.full_names]
        self.own = {n: full for n, full in zip(short, self.full_names) if short.count(n) == 1} # in prose a name must be enough
        self.files, self.problems = {nb.relative_to(ROOT).as_posix(): p for nb, p in self.pages.items()} | {file: f'{name}.md' for name, file in DOCS.items()}, []

    def names(self, line):
        "Inline code that names something public becomes a link to it; names of fastai and fastcore are nbdev's business."
        def one(m): return f'{{py:obj}}`{m.group(1)} <{self.own[m.group(1)]}>`' if m.group(1) in self.own else m.group(0)
        line = re.sub(r'(?<![`\[\w{}])`(\w+)`(?![`\]])', one, line)
        return re.sub(r'\]\((https?://[^)\s]+)\)\{[^}]*\}', r'](\1)', self.lookup.link_line(line)) if '`' in line else line

    def text(self, source, where=None):
        "Prose, line by line; fenced code and formulas stay as they are. Links are those of the file `where`."
        out, fence = [], None
        for line in source.split('\n'):
            mark = re.match(r'\s*(```+|~~~+|\$\$)', line)
            if fence: fence = None if mark and mark.group(1)[:2] == fence[:2] or (fence == '$$' and line.rstrip().endswith('$$')) else fence
            elif mark: fence = None if mark.group(1) == '$$' and line.strip() != '$$' and line.rstrip().endswith('$$') else mark.group(1)
            else:
                if where: line = re.sub(r'(\]\()([^)\s]+)(\))', lambda m: m.group(1) + self.target(m.group(2), where) + m.group(3), line)
                if not line.startswith('#'): line = self.names(line)
            out.append(line)
        return '\n'.join(out)

    def target(self, url, where):
        "Where a link of the file `where` leads on the site."
        if re.match(r'\w+:|#', url): return url
        path, _, anchor = url.partition('#')
        at_top = where == NBS / 'index.ipynb' # it is README.md, too
        parts = []
        for part in (PurePosixPath('' if at_top else where.parent.relative_to(ROOT).as_posix()) / path).parts: parts = parts[:-1] if part == '..' else [*parts, part]
        path, up = '/'.join(parts), '../' * self.files[where.relative_to(ROOT).as_posix()].count('/')
        if path in self.files: return f'{up}{self.files[path]}{"" if path.endswith(".md") else ".ipynb"}' + (f'#{anchor}' if anchor else '')
        if path.startswith('nbs/') and path.removeprefix('nbs/') in SECTIONS: return f'{up}{path.removeprefix("nbs/")}/index.md'
        if not (ROOT / path).exists():
            self.problems.append(f'{where.relative_to(ROOT)}: the link {url} leads nowhere')
            return url
        if path.endswith(('.svg', '.png')): return url # copied beside the page
        return f'{self.cfg["git_url"]}/blob/{self.cfg["branch"]}/{path}'


# ---- pages ---------------------------------------------------------------------------------------------------------

def directives(source):
    "The lines `#| key: value` of a cell, and the rest."
    lines = source.split('\n')
    found = dict(re.match(r'#\|\s*([\w-]+):?\s*(.*)', l).groups() for l in lines if re.match(r'#\|\s*\w', l))
    return found, '\n'.join(l for l in lines if not l.startswith('#|')).strip('\n')

def title_and_lead(nb):
    first = next(c.source for c in nb.cells if c.cell_type == 'markdown')
    return re.search(r'^# (.+)$', first, re.M).group(1), (re.search(r'^> (.+)$', first, re.M) or ['', ''])[1]

def source_links(where, cfg):
    repo, path = cfg['git_url'], where.relative_to(ROOT).as_posix()
    colab = '' if where.parent.name == 'tutorials' else f' · <a href="https://colab.research.google.com/github/{cfg["user"]}/{cfg["repo"]}/blob/{cfg["branch"]}/{path}">Open in Colab</a>' # they have a button
    return (f'<p class="page-links"><a href="{repo}/blob/{cfg["branch"]}/{path}">View the notebook</a> · <a href="{repo}/edit/{cfg["branch"]}/{path}">Edit it</a>'
            f'{colab}</p>')

def as_shown(outputs, links, where):
    "Links of Markdown lead to pages; and pandas puts a style before each table, where the theme has one for all."
    for o in outputs:
        if 'text/markdown' in o.get('data', {}): o['data']['text/markdown'] = links.text(o['data']['text/markdown'], where)
        if 'text/html' in o.get('data', {}): o['data']['text/html'] = re.sub(r'<style scoped>.*?</style>\s*', '', o['data']['text/html'], flags=re.S).replace(' border="1"', '').replace(' style="text-align: right;"', '')
    return outputs

def shown(c, d, source, imports, where, links):
    "A code cell with what MyST-NB is to make of it."
    cell = nbformat.v4.new_code_cell(source, outputs=as_shown(c.outputs, links, where))
    drawn = any({'image/png', 'image/svg+xml'} & set(o.get('data', {})) for o in c.outputs)
    if drawn and 'fig-alt' not in d: links.problems.append(f'{where.relative_to(ROOT)}: a figure has no alt text; begin its cell with "#| fig-alt: what is seen": {source.splitlines()[0]}')
    if drawn: cell.metadata['mystnb'] = {'image': {'alt': d.get('fig-alt', '')}}
    if imports: cell.metadata['mystnb'] = dict(code_prompt_show='Show the imports', code_prompt_hide='Hide the imports')
    folded = 'export' in d and where.parent.name not in OPEN
    tags = ['remove-input'] if d.get('echo') == 'false' else ['hide-input', 'imports'] if imports else ['hide-input'] if folded else []
    if tags: cell.metadata['tags'] = tags
    return cell

def convert(where, links):
    "A notebook as a page: hidden cells gone, directives as MyST-NB knows them, links resolved, exported names documented."
    cells, module = [], None
    for c in nbformat.read(where, as_version=4).cells:
        if c.cell_type == 'markdown':
            text = links.text(c.source, where)
            if not cells: text = re.sub(r'^(# .+\n(?:\n> .+)?)', lambda m: f'{m.group(1)}\n\n{source_links(where, links.cfg)}\n', text, count=1)
            cells.append(nbformat.v4.new_markdown_cell(text))
        if c.cell_type != 'code': continue
        d, source = directives(c.source)
        if 'default_exp' in d: module = 'sadt_nb.' + d['default_exp']
        if 'default_exp' in d or 'hide' in d or d.get('include') == 'false' or not source: continue
        body = ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M)).body
        imports = where.parent.name not in ('tutorials', 'nbs') and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)
        if imports and cells and 'imports' in cells[-1].metadata.get('tags', []): cells[-1].source += f'\n\n{source}' # those of the library and of its tests unfold together
        else: cells.append(shown(c, d, source, imports, where, links))
        if 'export' in d:
            names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
            documented_here = [text for n in names if (text := api(module, n, links))]
            if documented_here: cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(documented_here)))
    return nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}, 'language_info': {'name': 'python'}})

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def toctree(entries, **options): return '\n'.join(['```{toctree}', *(f':{k}: {v}'.rstrip() for k, v in options.items()), '', *entries, '```', ''])

def section(folder, titles):
    "A section's page: what its notebooks are about."
    title, lead = SECTIONS[folder]
    here = {p.removeprefix(f'{folder}/'): t for p, t in titles.items() if p.startswith(f'{folder}/')}
    rows = [f'| [{name}]({p}.ipynb) | {what} |' for p, (name, what) in here.items()]
    return '\n'.join([f'# {title}', '', lead, '', '| | |', '|---|---|', *rows, '', toctree(here, hidden='', maxdepth=1)])

def api_page(links):
    "Everything public, by module, with the first line of what it says of itself."
    lines = ['# API', '', 'Everything public; `from sadt_nb.all import *` imports the names of all modules. Each name leads to its signature and parameters.', '']
    modules = {}
    for full in links.full_names: modules.setdefault(full.rpartition('.')[0], []).append(full)
    for module, names in sorted(modules.items()):
        rows = []
        for full in names:
            obj = getattr(import_module(module), full.rpartition('.')[2])
            said = (inspect.getdoc(obj) or '').split('\n')[0] if callable(obj) and getattr(obj, '__module__', None) == module else ''
            if said.startswith(f'{full.rpartition(".")[2]}('): said = ''
            rows.append(f'| {{py:obj}}`{full.rpartition(".")[2]} <{full}>` | {links.text(said).replace("|", chr(92) + "|")} |')
        lines += [f'## `{module.removeprefix("sadt_nb.")}`', '', '| name | |', '|---|---|', *rows, '']
    return '\n'.join(lines)

def fill(cfg):
    "Write the sources of all pages."
    shutil.rmtree(SOURCE, ignore_errors=True)
    links, titles = Links(cfg), {}
    for nb, p in links.pages.items():
        new = convert(nb, links)
        titles[p] = title_and_lead(nbformat.read(nb, as_version=4))
        if p == 'index':
            new.cells.append(nbformat.v4.new_markdown_cell('\n'.join([toctree([f'{s}/index' for s in SECTIONS], hidden='', maxdepth=2), toctree(['api', *DOCS], hidden='', maxdepth=1, caption='Reference')])))
        write(SOURCE / f'{p}.ipynb', nbformat.writes(new))
    for folder in SECTIONS:
        write(SOURCE / folder / 'index.md', section(folder, titles))
        for image in (NBS / folder).glob('*.svg'): shutil.copy(image, SOURCE / folder / image.name)
    for name, file in DOCS.items(): write(SOURCE / f'{name}.md', links.text((ROOT / file).read_text(encoding='utf-8'), ROOT / file))
    write(SOURCE / 'api.md', api_page(links))
    if links.problems: raise SystemExit('\n'.join(links.problems))

def main():
    sys.path.insert(0, str(ROOT / 'docs'))
    from conf import settings
    print(f'making the website from {len(pages())} notebooks, which takes a minute or two', flush=True)
    fill(settings)
    shutil.rmtree(OUT / 'html', ignore_errors=True)
    failed = build_main(['-b', 'html', '-c', str(ROOT / 'docs'), '-d', str(OUT / 'doctrees'), '-W', '--keep-going', '-q', *sys.argv[1:], str(SOURCE), str(OUT / 'html')])
    if not failed: print(f'done: open {(OUT / "html" / "index.html").relative_to(ROOT)} in a browser')
    return failed

if __name__ == '__main__': raise SystemExit(main())
