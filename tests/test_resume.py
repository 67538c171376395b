"Interrupted runs end with the same bits as uninterrupted runs, for every method and at any moment."
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import context, covering
from fastai.callback.core import Callback
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Recorder
from fastai.optimizer import SGD
from sadt_nb.core import checkpoint
from sadt_nb.core.checkpoint import Checkpoint, CheckpointError
from sadt_nb.core.ranks import this_rank
from sadt_nb.experiments import runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.results import RunRecorder
from sadt_nb.experiments.run_folder import RunBusy, RunError, read_result, run_lock
from sadt_nb.experiments.runner import run
from sadt_nb.methods.born_again import KeepBest
from sadt_nb.methods.registry import METHODS
from sadt_nb.models.registry import MODELS
from sadt_nb.models.simple_cnn import simple_cnn

pytestmark = pytest.mark.usefixtures('narrow')
quiet = dict(progress=False, minutes=0)
SHORT = Run(epochs=4, n_train=75, bs=15, valid=.2, crop=2, flip=True, cutmix=.25, split=0)
OPTIONS = dict(saf=dict(start_epoch=2, lag=1), mesa=dict(start_epoch=1, beta=.9), looksam=dict(k=3),
               sam=dict(interval=2))
VARIANTS = {
    'restart': SHORT.but(method='sadt1', opt='keras_adam', sched='restart'),
    'momentum, clipping, best epoch': SHORT.but(method='sadt3', opt='sgd', lr=.05, clip=1., select='valid',
                                                opt_args=dict(momentum=.9, weight_decay=1e-3)),
    'half precision': SHORT.but(n_train=40, bs=8, method='esam', amp='bf16', select='test'),
    'float16': SHORT.but(n_train=40, bs=8, method='sadt2', amp='fp16'),
    'augmented': SHORT.but(method='mesa', method_args=OPTIONS['mesa'], data='digits', autoaugment='cifar10',
                           cutout=4, rotate=10., valid=0.),
}
TIMES = ('seconds', 'train_seconds', 'wall_seconds', 'started', 'resumed')


def of(method):
    "Return a short run of a method."
    changes = {}
    if METHODS[method].needs_teacher: changes = dict(teachers=SHORT.but(epochs=1))
    if method == 'saf': changes = dict(cutmix=0.) # it needs a label for each sample
    return SHORT.but(method=method, method_args=OPTIONS.get(method, {}), seed=1, **changes)


def stop_in(monkeypatch, epoch, batch=2):
    "Raise `KeyboardInterrupt` after a batch of an epoch."
    real = RunRecorder.after_batch
    def after_batch(self):
        real(self)
        if self.training and (self.epoch, self.iter) == (epoch, batch): raise KeyboardInterrupt()
    monkeypatch.setattr(RunRecorder, 'after_batch', after_batch)


def without_times(d): return {k: v for k, v in d.items() if k not in TIMES}


def outcome(cfg, root):
    "Return weights, result and history that a run stores, without times."
    folder = Path(root) / cfg.name
    weights = torch.load(folder / 'weights.pt', weights_only=True)
    history = json.loads((folder / 'history.json').read_text())
    return weights, without_times(read_result(cfg, root)), [without_times(row) for row in history]


