"The commands as a stranger uses them: help, one run, mistakes, Ctrl-C."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sadt_nb.experiments import cli, papers
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_ensemble

BIN = Path(sys.executable).parent
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
SMALL = ['--epochs', '1', '--n_train', '200', '--bs', '50']


def shell(*args, cwd=None):
    return subprocess.run([BIN / args[0], *map(str, args[1:])], capture_output=True, text=True, env=ENV, cwd=cwd, timeout=300)


@pytest.mark.parametrize('command', ['sadt_demo', 'sadt_grid'])
def test_help(command):
    r = shell(command, '--help')
    assert r.returncode == 0 and '--root' in r.stdout and 'Traceback' not in r.stderr


def test_train_store_and_report(tmp_path):
    r = shell('sadt_train', *SMALL, '--method', 'sam', '--method_args', 'rho=0.1', '--root', tmp_path)
    assert r.returncode == 0 and 'test accuracy' in r.stdout, r.stderr
    folder, = tmp_path.iterdir()
    config, result = (json.loads((folder / f'{n}.json').read_text()) for n in ('config', 'result'))
    assert config['method_args'] == {'rho': .1} and result['status'] == 'finished' and result['steps'] == 4 and result['forwards'] == 8
    assert {'versions', 'hardware', 'code', 'train_seconds', 'accuracy_bn'} <= result.keys()
    r = shell('sadt_report', '--root', tmp_path, '--figure', tmp_path / 'f.png')
    assert r.returncode == 0 and 'sam' in r.stdout and (tmp_path / 'f.png').stat().st_size > 10_000, r.stderr


def test_a_student_is_trained_from_the_folder_of_its_teacher(tmp_path, capsys):
    small = dict(epochs=1, n_train=200, bs=50, root=tmp_path)
    cli.sadt_train(method='baseline', seed=3, **small)
    teacher, = tmp_path.iterdir()
    cli.sadt_train(method='distillation', method_args='alpha=0.2', teacher=teacher, seed=4, autoaugment='svhn', cutout=8, rotate=5., amp='bf16', clip=1., **small)
    student, = set(tmp_path.iterdir()) - {teacher}
    config, result = (json.loads((student / f'{n}.json').read_text()) for n in ('config', 'result'))
    assert config['split'] == 3 and config['teachers'][0]['seed'] == 3 and config['autoaugment'] == 'svhn' and result['teacher']['accuracy'] > 0
    for wrong, says in ((tmp_path, 'not the folder of a run'), (teacher, 'pass --root')):
        with pytest.raises(SystemExit): cli.sadt_train(method='distillation', teacher=wrong, **{**small, 'root': tmp_path / 'other' if says == 'pass --root' else tmp_path})
        assert says in capsys.readouterr().err


MISTAKES = [
    (dict(method='sma'), 'unknown method'), (dict(model='resnet'), 'unknown model'), (dict(data='/no/such'), 'unknown data set'), (dict(lr=0.), 'lr'), (dict(epochs=0), 'epochs'),
    (dict(bs=0), 'bs'), (dict(bs=9999), 'batch size'), (dict(method_args='rho=-1'), 'rho'), (dict(method_args='radius=1'), 'no option'), (dict(method_args='rho'), 'rho=0.1'),
    (dict(data='noisy_digits', data_args='noise=2'), 'noise'), (dict(data_args='nois=2'), 'nois'), (dict(method='sadt1', method_args='noise_scale=-1'), 'noise_scale'),
    (dict(valid=1.5), 'valid'), (dict(root='/proc/nowhere'), 'another root'), (dict(lr=1e30, opt='sgd', sched='constant', epochs=9), 'epoch 1'),
    (dict(opt='sgd', opt_args='momentum=2x'), 'momentum'), (dict(cutmix=-1.), 'cutmix'), (dict(n_train=3, bs=2), 'n_train'),
    (dict(method='distillation'), 'teachers'), (dict(select='best'), 'select'), (dict(amp='fp8'), 'amp'), (dict(autoaugment='mnist'), 'policy'), (dict(cutout=99), 'cutout'),
]


