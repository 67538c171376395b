"The commands in a user's shell: help, one run, wrong arguments, Ctrl-C."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from inspect import signature
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import sadt_nb
from sadt_nb.commands import cli, command as command_page
from sadt_nb.data.augment import PAD_MODES
from sadt_nb.data.datasets import DATASETS
from sadt_nb.experiments.config import COMPILE, OPTIMIZERS, SCHEDULES, SELECT, Run
from sadt_nb.experiments.grid import duration, run_ensemble
from sadt_nb.experiments.measure import MEASURES
from sadt_nb.experiments.runner import run
from sadt_nb.experiments.sweep import SWEEPS
from sadt_nb.methods.registry import METHODS
from sadt_nb.models.registry import MODELS
from sadt_nb.papers import grids
from sadt_nb.papers.base import PaperEnsemble, PaperRun
from sadt_nb.papers.grids import PAPER_GRIDS
from sadt_nb.papers.tables import TABLES

BIN = Path(sys.executable).parent
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = ['--epochs', '1', '--n_train', '200', '--bs', '50']


def shell(*args):
    command = [BIN / args[0], *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=300)


def read_json(file): return json.loads(file.read_text())


COMMANDS = ['sadt_demo', 'sadt_train', 'sadt_compare', 'sadt_grid', 'sadt_report', 'sadt_sweep',
            'sadt_measure']
HEAVY = ('torch', 'fastai', 'fastcore', 'numpy', 'pandas', 'matplotlib', 'sklearn', 'scipy')


def light(command, *args, columns=80):
    "Run a command that must answer before it imports anything heavy; return status, output, error."
    code = f'''
import sys
sys.argv = {[command, *map(str, args)]!r}
from sadt_nb.commands.cli import {command}
try: {command}()
finally:
    heavy = [m for m in {HEAVY!r} if m in sys.modules]
    assert not heavy, heavy
'''
    env = {**ENV, 'COLUMNS': str(columns)}
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=60)
    assert 'Traceback' not in r.stderr, r.stderr
    return r.returncode, r.stdout, r.stderr


def test_the_check_for_light_commands_can_fail(monkeypatch):
    "Every command imports `argparse`, which is not heavy."
    monkeypatch.setattr(sys.modules[__name__], 'HEAVY', (*HEAVY, 'argparse'))
    with pytest.raises(AssertionError, match='argparse'): light('sadt_train', '--version')


@pytest.mark.parametrize('command', COMMANDS)
def test_help_is_light_fits_the_terminal_and_has_an_example(command):
    for columns in (60, 100):
        status, out, _ = light(command, '--help', columns=columns)
        assert status == 0
        text, example = out.rsplit('example: ', 1)
        assert max(map(len, text.splitlines())) <= columns - 2
        assert '--version' in text
        assert example.startswith(command + ' ')


@pytest.mark.parametrize('command', COMMANDS)
def test_the_example_in_the_help_is_a_right_call(command):
    example = light(command, '--help')[1].rsplit('example: ', 1)[1]
    function = cli.__dict__[command].__wrapped__
    args = vars(command_page._parser(function, '').parse_args(shlex.split(example)[1:]))
    for name, value in args.items(): command_page._check(name, function.__annotations__[name], value)


@pytest.mark.parametrize('command', COMMANDS)
def test_version_is_light(command):
    assert light(command, '--version') == (0, f'{command} {sadt_nb.__version__}\n', '')


TYPOS = [
    ('sadt_train --epcohs 3', 'unknown option --epcohs; did you mean --epochs?'),
    ('sadt_train --method sma', "unknown method 'sma'; did you mean sam?"),
    ('sadt_train --model resnet8', "unknown model 'resnet8'; did you mean resnet18?"),
    ('sadt_train --data digit', "unknown data set 'digit'; did you mean digits?"),
    ('sadt_train --opt adm', "unknown --opt 'adm'; did you mean adam?"),
    ('sadt_train --views 3', 'choose one of 0, 1, 2'),
    ('sadt_train --bs many', '--bs: invalid int value'),
    ('sadt_train --flip --alternate', '--flip and --alternate are two ways to mirror; use one of them'),
    ('sadt_grid sadt/notbook20', "unknown table 'sadt/notbook20'; did you mean sadt/notebook20?"),
    ('sadt_grid --list xyz', "unknown table 'xyz'; sadt_grid --list shows all"),
    ('sadt_grid sadt/table1 sadt/figure2', 'unexpected argument sadt/figure2'),
    ('sadt_report notebook20', "unknown table 'notebook20'; did you mean sadt/notebook20?"),
    ('sadt_sweep sadt_part', "unknown search 'sadt_part'; did you mean sadt_parts?"),
    ("sadt_sweep --methods 'baseline sma'", "unknown method 'sma'; did you mean sam?"),
    ('sadt_measure', 'the folder of a run is missing'),
    ('sadt_measure nowhere', 'not the folder of a run'),
    ('sadt_measure nowhere --measures trase', "unknown measure 'trase'; did you mean trace?"),
]


