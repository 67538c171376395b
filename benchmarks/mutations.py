"""Changes the library at one place at a time, and notes whether a test or the notebook notices the change.

    python -m benchmarks.mutations coverage              # which test runs which line; about twice the suite
    python -m benchmarks.mutations run --n 200           # resumable; results/mutations.jsonl
    python -m benchmarks.mutations table

Run it in a clone: while it works, notebooks and modules of the checkout are changed. `coverage` needs the
package pytest-cov. A change is made in the notebook's exported cell and in the module. Then the tests that
run the changed line are run, quickest first, and after them the notebook; the first failure ends the check.
Every check runs in a process that is forked from one in which PyTorch and fastai are imported."""
import argparse
import ast
import json
import os
import random
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'mutations.jsonl'
COVERAGE = ROOT / '.coverage'
DURATIONS = ROOT / '.coverage_durations'
# Tests of several processes run the library where coverage does not see it
UNSEEN = ('test_cluster', 'test_sharded', 'test_distributed', 'test_integrations', 'test_gpu',
          'test_notebooks')
FOLDERS = ('core', 'data', 'models', 'methods', 'measures', 'experiments', 'papers', 'commands')
LONGEST = 400  # seconds of one check
AT_MOST = 60   # tests of one change
COMPARISONS = {ast.Lt: ('<', '<='), ast.LtE: ('<=', '<'), ast.Gt: ('>', '>='), ast.GtE: ('>=', '>'),
               ast.Eq: ('==', '!='), ast.NotEq: ('!=', '=='), ast.Is: ('is', 'is not'),
               ast.IsNot: ('is not', 'is'), ast.In: ('in', 'not in'), ast.NotIn: ('not in', 'in')}
ARITHMETIC = {ast.Add: ('+', '-'), ast.Sub: ('-', '+'), ast.Mult: ('*', '/'), ast.Div: ('/', '*'),
              ast.FloorDiv: ('//', '*'), ast.Mod: ('%', '//'), ast.Pow: ('**', '*'), ast.BitAnd: ('&', '|'),
              ast.BitOr: ('|', '&'), ast.MatMult: ('@', '*')}
LOGIC = {ast.And: ('and', 'or'), ast.Or: ('or', 'and')}
# What is drawn or printed for a reader is looked at, not tested number by number
DRAWN = re.compile(r'^(_?plot|_?draw|_?show|_?print|_?animate|__repr__|_repr|_figure|_axes)')


@dataclass(frozen=True)
class Change:
    module: str    # For example 'core.perturb'
    notebook: str  # Path of the notebook below the checkout
    cell: str      # Its id
    line: int      # Line of the module
    start: int     # Characters of the cell's exported source that are replaced
    end: int
    old: str
    new: str

    @property
    def key(self): return f'{self.module}:{self.cell}:{self.start}:{self.old}>{self.new}'


def exported(notebook):
    "Return the module's name and its exported cells, as pairs of id and source without directives."
    cells = json.loads(notebook.read_text())['cells']
    sources = [(c['id'], ''.join(c['source'])) for c in cells if c['cell_type'] == 'code']
    names = [re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M) for _, s in sources]
    names = [m.group(1) for m in names if m]
    if not names:
        return None, []
    code = []
    for cell, source in sources:
        if re.match(r'#\|\s*exporti?\s*$', source.split('\n')[0]):
            code.append((cell, re.sub(r'^(#\|.*\n)+', '', source)))
    return names[0], code


def is_text(node):
    if isinstance(node, ast.Constant): return isinstance(node.value, str)
    return isinstance(node, ast.JoinedStr)


class Places(ast.NodeVisitor):
    "Collects the places of a cell where its meaning can be changed, as (start, end, new text)."
    def __init__(self, source):
        self.source, self.found = source, []
        self.begins = [0]
        for line in source.split('\n'):
            self.begins.append(self.begins[-1] + len(line) + 1)
        self.visit(ast.parse(source))

    def at(self, line, column):
        text = self.source.split('\n')[line - 1]
        return self.begins[line - 1] + len(text.encode()[:column].decode())

    def span(self, node):
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def add(self, start, end, new): self.found.append((start, end, new))

    def between(self, left, right, old, new):
        "Replace the operator between two operands."
        start, end = self.span(left)[1], self.span(right)[0]
        hits = [m for m in re.finditer(re.escape(old), self.source[start:end])]
        if len(hits) == 1:
            self.add(start + hits[0].start(), start + hits[0].end(), new)

    def visit_FunctionDef(self, node):
        if DRAWN.match(node.name):
            return
        self.body(node)

    def visit_ClassDef(self, node): self.body(node)

    def body(self, node):
        "Visit defaults and statements; annotations, decorators and docstrings have no meaning to change."
        if isinstance(node, ast.FunctionDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if default is not None:
                    self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Raise(self, node): pass # the wording of errors
    def visit_JoinedStr(self, node): pass

    def visit_Compare(self, node):
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:]):
            self.between(left, right, *COMPARISONS[type(op)])
        self.generic_visit(node)

    def visit_BinOp(self, node):
        on_text = is_text(node.left) or is_text(node.right)
        if not on_text and type(node.op) in ARITHMETIC:
            self.between(node.left, node.right, *ARITHMETIC[type(node.op)])
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        for left, right in zip(node.values, node.values[1:]):
            self.between(left, right, *LOGIC[type(node.op)])
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        start, _ = self.span(node)
        inner, _ = self.span(node.operand)
        if isinstance(node.op, (ast.Not, ast.USub)):
            self.add(start, inner, '')
        self.generic_visit(node)

    def visit_Constant(self, node):
        start, end = self.span(node)
        if isinstance(node.value, bool):
            self.add(start, end, str(not node.value))
        elif isinstance(node.value, int):
            self.add(start, end, str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(start, end, repr(1.25 * node.value if node.value else 1.))

    def visit_If(self, node):
        start, end = self.span(node.test)
        self.add(start, end, 'False')
        self.generic_visit(node)

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant):
            return # a docstring
        self.add(*self.span(node), 'pass')
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        self.between(node.target, node.value, *(f'{o}=' for o in ARITHMETIC[type(node.op)]))
        self.visit(node.value)


