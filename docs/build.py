"""Build the website into _build/html: notebooks through nbdev's doclinks, then Sphinx with MyST-NB.

The pages are the notebooks with their stored outputs; nothing is executed. An exported cell keeps its source
and gets the signatures and parameter tables of what it defines, read from the library itself. Every warning
is an error."""
import ast
import inspect
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path, PurePosixPath

import explorables
import gallery
import nbformat
from fastcore.docments import docments, empty
from nbdev.doclinks import NbdevLookup
from sadt_nb.core.arguments import without_parameters
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
NBS = ROOT / 'nbs'
SOURCE = ROOT / '_proc'
OUT = ROOT / '_build'
SECTIONS = dict( # folder of notebooks to title and lead, in the order of the sidebar
    tutorials=(
        'Tutorials',
        'A course of ten notebooks, each of which computes for about a minute. '
        'Read them in order, or start with the one that you need.'),
    guides=(
        'Guides',
        'The lines to copy: how to do one thing, with what works and what does not.'),
    methods=(
        'Methods',
        'One notebook for each method: the idea, the method in ten lines by hand, the callback, tests '
        'against the paper, and the cost. SADT has two more: its teachers, and further tests.'),
    measures=(
        'Measures',
        'Functions that measure how flat, how robust, how well calibrated and how alike networks are, '
        'most of them with an error.'),
    models=(
        'Models',
        'The networks of the papers.'),
    data=(
        'Data',
        'Data sets that live on the device, and augmentation for whole batches.'),
    experiments=(
        'Experiments',
        'Configurations, runs that continue after an interruption, grids, measures, reports, searches.'),
    papers=(
        'Papers',
        'One page per paper: the claims of the paper, our runs for them, how to train the runs, and the '
        'cost; and verdicts on all claims.'),
    commands=(
        'Commands',
        'The library from a shell, without a line of Python.'),
    studies=(
        'Studies',
        "Stored results with a discussion, and the papers' numbers beside ours."),
    core=(
        'Core',
        'What all methods are made of: exact perturbation, extra passes, divergences, checkpoints.'))
# in these folders the source of an exported cell is shown; elsewhere it is folded
OPEN = ('tutorials', 'guides', 'methods', 'core', 'studies')
# why the source of a cell is folded: what a click shows
FOLDED = dict(imports='the imports', figure='the code of the figure', code='the code')
# in these sections the pages are shown as cards with a picture
GALLERIES = ('tutorials', 'methods', 'studies')
# pages that are Markdown files in the checkout
DOCS = dict(citing='docs/citing.md', contributing='CONTRIBUTING.md', changelog='CHANGELOG.md',
            security='SECURITY.md')
NO_VALUE = (empty, inspect.Parameter.empty)


def page(nb):
    "Return a notebook's page: its path without the numbers that give the reading order."
    path = nb.relative_to(NBS)
    return (path.parent / re.sub(r'^\d+_', '', path.stem)).as_posix()

def notebooks():
    found = []
    for folder in SECTIONS: found += sorted((NBS / folder).glob('*.ipynb'))
    return found

def pages(): return {(NBS / 'index.ipynb'): 'index', **{nb: page(nb) for nb in notebooks()}}
def in_checkout(path): return path.relative_to(ROOT).as_posix()
def last_part(full_name): return full_name.rpartition('.')[2]


# What the library defines

def exported():
    "Return the full names of everything public, module by module."
    for file in sorted((ROOT / 'sadt_nb').rglob('*.py')):
        if file.stem in ('all', '_modidx', '__init__'): continue
        module = '.'.join(file.relative_to(ROOT).with_suffix('').parts)
        for name in getattr(import_module(module), '__all__', ()): yield f'{module}.{name}'

def typed(value):
    "Return a default value as a user would type it."
    if isinstance(value, float): return f'{value:g}'
    if inspect.isclass(value) or inspect.isroutine(value): return value.__name__
    text = repr(value)
    return '...' if ' at 0x' in text or len(text) > 60 else text

def type_name(anno):
    "Return the name of a type without its modules; '' for no type and for the type of `None`."
    if anno in (*NO_VALUE, None, type(None)): return '' # a default of None gives no type
    if isinstance(anno, str): return anno
    if inspect.isclass(anno) and not getattr(anno, '__args__', None): return anno.__name__
    return re.sub(r'(?:\w+\.)+(?=\w)', '', str(anno))