@pytest.mark.parametrize('line, message', TYPOS, ids=[line for line, _ in TYPOS])
def test_a_typo_is_one_line_without_heavy_imports(line, message):
    command, *args = shlex.split(line)
    status, out, err = light(command, *args)
    assert status == 2
    assert out == ''
    assert err.startswith(f'{command}: error: ')
    assert err.count('\n') == 1
    assert message in err


def test_options_may_have_hyphens():
    parser = command_page._parser(cli.sadt_grid.__wrapped__, '')
    args = parser.parse_args(['sadt/table1', '--no-measures', '--only=a-b', '--root', 'x'])
    assert (args.no_measures, args.only, args.root) == (True, 'a-b', Path('x'))
    parser = command_page._parser(cli.sadt_train.__wrapped__, '')
    args = parser.parse_args(['--n-train', '60', '--method_args=a-b=1'])
    assert (args.n_train, args.method_args) == (60, 'a-b=1')


def test_names_read_from_source_are_those_of_the_registries():
    "An argument with a fixed set of values allows what a `Run` allows, too."
    page = command_page
    registries = {page.MethodName: METHODS, page.ModelName: MODELS, page.DataName: DATASETS,
                  page.SearchName: SWEEPS, page.MeasureNames: MEASURES, page.TableName: PAPER_GRIDS}
    for kind, registry in registries.items(): assert kind.known() == [*registry], kind
    allowed = dict(opt=OPTIMIZERS, sched=SCHEDULES, select=SELECT, compile=COMPILE, pad_mode=PAD_MODES)
    for name, values in allowed.items():
        assert set(get_args(cli.sadt_train.__annotations__[name])) == set(values), name


def test_names_are_read_from_every_form_of_a_dictionary(tmp_path, monkeypatch):
    text = "A = dict(a=1, b=2)\nB = {'c': 3, **A}\nC = Registry({**B, 'd': 4}, other=5)\nD = {}\n"
    (tmp_path / 'x.py').write_text(text)
    monkeypatch.setattr(command_page.sadt_nb, '__file__', str(tmp_path / '__init__.py'))
    found = {name: command_page.registered('x.py', name) for name in 'ABCD'}
    assert found == {'A': ['a', 'b'], 'B': ['c', 'a', 'b'], 'C': ['c', 'a', 'b', 'd', 'other'], 'D': []}


def test_the_rows_of_one_table(capsys):
    cli.sadt_grid('sadt/table1', only='cifar10 simple_cnn 2048', list=True)
    lines = capsys.readouterr().out.splitlines()
    cells = grids.paper_grid('sadt/table1', only='cifar10 simple_cnn 2048')
    assert lines[0] == f'sadt/table1: {TABLES["sadt/table1"]}'
    assert [line.split('  ')[0] for line in lines[3:]] == [c.label for c in cells]
    assert f'{100 * cells[0].published:.1f}' in lines[3]


DURATIONS = [(50, '50 s'), (720, '12 min'), (12_000, '3 h 20 min'), (5 * 86_400, '5 days'),
             (700 * 86_400, '700 days'), (254_735 * 86_400, '697 years')]


@pytest.mark.parametrize('seconds, text', DURATIONS)
def test_durations_are_readable(seconds, text): assert duration(seconds) == text


def test_demo(tmp_path, monkeypatch, capsys, narrow):
    "A line per run, one table, one figure and one last sentence; `every_output` has it without a terminal."
    monkeypatch.chdir(tmp_path)
    def demo():
        cli.sadt_demo(epochs=1, seeds=1, root=tmp_path / 'runs', figure=tmp_path / 'f.png')
        return capsys.readouterr().out
    first = demo()
    lines = first.splitlines()
    ended = [line for line in lines if line.startswith('[')]
    stored = [read_json(f) for f in (tmp_path / 'runs').glob('*/result.json')]
    shown = {float(line.rsplit(' ', 1)[1].rstrip('%')) for line in ended}
    assert len(ended) == len(stored) == 5
    assert shown == {round(100 * s['accuracy_bn'], 1) for s in stored}
    assert lines[-1].startswith('With 40% wrong labels, ')
    assert (tmp_path / 'f.png').stat().st_size > 10_000
    assert demo() == first, 'finished runs are not repeated'