def all_changes(folders=FOLDERS):
    "Return every change of the exported library, in the order of the notebooks."
    changes = []
    for notebook in sorted(ROOT.glob('nbs/*/*.ipynb')):
        module, cells = exported(notebook)
        if module is None or module.split('.')[0] not in folders:
            continue
        text = module_file(module).read_text()
        for cell, source in cells:
            at = text.find(source)
            if at < 0 or re.match(r'\s*(import|from)\s', source):
                continue # nbdev rewrites imports
            for start, end, new in Places(source).found:
                line = text[:at + start].count('\n') + 1
                changes.append(Change(module, str(notebook.relative_to(ROOT)), cell, line, start, end,
                                      source[start:end], new))
    return changes


def module_file(module): return ROOT / 'sadt_nb' / (module.replace('.', '/') + '.py')


def sample(changes, n, seed):
    "Return `n` changes in random order: as many of each module as its share, at least one."
    rng = random.Random(seed)
    by_module = defaultdict(list)
    for c in changes:
        by_module[c.module].append(c)
    chosen = []
    for module, found in by_module.items():
        share = max(1, round(n * len(found) / len(changes)))
        chosen += rng.sample(found, min(share, len(found)))
    rng.shuffle(chosen)
    return chosen


class Tests:
    "Which tests run a line, and how long each of them takes."
    def __init__(self):
        import coverage
        self.data = coverage.CoverageData(str(COVERAGE))
        self.data.read()
        self.seconds = defaultdict(float)
        for line in DURATIONS.read_text().splitlines():
            found = re.match(r'\s*([\d.]+)s (?:call|setup|teardown)\s+(\S.*)$', line)
            if found:
                self.seconds[found.group(2)] += float(found.group(1))

    def of(self, change):
        """Return the tests of the changed line, or of the function around it, quickest first.

        Nothing but an import runs a default value or a table of the module; then all test files count that
        name the module or its registry."""
        lines = self.data.contexts_by_lineno(str(module_file(change.module)))
        wanted = set(self.contexts(lines, [change.line]))
        if not wanted:
            wanted = set(self.contexts(lines, self.function(change)))
        if not wanted:
            return self.files(change.module)
        return sorted(wanted, key=lambda t: self.seconds[t])[:AT_MOST]

    def files(self, module):
        "Return the test files that name a module, or one of the registries for a module of papers."
        names = [f'sadt_nb.{module}']
        if module.startswith('papers.'):
            names.append('sadt_nb.papers.grids')
        found = [f for f in ROOT.glob('tests/test_*.py') if any(n in f.read_text() for n in names)]
        found = [f for f in found if f.stem not in UNSEEN]
        return sorted((str(f.relative_to(ROOT)) for f in found), key=self.seconds_of_file)

    def seconds_of_file(self, file):
        return sum(s for test, s in self.seconds.items() if test.startswith(file))

    def contexts(self, lines, numbers):
        return [context.split('|')[0] for n in numbers for context in lines.get(n, []) if context]

    def function(self, change):
        "Return the lines of the smallest function or class that holds the changed line."
        tree = ast.parse(module_file(change.module).read_text())
        around = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))
                  and n.lineno <= change.line <= n.end_lineno]
        if not around:
            return []
        smallest = min(around, key=lambda n: n.end_lineno - n.lineno)
        return range(smallest.lineno, smallest.end_lineno + 1)


def applied(change):
    "Make the change in notebook and module. Return the old texts by file."
    notebook, module = ROOT / change.notebook, module_file(change.module)
    before = {notebook: notebook.read_text(), module: module.read_text()}
    book = json.loads(before[notebook])
    cell, = [c for c in book['cells'] if c['id'] == change.cell]
    source = ''.join(cell['source'])
    code = re.sub(r'^(#\|.*\n)+', '', source)
    changed = code[:change.start] + change.new + code[change.end:]
    cell['source'] = source.replace(code, changed).splitlines(keepends=True)
    notebook.write_text(json.dumps(book))
    module.write_text(before[module].replace(code, changed))
    return before