def documented(fn):
    try: return docments(fn, full=True)
    except (TypeError, ValueError, OSError): return {}

def signature(fn):
    "Return the parameters of a function or class with defaults, in parentheses and without `self`."
    try: params = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError): return '()'
    parts = []
    star = False
    for p in params:
        if p.name == 'self': continue
        if p.kind is p.VAR_POSITIONAL: star = True
        if p.kind is p.KEYWORD_ONLY and not star:
            parts.append('*')
            star = True
        prefix = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
        default = '' if p.default is p.empty else f'={typed(p.default)}'
        parts.append(prefix + p.name + default)
    return f'({", ".join(parts)})'

def in_cell(text):
    "Return text that is valid in a cell of a table."
    return text.replace('|', '\\|')

def code(text):
    "Return inline code that is valid in a cell of a table."
    return in_cell(f'`{text}`') if text else ''

def parameter_row(name, about, links):
    "Return the cells of one parameter: name, type, default, meaning."
    default = code(typed(about.default)) if about.default not in NO_VALUE else ''
    meaning = links.text((about.docment or '').replace('\n', ' '))
    return code(name), code(type_name(about.anno)), default, in_cell(meaning)

def parameters(fn, links):
    "Return the lines of the table of parameters and of the return value."
    known = {k: v for k, v in documented(fn).items() if k != 'self'}
    back = known.pop('return', None)
    rows = [parameter_row(name, about, links) for name, about in known.items()]
    lines = []
    if any(kind or meaning for _, kind, _, meaning in rows):
        lines = ['| parameter | type | default | meaning |', '|---|---|---|---|']
        lines += [f'| {" | ".join(row)} |' for row in rows]
    if back and (back.docment or back.anno not in (*NO_VALUE, None)):
        text = links.text(back.docment or '')
        kind = type_name(back.anno)
        lines += ['', ' '.join(filter(None, ('**Returns**', kind and f'`{kind}`', text)))]
    return lines

def doc(obj, links):
    "Return a docstring without the parameters, for which there is a table."
    return links.text(without_parameters(inspect.getdoc(obj) or '')) if getattr(obj, '__doc__', None) else ''

def function_api(module, name, fn, links):
    return [f':::{{py:function}} {name}{signature(fn)}', f':module: {module}', '', doc(fn, links), '',
            *parameters(fn, links), ':::']

def listed_methods(cls):
    "Return the public methods with a docstring by name, of a class and of its private base classes."
    found = {}
    for base in cls.__mro__:
        if base is not cls and not base.__name__.startswith('_'): break # a public class has its own entry
        for name, fn in vars(base).items():
            if not name.startswith('_') and inspect.isfunction(fn) and fn.__doc__: found.setdefault(name, fn)
    return found

def class_api(module, name, cls, links):
    "Return a class with its own docstring, and its public methods that have one."
    own = cls.__dict__.get('__doc__')
    is_generated = own and own.startswith(f'{name}(') # as for named tuples
    text = links.text(without_parameters(inspect.cleandoc(own))) if own and not is_generated else ''
    lines = [f'::::{{py:class}} {name}{signature(cls)}', f':module: {module}', '', text, '',
             *parameters(cls, links)]
    for member, fn in listed_methods(cls).items():
        lines += ['', f':::{{py:method}} {member}{signature(fn)}', '', doc(fn, links), '',
                  *parameters(fn, links), ':::']
    return [*lines, '::::']

def api(module, name, links):
    "Return the definition of `name` in `module` as Sphinx directives for Python; '' for plain values."
    obj = getattr(import_module(module), name, None)
    if not callable(obj) or getattr(obj, '__module__', None) != module: return ''
    entry = class_api if inspect.isclass(obj) else function_api
    return '\n'.join(entry(module, name, obj, links))


# Links

def closes(fence, line, mark):
    "Return whether a line ends the open fence of code or formulas."
    if mark and mark.group(1)[:2] == fence[:2]: return True
    return fence == '$$' and line.rstrip().endswith('$$')

def opened(line, mark):
    "Return the fence that a line opens; `None` for a formula that begins and ends in this line."
    is_one_line = mark.group(1) == '$$' and line.strip() != '$$' and line.rstrip().endswith('$$')
    return None if is_one_line else mark.group(1)