def test_train_store_and_report(tmp_path, capsys):
    r = shell('sadt_train', *SMALL, '--method', 'sam', '--method_args', 'rho=0.1', '--root', tmp_path)
    assert r.returncode == 0, r.stderr
    assert 'test accuracy' in r.stdout, r.stderr
    assert r.stderr == ''
    assert '\r' not in r.stdout
    assert r.stdout.startswith('epoch 1 of 1: training loss ')
    folder, = tmp_path.iterdir()
    config = read_json(folder / 'config.json')
    result = read_json(folder / 'result.json')
    assert config['method_args'] == {'rho': .1}
    assert result['status'] == 'finished'
    assert result['steps'] == 4
    assert result['forwards'] == 8
    assert {'versions', 'hardware', 'code', 'train_seconds', 'accuracy_bn'} <= result.keys()
    figure = tmp_path / 'f.png'
    cli.sadt_report(root=tmp_path, figure=figure)
    assert 'sam' in capsys.readouterr().out
    assert figure.stat().st_size > 10_000


def test_a_student_is_trained_from_the_folder_of_its_teacher(tmp_path, capsys):
    small = dict(epochs=1, n_train=200, bs=50, root=tmp_path)
    cli.sadt_train(method='baseline', seed=3, **small)
    teacher, = tmp_path.iterdir()
    options = dict(autoaugment='svhn', cutout=8, rotate=5., amp='bf16', clip=1.)
    cli.sadt_train(method='distillation', method_args='alpha=0.2', teacher=teacher, seed=4,
                   **options, **small)
    student, = set(tmp_path.iterdir()) - {teacher}
    config = read_json(student / 'config.json')
    result = read_json(student / 'result.json')
    assert config['split'] == 3
    assert config['teachers'][0]['seed'] == 3
    assert config['autoaugment'] == 'svhn'
    assert result['teacher']['accuracy'] > 0
    cases = [(tmp_path, tmp_path, 'not the folder of a run'),
             (teacher, tmp_path / 'other', 'pass --root')]
    for folder, root, message in cases:
        with pytest.raises(SystemExit):
            cli.sadt_train(method='distillation', teacher=folder, **{**small, 'root': root})
        assert message in capsys.readouterr().err


MISTAKES = [
    (dict(method='sma'), 'unknown method'),
    (dict(model='resnet'), 'unknown model'),
    (dict(data='/no/such'), 'unknown data set'),
    (dict(lr=0.), 'lr'),
    (dict(epochs=0), 'epochs'),
    (dict(bs=0), 'bs'),
    (dict(bs=9999), '`bs` must be at most'),
    (dict(method_args='rho=-1'), 'rho'),
    (dict(method_args='radius=1'), 'no option'),
    (dict(method_args='rho'), 'rho=0.1'),
    (dict(data='noisy_digits', data_args='noise=2'), 'noise'),
    (dict(data_args='nois=2'), 'nois'),
    (dict(method='sadt1', method_args='noise_scale=-1'), 'noise_scale'),
    (dict(valid=1.5), 'valid'),
    (dict(root='/proc/nowhere'), 'another root'),
    (dict(lr=1e30, opt='sgd', sched='constant', epochs=9), 'epoch 1'),
    (dict(opt='sgd', opt_args='momentum=2x'), 'momentum'),
    (dict(cutmix=-1.), 'cutmix'),
    (dict(n_train=3, bs=2), 'n_train'),
    (dict(method='distillation'), 'teachers'),
    (dict(select='best'), 'select'),
    (dict(amp='fp8'), 'amp'),
    (dict(autoaugment='mnist'), '`autoaugment` must be one of imagenet'),
    (dict(cutout=99), 'cutout'),
]


def as_text(args): return ' '.join(f'{k}={v}' for k, v in args.items())


