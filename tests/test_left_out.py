"Reports of folders with damaged, newer or foreign files: these are named, and the rest is shown."
import json
import math
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from sadt_nb.commands.cli import sadt_report
from sadt_nb.experiments.archive import ARCHIVE, MOST_BYTES
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.report import load_results, plot_runs, published, results_table
from sadt_nb.experiments.run_folder import read_result
from sadt_nb.papers import pages

GOOD = dict(status='finished', accuracy=.9, accuracy_bn=.91, steps=4, forwards=4, backwards=4,
            train_seconds=1.)
HISTORY = [dict(epoch=1, train_loss=1., train_accuracy=.5, valid_loss=1., valid_accuracy=.5)]
BAD = Run(epochs=1, seed=7)


def write_run(root, cfg, **changes):
    "Write the files of a finished run; `changes` are contents by part."
    folder = root / cfg.name
    folder.mkdir(parents=True)
    parts = dict(config=cfg.to_dict(), result=GOOD, history=HISTORY, measures=dict(measures={}))
    for part, content in {**parts, **changes}.items():
        (folder / f'{part}.json').write_text(json.dumps(content))
    return folder


@pytest.fixture
def root(tmp_path):
    for seed in range(2): write_run(tmp_path, Run(epochs=1, seed=seed))
    return tmp_path


def without(name): return {k: v for k, v in GOOD.items() if k != name}


DEEP = '[' * 100_000
RAW = {
    'half a file': ('result', '{"status": "fini'), 'empty': ('config', ''), 'binary': ('config', '\x00\x01'),
    'nested too deep': ('history', DEEP), 'large': ('measures', '{"x": "' + 'a' * MOST_BYTES + '"}'),
}
CONTENTS = {
    'a list for a result': ('result', [1]), 'a text for a configuration': ('config', 'hello'),
    'a number for a history': ('history', 5), 'null for measures': ('measures', None),
    'no status': ('result', without('status')), 'no accuracy': ('result', without('accuracy')),
    'no passes': ('result', without('forwards')), 'NaN': ('result', {**GOOD, 'accuracy': math.nan}),
    'infinite seconds': ('result', {**GOOD, 'train_seconds': math.inf}),
    'a text for an accuracy': ('result', {**GOOD, 'accuracy': 'high'}),
    'a field of a newer version': ('config', {**BAD.to_dict(), 'quantum': True}),
    'an unknown method': ('config', {**BAD.to_dict(), 'method': 'sam9'}),
    'an impossible value': ('config', {**BAD.to_dict(), 'lr': -1}),
    'teachers that are none': ('config', {**BAD.to_dict(), 'teachers': [3]}),
    'foreign': ('config', {'name': 'my-app', 'version': 3}), 'rows of a history': ('history', [[1, 2]]),
    'rows without an epoch': ('history', [dict(loss=3)]), 'measures': ('measures', dict(measures=[1])),
    'a measure without a value': ('measures', dict(measures=dict(trace=dict(error=1)))),
}


def check_rest(root, capsys, name, n=1):
    "The two good runs are shown; one line names the other, and one counts."
    results = load_results(root)
    assert len(results) == 2
    assert results_table(results)['n'].sum() == 2
    plot_runs(results)
    plt.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == n + 1, lines
    assert all(line.startswith('left out: ') and len(line) < 500 for line in lines[:-1])
    assert name in lines[0]
    assert lines[-1] == f'number of runs and archives that could not be read and were left out: {n}'


@pytest.mark.parametrize('part, text', RAW.values(), ids=RAW)
def test_a_damaged_file_is_named_and_left_out(part, text, root, capsys):
    folder = write_run(root, BAD)
    (folder / f'{part}.json').write_text(text)
    check_rest(root, capsys, f'{part}.json')
    if part == 'result': assert read_result(BAD, root) is None


@pytest.mark.parametrize('part, content', CONTENTS.values(), ids=CONTENTS)
def test_a_file_of_another_form_is_named_and_left_out(part, content, root, capsys):
    write_run(root, BAD, **{part: content})
    check_rest(root, capsys, f'{part}.json')


