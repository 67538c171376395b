"""Full disks and killed processes: at every single write, nothing is lost, and nothing stays behind.

`Disk` counts all calls that change a folder, and lets the call of a chosen number fail or end the process."""
import builtins
import errno
import hashlib
import json
import os
import pathlib
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import context
from PIL import Image
from sadt_nb.core import checkpoint
from sadt_nb.core.checkpoint import Checkpoint, whole_file, write_whole
from sadt_nb.data import datasets, mapped
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.run_folder import RunError, read_result
from sadt_nb.experiments.runner import run

quiet = dict(progress=False, minutes=0, device='cpu')
FILES = {'config.json', 'history.json', 'result.json', 'weights.pt'}
MANY = 100 # more writes than any of these trainings makes


class Disk:
    "Lets calls number `first` to `last` below `root` fail with `error`, or end the process at the first."
    def __init__(self, root, first, last=None, error=errno.ENOSPC):
        self.root, self.error = str(root), error
        self.first, self.last = first, first if last is None else last
        self.calls = 0

    def call(self, path, break_file=None):
        if not str(path).startswith(self.root): return
        self.calls += 1
        if not self.first <= self.calls <= self.last: return
        if break_file: break_file()
        if self.error is None: os._exit(9)
        raise OSError(self.error, os.strerror(self.error))

    def install(self, patch):
        real_open, replace, fsync, unlink = builtins.open, os.replace, os.fsync, pathlib.Path.unlink
        files = {}
        def counted_open(file, mode='r', *args, **kwargs):
            if set(mode) & set('wax+'): self.call(file)
            f = real_open(file, mode, *args, **kwargs)
            if not isinstance(file, int): files[f.fileno()] = file
            return f
        def counted_fsync(fd):
            file = files[fd]
            def half(): os.ftruncate(fd, os.path.getsize(file) // 2)
            self.call(file, half)
            fsync(fd)
        def counted_replace(a, b):
            self.call(b)
            replace(a, b)
        def counted_unlink(file, missing_ok=False):
            if self.error is None: self.call(file) # a full disk can delete files
            unlink(file, missing_ok)
        patch(builtins, 'open', counted_open)
        patch(os, 'fsync', counted_fsync)
        patch(os, 'replace', counted_replace)
        patch(pathlib.Path, 'unlink', counted_unlink)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path_factory.mktemp('cache')))


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "A folder with two classes of four small images in both parts."
    root = tmp_path_factory.mktemp('data') / 'photos'
    for part in ('train', 'test'):
        for label, shade in (('dark', 40), ('light', 200)):
            (root / part / label).mkdir(parents=True)
            for i in range(4):
                image = Image.new('RGB', (12, 12), (shade + i,) * 3)
                image.save(root / part / label / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def cfg(photos):
    "A run that takes a few milliseconds."
    model_args = dict(widths=(4, 4, 4), depth=2, whiten=False)
    small = dict(epochs=2, bs=4, opt='adam', valid=0.)
    return Run(data=str(photos), model='fast_cnn', model_args=model_args, **small)


def weights(cfg, root): return torch.load(Path(root) / cfg.name / 'weights.pt', weights_only=True)


def files(folder):
    "Return the names of a folder's files but the lock's, which some versions of filelock delete."
    return {f.name for f in Path(folder).iterdir()} - {'.lock'}


def check_whole(cfg, root, expected):
    "The run is finished with the expected weights, and its folder has only the files of a finished run."
    assert read_result(cfg, root)['status'] == 'finished'
    found = weights(cfg, root)
    assert all(torch.equal(v, found[k]) for k, v in expected.items())
    assert files(Path(root) / cfg.name) == FILES


@pytest.fixture
def expected(cfg, tmp_path, one_thread):
    run(cfg, tmp_path / 'whole', **quiet)
    check_whole(cfg, tmp_path / 'whole', weights(cfg, tmp_path / 'whole'))
    return weights(cfg, tmp_path / 'whole')


def incomplete(folder):
    "Return the files that an interrupted write has left."
    return [f for f in Path(folder).rglob('.*') if f.name != '.lock']


# Failed writes

def test_every_single_write_may_fail(cfg, tmp_path, expected, monkeypatch):
    "Nothing incomplete is left, and the same command then ends with the same weights."
    outcomes = []
    for k in range(1, MANY):
        root = tmp_path / str(k)
        disk = Disk(root, k, error=errno.EIO)
        with monkeypatch.context() as m, warnings.catch_warnings():
            warnings.simplefilter('ignore')
            disk.install(m.setattr)
            try: outcomes.append(run(cfg, root, **quiet)['status'])
            except RunError as e:
                assert 'cannot write to' in str(e)
                outcomes.append('error')
        assert not incomplete(root)
        run(cfg, root, **quiet)
        check_whole(cfg, root, expected)
        if disk.calls < k: break
    assert len(outcomes) > 20
    assert outcomes.count('error') > 10 and outcomes.count('finished') > 5 # without a checkpoint it goes on


def used(root): return sum(f.stat().st_size for f in Path(root).rglob('*') if f.is_file())


def with_room(root, size, patch):
    "Let the disk be full when the files below `root` have `size` bytes."
    real = os.fsync
    def fsync(fd):
        if used(root) > size: raise OSError(errno.ENOSPC, 'No space left on device')
        real(fd)
    patch(os, 'fsync', fsync)


@pytest.mark.parametrize('checkpoints, warned', [(3.5, False), (2.5, False), (1.5, True)])
def test_the_older_checkpoint_makes_room(checkpoints, warned, cfg, tmp_path, expected, monkeypatch):
    "With room for one or two checkpoints, the run ends with its weights."
    cfg = cfg.but(epochs=4)
    run(cfg, tmp_path / 'whole', **quiet)
    Checkpoint.remove, remove = lambda self: None, Checkpoint.remove
    try: run(cfg, tmp_path / 'measure', **quiet)
    finally: Checkpoint.remove = remove
    size = (tmp_path / 'measure' / cfg.name / 'checkpoint.pt').stat().st_size
    with monkeypatch.context() as m, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        with_room(tmp_path / 'full', checkpoints * size, m.setattr)
        run(cfg, tmp_path / 'full', **quiet)
    check_whole(cfg, tmp_path / 'full', weights(cfg, tmp_path / 'whole'))
    assert warned == any('could not be written' in str(w.message) for w in seen)


def test_weights_without_room_keep_the_newest_checkpoint(cfg, tmp_path, expected, monkeypatch):
    "With no room for the weights the error says so; with room, the same command trains nothing anew."
    root = tmp_path / 'full'
    real = checkpoint.write_whole
    def write(file, *args):
        if file.name == 'weights.pt': raise OSError(errno.ENOSPC, 'No space left on device')
        real(file, *args)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, 'write_whole', write)
        with pytest.raises(RunError, match='No space left.*repeat the command, which then continues'):
            run(cfg, root, **quiet)
    assert sorted(f.name for f in (root / cfg.name).glob('checkpoint*')) == ['checkpoint.pt']
    assert run(cfg, root, **quiet)['resumed'] == 2
    check_whole(cfg, root, expected)