@pytest.mark.parametrize('args, message', MISTAKES, ids=[as_text(args) for args, _ in MISTAKES])
def test_mistakes_are_one_line(tmp_path, capsys, args, message):
    defaults = dict(epochs=1, n_train=200, bs=50, root=tmp_path)
    with pytest.raises(SystemExit) as e: cli.sadt_train(**{**defaults, **args})
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('sadt_train: error:')]
    assert e.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_mistake_in_a_real_shell():
    r = shell('sadt_train', '--method', 'sma')
    assert r.returncode == 2
    assert 'Traceback' not in r.stderr
    assert r.stderr.strip().splitlines()[-1].startswith('sadt_train: error: unknown method')


@pytest.mark.parametrize('args, status', [
    (['sadt_grid', '--help'], {0, 141}), # argparse itself ignores that nobody reads
    (['sadt_grid', 'fast/narrow', '--list'], {141}),
])
def test_a_command_whose_reader_has_ended_ends_without_a_message(args, status):
    "`sadt_grid NAME --list | head` closes the pipe before all rows are written."
    reader, writer = os.pipe()
    os.close(reader)
    command = [BIN / args[0], *args[1:]]
    r = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENV, timeout=300)
    os.close(writer)
    assert r.stderr == ''
    assert r.returncode in status


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys):
    messages = {BrokenPipeError(32, 'worker'): '[Errno 32] worker', ValueError(): 'ValueError'}
    for error, message in messages.items():
        with pytest.raises(SystemExit) as end, command_page._one_line_errors('sadt_grid'): raise error
        assert end.value.code == 2
        assert capsys.readouterr().err == f'sadt_grid: error: {message}\n'


def receive_ctrl_c():
    "Undo what shells do to background jobs and their children, which ignore Ctrl-C."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_marks_the_run_and_the_next_call_finishes_it(tmp_path, one_thread):
    args = [BIN / 'sadt_train', '--epochs', '3', '--n_train', '300', '--bs', '20', '--root', tmp_path]
    pipe = subprocess.PIPE
    p = subprocess.Popen(args, stdout=pipe, stderr=pipe, text=True, env=ENV, preexec_fn=receive_ctrl_c)
    deadline = time.time() + 120
    while not list(tmp_path.glob('*/history.json')) and time.time() < deadline: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    result = read_json(next(tmp_path.glob('*/result.json')))
    assert p.returncode == 130
    assert result['status'] == 'interrupted'
    assert 'Traceback' not in err
    assert 'stopped' in err
    assert len(read_json(next(tmp_path.glob('*/history.json')))) >= 1
    cli.sadt_train(epochs=3, n_train=300, bs=20, root=tmp_path)
    assert read_json(next(tmp_path.glob('*/result.json')))['status'] == 'finished'


def test_a_grid_evaluates_its_ensembles(tmp_path, monkeypatch, capsys):
    "One member of the second ensemble is not a run of this table, so it has no accuracy; a line says so."
    runs = [Run(epochs=1, n_train=200, bs=50, seed=s) for s in (0, 1)]
    cells = [PaperRun(f'seed {r.seed}', r) for r in runs]
    both = PaperEnsemble('both', tuple(runs))
    another = PaperEnsemble('another', (runs[0], runs[0].but(seed=2)))
    monkeypatch.setitem(grids.PAPER_GRIDS, 'tiny', lambda: cells)
    monkeypatch.setitem(grids.PAPER_ENSEMBLES, 'tiny', lambda: [both, another])
    def printed(**options):
        capsys.readouterr()
        cli.sadt_grid('tiny', root=tmp_path, **options)
        return capsys.readouterr()
    def ensemble_lines(text): return [line for line in text.splitlines() if 'ensemble' in line]
    found = printed()
    accuracy = run_ensemble(runs, tmp_path)['accuracy']
    of_both = f'ensemble of both: accuracy {accuracy:.3f}'
    untrained = ('ensemble of another left out: members that are not trained: 1 of 2; the first is '
                 f'{runs[0].but(seed=2).name}; train them first (sadt_grid without --only)')
    count = '1 of 2 ensembles left out, see above'
    assert ensemble_lines(found.out) == [of_both] and ensemble_lines(found.err) == [untrained, count]

    for r in runs: (tmp_path / r.name / 'weights.pt').unlink()
    found = printed()
    assert ensemble_lines(found.out) == [of_both], 'a stored accuracy needs no weights'
    shutil.rmtree(tmp_path / 'ensembles')
    found = printed()
    assert not ensemble_lines(found.out)
    of_both_left, *others = ensemble_lines(found.err)
    first = min(runs, key=lambda r: r.key).name
    assert of_both_left.startswith('ensemble of both left out: members without stored weights: 2 of 2; the '
                                   f'first is {first}; copy weights.pt')
    assert of_both_left.endswith('train them again with force=True (--force)')
    assert others == [untrained, '2 of 2 ensembles left out, see above']
    as_json = json.loads(printed(json=True).out)
    reasons = dict(line.split(' left out: ') for line in (of_both_left, untrained))
    assert as_json['ensembles'] == {}
    assert {f'ensemble of {k}': v for k, v in as_json['ensembles_left_out'].items()} == reasons
    assert ensemble_lines(printed(force=True).out) == [of_both], 'as the line says'