def resolved(folder, path):
    "Return a path relative to a folder, both in the checkout, without `..`."
    parts = []
    for part in (PurePosixPath(folder) / path).parts:
        if part == '..': parts = parts[:-1]
        else: parts.append(part)
    return '/'.join(parts)


class Links:
    "Turns doclinks and links between notebooks into links between pages."
    def __init__(self, cfg):
        self.cfg = cfg
        self.lookup = NbdevLookup()
        self.pages = pages()
        self.full_names = list(exported())
        self.problems = []
        short = [last_part(full) for full in self.full_names]
        # prose has short names only, so they must be unique
        self.own = {name: full for name, full in zip(short, self.full_names) if short.count(name) == 1}
        self.files = {in_checkout(nb): f'{p}.ipynb' for nb, p in self.pages.items()}
        for name, file in DOCS.items(): self.files[file] = f'{name}.md'

    def names(self, line):
        "Return a line with links at public names in inline code; the texts of links stay as they are."
        parts = re.split(r'(\[[^\[\]]*\]\([^)\s]*\))', line) # every second part is a link
        return ''.join(part if i % 2 else self.linked(part) for i, part in enumerate(parts))

    def linked(self, text):
        "Return text with links at public names; nbdev links the names of fastai and fastcore."
        def link(match):
            full = self.own.get(match.group(1))
            return f'{{py:obj}}`{match.group(1)} <{full}>`' if full else match.group(0)
        text = re.sub(r'(?<![`\[\w{}])`(\w+)`(?![`\]])', link, text)
        if '`' not in text: return text
        return re.sub(r'\]\((https?://[^)\s]+)\)\{[^}]*\}', r'](\1)', self.lookup.link_line(text))

    def line(self, line, where):
        "Return one line of prose with its links; headings get no links at names."
        def link(match): return match.group(1) + self.target(match.group(2), where) + match.group(3)
        if where: line = re.sub(r'(\]\()([^)\s]+)(\))', link, line)
        return line if line.startswith('#') else self.names(line)

    def text(self, source, where=None):
        "Return prose of the file `where` with its links; fenced code and formulas stay as they are."
        out = []
        fence = None
        for line in source.split('\n'):
            mark = re.match(r'\s*(```+|~~~+|\$\$)', line)
            if fence:
                if closes(fence, line, mark): fence = None
            elif mark: fence = opened(line, mark)
            else: line = self.line(line, where)
            out.append(line)
        return '\n'.join(out)

    def target(self, url, where):
        "Return where a link of the file `where` leads on the site."
        if re.match(r'\w+:|#', url): return url
        path, _, anchor = url.partition('#')
        at_top = where == NBS / 'index.ipynb' # it is README.md as well
        path = resolved('' if at_top else in_checkout(where.parent), path)
        up = '../' * self.files[in_checkout(where)].count('/')
        if path in self.files: return up + self.files[path] + (f'#{anchor}' if anchor else '')
        folder = path.removeprefix('nbs/')
        if path.startswith('nbs/') and folder in SECTIONS: return f'{up}{folder}/index.md'
        if not (ROOT / path).exists():
            self.problems.append(f'{in_checkout(where)}: the link {url} leads nowhere')
            return url
        if path.endswith(('.svg', '.png')): return url # copied beside the page
        return f'{self.cfg["git_url"]}/blob/{self.cfg["branch"]}/{path}'


# Pages

def directives(source):
    "Return the lines `#| key: value` of a cell, and the rest."
    found = {}
    rest = []
    for line in source.split('\n'):
        match = re.match(r'#\|\s*(\w[\w-]*):?\s*(.*)', line)
        if match: found[match.group(1)] = match.group(2)
        if not line.startswith('#|'): rest.append(line)
    return found, '\n'.join(rest).strip('\n')

def title_and_lead(nb):
    first = next(c.source for c in nb.cells if c.cell_type == 'markdown')
    title = re.search(r'^# (.+)$', first, re.M).group(1)
    lead = re.search(r'^> (.+)$', first, re.M)
    return title, lead.group(1) if lead else ''

def source_links(where, cfg):
    """Return links to a page's notebook: to read it and to edit it.

    Tutorials have a Colab button of their own. The other notebooks have no cell that installs the library,
    and so do not run in Colab."""
    repo = cfg['git_url']
    path = f'{cfg["branch"]}/{in_checkout(where)}'
    links = [f'<a href="{repo}/blob/{path}">View the notebook</a>',
             f'<a href="{repo}/edit/{path}">Edit it</a>']
    return f'<p class="page-links">{" · ".join(links)}</p>'