# Killed processes

def killed(action, roots):
    "Do `action(root)` for each root in a process of its own that ends at write number 1, 2, ... of all."
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    action(Path(roots[0]).parent / 'first') # every copy of this process then has what is imported late
    for k, root in enumerate(roots, start=1):
        pid = os.fork()
        if not pid:
            Disk(root, k, error=None).install(setattr)
            action(root)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        (Path(root).parent / 'codes').open('a').write(f'{code}\n')
        if code != 9: return


def kill_at_every_write(action, roots):
    "Return the roots in which a process was killed, and one in which a process was not killed."
    p = context.Process(target=killed, args=(action, roots))
    p.start()
    p.join(300)
    codes = (Path(roots[0]).parent / 'codes').read_text().split()
    assert codes[-1] == '0' and set(codes[:-1]) == {'9'}, codes
    return roots[:len(codes)]


class Train:
    def __init__(self, cfg, force): self.cfg, self.force = cfg, force
    def __call__(self, root): run(self.cfg, root, force=self.force, **quiet)


def test_a_process_may_be_killed_at_every_write(cfg, tmp_path, expected):
    roots = kill_at_every_write(Train(cfg, False), [tmp_path / str(k) for k in range(MANY)])
    assert len(roots) > 20
    assert any(incomplete(root) for root in roots), 'a killed process leaves incomplete files'
    for root in roots:
        run(cfg, root, **quiet)
        check_whole(cfg, root, expected)