def test_of_many_ensembles_left_out_ten_are_named(tmp_path, monkeypatch, capsys):
    many = [PaperEnsemble(f'pair {i}', (Run(seed=i), Run(seed=i + 1))) for i in range(11)]
    monkeypatch.setitem(grids.PAPER_ENSEMBLES, 'tiny', lambda: many)
    monkeypatch.setitem(grids.PAPER_GRIDS, 'tiny', lambda: [PaperRun('row', Run())])
    monkeypatch.setattr('sadt_nb.experiments.grid.run_grid', lambda *args, **kwargs: [{}])
    cli.sadt_grid('tiny', root=tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if 'ensemble' in line]
    assert [line.split(' left out')[0] for line in lines[:10]] == [f'ensemble of pair {i}' for i in range(10)]
    assert lines[10:] == ['11 of 11 ensembles left out, the first 10 are named above']


def test_measure_a_stored_run(tmp_path, capsys, narrow):
    cli.sadt_train(epochs=1, n_train=200, bs=50, root=tmp_path)
    folder, = tmp_path.iterdir()
    capsys.readouterr()
    cli.sadt_measure(str(folder), measures='sharpness gradient_norm', samples=100)
    out = capsys.readouterr().out
    assert 'sharpness' in out
    assert 'gradient_norm' in out
    stored = read_json(folder / 'measures.json')
    assert all(m['samples'] == 100 for m in stored['measures'].values())
    assert set(stored['measures']) == {'sharpness', 'gradient_norm'}
    assert {'versions', 'hardware', 'code'} <= stored.keys()
    capsys.readouterr()
    cli.sadt_report(root=tmp_path)
    assert 'gradient_norm' in capsys.readouterr().out
    status, _, err = light('sadt_measure', tmp_path)
    assert status == 2
    assert 'not the folder of a run' in err
    assert len(err.strip().splitlines()) == 1


MAKEFILE = Path(__file__).parents[1] / 'Makefile'


@pytest.mark.skipif(not MAKEFILE.exists(), reason='the installed library has no Makefile')
def test_make_demo_installs_the_library_alone_and_make_test_the_rest(tmp_path):
    # Inside `make test`, make would take these options for its own and print the folders that it enters.
    outer_make = {'MAKEFLAGS', 'MFLAGS', 'MAKELEVEL', 'MAKEOVERRIDES', 'VENV', 'PYTHON'}
    environment = {name: value for name, value in os.environ.items() if name not in outer_make}

    def dry_run(target):
        command = ['make', '-n', target, f'VENV={tmp_path}']
        done = subprocess.run(command, cwd=MAKEFILE.parent, env=environment, capture_output=True, text=True)
        return done.stdout
    fresh = dry_run('demo')
    assert ' -e .\n' in fresh
    assert '[dev]' not in fresh
    assert fresh.strip().endswith('/bin/sadt_demo')
    assert "-e '.[dev]'" in dry_run('lint')
    (tmp_path / '.ready').touch()
    (tmp_path / 'bin').mkdir()
    (tmp_path / 'bin' / 'python').touch()
    assert ' -e .' not in dry_run('demo'), 'the development environment holds the library'


def test_a_grid_without_a_name_lists_the_tables(monkeypatch):
    monkeypatch.setattr(cli, '_list_tables', lambda json, samples: 'all tables')
    monkeypatch.setattr(sys, 'argv', ['sadt_grid']) # read by a command without arguments
    assert cli.sadt_grid() == cli.sadt_grid(list=True) == 'all tables'


def test_the_message_of_the_demonstration():
    def message(plain, longer, sam):
        means = {'plain training': plain, 'plain training, twice the epochs': longer, 'SAM': sam}
        return cli._demo_message({label: pd.Series([m - 1, m + 1]) for label, m in means.items()})
    start = 'With 40% wrong labels, '
    longer = 'and 70% in twice the epochs'
    assert message(60, 70, 80) == f'{start}SAM reaches 80%, plain training 60%, {longer}'
    assert message(60, 70, 65) == f'{start}no method is better than plain training (60%, {longer})'