def same_state(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
def same(a, b): return same_state(a[0], b[0]) and a[1:] == b[1:]


def interrupted(cfg, root, monkeypatch, at=((1, 0), (3, 2))):
    "Return the result of a run that is interrupted after each pair of epoch and batch in `at`."
    for epoch, batch in at:
        with monkeypatch.context() as m:
            stop_in(m, epoch, batch)
            with pytest.raises(KeyboardInterrupt): run(cfg, root, **quiet)
        assert read_result(cfg, root) is None
    return run(cfg, root, **quiet)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Return a function from a run to the outcome of its training without a stop, which many tests compare."
    root, found = tmp_path_factory.mktemp('whole'), {}
    def outcome_of(cfg):
        if cfg not in found:
            run(cfg, root, **quiet)
            found[cfg] = outcome(cfg, root)
        return found[cfg]
    return outcome_of


# Without a state, or with one like another method's; test_every_method.py saves the state of all methods.
# The variants have sadt2 and esam in half precision, and teachers have a test of their own.
LIKE_ANOTHER = ('baseline', 'gc', 'agc', 'asam', 'gsam', 'wsam', 'repeat_step', 'sadt2', 'distillation',
                'half precision')
INTERRUPTED = [*METHODS, *VARIANTS]


@pytest.mark.filterwarnings('ignore:this processor emulates')
@pytest.mark.parametrize('name', covering(INTERRUPTED, {*INTERRUPTED} - {*LIKE_ANOTHER}))
def test_an_interrupted_run_ends_with_the_same_bits(name, whole, tmp_path, monkeypatch):
    cfg = VARIANTS[name] if name in VARIANTS else of(name)
    assert interrupted(cfg, tmp_path / 'cut', monkeypatch)['resumed'] == 3
    assert same(whole(cfg), outcome(cfg, tmp_path / 'cut'))
    files = sorted(f.name for f in (tmp_path / 'cut' / cfg.name).glob('[!.]*'))
    assert files == ['config.json', 'history.json', 'result.json', 'weights.pt']


SENSITIVE = {'scaler': VARIANTS['float16'],
             'set_random_states': of('baseline').but(model_args=dict(dropout=.3))}


def forget_scaler(monkeypatch):
    "Let a checkpoint load a fresh scaler of gradients with another scale."
    fresh = torch.amp.GradScaler('cpu').state_dict()
    real = checkpoint.load_training_state
    def load(learn, state): return real(learn, {**state, 'scaler': {**fresh, 'scale': 2.**40}})
    monkeypatch.setattr(checkpoint, 'load_training_state', load)


@pytest.mark.parametrize('forget', ['_load_callback', '_load_loader', 'set_random_states', 'opt', 'scaler'])
def test_no_part_of_the_state_is_superfluous(forget, whole, tmp_path, monkeypatch):
    cfg = SENSITIVE.get(forget, VARIANTS['momentum, clipping, best epoch'])
    expected = whole(cfg)
    if forget == 'scaler': forget_scaler(monkeypatch)
    elif forget == 'opt': monkeypatch.setattr(torch.optim.SGD, 'load_state_dict', lambda *a: None)
    else: monkeypatch.setattr(checkpoint, forget, lambda *a: None)
    interrupted(cfg, tmp_path / 'cut', monkeypatch)
    assert not same(expected, outcome(cfg, tmp_path / 'cut'))


@pytest.mark.parametrize('method', ['looksam', 'esam', 'saf', 'mesa', 'sadt1', 'sadt3', 'weight_average'])
def test_the_methods_state_matters(method, whole, tmp_path, monkeypatch):
    cfg = of(method)
    expected = whole(cfg)
    real = checkpoint._load_callback
    def load_only_the_recorder(cb, state):
        if isinstance(cb, RunRecorder): return real(cb, state)
    monkeypatch.setattr(checkpoint, '_load_callback', load_only_the_recorder)
    interrupted(cfg, tmp_path / 'cut', monkeypatch)
    assert not same(expected, outcome(cfg, tmp_path / 'cut'))


def test_with_a_progress_bar_or_without(tmp_path, monkeypatch, capsys):
    cfg = of('sam')
    run(cfg, tmp_path / 'whole', **quiet)
    with monkeypatch.context() as m:
        stop_in(m, 2)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path / 'cut', **quiet)
    assert run(cfg, tmp_path / 'cut', progress=True, minutes=0)['resumed'] == 2
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


def checkpoint_bytes(cfg, root, monkeypatch):
    "Return the size of the checkpoint of a run with a progress bar that is stopped after its second epoch."
    with monkeypatch.context() as m:
        m.setattr(runner.sys.stdout, 'isatty', lambda: True)
        stop_in(m, 2, 0)
        with pytest.raises(KeyboardInterrupt): run(cfg, root, minutes=0)
    return (root / cfg.name / 'checkpoint.pt').stat().st_size


def test_checkpoints_do_not_grow_with_the_steps(tmp_path, monkeypatch):
    "20 times the steps; the size may differ by digits of counts and the alignment of tensors."
    few, many = SHORT.but(epochs=3, bs=60, n_train=75), SHORT.but(epochs=3, bs=3, n_train=75)
    sizes = [checkpoint_bytes(cfg, tmp_path, monkeypatch) for cfg in (few, many)]
    assert abs(sizes[0] - sizes[1]) < 200, sizes