def without_style(table):
    "Return a table of pandas without its own style; the theme has one for all tables."
    table = re.sub(r'<style scoped>.*?</style>\s*', '', table, flags=re.S)
    return table.replace(' border="1"', '').replace(' style="text-align: right;"', '')

def joined(outputs):
    "Return outputs in which printed lines that follow one another are one output, and so one box."
    found = []
    for o in outputs:
        last = found[-1] if found else {}
        if o.output_type == 'stream' and last.get('name') == o.name: last.text += o.text
        else: found.append(o)
    return found

def as_shown(outputs, links, where):
    "Return outputs in which Markdown links lead to pages and tables have the theme's style."
    outputs = joined(outputs)
    for o in outputs:
        data = o.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = links.text(data['text/markdown'], where)
        if 'text/html' in data: data['text/html'] = without_style(data['text/html'])
    return outputs

def has_figure(outputs): return any({'image/png', 'image/svg+xml'} & set(o.get('data', {})) for o in outputs)

def cell_tags(found, folded, where):
    "Return the tags with which MyST-NB hides a cell's source or removes the cell."
    if found.get('echo') == 'false': return ['remove-input']
    if folded: return ['hide-input', folded]
    if 'export' in found and where.parent.name not in OPEN: return ['hide-input']
    return []

def code_cell(cell, found, source, folded, where, links):
    """Return a code cell with the metadata that MyST-NB needs.

    `found` are its directives; `folded` is a key of `FOLDED`, or '' for a cell whose source is shown."""
    new = nbformat.v4.new_code_cell(source, outputs=as_shown(cell.outputs, links, where))
    new.metadata['mystnb'] = {}
    if has_figure(cell.outputs):
        if 'fig-alt' not in found:
            advice = 'begin its cell with "#| fig-alt: what is seen"'
            first = source.splitlines()[0]
            links.problems.append(f'{in_checkout(where)}: a figure has no alt text; {advice}: {first}')
        new.metadata['mystnb'] |= {'image': {'alt': found.get('fig-alt', '')}}
    if folded:
        what = FOLDED[folded]
        new.metadata['mystnb'] |= dict(code_prompt_show=f'Show {what}', code_prompt_hide=f'Hide {what}')
    tags = cell_tags(found, folded, where)
    if 'explorable' in found: new.metadata['explorable'] = found['explorable']
    if tags: new.metadata['tags'] = tags
    return new

def with_source_links(text, where, cfg):
    "Return the first cell of a page, with links to the notebook below its title and lead."
    def add(match): return f'{match.group(1)}\n\n{source_links(where, cfg)}\n'
    return re.sub(r'^(# .+\n(?:\n> .+)?)', add, text, count=1)

def parsed(source):
    "Return the statements of a cell; lines of magic count as `pass`."
    return ast.parse(re.sub(r'^(\s*)[%!].*$', r'\1pass', source, flags=re.M)).body

def is_import(n):
    "Return whether a statement imports or installs, or decides which messages an import may give."
    if isinstance(n, ast.Try): return all(map(is_import, n.body)) # what follows without the package is part
    if isinstance(n, (ast.If, ast.With)): return all(map(is_import, n.body))
    if isinstance(n, ast.Expr) and isinstance(n.value, ast.Call):
        return root_name(n.value) in ('warnings', 'logging')
    return isinstance(n, (ast.Import, ast.ImportFrom, ast.Pass))

def root_name(node):
    "Return the name that an expression such as `axs[0].plot(x)` begins with; '' if it begins with none."
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ''

def is_drawn(name):
    "Return whether a name stands for Matplotlib, a figure or axes."
    return re.fullmatch(r'(plt|fig|axs?)\d?', name) is not None

def calls(node): return [root_name(n) for n in ast.walk(node) if isinstance(n, ast.Call)]
def lines_of(nodes): return sum(n.end_lineno - n.lineno + 1 for n in nodes)

def leaves(body):
    "Return the statements of a cell that contain no other statements."
    for n in body:
        inner = [*getattr(n, 'body', ()), *getattr(n, 'orelse', ())]
        if inner: yield from leaves(inner)
        else: yield n