def test_a_result_as_json_and_nothing_else(tmp_path, capsys):
    cli.sadt_train(method='baseline', n_train=60, bs=30, epochs=1, root=tmp_path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found == {'folder': found['folder'], **read_json(Path(found['folder']) / 'result.json')}


@pytest.mark.parametrize('no_measures, expected', [(False, ('trace',)), (True, ())])
def test_a_grid_without_measures(tmp_path, monkeypatch, no_measures, expected):
    row = PaperRun('row', Run(n_train=60, epochs=1), measures=('trace',))
    asked = {}
    def run_grid(runs, root, workers, force, measures, **kwargs):
        asked.update(measures)
        return [{} for _ in runs]
    monkeypatch.setattr('sadt_nb.experiments.grid.run_grid', run_grid)
    monkeypatch.setattr(grids, 'paper_grid', lambda *args: [row])
    monkeypatch.setattr(grids, 'paper_ensembles', lambda *args: [])
    cli.sadt_grid('sadt/notebook20', root=tmp_path, no_measures=no_measures)
    assert asked == {row.run: expected}


EVERY_COMMAND = r"""
import sys
from pathlib import Path
from sadt_nb.commands import cli
from sadt_nb.experiments.config import Run
from sadt_nb.models.registry import MODELS
from sadt_nb.models.simple_cnn import cnn_of_widths
from sadt_nb.papers import any_data, grids
from sadt_nb.papers.base import PaperRun

def narrow_cnn(classes=10, bottleneck=False, init='torch', dropout=.3):
    return cnn_of_widths(4, (32, 16), classes, bottleneck, init, dropout)
def mark(name):
    for stream in (sys.stdout, sys.stderr): print(f'<<{name}>>', file=stream, flush=True)
simple_cnn = MODELS['simple_cnn']
root, figure = Path(sys.argv[1]), Path(sys.argv[1]) / 'figure.png'
small = Run(n_train=60, bs=30, epochs=1)
trained = root / 'train' / small.but(method='sam').name
row = PaperRun('a row', small, .5, measures=('gradient_norm',))
grids.PAPER_GRIDS['tiny'] = lambda: [row]
cli.TABLES = {'tiny': 'one row', 'distill/figure7': 'spectra'}
any_data.make_plan = lambda *args: any_data.Plan(2, 1.)
one_epoch = dict(n_train=60, bs=30, epochs=1)
CALLS = [
    ('train', cli.sadt_train, dict(method='sam', root=root / 'train', **one_epoch)),
    ('demo', cli.sadt_demo, dict(root=root / 'demo', seeds=1, epochs=1, figure=figure)),
    ('compare', cli.sadt_compare, dict(root=root / 'compare', n_train=60, bs=30, epochs=2)),
    ('grid', cli.sadt_grid, dict(name='tiny', root=root / 'grid')),
    ('tables', cli.sadt_grid, dict(list=True)),
    ('rows', cli.sadt_grid, dict(name='tiny', list=True)),
    ('folder', cli.sadt_report, dict(root=root / 'train', figure=figure)),
    ('report', cli.sadt_report, dict(name='tiny', root=root / 'grid')),
    ('sweep', cli.sadt_sweep, dict(methods='baseline', root=root / 'sweep', trials=2, seeds=1, **one_epoch)),
    ('measure', cli.sadt_measure, dict(name=trained, measures='gradient_norm', samples=60)),
]
for json in (False, True):
    for name, command, args in CALLS:
        # in one epoch, the narrow network is no better than guessing, and a search warns of that
        MODELS['simple_cnn'] = simple_cnn if name == 'sweep' else narrow_cnn
        mark(name + ' json' * json)
        command(json=json, **args)
mark('mistake')
try: cli.sadt_train(bs=5000, root=root / 'mistake')
except SystemExit as e: print(e.code)
"""


def parts(text):
    "Return the output of each call by its mark."
    found = re.split(r'<<(.+)>>\n', text)
    return dict(zip(found[1::2], found[2::2]))


@pytest.fixture(scope='module')
def every_output(tmp_path_factory):
    "Run every command without a terminal, as text and as JSON, then a mistake; return outputs and messages."
    pytest.importorskip('optuna', reason='sadt_sweep needs Optuna')
    root = tmp_path_factory.mktemp('every')
    command = [sys.executable, '-c', EVERY_COMMAND, root]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=500)
    assert done.returncode == 0, done.stderr
    return root, parts(done.stdout), parts(done.stderr)