def test_a_recorder_of_ones_own_takes_twelve_bytes_a_step(tmp_path):
    "A loss of 4 bytes and a learning rate of 8; as separate objects they took 260."
    sizes = []
    for bs in (60, 3):
        learn = make_learner(SHORT.but(bs=bs), cbs=[Recorder()])
        with learn.no_logging(): learn.fit(2, cbs=Checkpoint(tmp_path / f'{bs}.pt'))
        sizes.append((tmp_path / f'{bs}.pt').stat().st_size)
    steps = 2 * (20 - 1)
    assert sizes[1] - sizes[0] < 13 * steps + 200, sizes


def fastai_learner():
    "Return a Learner with accumulation, early stopping and a Recorder; an epoch's last batch is half full."
    stopping = EarlyStoppingCallback(patience=2, min_delta=.01)
    cbs = [Recorder(), RunRecorder(), GradientAccumulation(60), stopping]
    return make_learner(SHORT.but(epochs=9, n_train=130, bs=20, lr=.01), cbs=cbs)


def test_callbacks_of_fastai_continue(tmp_path, monkeypatch):
    "Accumulated gradients, early stopping and the Recorder continue after an interruption."
    def train(file, stop=99): # by default in no epoch
        learn = fastai_learner()
        with monkeypatch.context() as m, learn.no_logging(), suppress(KeyboardInterrupt):
            stop_in(m, stop)
            learn.fit(9, cbs=Checkpoint(tmp_path / file))
        return learn
    whole = train('whole.pt')
    for epoch in (1, 3): train('cut.pt', stop=epoch)
    learn = train('cut.pt')
    assert (tmp_path / 'cut.pt').exists()
    assert same_state(whole.model.state_dict(), learn.model.state_dict())
    assert whole.recorder.losses == learn.recorder.losses
    assert list(map(list, whole.recorder.values)) == list(map(list, learn.recorder.values))
    assert whole.recorder.iters == learn.recorder.iters
    assert 3 < len(learn.recorder.values)
    assert learn.early_stopping.best == whole.early_stopping.best
    assert learn.early_stopping.wait == whole.early_stopping.wait
    grads = torch.load(tmp_path / 'cut.pt', weights_only=True)['grads']
    assert grads, 'after six batches of twenty and a rest, some gradients are not yet used by a step'


class StopInEpochTwo(Callback):
    def before_batch(self):
        if self.epoch == 2 and self.training: raise KeyboardInterrupt()


def shuffled_loader(kind):
    "Return a new loader of the given kind over the same samples."
    if kind == 'list': return conftest.batches(conv=True)
    items = []
    for x, y in conftest.batches(conv=True): items += list(zip(x, y))
    if kind == 'torch':
        generator = torch.Generator().manual_seed(3)
        return torch.utils.data.DataLoader(items, 8, shuffle=True, generator=generator)
    loader = DataLoader(items, bs=8, shuffle=True)
    loader.rng = random.Random(3)
    return loader


@pytest.mark.parametrize('kind', ['list', 'fastai', 'torch'])
def test_any_loader(kind, tmp_path):
    "A list of batches, fastai's loader and PyTorch's loader, each with `KeepBest`."
    def train(file, *cbs):
        opt_func = lambda p, lr: SGD(p, lr=lr, mom=.9)
        learn = conftest.learner(conftest.cnn(), [KeepBest('valid')], opt_func=opt_func)
        learn.dls = DataLoaders(shuffled_loader(kind), conftest.batches(conv=True))
        with suppress(KeyboardInterrupt): learn.fit(5, cbs=[Checkpoint(tmp_path / file), *cbs])
        return conftest.flat(learn.model)
    whole = train('whole.pt')
    assert not torch.equal(train('cut.pt', StopInEpochTwo()), whole)
    assert torch.equal(train('cut.pt'), whole)