def subplots(body):
    "Return the names that a cell gives to what Matplotlib returns, such as its axes."
    names = set()
    for n in body:
        if not isinstance(n, ast.Assign) or root_name(n.value) != 'plt': continue
        for target in n.targets:
            names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names

def draws(n, axes=()): return any(name in axes or is_drawn(name) for name in calls(n))

def only_draws(cell, body, library):
    """Return whether most of a cell draws: its own figure, or without outputs a part of later figures.

    If half of its lines draw, a cell is folded in any case. If only the loops around these lines make the
    half, the cell is folded unless it prints or calls a function of `library`, names of this library."""
    if cell.source.startswith('#| export') or lines_of(body) < 4: return False
    if cell.outputs and not has_figure(cell.outputs): return False
    axes = subplots(body)
    single = [*leaves(body)]
    if lines_of(n for n in single if draws(n, axes)) >= lines_of(single) / 2: return True
    called = {name for n in body for name in calls(n)}
    if 'print' in called or called & library: return False
    return lines_of(n for n in body if draws(n, axes)) > lines_of(body) / 2

def library_names(cells):
    "Return the names that a notebook imports from this library, or that it defines for the library."
    found = set()
    for c in cells:
        if c.cell_type != 'code': continue
        exported = c.source.startswith('#| export')
        for n in ast.walk(ast.Module(parsed(c.source), [])):
            if isinstance(n, ast.ImportFrom) and n.module.startswith('sadt_nb'):
                found |= {a.name for a in n.names}
            if exported and isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.add(n.name)
    return found - {'COLORS'} # figures of all pages use it

def fold(cell, body, where, library):
    "Return why a cell's source is folded: a key of `FOLDED`, or '' if it is shown."
    if not body: return ''
    if all(map(is_import, body)): return 'imports'
    if where.parent.name == 'studies': # only results are to be read
        if has_figure(cell.outputs): return 'figure'
        return 'code' if any(map(draws, body)) or not cell.outputs else ''
    return 'figure' if only_draws(cell, body, library) else ''

def definitions(body, module, links):
    "Return the documentation of the public functions and classes that an exported cell defines."
    found = []
    for n in body:
        if not isinstance(n, (ast.FunctionDef, ast.ClassDef)) or n.name.startswith('_'): continue
        text = api(module, n.name, links)
        if text: found.append(text)
    return found

def is_hidden(found, source):
    return 'default_exp' in found or 'hide' in found or found.get('include') == 'false' or not source

def on_lines(text):
    "Return prose in which a displayed formula of several parts has a line for each part, to fit on a phone."
    def lines(match):
        if '\\qquad' not in match.group(1): return match.group(0)
        parts = re.sub(r'\s*\\qquad\s*', r' \\\\ ', match.group(1).strip())
        return f'$$\\begin{{gathered}} {parts} \\end{{gathered}}$$'
    return re.sub(r'\$\$((?:(?!\$\$|\\begin).)+)\$\$', lines, text, flags=re.S)

def convert(where, links):
    """Return a notebook as a page.

    Hidden cells are removed, directives become metadata of MyST-NB, links are resolved, and exported names
    are documented below their cell."""
    cells = []
    module = None
    read = nbformat.read(where, as_version=4).cells
    library = library_names(read)
    for cell in read:
        if cell.cell_type == 'markdown':
            text = on_lines(links.text(cell.source, where))
            if not cells: text = with_source_links(text, where, links.cfg)
            cells.append(nbformat.v4.new_markdown_cell(text))
        if cell.cell_type != 'code': continue
        found, source = directives(cell.source)
        if 'default_exp' in found: module = 'sadt_nb.' + found['default_exp']
        if is_hidden(found, source): continue
        body = parsed(source)
        folded = 'code' if found.get('code-fold') == 'true' else fold(cell, body, where, library)
        if folded == 'imports' and cells and 'imports' in cells[-1].metadata.get('tags', []):
            cells[-1].source += f'\n\n{source}' # imports of the library and of its tests unfold together
        else: cells.append(code_cell(cell, found, source, folded, where, links))
        if 'export' in found:
            texts = definitions(body, module, links)
            if texts: cells.append(nbformat.v4.new_markdown_cell('\n\n'.join(texts)))
    cells = explorables.with_explorables(cells, up='../' * links.files[in_checkout(where)].count('/'))
    kernel = {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}
    metadata = dict(kernelspec=kernel, language_info={'name': 'python'})
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)