def test_without_a_terminal_every_command_prints_plain_lines(every_output):
    _, out, err = every_output
    assert len(out) == len(err) == 21
    for streams in (out, err):
        for name, text in streams.items():
            assert not re.search(r'[\r\b\x1b]', text), name
            assert 'Warning' not in text, name
    for name in [n for n in out if not n.endswith(' json')]: assert out[name].strip(), name


def test_a_mistake_that_is_found_after_the_imports_is_one_line(every_output):
    root, out, err = every_output
    assert out['mistake'] == '2\n'
    line, = err['mistake'].splitlines()
    assert line.startswith('sadt_train: error: `bs` must be at most 1293')
    assert not (root / 'mistake').exists()


def test_every_command_has_its_result_as_json_and_nothing_else(every_output):
    root, out, _ = every_output
    assert all('json' in cli.__dict__[c].__annotations__ for c in COMMANDS)
    def refuse(name): raise AssertionError(f'{name} is no JSON')
    found = {}
    for name, text in out.items():
        if name.endswith(' json'): found[name[:-5]] = json.loads(text, parse_constant=refuse)
    row, = found['grid']['rows']
    stored = read_json(Path(row['folder']) / 'result.json')
    assert (row['run'], row['published'], row['result']) == ('a row', .5, stored)
    assert found['report']['rows'] == found['grid']['rows']
    assert found['report']['verdicts'][0]['row'] == 'a row'
    assert all(Path(f).is_file() for f in found['report']['pages'])
    listed, = found['rows']['rows']
    assert Run.from_dict(listed['config']) == Run(n_train=60, bs=30, epochs=1)
    shown, = found['folder']['runs']
    trained = read_json(next((root / 'train').glob('*/result.json')))
    assert (shown['label'], shown['method']) == ('sam', 'sam')
    assert shown['accuracy'] == trained['accuracy']
    measured = read_json(next((root / 'train').glob('*/measures.json')))['measures']
    assert found['measure']['measures'] == measured
    tested, = found['sweep']['rows']
    assert tested['method'] == 'baseline'
    assert len(tested['test']) == 1
    assert all(0 <= share <= 1 for share in (tested['validation'], *tested['test']))
    assert len(found['demo']['accuracies']) == 5
    assert len(found['compare']['rows']) == 3
    assert found['compare']['rows'][0]['difference'] is None, 'NaN in the table, which JSON lacks'


def test_the_list_of_tables_counts_measures(every_output):
    "`distill/figure7` computes spectra, whose time grows with the number of images."
    _, out, _ = every_output
    tiny, spectra = json.loads(out['tables json'])['tables']
    assert tiny['runs'] == 1
    assert spectra['measuring_seconds'] > tiny['measuring_seconds'] > 0
    assert spectra['training_seconds'] > tiny['training_seconds'] > 0
    assert 'for measures' in out['tables']


def test_a_bar_is_shown_in_terminals_only(monkeypatch):
    from sadt_nb.core.display import bar
    for in_terminal in (True, False):
        monkeypatch.setattr(sys.stderr, 'isatty', lambda answer=in_terminal: answer, raising=False)
        assert bar(range(3)).disable is not in_terminal
        assert bar(range(3), show=False).disable
        assert list(bar(range(3))) == [0, 1, 2]


def test_all_bars_are_of_one_function():
    package = Path(sadt_nb.__file__).parent
    users = [f for f in package.rglob('*.py') if 'import tqdm' in f.read_text()]
    assert [f.relative_to(package).as_posix() for f in users] == ['core/display.py']


def completions(line, extra=''):
    "Return what a shell offers for a line, as argcomplete's shell function asks for it."
    with tempfile.NamedTemporaryFile() as answer:
        env = {**ENV, '_ARGCOMPLETE': '1', 'COMP_LINE': line, 'COMP_POINT': str(len(line)),
               '_ARGCOMPLETE_IFS': '\n', '_ARGCOMPLETE_STDOUT_FILENAME': answer.name}
        command = line.split()[0]
        code = f"""
import atexit, sys
sys.argv = [{command!r}]
{extra}
atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules]))
from sadt_nb.commands.cli import {command}
{command}()
"""
        run = [sys.executable, '-c', code]
        done = subprocess.run(run, capture_output=True, text=True, env=env, timeout=60)
        return done, Path(answer.name).read_text().split('\n')