def test_teachers_continue_too(tmp_path, monkeypatch):
    teacher = SHORT.but(epochs=3)
    student = SHORT.but(method='distillation', teachers=teacher, seed=1)
    run(student, tmp_path / 'whole', **quiet)
    with monkeypatch.context() as m:
        stop_in(m, 2)
        with pytest.raises(KeyboardInterrupt): run(student, tmp_path / 'cut', **quiet)
    assert (tmp_path / 'cut' / teacher.name / 'checkpoint.pt').exists()
    run(student, tmp_path / 'cut', **quiet)
    assert read_result(teacher, tmp_path / 'cut')['resumed'] == 2
    assert same(outcome(student, tmp_path / 'whole'), outcome(student, tmp_path / 'cut'))


def test_when_checkpoints_are_written(tmp_path, monkeypatch):
    "Uses a clock on which each epoch takes a minute."
    now = [0.]
    minutes_of_writes = []
    real = checkpoint.write_whole
    def write(file, *args):
        minutes_of_writes.append(int(now[0] / 60))
        real(file, *args)
    monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: now[0])
    monkeypatch.setattr(checkpoint, 'write_whole', write)
    class Clock(RunRecorder):
        def after_epoch(self): now[0] += 60
    cases = [(dict(), [1, 2, 3, 4, 5, 6]),
             (dict(epochs=2), [2, 4, 6]),
             (dict(minutes=2.5), [3, 6]),
             (dict(epochs=4, minutes=1), [4])]
    for args, expected in cases:
        now[0] = 0.
        minutes_of_writes.clear()
        cp = Checkpoint(tmp_path / 'x.pt', **args)
        make_learner(SHORT.but(n_train=60), cbs=[Clock()]).fit(6, cbs=cp)
        assert minutes_of_writes == expected, args
        cp.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    "Return a root with the run of `half_done`, which is trained when a test first asks for it."
    root = tmp_path_factory.mktemp('stopped') / 'root'
    def trained(monkeypatch):
        if not root.exists():
            with monkeypatch.context() as m:
                stop_in(m, 3)
                with pytest.raises(KeyboardInterrupt): run(of('sadt1'), root, **quiet)
        return root
    return trained


@pytest.fixture
def half_done(stopped, whole, tmp_path, monkeypatch):
    "Return a run interrupted after three epochs, its root, and the outcome of the same run without a stop."
    shutil.copytree(stopped(monkeypatch), tmp_path / 'cut')
    return of('sadt1'), tmp_path / 'cut', whole(of('sadt1'))


DAMAGES = {'cut off': lambda b: b[:len(b) // 3],
           'empty': lambda b: b'',
           'one byte short': lambda b: b[:-1],
           'zeros': lambda b: bytes(len(b)),
           'one bit': lambda b: b[:5000] + bytes([b[5000] ^ 16]) + b[5001:]}


@pytest.mark.parametrize('damage', DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint(half_done, damage):
    cfg, root, whole = half_done
    file = root / cfg.name / 'checkpoint.pt'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match='checkpoint.pt is damaged; the previous checkpoint is used'):
        r = run(cfg, root, **quiet)
    assert r['resumed'] == 2
    assert same(whole, outcome(cfg, root))


def test_both_checkpoints_damaged(half_done):
    cfg, root, whole = half_done
    for f in ('checkpoint.pt', 'checkpoint.pt.previous'): (root / cfg.name / f).write_bytes(b'PK')
    with pytest.warns(UserWarning, match='training starts from the beginning'): r = run(cfg, root, **quiet)
    assert r['resumed'] == 0
    assert same(whole, outcome(cfg, root))


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path):
    state = dict(a=torch.randn(300), b=[1, 'two'], c=dict(d=torch.arange(20)))
    file = tmp_path / 'x.pt'
    checkpoint.write_whole(file, checkpoint.saved(state))
    data = file.read_bytes()
    rnd = random.Random(0)
    noticed = 0
    for _ in range(400):
        i = rnd.randrange(len(data))
        flipped = data[i] ^ (1 << rnd.randrange(8))
        file.write_bytes(data[:i] + bytes([flipped]) + data[i + 1:])
        if not checkpoint._is_whole(file):
            noticed += 1
            continue
        loaded = torch.load(file, weights_only=True)
        assert torch.equal(loaded['a'], state['a'])
        assert torch.equal(loaded['c']['d'], state['c']['d'])
        assert loaded['b'] == state['b']
    assert noticed > 200