def test_bytes_that_are_no_text(root, capsys):
    (write_run(root, BAD) / 'result.json').write_bytes(b'\xff\xfe{}')
    check_rest(root, capsys, 'result.json')


def test_a_damaged_archive_is_left_out(root, capsys):
    (root / 'more').mkdir()
    (root / 'more' / ARCHIVE).write_bytes(b'no archive')
    check_rest(root, capsys, ARCHIVE)


def test_many_are_counted(root, capsys):
    for seed in range(20, 35): write_run(root, Run(epochs=1, seed=seed), result=[])
    assert len(load_results(root)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == ('number of runs and archives that could not be read and were left out: '
                         '15, of which 5 are not named here')


def test_only_damaged_runs(tmp_path):
    write_run(tmp_path, BAD, result=[])
    message = r'no runs below .* \(1 could not be read\); train some'
    with pytest.raises(FileNotFoundError, match=message): load_results(tmp_path)


def test_no_published_run_is_left_out(capsys):
    assert len(load_results('published')) > 1000
    assert capsys.readouterr().err == ''
    assert published().is_dir()


def report(root, cwd, **env):
    "Run `sadt_report` in a process of its own, and return its end, output and errors."
    code = 'from sadt_nb.commands.cli import sadt_report; sadt_report()'
    keep = {k: v for k, v in os.environ.items() if k in ('PATH', 'PYTHONPATH', 'OMP_NUM_THREADS')}
    command = [sys.executable, '-c', code, '--root', root]
    p = subprocess.run(command, cwd=cwd, env={**keep, **env}, capture_output=True, timeout=300)
    return p.returncode, p.stdout.decode(), p.stderr.decode()


ASCII = dict(PYTHONIOENCODING='ascii:strict', PYTHONUTF8='0', LC_ALL='C', PYTHONCOERCECLOCALE='0')


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_a_report_on_an_ascii_terminal_without_home_and_with_odd_names(root, tmp_path_factory):
    "HOME is missing, the terminal knows only ASCII, and a folder's name is no UTF-8 and clears the screen."
    odd = os.fsencode(root) + b'/\xff\xfe\x1b[2J'
    os.mkdir(odd)
    good = write_run(root, Run(epochs=1, method='sam'))
    os.rename(os.fsencode(good), odd + b'/good')
    bad = write_run(root, BAD, result=[])
    os.rename(os.fsencode(bad), odd + b'/bad')
    rc, out, err = report(os.fsencode(root), tmp_path_factory.mktemp('cwd'), **ASCII)
    assert rc == 0, err
    assert '90.0 +- 0.0' in out
    assert 'sam' in out
    assert r'\udcff\udcfe\x1b[2J' in err
    assert '\x1b' not in err
    assert 'number of runs and archives that could not be read and were left out: 1' in err
    assert 'Traceback' not in err


ODD = '[link](http://a.b) <img src=x> | `code` \\ $x$ \x1b[2J\nnext'


def test_texts_from_files_in_pages(tmp_path):
    "Markdown shows them as they are, in one line; a parser of Markdown is the oracle."
    markdown_it = pytest.importorskip('markdown_it', reason='markdown-it-py is not installed')
    table = pd.DataFrame({'row': [ODD], 'n': ['1 of 1']})
    page = pages._markdown_page(ODD, 'counted', [table], '', dict(hardware=ODD))
    assert '\x1b' not in page
    html = markdown_it.MarkdownIt('commonmark', {'html': True}).enable('table').render(page)
    shown = r'[link](http://a.b) &lt;img src=x&gt; | `code` \ $x$ \x1b[2J next'
    assert html.count(shown) == 3, html
    assert html.count('<td>') == 2
    assert not any(tag in html for tag in ('<img', '<a ', '<code'))


def test_a_report_shows_control_characters_as_escapes(tmp_path, capsys):
    for data in ('a\x1b[2Jb', 'c\x9b'): write_run(tmp_path, Run(epochs=1, data=data))
    sadt_report(root=tmp_path)
    out, err = capsys.readouterr()
    assert r'data=a\x1b[2Jb' in out
    assert r'data=c\x9b' in out
    assert '\x1b' not in out + err and '\x9b' not in out + err