@pytest.mark.parametrize('command', COMMANDS)
def test_tab_completes_the_options_of_every_command(command):
    pytest.importorskip('argcomplete')
    options = {f'--{name}' for name in cli.__dict__[command].__annotations__ if name != 'name'}
    _, found = completions(f'{command} --')
    assert {f.strip() for f in found} == {*options, '--help', '--version'}


COMPLETED = [
    ('sadt_train --method es', ['esam']),
    ('sadt_train --epo', ['--epochs']),
    ('sadt_train --views ', ['0', '1', '2']),
    ('sadt_train --model resnet1', [m for m in MODELS if m.startswith('resnet1')]),
    ('sadt_train --data noisy_d', ['noisy_digits']),
    ('sadt_grid sadt/table', [t for t in TABLES if t.startswith('sadt/table')]),
    ('sadt_measure runs --measures gr', ['gradient_norm']),
    ("sadt_sweep --methods 'sam es", ['sam esam']),
]


@pytest.mark.parametrize('line, expected', COMPLETED, ids=[line for line, _ in COMPLETED])
def test_tab_completes_names(line, expected):
    pytest.importorskip('argcomplete')
    _, found = completions(line)
    assert [f.strip(" '") for f in found] == expected


def test_tab_completes_files(tmp_path, monkeypatch):
    pytest.importorskip('argcomplete')
    (tmp_path / 'a_run').mkdir()
    monkeypatch.chdir(tmp_path)
    assert completions('sadt_measure a_')[1] == ['a_run/']


def test_tab_starts_no_training_without_argcomplete(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done, found = completions('sadt_train --epo', "sys.modules['argcomplete'] = None")
    assert done.returncode == 1
    assert done.stdout == '[]\n', 'nothing heavy was imported'
    assert found == ['']


def test_bash_completes_with_the_line_of_the_page():
    pytest.importorskip('argcomplete')
    script = """
eval "$(python -m argcomplete.scripts.register_python_argcomplete sadt_train)"
COMP_LINE='sadt_train --method look' COMP_POINT=24 COMP_TYPE=9 COMP_WORDBREAKS=$' \\t\\n'
_python_argcomplete sadt_train
echo "${COMPREPLY[@]}"
"""
    env = {**ENV, 'PATH': f'{BIN}:{os.environ["PATH"]}'}
    done = subprocess.run(['bash', '-c', script], capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.strip() == 'looksam', done.stderr


@pytest.mark.parametrize('scale, samples, expected',
                         [(1., None, 1000), (.3, None, 300), (.01, None, 100), (.01, 500, 500)])
def test_measures_get_shorter_with_the_training(tmp_path, monkeypatch, scale, samples, expected):
    asked = {}
    def run_grid(runs, *args, **kwargs):
        asked.update(kwargs)
        return [{} for _ in runs]
    monkeypatch.setattr('sadt_nb.experiments.grid.run_grid', run_grid)
    monkeypatch.setattr(grids, 'paper_grid', lambda *args: [PaperRun('row', Run(n_train=60, epochs=1))])
    monkeypatch.setattr(grids, 'paper_ensembles', lambda *args: [])
    cli.sadt_grid('sadt/notebook20', root=tmp_path, scale=scale, samples=samples)
    assert asked['samples'] == expected


def test_the_report_of_a_table_shows_the_verdict_of_each_row(monkeypatch, tmp_path, capsys):
    rows = [dict(row='sam', where='', n=3, verdict='agrees'), dict(row='gc', where='', n=2, verdict='open')]
    monkeypatch.setattr(cli.pages, 'comparison', lambda *_: pd.DataFrame(rows))
    monkeypatch.setattr(cli.pages, 'write_pages', lambda *_: [tmp_path / 'index.md'])
    monkeypatch.setattr(cli.report, 'load_results', lambda *_: None)
    monkeypatch.setattr(cli, '_published_table', lambda *_: pd.DataFrame(dict(published=[98.5])))
    cli._report_table('sam/table', tmp_path, tmp_path, 1., '', json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [['published'], ['0', '98.5'], [], ['row', 'n', 'verdict'], ['sam', '3', 'agrees'],
                     ['gc', '2', 'open'], [], ['pages:', str(tmp_path / 'index.md')]]


def test_every_command_stores_checkpoints_as_often_as_a_run():
    expected = signature(run).parameters['minutes'].default
    for command in (cli.sadt_train, cli.sadt_grid):
        assert signature(command).parameters['minutes'].default == expected