def forked(check, seconds=LONGEST):
    "Return the exit code of `check()` in a forked process; -1 if it takes longer than `seconds`."
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        quiet = os.open(ROOT / '.mutation_log', os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            os._exit(check())
        except BaseException:
            os._exit(99)
    end = time.time() + seconds
    while time.time() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return abs(os.waitstatus_to_exitcode(status)) # below 0 if a signal has ended the process
        time.sleep(.1)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def tests_pass(tests):
    import pytest
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    return int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', *tests]))


def notebook_passes(path):
    from nbdev.test import test_nb
    sys.path.insert(0, str(ROOT))
    passed, _ = test_nb(ROOT / path, skip_flags=['slow'])
    return 0 if passed else 1


def check_tests(tests):
    "Raise `SystemExit` for a test of the coverage that the checkout no longer has: pytest would run nothing."
    for name in tests:
        file, *rest = name.split('::')
        function = rest[-1].split('[')[0] if rest else ''
        text = (ROOT / file).read_text() if (ROOT / file).exists() else ''
        lacks_function = bool(rest) and f'def {function}' not in text
        if not text or lacks_function:
            raise SystemExit(f'{name} does not exist; measure the coverage of this checkout first')


def noticed(change, tests):
    """Return what notices the change: 'tests', 'notebook' or 'nothing'.

    A check that does not end in time gives 'time': the change made it endless, or the machine was busy."""
    chosen = tests.of(change)
    check_tests(chosen)
    before = applied(change)
    try:
        by_tests = forked(lambda: tests_pass(chosen)) if chosen else 0
        if by_tests > 0:
            return 'tests'
        by_notebook = forked(lambda: notebook_passes(change.notebook))
        if by_notebook > 0:
            return 'notebook'
        return 'time' if min(by_tests, by_notebook) < 0 else 'nothing'
    finally:
        for file, text in before.items():
            file.write_text(text)


def results():
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(n, seed, folders):
    "Try `n` changes; those that are in the results file already are not repeated."
    import fastai.vision.all    # noqa: F401, imported once for all the checks
    import matplotlib.pyplot    # noqa: F401
    import nbdev.test           # noqa: F401
    import pytest               # noqa: F401
    tests = Tests()
    done = {r['key'] for r in results()}
    for change in sample(all_changes(folders), n, seed):
        if change.key in done:
            continue
        began = time.time()
        by = noticed(change, tests)
        line = module_file(change.module).read_text().splitlines()[change.line - 1].strip()
        row = dict(key=change.key, module=change.module, line=change.line, old=change.old, new=change.new,
                   source=line, noticed_by=by, seconds=round(time.time() - began, 1))
        with RESULTS.open('a') as f:
            f.write(json.dumps(row) + '\n')
        print(f"{by:9} {row['seconds']:6.1f} s  {change.module}:{change.line}  "
              f'{change.old!r} -> {change.new!r}   {line}', flush=True)


def table():
    """Print how many changes were noticed, by folder, as Markdown.

    By hand a row of the results may get `equivalent`, if no program can notice the change, or `since`: the
    test that was written for the change and fails with it."""
    counts = defaultdict(Counter)
    for r in results():
        of_hand = [k for k in ('equivalent', 'since') if r.get(k)]
        counts[r['module'].split('.')[0]][of_hand[0] if of_hand else r['noticed_by']] += 1
    print('| folder | changes | noticed | by a test written since | equivalent | too long | not noticed |\n'
          '|---|---|---|---|---|---|---|')
    for folder in [*FOLDERS, 'all']:
        c = sum(counts.values(), Counter()) if folder == 'all' else counts[folder]
        noticed = c['tests'] + c['notebook']
        cells = [sum(c.values()), noticed, c['since'], c['equivalent'], c['time'], c['nothing']]
        print(f'| {folder} |', ' | '.join(map(str, cells)), '|')


def measure_coverage():
    import subprocess
    ignored = [arg for name in UNSEEN for arg in ('--ignore', f'tests/{name}.py')]
    command = [sys.executable, '-m', 'pytest', '-q', '-n', '2', '--cov=sadt_nb', '--cov-context=test',
               '--cov-report=', '--durations=0', *ignored, 'tests']
    with DURATIONS.open('w') as out:
        subprocess.run(command, cwd=ROOT, stdout=out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('what', choices=('coverage', 'run', 'table', 'list'))
    parser.add_argument('--n', type=int, default=200, help='number of changes')
    parser.add_argument('--seed', type=int, default=0, help='seed of the choice of changes')
    parser.add_argument('--folders', nargs='*', default=FOLDERS, choices=FOLDERS, help='folders of sadt_nb')
    args = parser.parse_args()
    if args.what == 'coverage':
        measure_coverage()
    elif args.what == 'table':
        table()
    elif args.what == 'list':
        for change in sample(all_changes(args.folders), args.n, args.seed):
            print(f'{change.module}:{change.line} {change.old!r} -> {change.new!r}')
    else:
        run(args.n, args.seed, args.folders)


if __name__ == '__main__':
    main()
