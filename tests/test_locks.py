"Locks on disks without `flock`, launchers that die, and Ctrl-C while a command is imported."
import errno
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from conftest import covering
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.run_folder import RunBusy, RunError, run_lock
from sadt_nb.experiments.runner import run

pytestmark = pytest.mark.usefixtures('narrow')
quiet = dict(progress=False)
CFG = Run(epochs=1, n_train=20, bs=10)
fcntl = pytest.importorskip('fcntl', reason='Windows has other locks')
HOUR = 3600
NO_LOCKS = [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK]


@pytest.fixture(params=NO_LOCKS, ids=[errno.errorcode[number] for number in NO_LOCKS])
def without_flock(request, monkeypatch):
    def flock(file, operation): raise OSError(request.param, os.strerror(request.param))
    monkeypatch.setattr(fcntl, 'flock', flock)


def locked_by(tmp_path, host, pid, hours):
    "Lock the run's folder as a process does where there is no `flock`; nothing has changed for `hours`."
    folder = tmp_path / CFG.name
    folder.mkdir(exist_ok=True)
    lock = folder / '.lock.held'
    lock.write_text(f'{pid}\n{host}\n')
    then = time.time() - hours * HOUR
    (folder / 'history.json').write_text('[]')
    (folder / '.lock').write_text('')
    for file in (lock, folder / 'history.json'): os.utime(file, (then, then))
    return lock


def test_a_run_locks_out_another_one(without_flock, tmp_path):
    with run_lock(CFG, tmp_path), pytest.raises(RunBusy, match=f'process {os.getpid()} on'):
        with run_lock(CFG, tmp_path): pass
    with run_lock(CFG, tmp_path): pass
    assert not [*tmp_path.iterdir()], 'a folder without content is removed'


@pytest.mark.parametrize('existing', ['.', 'a', 'a/b', 'a/b/c'])
def test_a_refused_run_removes_the_folders_that_were_made_for_it(existing, tmp_path):
    root = tmp_path / 'a/b/c'
    (tmp_path / existing).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob('*'))
    too_many = CFG.but(n_train=10_000)
    with pytest.raises(ValueError, match='`n_train`'): run(too_many, root, **quiet)
    assert sorted(tmp_path.rglob('*')) == before
    with run_lock(CFG, root):
        with pytest.raises(ValueError, match='`n_train`'): run(too_many, root, **quiet)
        assert (root / CFG.name).exists(), 'another process trains in this root'
    assert sorted(tmp_path.rglob('*')) == before


HOLD = 'import filelock, os, sys; lock = filelock.SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(0)'


def test_a_dead_process_of_this_machine_loses_its_lock(without_flock, tmp_path):
    lock = tmp_path / CFG.name / '.lock.held'
    lock.parent.mkdir()
    subprocess.run([sys.executable, '-c', HOLD, lock], check=True)
    assert lock.exists()
    then = time.time() - HOUR # filelock leaves young files alone: their process may still be writing them
    os.utime(lock, (then, then))
    with run_lock(CFG, tmp_path): assert str(os.getpid()) in lock.read_text()
    assert not lock.exists()


@pytest.mark.parametrize('hours, age', [(.5, '30 min'), (3.2, '3 h')])
def test_a_lock_of_another_machine_is_named(hours, age, without_flock, tmp_path):
    lock = locked_by(tmp_path, 'node17', 4711, hours)
    advice = 'if that process has ended, delete .*lock.held'
    named = f'process 4711 on node17 locked this run {age} ago.*{advice}'
    with pytest.raises(RunBusy, match=named): run(CFG, tmp_path, **quiet)
    assert lock.exists()


