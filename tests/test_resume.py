"Interrupted runs: the same bits as in one go, whatever the method and whenever the lights go out."
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import conftest
import pytest
import torch
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Recorder
from fastai.optimizer import SGD
from sadt_nb.core import checkpoint
from sadt_nb.core.checkpoint import Checkpoint, CheckpointError
from sadt_nb.experiments import runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.runner import RunBusy, RunError, RunRecorder, read_result, run
from sadt_nb.methods.born_again import KeepBest
from sadt_nb.methods.registry import METHODS

quiet = dict(progress=False, minutes=0)
SHORT = Run(epochs=4, n_train=75, bs=15, valid=.2, crop=2, flip=True, cutmix=.25, split=0)
OPTIONS = dict(saf=dict(start_epoch=2, lag=1), mesa=dict(start_epoch=1, beta=.9), looksam=dict(k=3), sam=dict(interval=2))
VARIANTS = {
    'restart': SHORT.but(method='sadt1', opt='keras_adam', sched='restart'),
    'momentum, clipping, best epoch': SHORT.but(method='sadt3', opt='sgd', opt_args=dict(momentum=.9, weight_decay=1e-3), lr=.05, clip=1., select='valid'),
    'half precision': SHORT.but(n_train=40, bs=8, method='esam', amp='bf16', select='test'),
    'float16': SHORT.but(n_train=40, bs=8, method='sadt2', amp='fp16'),
    'augmented': SHORT.but(method='mesa', method_args=OPTIONS['mesa'], data='digits', autoaugment='cifar10', cutout=4, rotate=10., valid=0.),
}


def of(method):
    taught = dict(teachers=SHORT.but(epochs=1)) if METHODS[method].taught else {}
    if method == 'saf': taught = dict(cutmix=0.) # it follows single samples
    return SHORT.but(method=method, method_args=OPTIONS.get(method, {}), seed=1, **taught)


def stop_in(monkeypatch, epoch, batch=2):
    real = RunRecorder.after_batch
    def after_batch(self):
        real(self)
        if self.training and (self.epoch, self.iter) == (epoch, batch): raise KeyboardInterrupt()
    monkeypatch.setattr(RunRecorder, 'after_batch', after_batch)


def outcome(cfg, root):
    "Everything that a run leaves, but for times."
    times = ('seconds', 'train_seconds', 'wall_seconds', 'started', 'resumed')
    strip = lambda d: {k: v for k, v in d.items() if k not in times}
    folder = Path(root) / cfg.name
    return torch.load(folder / 'weights.pt', weights_only=True), strip(read_result(cfg, root)), [strip(r) for r in json.loads((folder / 'history.json').read_text())]


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items()) and a[1:] == b[1:]


def interrupted(cfg, root, monkeypatch, at=((1, 0), (3, 2))):
    for epoch, batch in at:
        with monkeypatch.context() as m:
            stop_in(m, epoch, batch)
            with pytest.raises(KeyboardInterrupt): run(cfg, root, **quiet)
        assert read_result(cfg, root) is None
    return run(cfg, root, **quiet)


@pytest.mark.filterwarnings('ignore:this processor emulates')
@pytest.mark.parametrize('cfg', [*map(of, METHODS), *(pytest.param(v, marks=pytest.mark.slow) if k == 'half precision' else v for k, v in VARIANTS.items())], ids=[*METHODS, *VARIANTS])
def test_an_interrupted_run_ends_with_the_same_bits(cfg, tmp_path, monkeypatch):
    run(cfg, tmp_path / 'whole', **quiet)
    assert interrupted(cfg, tmp_path / 'cut', monkeypatch)['resumed'] == 3
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))
    assert sorted(f.name for f in (tmp_path / 'cut' / cfg.name).glob('[!.]*')) == ['config.json', 'history.json', 'result.json', 'weights.pt']


@pytest.mark.parametrize('forget', ['_load_callback', '_load_loader', '_load_random', 'opt', 'scaler'])
def test_no_part_of_the_state_is_superfluous(forget, tmp_path, monkeypatch):
    cfg = {'scaler': VARIANTS['float16'], '_load_random': of('baseline').but(model_args=dict(dropout=.3))}.get(forget, VARIANTS['momentum, clipping, best epoch'])
    run(cfg, tmp_path / 'whole', **quiet)
    if forget.startswith('_'): monkeypatch.setattr(checkpoint, forget, lambda *a: None)
    elif forget == 'opt': monkeypatch.setattr(torch.optim.SGD, 'load_state_dict', lambda *a: None)
    else:
        fresh = torch.amp.GradScaler('cpu').state_dict()
        real = checkpoint.load_training_state
        monkeypatch.setattr(checkpoint, 'load_training_state', lambda learn, state: real(learn, {**state, 'scaler': {**fresh, 'scale': 2.**40}}))
    interrupted(cfg, tmp_path / 'cut', monkeypatch)
    assert not same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