def test_a_forced_run_may_be_killed_at_every_write(cfg, tmp_path, expected):
    "The old result or the new one stands at any moment; both have the same weights here."
    roots = [tmp_path / str(k) for k in range(45)]
    for root in roots: shutil.copytree(tmp_path / 'whole', root)
    for root in kill_at_every_write(Train(cfg, True), roots):
        assert read_result(cfg, root)['status'] == 'finished'
        run(cfg, root, **quiet)
        left = files(root / cfg.name) - FILES
        new = root / cfg.name / 'new'
        assert left == ({'new'} if [*new.glob('checkpoint.pt*')] else set()), 'a checkpoint to continue from'
        run(cfg, root, force=bool(left), **quiet)
        check_whole(cfg, root, expected)


def test_an_interrupt_after_the_result_keeps_it(cfg, tmp_path, expected, monkeypatch):
    "Ctrl-C between the result and the end of the function."
    def interrupt(self): raise KeyboardInterrupt()
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, 'remove', interrupt)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path / 'cut', **quiet)
    started = read_result(cfg, tmp_path / 'cut')['started']
    assert run_grid([cfg], tmp_path / 'cut', progress=False)[0]['started'] == started
    check_whole(cfg, tmp_path / 'cut', expected)


def test_a_checkpoint_beside_another_process_is_left_alone(cfg, tmp_path, expected):
    "Another process holds the lock, because it trains the run anew."
    from sadt_nb.experiments.run_folder import run_lock
    left = tmp_path / 'whole' / cfg.name / 'checkpoint.pt'
    left.write_bytes(b'')
    with run_lock(cfg, tmp_path / 'whole'): run(cfg, tmp_path / 'whole', **quiet)
    assert left.exists()
    run(cfg, tmp_path / 'whole', **quiet)
    check_whole(cfg, tmp_path / 'whole', expected)


# Incomplete files of other processes

def dead_process():
    p = context.Process(target=time.time)
    p.start()
    p.join()
    return p.pid


@pytest.mark.parametrize('host, pid, hours, stays', [
    ('here', 'dead', 0, False), ('here', 'alive', 0, True), ('there', 'dead', 0, True),
    ('there', 'dead', 23, True), ('there', 'dead', 25, False), ('here', 'alive', 25, False)])
def test_which_incomplete_files_are_removed(host, pid, hours, stays, tmp_path):
    host = checkpoint._HOST if host == 'here' else 'node17'
    pid = dead_process() if pid == 'dead' else os.getppid()
    left = tmp_path / f'.a.json.{host}.{pid}'
    left.write_text('{')
    then = time.time() - 3600 * hours
    os.utime(left, (then, then))
    names = (f'.b.json.{host}.{pid}', '.lock', '.a.json', 'a.txt')
    others = [tmp_path / name for name in names]
    for f in others: f.write_text('')
    write_whole(tmp_path / 'a.json', b'{}')
    assert left.exists() == stays
    assert all(f.exists() for f in others)
    assert json.loads((tmp_path / 'a.json').read_text()) == {}


def test_an_error_inside_the_block_changes_nothing(tmp_path):
    file = tmp_path / 'a'
    file.write_text('old')
    with pytest.raises(KeyboardInterrupt), whole_file(file) as part:
        part.write_text('half')
        raise KeyboardInterrupt()
    assert file.read_text() == 'old'
    assert [*tmp_path.iterdir()] == [file]