def test_a_stale_lock_of_another_machine_is_an_error(monkeypatch, tmp_path):
    "A grid does not wait for it, and goes on after the file is deleted, as the message says."
    def flock(file, operation): raise OSError(errno.ENOSYS, '')
    monkeypatch.setattr(fcntl, 'flock', flock)
    lock = locked_by(tmp_path, 'node17', 4711, 73)
    error, = run_grid([CFG], tmp_path, **quiet)
    assert type(error) is RunError
    holder = 'process 4711 on node17 locked this run 3 days ago'
    assert f'{holder}, but no file in its folder has changed for 3 days' in str(error)
    assert str(error).endswith(f'if that process has ended, delete {lock}')
    lock.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert run_grid([CFG], tmp_path, **quiet)[0]['status'] == 'finished'
    assert not lock.exists()


def test_a_grid_says_for_what_it_waits(monkeypatch, tmp_path, capsys):
    busy = [RunBusy('another process is training it (process 4711 on node17)')] * 3
    real = run
    def first_busy(*args, **kwargs):
        if busy: raise busy.pop()
        return real(*args, **kwargs)
    monkeypatch.setattr('sadt_nb.experiments.grid.run', first_busy)
    monkeypatch.setattr('sadt_nb.experiments.grid.time.sleep', lambda seconds: None)
    run_grid([CFG], tmp_path)
    assert capsys.readouterr().out.count('process 4711 on node17') == 1


# The launcher of several processes

RANK = '''
import os, sys, time
from sadt_nb.core.ranks import end_with_launcher
end_with_launcher(seconds=.1)
print('ready', flush=True)
time.sleep(120)
'''
LAUNCHER = 'import subprocess, sys; subprocess.run([sys.executable, "-c", sys.argv[1]])'


@pytest.mark.skipif(os.name != 'posix', reason='other systems do not give an orphan a new parent')
@pytest.mark.parametrize('by_torchrun', [True, False])
def test_a_rank_ends_when_its_launcher_is_killed(by_torchrun):
    env = {k: v for k, v in os.environ.items() if k != 'TORCHELASTIC_RUN_ID'}
    if by_torchrun: env['TORCHELASTIC_RUN_ID'] = 'none'
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, '-W', 'ignore', '-c', LAUNCHER, RANK]
    p = subprocess.Popen(command, env=env, start_new_session=True, **pipe)
    assert p.stdout.readline() == 'ready\n'
    p.kill()
    try:
        _, err = p.communicate(timeout=10 if by_torchrun else 2) # ends when the rank closes the pipes
        assert by_torchrun
        assert 'the launcher of this process has died' in err
    except subprocess.TimeoutExpired: assert not by_torchrun, 'only torchrun and accelerate are watched'
    finally:
        try: os.killpg(p.pid, signal.SIGKILL)
        except ProcessLookupError: pass


# Ctrl-C while a command is imported

SCRIPT = '''
import signal
real = signal.signal
def say_so(*args):
    real(*args)
    print("ready", flush=True)
    signal.signal = real
signal.signal = say_so
from sadt_nb.commands.cli import sadt_train
sadt_train()
'''


def receive_ctrl_c():
    "Undo that this process ignores Ctrl-C, as a job in the background does."
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(seconds, cwd):
    """Start a command, press Ctrl-C, and return its exit status and all output.

    The `seconds` count from the moment when the command treats Ctrl-C in its own way."""
    (cwd / 'sadt_train').write_text(SCRIPT)
    command = [sys.executable, 'sadt_train', '--epochs', '300', '--n_train', '40', '--bs', '20']
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    p = subprocess.Popen(command, cwd=cwd, preexec_fn=receive_ctrl_c, **pipe)
    assert p.stdout.readline() == 'ready\n'
    time.sleep(seconds)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=60)
    return p.returncode, out


@pytest.mark.parametrize('seconds', covering([0., .02, .05, .1, .5, 1., 2.], [0., .1, 1.]))
def test_ctrl_c_at_any_moment_ends_a_command_with_one_line(seconds, tmp_path):
    "In its first seconds, a command imports its modules."
    rc, out = interrupted(seconds, tmp_path)
    assert rc == 130, out
    assert 'Traceback' not in out
    assert out.splitlines()[-1] == 'sadt_train: stopped; run the command again to continue'