@pytest.mark.parametrize('method', ['looksam', 'esam', 'saf', 'mesa', 'sadt1', 'sadt3'])
def test_the_methods_state_matters(method, tmp_path, monkeypatch):
    cfg = of(method)
    run(cfg, tmp_path / 'whole', **quiet)
    real = checkpoint._load_callback
    monkeypatch.setattr(checkpoint, '_load_callback', lambda cb, s: real(cb, s) if isinstance(cb, RunRecorder) else None)
    interrupted(cfg, tmp_path / 'cut', monkeypatch)
    assert not same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


def test_with_a_progress_bar_or_without(tmp_path, monkeypatch, capsys):
    cfg = of('sam')
    run(cfg, tmp_path / 'whole', **quiet)
    with monkeypatch.context() as m:
        stop_in(m, 2)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path / 'cut', **quiet)
    assert run(cfg, tmp_path / 'cut', progress=True, minutes=0)['resumed'] == 2
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


def test_callbacks_of_fastai_continue(tmp_path, monkeypatch):
    "Accumulation with a batch that is half full at the end of the epoch, early stopping, and what the Recorder shows."
    def train(cut=None):
        monkeypatch.undo()
        learn = runner.make_learner(SHORT.but(epochs=9, n_train=130, bs=20), cbs=[Recorder(), RunRecorder(), GradientAccumulation(60), EarlyStoppingCallback(patience=2, min_delta=.01)])
        if cut is not None: stop_in(monkeypatch, cut)
        with learn.no_logging():
            try: learn.fit(9, cbs=Checkpoint(tmp_path / f'{bool(cut)}.pt'))
            except KeyboardInterrupt: pass
        return learn
    whole = train()
    for cut in (1, 3): train(cut)
    learn = train(99)
    assert (tmp_path / 'True.pt').exists() and all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), learn.model.state_dict().values()))
    assert whole.recorder.losses == learn.recorder.losses and list(map(list, whole.recorder.values)) == list(map(list, learn.recorder.values)) and whole.recorder.iters == learn.recorder.iters
    assert 3 < len(learn.recorder.values) and learn.early_stopping.best == whole.early_stopping.best and learn.early_stopping.wait == whole.early_stopping.wait
    grads = torch.load(tmp_path / 'True.pt', weights_only=True)['grads']
    assert grads, 'six batches of twenty and a rest: some gradients wait for their step'