def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')

def toctree(entries, **options):
    lines = [f':{k}: {v}'.rstrip() for k, v in options.items()]
    return '\n'.join(['```{toctree}', *lines, '', *entries, '```', ''])

def section(folder, notebooks):
    "Return a section's page: title and lead of each notebook, in a gallery of pictures or in a table."
    title, lead = SECTIONS[folder]
    entries = []
    rows = []
    known = gallery.costs()
    for p, nb in notebooks.items():
        if not p.startswith(f'{folder}/'): continue
        entry = p.removeprefix(f'{folder}/')
        entries.append(entry)
        name, what = title_and_lead(nb)
        if folder in GALLERIES: rows += gallery.card(entry, name, what, nb, SOURCE / folder, known)
        else: rows.append(f'| [{name}]({entry}.ipynb) | {what} |')
    if folder in gallery.TIMED: lead += f' {gallery.about_times()}'
    body = gallery.gallery(rows) if folder in GALLERIES else ['| | |', '|---|---|', *rows]
    return '\n'.join([f'# {title}', '', lead, '', *body, '', toctree(entries, hidden='', maxdepth=1)])

def first_line(obj, name, module):
    "Return the first line of the docstring of a function or class that `module` defines, else ''."
    if not callable(obj) or getattr(obj, '__module__', None) != module: return ''
    line = (inspect.getdoc(obj) or '').split('\n')[0]
    return '' if line.startswith(f'{name}(') else line

def api_page(links):
    "Return the page of everything public, by module, with the first line of its docstring."
    lead = ('Everything public; `from sadt_nb.all import *` imports the names of all modules. '
            'Each name leads to its signature and parameters.')
    lines = ['# API', '', lead, '']
    modules = {}
    for full in links.full_names: modules.setdefault(full.rpartition('.')[0], []).append(last_part(full))
    for module, names in sorted(modules.items()):
        lines += [f'## `{module.removeprefix("sadt_nb.")}`', '', '| name | |', '|---|---|']
        for name in names:
            text = links.text(first_line(getattr(import_module(module), name), name, module))
            lines.append(f'| {{py:obj}}`{name} <{module}.{name}>` | {in_cell(text)} |')
        lines.append('')
    return '\n'.join(lines)

def contents_of_site():
    "Return the sidebar: the sections, then the pages for reference."
    sections = [f'{folder}/index' for folder in SECTIONS]
    reference = ['api', *DOCS]
    return '\n'.join([toctree(sections, hidden='', maxdepth=2),
                      toctree(reference, hidden='', maxdepth=1, caption='Reference')])

def fill(cfg):
    "Write the sources of all pages."
    shutil.rmtree(SOURCE, ignore_errors=True)
    links = Links(cfg)
    read = {}
    for nb, p in links.pages.items():
        new = convert(nb, links)
        read[p] = nbformat.read(nb, as_version=4)
        if p == 'index': new.cells.append(nbformat.v4.new_markdown_cell(contents_of_site()))
        write(SOURCE / f'{p}.ipynb', nbformat.writes(new))
    for folder in SECTIONS:
        write(SOURCE / folder / 'index.md', section(folder, read))
        for image in (NBS / folder).glob('*.svg'): shutil.copy(image, SOURCE / folder / image.name)
    for name, file in DOCS.items():
        text = (ROOT / file).read_text(encoding='utf-8')
        write(SOURCE / f'{name}.md', links.text(text, ROOT / file))
    write(SOURCE / 'api.md', api_page(links))
    if links.problems: raise SystemExit('\n'.join(links.problems))

def main():
    sys.path.insert(0, str(ROOT / 'docs'))
    from conf import settings
    print(f'making the website from {len(pages())} notebooks, which takes a minute or two', flush=True)
    fill(settings)
    html = OUT / 'html'
    shutil.rmtree(html, ignore_errors=True)
    folders = ['-c', str(ROOT / 'docs'), '-d', str(OUT / 'doctrees')]
    options = ['-W', '--keep-going', '-q', *sys.argv[1:]]
    failed = build_main(['-b', 'html', *folders, *options, str(SOURCE), str(html)])
    if not failed: print(f'done: open {(html / "index.html").relative_to(ROOT)} in a browser')
    return failed

if __name__ == '__main__': raise SystemExit(main())