# The cache of decoded images

def load(photos): return datasets.load_data(photos)


def load_mapped(photos):
    train, test = mapped.mapped_folder(photos, datasets._cache_dir(), 8)
    return train, test, train.checksum()


LOADERS = {'arrays': load, 'mapped': load_mapped}


@pytest.mark.parametrize('load', LOADERS.values(), ids=LOADERS)
def test_a_failed_write_of_the_cache_leaves_nothing(load, photos, tmp_path, monkeypatch, capsys):
    for k in range(1, MANY):
        cache = tmp_path / str(k)
        monkeypatch.setenv('SADT_CACHE', str(cache))
        disk = Disk(cache, k)
        with monkeypatch.context() as m:
            disk.install(m.setattr)
            try: load(photos)
            except OSError as e: assert e.errno == errno.ENOSPC
        assert not incomplete(cache)
        assert np.asarray(load(photos)[0].x).mean() > 100
        if disk.calls < k: break
    assert k >= 3


class Load:
    def __init__(self, photos, name): self.photos, self.name = photos, name
    def __call__(self, cache):
        os.environ['SADT_CACHE'] = str(cache)
        LOADERS[self.name](self.photos)


@pytest.mark.parametrize('name', LOADERS)
def test_the_cache_after_a_kill_at_every_write(name, photos, tmp_path, monkeypatch, capsys):
    "Loading these or other images removes what the killed process has left."
    other = tmp_path / 'other'
    shutil.copytree(photos, other)
    caches = kill_at_every_write(Load(photos, name), [tmp_path / str(k) for k in range(MANY)])
    assert any(incomplete(cache) for cache in caches)
    for cache in caches:
        monkeypatch.setenv('SADT_CACHE', str(cache))
        LOADERS[name](other)
        assert np.asarray(LOADERS[name](photos)[0].x).mean() > 100
        assert not incomplete(cache)


def test_a_full_disk_is_named(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    with monkeypatch.context() as m:
        Disk(tmp_path / 'cache', 1, MANY).install(m.setattr)
        assert len(load(photos)[0]) == 8
    assert 'No space left on device' in capsys.readouterr().err


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    "After a power cut, a file that has been renamed but not flushed may be empty."
    events, data = [], bytes(range(100)) # less than Python's own buffer
    fsync, replace = os.fsync, os.replace
    def watched_fsync(fd):
        events.append(('on disk', os.fstat(fd).st_size))
        fsync(fd)
    def watched_replace(old, new):
        events.append(('moved', Path(new).name))
        replace(old, new)
    monkeypatch.setattr(os, 'fsync', watched_fsync)
    monkeypatch.setattr(os, 'replace', watched_replace)
    write_whole(tmp_path / 'a', data)
    assert events == [('on disk', len(data)), ('moved', 'a')]
    assert (tmp_path / 'a').read_bytes() == data


def test_the_newest_whole_checkpoint_takes_the_place_of_a_damaged_one(tmp_path):
    file, older = tmp_path / 'a.pt', tmp_path / 'a.pt.previous'
    assert checkpoint._newest(file) is None
    torch.save(dict(step=1), older)
    file.write_bytes(b'damaged')
    with pytest.warns(UserWarning, match='a.pt is damaged; the previous'):
        assert checkpoint._newest(file) == file
    assert torch.load(file, weights_only=True) == dict(step=1)
    assert not older.exists()
    assert checkpoint._newest(file) == file


def test_the_name_of_a_cache_is_a_hash_of_what_the_images_are(tmp_path):
    file = tmp_path / 'a' / 'one.png'
    file.parent.mkdir()
    file.write_bytes(b'12345')
    os.utime(file, ns=(7, 7))
    text = f'v3\n{tmp_path.resolve()}\n32\na/one.png|5|7'
    assert mapped._stamp(tmp_path, 32, [file]) == hashlib.sha256(text.encode()).hexdigest()[:16]