@pytest.mark.parametrize('kind', ['list', 'fastai', 'torch'])
def test_any_loader(kind, tmp_path):
    "Batches in a list, fastai's and PyTorch's own loaders, with this library's choice of an epoch beside them."
    from fastai.callback.core import Callback
    from fastai.data.load import DataLoader
    class Stop(Callback):
        def before_batch(self):
            if self.epoch == 2 and self.training: raise KeyboardInterrupt()
    def train(file, *cbs):
        learn = conftest.learner(conftest.cnn(), [KeepBest('valid')], opt_func=lambda p, lr: SGD(p, lr=lr, mom=.9))
        items = [(x[i], y[i]) for x, y in conftest.batches(conv=True) for i in range(len(x))]
        if kind == 'fastai': loader = DataLoader(items, bs=8, shuffle=True)
        elif kind == 'torch': loader = torch.utils.data.DataLoader(items, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        else: loader = conftest.batches(conv=True)
        if kind == 'fastai': loader.rng = random.Random(3)
        learn.dls = DataLoaders(loader, conftest.batches(conv=True))
        try: learn.fit(5, cbs=[Checkpoint(tmp_path / file), *cbs])
        except KeyboardInterrupt: pass
        return conftest.flat(learn.model)
    whole = train('whole.pt')
    assert not torch.equal(train('cut.pt', Stop()), whole) and torch.equal(train('cut.pt'), whole)


def test_teachers_continue_too(tmp_path, monkeypatch):
    teacher = SHORT.but(epochs=3)
    student = SHORT.but(method='distillation', teachers=teacher, seed=1)
    run(student, tmp_path / 'whole', **quiet)
    with monkeypatch.context() as m:
        stop_in(m, 2)
        with pytest.raises(KeyboardInterrupt): run(student, tmp_path / 'cut', **quiet)
    assert (tmp_path / 'cut' / teacher.name / 'checkpoint.pt').exists()
    run(student, tmp_path / 'cut', **quiet)
    assert read_result(teacher, tmp_path / 'cut')['resumed'] == 2 and same(outcome(student, tmp_path / 'whole'), outcome(student, tmp_path / 'cut'))


def test_the_rhythm_of_checkpoints(tmp_path, monkeypatch):
    now, seen = [0.], []
    monkeypatch.setattr(checkpoint.time, 'monotonic', lambda: now[0])
    real = checkpoint.write_whole
    monkeypatch.setattr(checkpoint, 'write_whole', lambda file, *a: (seen.append(int(now[0] / 60)), real(file, *a)))
    class Clock(RunRecorder):
        def after_epoch(self): now[0] += 60
    for args, expected in ((dict(), [1, 2, 3, 4, 5, 6]), (dict(epochs=2), [2, 4, 6]), (dict(minutes=2.5), [3, 6]), (dict(epochs=4, minutes=1), [4])):
        now[0], seen[:] = 0., []
        cp = Checkpoint(tmp_path / 'x.pt', **args)
        runner.make_learner(SHORT.but(n_train=60), cbs=[Clock()]).fit(6, cbs=cp)
        assert seen == expected, args
        cp.remove()
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    "A run that was cut off after three epochs, and the same in one go."
    cfg = of('sadt1')
    run(cfg, tmp_path / 'whole', **quiet)
    with monkeypatch.context() as m:
        stop_in(m, 3)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path / 'cut', **quiet)
    return cfg, tmp_path / 'cut', outcome(cfg, tmp_path / 'whole')


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 3], lambda b: b'', lambda b: b[:-1], lambda b: bytes(len(b)), lambda b: b[:5000] + bytes([b[5000] ^ 16]) + b[5001:]],
                         ids=['cut off', 'empty', 'one byte short', 'zeros', 'one bit'])
def test_a_damaged_checkpoint(half_done, damage):
    cfg, root, whole = half_done
    file = root / cfg.name / 'checkpoint.pt'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match='checkpoint.pt is damaged; the one before it is taken'): r = run(cfg, root, **quiet)
    assert r['resumed'] == 2 and same(whole, outcome(cfg, root))


def test_both_checkpoints_damaged(half_done):
    cfg, root, whole = half_done
    for f in ('checkpoint.pt', 'checkpoint.pt.previous'): (root / cfg.name / f).write_bytes(b'PK')
    with pytest.warns(UserWarning, match='training starts anew'): assert run(cfg, root, **quiet)['resumed'] == 0
    assert same(whole, outcome(cfg, root))


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path):
    state, file = dict(a=torch.randn(300), b=[1, 'two'], c=dict(d=torch.arange(20))), tmp_path / 'x.pt'
    checkpoint.write_whole(file, checkpoint.saved(state))
    data, rnd, noticed = file.read_bytes(), random.Random(0), 0
    for _ in range(400):
        i = rnd.randrange(len(data))
        file.write_bytes(data[:i] + bytes([data[i] ^ (1 << rnd.randrange(8))]) + data[i + 1:])
        if not checkpoint._is_whole(file): noticed += 1
        else:
            back = torch.load(file, weights_only=True)
            assert torch.equal(back['a'], state['a']) and torch.equal(back['c']['d'], state['c']['d']) and back['b'] == state['b']
    assert noticed > 200