def test_other_code_or_configuration_is_refused(half_done, monkeypatch):
    cfg, root, whole = half_done
    with monkeypatch.context() as m:
        m.setattr(runner, 'code_version', lambda: dict(sadt_nb='9', source='somethingelse'))
        with pytest.raises(RunError, match='checkpoint of .*not of .*force=True'): run(cfg, root, **quiet)
        assert run(cfg, root, force=True, **quiet)['resumed'] == 0
    assert same(tuple(whole[:1]), tuple(outcome(cfg, root)[:1]))
    config = root / cfg.name / 'config.json'
    config.write_text(config.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(RunError, match='lr is 0.002 there and 0.001 here.*force=True'):
        run(cfg, root, **quiet)
    assert run(cfg, root, force=True, **quiet)['status'] == 'finished'
    assert '"lr": 0.001' in config.read_text()
    older = json.loads(config.read_text())
    for added_later in ('amp', 'teachers'): del older[added_later]
    config.write_text(json.dumps(older))
    assert run(cfg, root, **quiet)['status'] == 'finished'


def test_force_trains_a_finished_run_anew_and_continues_an_interrupted_one(half_done):
    cfg, root, whole = half_done
    assert run(cfg, root, force=True, **quiet)['resumed'] == 3
    assert same(whole, outcome(cfg, root))
    started = read_result(cfg, root)['started']
    time.sleep(1.1)
    assert run(cfg, root, **quiet)['started'] == started
    assert run(cfg, root, force=True, **quiet)['started'] != started


def test_mistakes(tmp_path):
    file = tmp_path / 'x.pt'
    for args in (dict(epochs=0), dict(epochs=1.5), dict(minutes=-1), dict(minutes=float('nan'))):
        with pytest.raises(ValueError): Checkpoint(file, **args)
    with pytest.raises(ValueError, match='a Checkpoint is for one `fit`; pass it as'):
        make_learner(SHORT, cbs=[Checkpoint(file)])
    learn = make_learner(SHORT)
    cp = Checkpoint(file)
    with pytest.raises(CheckpointError, match='no folder'):
        learn.fit(1, cbs=Checkpoint(tmp_path / 'none' / 'x.pt'))
    learn.fit(1, cbs=cp)
    with pytest.raises(ValueError, match='was used in an earlier `fit`; make a new one'): learn.fit(1, cbs=cp)
    torch.save(dict(weights=1), tmp_path / 'y.pt')
    with pytest.raises(CheckpointError, match='is not a checkpoint'):
        learn.fit(1, cbs=Checkpoint(tmp_path / 'y.pt'))
    other = make_learner(SHORT.but(model='resnet20'))
    with pytest.raises(CheckpointError, match='another network'): other.fit(1, cbs=Checkpoint(file))
    class Odd(RunRecorder):
        def state_dict(self): return dict(file=tmp_path)
    with pytest.raises(TypeError, match='the state of Odd holds a .*Path'):
        make_learner(SHORT, cbs=[Odd()]).fit(2, cbs=Checkpoint(tmp_path / 'z.pt'))
    assert not (tmp_path / 'z.pt').exists()


def test_loading_a_checkpoint_runs_no_code_from_it(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, ('touch ' + str(tmp_path / 'ran'),)
    torch.save(dict(processes=Evil()), tmp_path / 'x.pt')
    with pytest.raises(CheckpointError, match='cannot be loaded'):
        make_learner(SHORT).fit(1, cbs=Checkpoint(tmp_path / 'x.pt'))
    assert not (tmp_path / 'ran').exists()


# Processes that are killed

def child(target, *args):
    p = context.Process(target=target, args=args)
    p.start()
    return p


def begin():
    "Set up a child process: one thread, no warnings, no GPU, the narrow network."
    MODELS['simple_cnn'] = conftest.narrow_cnn
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    from fastai.torch_core import defaults
    defaults.use_cuda = False


def counting_grid(runs, root, workers=1):
    "Train a grid, and write the name of each run that begins into the file `trained`."
    begin()
    real = runner.run_results
    def results(cfg, *args):
        with open(Path(root) / 'trained', 'a') as f: f.write(f'{cfg.name}\n')
        return real(cfg, *args)
    runner.run_results = results
    out = run_grid(runs, root, workers, **quiet)
    assert all(r['status'] == 'finished' for r in out), out


def whole_files(root):
    "Read all files; an incomplete file raises an error."
    for f in Path(root).rglob('*.json'): json.loads(f.read_text())
    for f in Path(root).rglob('*.pt'): torch.load(f, weights_only=True)


def checkpoints(root):
    "Return all checkpoints, each with the time when it was written."
    found = set()
    for f in Path(root).rglob('checkpoint.pt'):
        with suppress(FileNotFoundError): found.add((f, f.stat().st_mtime_ns)) # gone when its run ended
    return found


def wait_for_checkpoints(p, root, count):
    "Wait until `count` more checkpoints are written, or the process ends."
    seen = checkpoints(root)
    while count and p.is_alive():
        new = checkpoints(root) - seen
        if new:
            count -= 1
            seen |= new
        time.sleep(.005)


def killed_again_and_again(runs, root, times, most, seed):
    """Kill a grid at random moments, at most `times` times; return the number of kills.

    Each kill comes after up to `most` more checkpoints, however long they take, and up to half a second."""
    rnd = random.Random(seed)
    kills = 0
    started = {}
    while kills < times:
        p = child(counting_grid, runs, root)
        wait_for_checkpoints(p, root, rnd.randint(0, most))
        p.join(rnd.uniform(.01, .5))
        if p.exitcode is not None:
            assert p.exitcode == 0
            return kills
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        kills += 1
        whole_files(root)
        for cfg in runs:
            r = read_result(cfg, root)
            if cfg in started:
                assert r is not None, 'a finished run was lost'
                assert r['started'] == started[cfg], 'a finished run was trained again'
            elif r: started[cfg] = r['started']
    p = child(counting_grid, runs, root)
    p.join()
    assert p.exitcode == 0
    return kills


def check_after_kills(runs, tmp_path, times, most, least):
    "Compare a killed grid with one that was not killed; return how many of its runs were continued."
    cut = tmp_path / 'cut'
    whole = tmp_path / 'whole'
    cut.mkdir()
    whole.mkdir()
    kills = killed_again_and_again(runs, cut, times, most, 0)
    p = child(counting_grid, runs, whole)
    p.join()
    assert p.exitcode == 0
    assert kills >= least
    for cfg in runs: assert same(outcome(cfg, whole), outcome(cfg, cut)), cfg.name
    left = {f.name for c in runs for f in (cut / c.name).iterdir()}
    left.discard('.lock') # some versions of filelock delete it when they release the lock
    assert left == {'config.json', 'history.json', 'result.json', 'weights.pt'}
    return sum(read_result(c, cut)['resumed'] > 0 for c in runs)


def test_kill_9_at_random_moments(tmp_path):
    runs = [of(m).but(epochs=20, n_train=120) for m in ('sadt1', 'looksam')]
    continued = check_after_kills(runs, tmp_path, times=6, most=5, least=2)
    assert continued > 0


@pytest.mark.slow
def test_thirty_kills_over_a_grid_of_all_methods(tmp_path):
    runs = [of(m).but(epochs=20, n_train=240) for m in METHODS]
    continued = check_after_kills(runs, tmp_path, times=40, most=10, least=30)
    assert continued > 8


def test_two_grids_share_a_folder(tmp_path):
    runs = [of('sam').but(seed=s, epochs=6) for s in range(4)] + [of('distillation')]
    grids = [child(counting_grid, runs, tmp_path) for _ in range(2)]
    for g in grids: g.join()
    assert [g.exitcode for g in grids] == [0, 0]
    expected = {r.name for r in runs}
    for r in runs: expected |= {teacher.name for teacher in r.teachers}
    trained = (tmp_path / 'trained').read_text().split()
    assert sorted(trained) == sorted(expected), 'each run is trained once'


def hold(cfg, root, ready):
    with run_lock(cfg, root):
        ready.set()
        time.sleep(600)


def test_a_lock_ends_with_its_process(tmp_path):
    ready = context.Event()
    p = child(hold, SHORT, tmp_path, ready)
    ready.wait(120)
    with pytest.raises(RunBusy, match='another process is training it'): run(SHORT, tmp_path, **quiet)
    p.kill()
    p.join()
    assert run(SHORT, tmp_path, **quiet)['status'] == 'finished'


def with_a_small_disk(cfg, root, limit, out):
    "Run with a limit on the size of files; put the status or the error, and the warnings, into `out`."
    begin()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try: answer = run(cfg, root, **quiet)['status']
        except RunError as e: answer = str(e)
    messages = [str(w.message) for w in seen]
    out.put((answer, [m for m in messages if 'checkpoint' in m]))


def is_left_over(file):
    "Return whether this is a hidden file other than the lock, as an incomplete write leaves behind."
    return file.name.startswith('.') and file.name != '.lock'


@pytest.mark.parametrize('room', ['no checkpoint', 'no weights', 'no history'])
def test_a_full_disk(room, one_thread, tmp_path):
    "The system stops writing in the middle of a file, at a limit for every file, like a full disk."
    cfg = of('baseline')
    cut = tmp_path / 'cut'
    run(cfg, tmp_path / 'whole', **quiet)
    size = (tmp_path / 'whole' / cfg.name / 'weights.pt').stat().st_size
    limit = {'no checkpoint': size + 20_000, 'no weights': size // 2, 'no history': 900}[room]
    out = context.Queue()
    p = child(with_a_small_disk, cfg, cut, limit, out)
    answer, messages = out.get(timeout=300)
    p.join()
    assert not [f for f in (cut / cfg.name).iterdir() if is_left_over(f)]
    assert not (cut / cfg.name / 'checkpoint.pt').exists()
    whole_files(cut)
    if room == 'no checkpoint':
        assert answer == 'finished'
        assert 'could not be written (File too large); training continues' in messages[0]
    else:
        assert 'cannot write to' in answer
        assert 'File too large' in answer
        assert read_result(cfg, cut) is None
    run(cfg, cut, **quiet)
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, cut))


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match='`bs` must be at most .* the number of training images, got 5000'):
        run(SHORT.but(bs=5000), tmp_path, **quiet)
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written():
    with pytest.raises(RunError, match='cannot write to /proc/none'): run(SHORT, '/proc/none', **quiet)