@pytest.mark.parametrize('args, says', MISTAKES, ids=[' '.join(f'{k}={v}' for k, v in a.items()) for a, _ in MISTAKES])
def test_mistakes_are_one_line(tmp_path, capsys, args, says):
    with pytest.raises(SystemExit) as e: cli.sadt_train(**{**dict(epochs=1, n_train=200, bs=50, root=tmp_path), **args})
    lines = [l for l in capsys.readouterr().err.splitlines() if l.startswith('sadt_train: error:')]
    assert e.value.code == 2 and len(lines) == 1 and says in lines[0]


def test_a_mistake_in_a_real_shell():
    r = shell('sadt_train', '--method', 'sma')
    assert r.returncode == 2 and 'Traceback' not in r.stderr and r.stderr.strip().splitlines()[-1].startswith('sadt_train: error: unknown method')


def test_ctrl_c_marks_the_run_and_the_next_call_finishes_it(tmp_path):
    args = [BIN / 'sadt_train', '--epochs', '3', '--n_train', '300', '--bs', '20', '--root', tmp_path]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # shells make background jobs, and their children, ignore it
    deadline = time.time() + 120
    while not list(tmp_path.glob('*/history.json')) and time.time() < deadline: time.sleep(.05)
    p.send_signal(signal.SIGINT)
    err = p.communicate(timeout=120)[1]
    result = json.loads(next(tmp_path.glob('*/result.json')).read_text())
    assert p.returncode == 130 and result['status'] == 'interrupted' and 'Traceback' not in err and 'stopped' in err
    assert len(json.loads(next(tmp_path.glob('*/history.json')).read_text())) >= 1
    assert subprocess.run(args, capture_output=True, env=ENV, timeout=300).returncode == 0
    assert json.loads(next(tmp_path.glob('*/result.json')).read_text())['status'] == 'finished'


def test_a_grid_evaluates_its_ensembles(tmp_path, monkeypatch, capsys):
    runs = [Run(epochs=1, n_train=200, bs=50, seed=s) for s in (0, 1)]
    monkeypatch.setitem(papers.PAPER_GRIDS, 'tiny', lambda: [papers.PaperRun(f'seed {r.seed}', r) for r in runs])
    monkeypatch.setitem(papers.PAPER_ENSEMBLES, 'tiny', lambda: [papers.PaperEnsemble('both', tuple(runs)), papers.PaperEnsemble('another', (runs[0], runs[0].but(seed=2)))])
    cli.sadt_grid('tiny', root=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('ensemble')]
    assert lines == [f'ensemble of both: accuracy {run_ensemble(runs, tmp_path)["accuracy"]:.3f}'] # one member of the other is not of this table


def test_measure_a_stored_run(tmp_path):
    assert shell('sadt_train', *SMALL, '--root', tmp_path).returncode == 0
    folder, = tmp_path.iterdir()
    r = shell('sadt_measure', folder, '--measures', 'sharpness gradient_norm', '--samples', 100)
    assert r.returncode == 0 and 'sharpness' in r.stdout and 'gradient_norm' in r.stdout, r.stderr
    stored = json.loads((folder / 'measures.json').read_text())
    assert all(m['samples'] == 100 for m in stored['measures'].values()) and set(stored['measures']) == {'sharpness', 'gradient_norm'} and {'versions', 'hardware', 'code'} <= stored.keys()
    assert 'gradient_norm' in shell('sadt_report', '--root', tmp_path).stdout
    for args, text in (((), 'say which run'), ((tmp_path,), 'not the folder of a run'), ((folder, '--measures', 'beauty'), 'unknown measure')):
        r = shell('sadt_measure', *args)
        assert r.returncode == 2 and text in r.stderr and len(r.stderr.strip().splitlines()) == 1