def test_other_code_or_configuration_is_refused(half_done, monkeypatch):
    cfg, root, whole = half_done
    with monkeypatch.context() as m:
        m.setattr(runner, '_code', lambda: dict(sadt_nb='9', source='somethingelse'))
        with pytest.raises(RunError, match='checkpoint of .*not of .*force=True'): run(cfg, root, **quiet)
        assert run(cfg, root, force=True, **quiet)['resumed'] == 0
    assert same(tuple(whole[:1]), tuple(outcome(cfg, root)[:1]))
    config = root / cfg.name / 'config.json'
    config.write_text(config.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(RunError, match='lr 0.002, not 0.001.*force=True'): run(cfg, root, **quiet)
    assert run(cfg, root, force=True, **quiet)['status'] == 'finished' and '"lr": 0.001' in config.read_text()
    older = json.loads(config.read_text())
    del older['amp'], older['teachers'] # fields that a later version has added
    config.write_text(json.dumps(older))
    assert run(cfg, root, **quiet)['status'] == 'finished'


def test_force_trains_a_finished_run_anew_and_continues_a_cut_one(half_done):
    cfg, root, whole = half_done
    assert run(cfg, root, force=True, **quiet)['resumed'] == 3 and same(whole, outcome(cfg, root))
    started = read_result(cfg, root)['started']
    time.sleep(1.1)
    assert run(cfg, root, **quiet)['started'] == started != run(cfg, root, force=True, **quiet)['started']


def test_mistakes(tmp_path):
    for args in (dict(epochs=0), dict(epochs=1.5), dict(minutes=-1), dict(minutes=float('nan'))):
        with pytest.raises(ValueError): Checkpoint(tmp_path / 'x.pt', **args)
    with pytest.raises(ValueError, match='given to it'): runner.make_learner(SHORT, cbs=[Checkpoint(tmp_path / 'x.pt')])
    learn, cp = runner.make_learner(SHORT), Checkpoint(tmp_path / 'x.pt')
    with pytest.raises(CheckpointError, match='no folder'): learn.fit(1, cbs=Checkpoint(tmp_path / 'none' / 'x.pt'))
    learn.fit(1, cbs=cp)
    with pytest.raises(ValueError, match='one fit'): learn.fit(1, cbs=cp)
    torch.save(dict(weights=1), tmp_path / 'y.pt')
    with pytest.raises(CheckpointError, match='is not a checkpoint'): learn.fit(1, cbs=Checkpoint(tmp_path / 'y.pt'))
    other = runner.make_learner(SHORT.but(model='resnet20'))
    with pytest.raises(CheckpointError, match='another network'): other.fit(1, cbs=Checkpoint(tmp_path / 'x.pt'))
    class Odd(RunRecorder):
        def state_dict(self): return dict(file=tmp_path)
    with pytest.raises(TypeError, match='the state of Odd holds a .*Path'): runner.make_learner(SHORT, cbs=[Odd()]).fit(2, cbs=Checkpoint(tmp_path / 'z.pt'))
    assert not (tmp_path / 'z.pt').exists()


def test_a_network_of_another_shape_cannot_bring_code(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, ('touch ' + str(tmp_path / 'ran'),)
    torch.save(dict(processes=Evil()), tmp_path / 'x.pt')
    with pytest.raises(CheckpointError, match='cannot be loaded'): runner.make_learner(SHORT).fit(1, cbs=Checkpoint(tmp_path / 'x.pt'))
    assert not (tmp_path / 'ran').exists()


# Processes that are killed. A server imports everything once, and its children begin at once.

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['sadt_nb.all'])


def child(target, *args):
    p = context.Process(target=target, args=args)
    p.start()
    return p


def begin():
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    from fastai.torch_core import defaults
    defaults.use_cuda = False


def counting_grid(runs, root, workers=1):
    begin()
    real = runner._results
    def results(cfg, *args):
        with open(Path(root) / 'trained', 'a') as f: f.write(f'{cfg.name}\n')
        return real(cfg, *args)
    runner._results = results
    out = run_grid(runs, root, workers, **quiet)
    assert all(r['status'] == 'finished' for r in out), out


def whole_files(root):
    for f in Path(root).rglob('*.json'): json.loads(f.read_text())
    for f in Path(root).rglob('*.pt'): torch.load(f, weights_only=True)


def checkpoints(root):
    "The checkpoints there are, and when each was written."
    found = set()
    for f in Path(root).rglob('checkpoint.pt'):
        with suppress(FileNotFoundError): found.add((f, f.stat().st_mtime_ns)) # gone when its run ended
    return found


def killed_again_and_again(runs, root, times, most, seed):
    "Kill a grid at random: after up to `most` more checkpoints, which takes as long as the machine needs, and a random part of a second."
    rnd, kills = random.Random(seed), 0
    started = {}
    while kills < times:
        p, more, seen = child(counting_grid, runs, root), rnd.randint(0, most), checkpoints(root)
        while more and p.is_alive():
            if now := checkpoints(root) - seen: more, seen = more - 1, seen | now
            time.sleep(.005)
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
            if cfg in started: assert r is not None and r['started'] == started[cfg], 'a finished run was lost or made again'
            elif r: started[cfg] = r['started']
    p = child(counting_grid, runs, root)
    p.join()
    assert p.exitcode == 0
    return kills


def check_after_kills(runs, tmp_path, times, most, least):
    (tmp_path / 'cut').mkdir()
    (tmp_path / 'whole').mkdir()
    kills = killed_again_and_again(runs, tmp_path / 'cut', times, most, 0)
    p = child(counting_grid, runs, tmp_path / 'whole')
    p.join()
    assert p.exitcode == 0 and kills >= least
    for cfg in runs: assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut')), cfg.name
    left = {f.name for c in runs for f in (tmp_path / 'cut' / c.name).iterdir()}
    assert left == {'.lock', 'config.json', 'history.json', 'result.json', 'weights.pt'}
    return kills, sum(read_result(c, tmp_path / 'cut')['resumed'] > 0 for c in runs)


def test_kill_9_at_random_moments(tmp_path):
    runs = [of(m).but(epochs=12, n_train=240) for m in ('sadt1', 'looksam')]
    kills, continued = check_after_kills(runs, tmp_path, 6, 5, 2)
    assert continued > 0


@pytest.mark.slow
def test_thirty_kills_over_a_grid_of_all_methods(tmp_path):
    kills, continued = check_after_kills([of(m).but(epochs=20, n_train=240) for m in METHODS], tmp_path, 40, 10, 30)
    assert continued > 8


def test_two_grids_share_a_folder(tmp_path):
    runs = [of('sam').but(seed=s, epochs=6) for s in range(4)] + [of('distillation')]
    grids = [child(counting_grid, runs, tmp_path) for _ in range(2)]
    for g in grids: g.join()
    assert [g.exitcode for g in grids] == [0, 0]
    trained = (tmp_path / 'trained').read_text().split()
    assert sorted(trained) == sorted({r.name for r in runs} | {t.name for r in runs for t in r.teachers}), 'each run is made once'


def hold(cfg, root, ready):
    with runner._lock(cfg, root):
        ready.set()
        time.sleep(600)


def test_a_lock_dies_with_its_owner(tmp_path):
    ready = context.Event()
    p = child(hold, SHORT, tmp_path, ready)
    ready.wait(120)
    with pytest.raises(RunBusy, match='another process is training it'): run(SHORT, tmp_path, **quiet)
    p.kill()
    p.join()
    assert run(SHORT, tmp_path, **quiet)['status'] == 'finished'


def with_a_small_disk(cfg, root, limit, out):
    begin()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try: answer = run(cfg, root, **quiet)['status']
        except RunError as e: answer = str(e)
    out.put((answer, [str(w.message) for w in said if 'checkpoint' in str(w.message)]))


@pytest.mark.parametrize('room', ['no checkpoint', 'no weights', 'no history'])
def test_a_full_disk(room, one_thread, tmp_path):
    "The system refuses every file above a size, at some byte in its middle, as a full disk does."
    cfg = of('baseline')
    run(cfg, tmp_path / 'whole', **quiet)
    size = (tmp_path / 'whole' / cfg.name / 'weights.pt').stat().st_size
    limit = {'no checkpoint': size + 20_000, 'no weights': size // 2, 'no history': 900}[room]
    out = context.Queue()
    p = child(with_a_small_disk, cfg, tmp_path / 'cut', limit, out)
    answer, said = out.get(timeout=300)
    p.join()
    assert not [f for f in (tmp_path / 'cut' / cfg.name).iterdir() if f.name.startswith('.') and f.name != '.lock'] and not (tmp_path / 'cut' / cfg.name / 'checkpoint.pt').exists()
    whole_files(tmp_path / 'cut')
    if room == 'no checkpoint': assert answer == 'finished' and 'could not be written (File too large); training goes on' in said[0]
    else: assert 'cannot write to' in answer and 'File too large' in answer and read_result(cfg, tmp_path / 'cut') is None
    run(cfg, tmp_path / 'cut', **quiet)
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


def test_a_run_that_cannot_be_begun_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match='above the number of training images'): run(SHORT.but(bs=5000), tmp_path, **quiet)
    assert not list(tmp_path.iterdir())


def test_a_root_that_cannot_be_written():
    with pytest.raises(RunError, match='cannot write to /proc/none'): run(SHORT, '/proc/none', **quiet)


def grid_of_two(runs, root, out):
    counting_grid_result = run_grid(runs, root, 2, **quiet)
    out.put([r if isinstance(r, dict) else str(r) for r in counting_grid_result])


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(.02)


def descendants(pid):
    import psutil
    def works(p):
        try: return 'spawn_main' in ' '.join(p.cmdline())
        except psutil.Error: return False # gone, or about to
    return [p for p in psutil.Process(pid).children(recursive=True) if works(p)]


@pytest.mark.skipif(not Path('/proc').is_dir(), reason='looks for processes as Linux lists them')
def test_a_worker_that_is_killed_and_a_parent_that_is_killed(tmp_path):
    pytest.importorskip('psutil', reason='psutil is not installed')
    runs = [of(m).but(epochs=40, seed=1) for m in ('sam', 'sadt1')]
    out = context.Queue()
    parent = child(grid_of_two, runs, tmp_path, out)
    wait_for(lambda: all((tmp_path / c.name / 'checkpoint.pt').exists() for c in runs))
    victim = descendants(parent.pid)[0]
    victim.kill()
    wait_for(lambda: len({p.pid for p in descendants(parent.pid)} - {victim.pid}) == 2)
    workers = descendants(parent.pid)
    parent.kill()
    parent.join()
    wait_for(lambda: not any(w.is_running() and w.status() != 'zombie' for w in workers), 60)
    results = run_grid(runs, tmp_path, **quiet)
    assert all(r['status'] == 'finished' for r in results) and any(r['resumed'] > 0 for r in results)


TOGETHER = '''
import sys, warnings
warnings.simplefilter('ignore')
from fastai.torch_core import defaults
defaults.use_cuda = False
import json
from pathlib import Path
from sadt_nb.core.passes import this_rank
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.runner import RunError, run
try: r = run(Run.from_dict(json.loads(sys.argv[2])), sys.argv[1], progress=False, minutes=0)
except RunError as e: r = dict(error=str(e))
Path(sys.argv[1], f'rank{this_rank()}').write_text(json.dumps(r))
'''


def together(cfg, root):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--no-python', sys.executable, '-c', TOGETHER, str(root), json.dumps(cfg.to_dict())]
    return subprocess.Popen(command, env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('cfg', [pytest.param(of('sadt1').but(select='valid', epochs=12, bs=14), marks=pytest.mark.slow), pytest.param(of('saf').but(valid=0., n_train=120, bs=20, epochs=12), marks=pytest.mark.slow)], ids=['sadt1', 'saf without validation'])
def test_several_processes_make_one_run_and_continue_it(cfg, tmp_path):
    pytest.importorskip('accelerate', reason='fastai distributes through accelerate: pip install sadt_nb[distributed]')
    psutil = pytest.importorskip('psutil', reason='psutil is not installed')
    whole, cut = tmp_path / 'whole', tmp_path / 'cut'
    for root in (whole, cut): root.mkdir()
    p = together(cfg, whole)
    assert p.wait(300) == 0, p.stderr.read()[-3000:]
    first, second = (json.loads((whole / f'rank{i}').read_text()) for i in range(2))
    assert first == second == read_result(cfg, whole) and first['processes'] == 2
    p = together(cfg, cut)
    wait_for(lambda: (cut / cfg.name / 'checkpoint.pt.previous').exists())
    family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
    for q in family: q.kill()
    psutil.wait_procs(family)
    assert read_result(cfg, cut) is None
    p = together(cfg, cut)
    assert p.wait(300) == 0, p.stderr.read()[-3000:]
    assert read_result(cfg, cut)['resumed'] > 0 and same(outcome(cfg, whole), outcome(cfg, cut))


def test_several_processes_stop_together(tmp_path):
    pytest.importorskip('accelerate', reason='fastai distributes through accelerate: pip install sadt_nb[distributed]')
    p = together(SHORT.but(opt='sgd', lr=1e30, sched='constant', bs=14), tmp_path)
    assert p.wait(300) == 0, p.stderr.read()[-3000:]
    for i in range(2): assert 'the loss became NaN or infinite in epoch 1' in json.loads((tmp_path / f'rank{i}').read_text())['error']
    assert json.loads((tmp_path / SHORT.but(opt='sgd', lr=1e30, sched='constant', bs=14).name / 'result.json').read_text())['status'] == 'diverged'