def grid_with_two_workers(runs, root): run_grid(runs, root, 2, **quiet)


def wait_for(condition, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(.02)


def descendants(pid):
    "Return the worker processes below a process."
    import psutil
    def works(p):
        try: return 'spawn_main' in ' '.join(p.cmdline())
        except psutil.Error: return False # it has ended, or is about to
    return [p for p in psutil.Process(pid).children(recursive=True) if works(p)]


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks for processes as Linux lists them')
def test_a_worker_that_is_killed_and_a_parent_that_is_killed(tmp_path, monkeypatch):
    pytest.importorskip('psutil', reason='psutil is not installed')
    monkeypatch.setitem(MODELS, 'simple_cnn', simple_cnn) # the workers are new processes and have this one
    runs = [of(m).but(epochs=40, seed=1) for m in ('sam', 'sadt1')]
    parent = child(grid_with_two_workers, runs, tmp_path)
    def all_have_a_checkpoint(): return all((tmp_path / c.name / 'checkpoint.pt').exists() for c in runs)
    wait_for(all_have_a_checkpoint)
    victim = descendants(parent.pid)[0]
    victim.kill()
    def two_others_work(): return len({p.pid for p in descendants(parent.pid)} - {victim.pid}) == 2
    wait_for(two_others_work)
    workers = descendants(parent.pid)
    parent.kill()
    parent.join()
    def all_have_ended(): return not any(w.is_running() and w.status() != 'zombie' for w in workers)
    wait_for(all_have_ended, 60)
    results = run_grid(runs, tmp_path, **quiet)
    assert all(r['status'] == 'finished' for r in results)
    assert any(r['resumed'] > 0 for r in results)


TOGETHER = '''
import sys, warnings
warnings.simplefilter('ignore')
from fastai.torch_core import defaults
defaults.use_cuda = False
import json
from pathlib import Path
from sadt_nb.core.ranks import this_rank
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.run_folder import RunError
from sadt_nb.experiments.runner import run
try: r = run(Run.from_dict(json.loads(sys.argv[2])), sys.argv[1], progress=False, minutes=0)
except RunError as e: r = dict(error=str(e))
Path(sys.argv[1], f'rank{this_rank()}').write_text(json.dumps(r))
'''


def together(cfg, root):
    "Start two processes that train one run."
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2']
    script = [sys.executable, '-c', TOGETHER, str(root), json.dumps(cfg.to_dict())]
    command = [*torchrun, '--no-python', *script]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def train_together(cfg, root):
    "Train one run in two processes and wait for its end."
    p = together(cfg, root)
    assert p.wait(300) == 0, p.stderr.read()[-3000:]


def need_accelerate():
    extra = 'pip install sadt_nb[distributed]'
    pytest.importorskip('accelerate', reason=f'fastai distributes through accelerate: {extra}')


IN_TWO_PROCESSES = {'sadt1': of('sadt1').but(select='valid', epochs=12, bs=14),
                    'saf without validation': of('saf').but(valid=0., n_train=120, bs=20, epochs=12)}


@pytest.mark.slow
@pytest.mark.parametrize('cfg', IN_TWO_PROCESSES.values(), ids=IN_TWO_PROCESSES)
def test_several_processes_make_one_run_and_continue_it(cfg, tmp_path):
    need_accelerate()
    psutil = pytest.importorskip('psutil', reason='psutil is not installed')
    whole = tmp_path / 'whole'
    cut = tmp_path / 'cut'
    for root in (whole, cut): root.mkdir()
    train_together(cfg, whole)
    first, second = (json.loads((whole / f'rank{i}').read_text()) for i in range(2))
    assert first == second == read_result(cfg, whole)
    assert first['processes'] == 2
    p = together(cfg, cut)
    wait_for(lambda: (cut / cfg.name / 'checkpoint.pt.previous').exists())
    family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
    for q in family: q.kill()
    psutil.wait_procs(family)
    assert read_result(cfg, cut) is None
    train_together(cfg, cut)
    assert read_result(cfg, cut)['resumed'] > 0
    assert same(outcome(cfg, whole), outcome(cfg, cut))


@pytest.mark.slow
def test_the_processes_end_when_their_launcher_is_killed(tmp_path):
    need_accelerate()
    psutil = pytest.importorskip('psutil', reason='psutil is not installed')
    cfg = of('sam').but(epochs=500, bs=14)
    p = together(cfg, tmp_path)
    wait_for(lambda: (tmp_path / cfg.name / 'checkpoint.pt').exists())
    ranks = psutil.Process(p.pid).children(recursive=True)
    assert len(ranks) == 2
    p.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    for q in alive: q.kill()
    assert not alive


def write_error(cfg, root):
    "Train a run that fails in this process, as one of two; write the text of its error."
    begin()
    with pytest.raises(RunError) as error: run(cfg, root, **quiet)
    (root / f'rank{this_rank()}').write_text(str(error.value))


def test_several_processes_stop_together(tmp_path):
    need_accelerate()
    diverging = SHORT.but(opt='sgd', lr=1e30, sched='constant', bs=14)
    conftest.in_two_processes(write_error, diverging, tmp_path)
    for i in range(2):
        assert 'the loss became NaN or infinite in epoch 1' in (tmp_path / f'rank{i}').read_text()
    result = json.loads((tmp_path / diverging.name / 'result.json').read_text())
    assert result['status'] == 'diverged'


def test_the_states_of_all_random_generators_are_put_back():
    "PyTorch's, NumPy's and Python's, each with numbers of its own."
    learn = conftest.learner(conftest.mlp(), data=conftest.as_loader(conftest.batches(), shuffle=True))
    learn.fit(1)
    draws = dict(torch=lambda: torch.rand(()).item(), numpy=np.random.rand, python=random.random,
                 order=lambda: [int(i) for i in learn.dls.train.get_idxs()])
    state = checkpoint.training_state(learn)
    first = {name: draw() for name, draw in draws.items()}
    second = {name: draw() for name, draw in draws.items()}
    checkpoint.load_training_state(learn, state)
    assert {name: draw() for name, draw in draws.items()} == first
    assert all(first[name] != second[name] for name in draws)
