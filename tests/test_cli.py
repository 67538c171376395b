"The commands in a user's shell: help, one run, wrong arguments, Ctrl-C."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sadt_nb.commands import cli
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_ensemble
from sadt_nb.papers import grids
from sadt_nb.papers.base import PaperEnsemble, PaperRun

BIN = Path(sys.executable).parent
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = ['--epochs', '1', '--n_train', '200', '--bs', '50']


def shell(*args, cwd=None):
    command = [BIN / args[0], *map(str, args[1:])]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=cwd, timeout=300)


def read_json(file): return json.loads(file.read_text())


@pytest.mark.parametrize('command', ['sadt_demo', 'sadt_grid'])
def test_help(command):
    r = shell(command, '--help')
    assert r.returncode == 0
    assert '--root' in r.stdout
    assert 'Traceback' not in r.stderr


def test_train_store_and_report(tmp_path):
    r = shell('sadt_train', *SMALL, '--method', 'sam', '--method_args', 'rho=0.1', '--root', tmp_path)
    assert r.returncode == 0, r.stderr
    assert 'test accuracy' in r.stdout, r.stderr
    folder, = tmp_path.iterdir()
    config = read_json(folder / 'config.json')
    result = read_json(folder / 'result.json')
    assert config['method_args'] == {'rho': .1}
    assert result['status'] == 'finished'
    assert result['steps'] == 4
    assert result['forwards'] == 8
    assert {'versions', 'hardware', 'code', 'train_seconds', 'accuracy_bn'} <= result.keys()
    figure = tmp_path / 'f.png'
    r = shell('sadt_report', '--root', tmp_path, '--figure', figure)
    assert r.returncode == 0, r.stderr
    assert 'sam' in r.stdout, r.stderr
    assert figure.stat().st_size > 10_000, r.stderr


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
    (dict(bs=9999), 'batch size'),
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
    (dict(autoaugment='mnist'), 'policy'),
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


def receive_ctrl_c():
    "Undo what shells do to background jobs and their children, which ignore Ctrl-C."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_marks_the_run_and_the_next_call_finishes_it(tmp_path):
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
    assert subprocess.run(args, capture_output=True, env=ENV, timeout=300).returncode == 0
    assert read_json(next(tmp_path.glob('*/result.json')))['status'] == 'finished'


def test_a_grid_evaluates_its_ensembles(tmp_path, monkeypatch, capsys):
    "One member of the second ensemble is not a run of this table, so only the first is reported."
    runs = [Run(epochs=1, n_train=200, bs=50, seed=s) for s in (0, 1)]
    cells = [PaperRun(f'seed {r.seed}', r) for r in runs]
    both = PaperEnsemble('both', tuple(runs))
    another = PaperEnsemble('another', (runs[0], runs[0].but(seed=2)))
    monkeypatch.setitem(grids.PAPER_GRIDS, 'tiny', lambda: cells)
    monkeypatch.setitem(grids.PAPER_ENSEMBLES, 'tiny', lambda: [both, another])
    cli.sadt_grid('tiny', root=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('ensemble')]
    accuracy = run_ensemble(runs, tmp_path)['accuracy']
    assert lines == [f'ensemble of both: accuracy {accuracy:.3f}']


def test_measure_a_stored_run(tmp_path):
    assert shell('sadt_train', *SMALL, '--root', tmp_path).returncode == 0
    folder, = tmp_path.iterdir()
    r = shell('sadt_measure', folder, '--measures', 'sharpness gradient_norm', '--samples', 100)
    assert r.returncode == 0, r.stderr
    assert 'sharpness' in r.stdout, r.stderr
    assert 'gradient_norm' in r.stdout, r.stderr
    stored = read_json(folder / 'measures.json')
    assert all(m['samples'] == 100 for m in stored['measures'].values())
    assert set(stored['measures']) == {'sharpness', 'gradient_norm'}
    assert {'versions', 'hardware', 'code'} <= stored.keys()
    assert 'gradient_norm' in shell('sadt_report', '--root', tmp_path).stdout
    cases = [((), 'say which run'),
             ((tmp_path,), 'not the folder of a run'),
             ((folder, '--measures', 'beauty'), 'unknown measure')]
    for args, message in cases:
        r = shell('sadt_measure', *args)
        assert r.returncode == 2
        assert message in r.stderr
        assert len(r.stderr.strip().splitlines()) == 1
