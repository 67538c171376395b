"Stored runs: written whole or not at all, skipped when finished, and equal in any number of processes."
import json
import math
import time
import warnings
from concurrent.futures import Future
from fractions import Fraction

import pytest
import torch
from conftest import learning_rates
from fastai.callback.core import Callback, CancelBatchException
from fastai.learner import Learner
from sadt_nb.data.datasets import digits
from sadt_nb.experiments import grid as grid_module
from sadt_nb.experiments import learner, results, runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import duration, run_grid
from sadt_nb.experiments.learner import _factor, _schedule, _share_among_ranks, make_learner, run_loaders
from sadt_nb.experiments.measure import measure_run
from sadt_nb.experiments.report import load_results, results_table
from sadt_nb.experiments.results import RunRecorder, _evaluations, _Sums
from sadt_nb.experiments.run_folder import RunError, read_result, write_json
from sadt_nb.experiments.runner import run
from sadt_nb.models.registry import MODELS
from sadt_nb.models.simple_cnn import simple_cnn
from sadt_nb.models.vit import vit

SMALL = Run(epochs=2, n_train=200, bs=50)
DIVERGING = SMALL.but(opt='sgd', lr=1e30, epochs=3, sched='constant')
TIMES = ('seconds', 'train_seconds', 'wall_seconds', 'started')
pytestmark = pytest.mark.usefixtures('narrow')
quiet = dict(progress=False)


def stored_weights(cfg, root): return torch.load(root / cfg.name / 'weights.pt', weights_only=True)
def stored_json(cfg, root, name): return json.loads((root / cfg.name / f'{name}.json').read_text())
def without_times(result): return {k: v for k, v in result.items() if k not in TIMES}
def same_bits(a, b): return all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_run_is_repeatable_and_skipped_when_finished(tmp_path, monkeypatch):
    a = run(SMALL, tmp_path / 'a', **quiet)
    b = run(SMALL, tmp_path / 'b', **quiet)
    assert same_bits(stored_weights(SMALL, tmp_path / 'a'), stored_weights(SMALL, tmp_path / 'b'))
    assert a['accuracy'] == b['accuracy']
    def fail(*args, **kwargs): raise AssertionError('trained again')
    monkeypatch.setattr(runner, 'make_learner', fail)
    assert run(SMALL, tmp_path / 'a', **quiet) == a


def test_processes_give_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, 'simple_cnn', simple_cnn) # the workers are new processes and have this one
    grid = [SMALL.but(seed=s, epochs=1) for s in range(2)] + [DIVERGING]
    one = run_grid(grid, tmp_path / 'one', **quiet)
    two = run_grid(grid, tmp_path / 'two', workers=2, **quiet)
    assert isinstance(one[2], RunError)
    assert isinstance(two[2], RunError)
    assert 'epoch 1' in str(two[2])
    for a, b in zip(one[:2], two[:2]):
        assert abs(a['accuracy'] - b['accuracy']) < .02 # numbers of threads differ, so roundings may


def test_the_history_is_kept_when_the_loss_diverges(tmp_path):
    with pytest.raises(RunError, match='epoch 1, batch'): run(DIVERGING, tmp_path, **quiet)
    assert stored_json(DIVERGING, tmp_path, 'result')['status'] == 'diverged'
    assert read_result(DIVERGING, tmp_path) is None


def test_a_damaged_result_is_made_again(tmp_path):
    run(SMALL, tmp_path, **quiet)
    (tmp_path / SMALL.name / 'result.json').write_text('{"status": "fini')
    assert read_result(SMALL, tmp_path) is None
    assert run(SMALL, tmp_path, **quiet)['status'] == 'finished'


def test_writes_are_atomic(tmp_path):
    file = tmp_path / 'x.json'
    write_json(file, {'a': 1})
    with pytest.raises(TypeError): write_json(file, {'a': object()})
    assert json.loads(file.read_text()) == {'a': 1}


def test_the_cosine_schedule_ends_near_zero(tmp_path):
    cfg = SMALL.but(epochs=3)
    run(cfg, tmp_path, **quiet)
    rates = [row['lr'] for row in stored_json(cfg, tmp_path, 'history')]
    assert rates[0] > rates[1] > rates[2]
    assert rates[2] < .1 * rates[0]


def test_the_restart_schedule_begins_anew_in_each_epoch():
    learn = make_learner(SMALL.but(sched='restart', opt='keras_adam', method='sadt1'))
    steps = []
    rates = []
    class RecordStep(Callback):
        run_valid = False
        def after_batch(self):
            state = next(iter(self.opt.opt.state.values()))
            steps.append(state['step'])
            rates.append(self.opt.hypers[-1]['lr'])
    learn.add_cb(RecordStep())
    learn.fit(2)
    assert steps == [2, 4, 6, 8] * 2, 'two steps per batch, counted from zero in each epoch'
    assert rates[0] == pytest.approx(1e-3 * .9**(1 / 1000))
    assert rates[4] == rates[0]


def test_without_validation_training_does_not_load_the_test_set():
    learn = make_learner(SMALL.but(valid=0.))
    test = learn.dls[2]
    real = test.batch
    loaded = []
    def batch(ids):
        loaded.append(1)
        return real(ids)
    test.batch = batch
    learn.fit(2)
    assert not loaded
    assert len(list(test))
    assert loaded


def test_table_means_and_spread(tmp_path):
    runs = [SMALL.but(epochs=1, seed=s, method=m) for s in range(2) for m in ('baseline', 'sam')]
    run_grid(runs, tmp_path, **quiet)
    df = load_results(tmp_path)
    table = results_table(df)
    acc = 100 * df[df.method == 'sam'].accuracy
    assert list(table.index) == ['baseline', 'sam']
    assert table.loc['sam', 'accuracy %'] == f'{acc.mean():.1f} ± {acc.std():.1f}'
    assert (table['n'] == 2).all()
    assert table.loc['sam', 'forward passes'] == 2 * table.loc['baseline', 'forward passes']


def test_the_rate_falls_to_a_tenth_after_every_thirty_epochs():
    learn = make_learner(SMALL.but(sched='step', epochs=61, lr=.5, n_train=50, bs=25))
    seen = []
    class RecordRate(Callback):
        order = 70 # after the scheduler
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.opt.hypers[-1]['lr']))
            raise CancelBatchException()
    learn.fit(61, cbs=RecordRate())
    assert len(seen) == 122
    for epoch, rate in seen: assert rate == pytest.approx(.5 * .1**(epoch // 30), rel=1e-12)


def test_a_pretrained_network_may_teach_as_it_is(tmp_path):
    pytest.importorskip('timm', reason='timm, the extra sadt_nb[timm], is not installed')
    pretrained = tmp_path / 's.pt'
    torch.save(vit(1000, img_size=64).vit.state_dict(), pretrained)
    model_args = dict(img_size=64, pretrained=str(pretrained))
    teacher = SMALL.but(model='vit_s32', model_args=model_args, epochs=0, split=0)
    student = SMALL.but(split=0, method='distillation', method_args=dict(alpha=0.), teachers=teacher, seed=1)
    trained, = run_grid([student], tmp_path, **quiet)
    r = read_result(teacher, tmp_path)
    net = make_learner(teacher).model
    assert r['epochs'] == r['steps'] == r['forwards'] == 0
    assert r['accuracy'] == r['accuracy_bn'] == trained['teacher']['accuracy']
    assert same_bits(stored_weights(teacher, tmp_path), net.state_dict())
    assert read_result(teacher, tmp_path) == run(teacher, tmp_path, **quiet)


@pytest.mark.parametrize('capability, emulated', [('AVX2', True), ('AVX512', False)])
def test_emulated_half_precision_gives_a_warning(capability, emulated, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    for amp in ('bf16', ''):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            make_learner(SMALL.but(amp=amp))
        warned = any('emulates half precision' in str(w.message) for w in seen)
        assert warned == (emulated and bool(amp))


def test_a_compiled_network_is_trained_stored_and_continued(tmp_path, monkeypatch):
    "The compiler traces the network and changes no operation, so the bits equal those without compilation."
    graphs = []
    compile = torch.compile
    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward
    monkeypatch.setattr(torch, 'compile', lambda model, mode: compile(model, backend=backend))
    plain = SMALL.but(method='sadt1', model_args=dict(dropout=0.), epochs=3)
    cfg = plain.but(compile=True)
    a = run(plain, tmp_path, **quiet)
    b = run(cfg, tmp_path, **quiet)
    assert graphs, 'the network was compiled'
    assert without_times(a) == without_times(b)
    x = stored_weights(plain, tmp_path)
    y = stored_weights(cfg, tmp_path)
    assert x.keys() == y.keys(), 'the stored names are those of the network itself'
    assert same_bits(x, y)
    student = SMALL.but(method='distillation', teachers=cfg, compile=True)
    assert run(student, tmp_path, **quiet)['status'] == 'finished'


@pytest.fixture(params=['highest', 'medium'])
def precision_outside(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def test_tf32_is_for_one_run(tmp_path, monkeypatch, precision_outside):
    seen = []
    real = RunRecorder.before_train
    def before_train(self):
        seen.append(torch.get_float32_matmul_precision())
        real(self)
    monkeypatch.setattr(RunRecorder, 'before_train', before_train)
    for tf32 in (False, True): run(SMALL.but(tf32=tf32, epochs=1), tmp_path, **quiet)
    assert seen == ['highest', 'high']
    assert torch.get_float32_matmul_precision() == precision_outside


def test_a_run_costs_little_beside_training_and_testing(tmp_path, monkeypatch, one_thread):
    "CPU time of a run in a grid of small ones: data, network, files, locks; measured 30 ms, before 71."
    spent = []
    def timed(f):
        def g(*args, **kwargs):
            start = time.process_time()
            try: return f(*args, **kwargs)
            finally: spent.append(time.process_time() - start)
        return g
    run_grid([SMALL.but(seed=99, epochs=1)], tmp_path, **quiet)
    monkeypatch.setattr(Learner, 'fit', timed(Learner.fit))
    monkeypatch.setattr(results, '_evaluations', timed(_evaluations))
    start = time.process_time()
    n = 4
    run_grid([SMALL.but(seed=s, epochs=1) for s in range(n)], tmp_path, **quiet)
    beside = time.process_time() - start - sum(spent)
    assert len(spent) == 2 * n
    assert beside < .1 * n


def test_digits_are_read_once_and_may_be_changed():
    (a, _), (b, _) = digits(), digits()
    a.x.zero_()
    a.y.zero_()
    assert int(b.x.max()) == int(digits()[0].x.max()) == 255
    assert int(digits()[0].y.max()) == 9


@pytest.mark.parametrize('warmup', [0., 1.])
def test_the_cosine_goes_from_the_rate_to_zero(warmup):
    "Its values at all steps, and at the end, which is one step after the last."
    cfg = SMALL.but(n_train=100, bs=25, valid=0., epochs=5, lr=.2, warmup=warmup, sched='cosine')
    rates = learning_rates(cfg)
    expected = [.2 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    risen = 4 * int(warmup)
    assert rates[risen:] == pytest.approx(expected[risen:], rel=1e-9)
    schedule = _schedule(cfg)[0].scheds['lr']
    assert schedule(1.) == pytest.approx(0., abs=1e-15)


@pytest.mark.parametrize('sched, span', [('thirds', None), ('step', 30)])
def test_the_rate_falls_at_the_right_step(sched, span):
    "fastai adds up the share of training in floating point; fractions say where the falls are."
    for epochs in (*range(1, 19), 44, 52, 90, 103): # with 44 epochs, 30 / 44 * 44 is a little below 30
        for batches in (1, 2, 3, 7, 30):
            factor, done = _factor(SMALL.but(sched=sched, epochs=epochs)), 0.
            for step in range(epochs * batches):
                if step % batches == 0: done = (step // batches) / epochs
                share = Fraction(step, epochs * batches)
                falls = int(share * 3) if span is None else int(share * epochs / span)
                assert factor(done) == .1**falls, (epochs, batches, step)
                done += 1. / (batches * epochs)


def test_means_over_an_epoch_weigh_batches_by_their_size():
    sums = _Sums('cpu')
    sums.add(torch.tensor(2.), torch.eye(3), torch.tensor([0, 1, 0])) # two of three are right
    sums.add(torch.tensor(6.), torch.eye(3)[:1], torch.tensor([0]))
    assert sums.means() == (pytest.approx((3 * 2 + 6) / 4), pytest.approx(3 / 4))


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_the_first_loss_that_is_not_finite_is_found(bad):
    sums = _Sums('cpu')
    for batch, loss in enumerate((1., 2., bad, 3., bad)): sums.check(torch.tensor(loss), batch)
    assert int(sums.first_bad) == 2
    fine = _Sums('cpu')
    fine.check(torch.tensor(1e30), 0)
    assert int(fine.first_bad) == -1


# Grids

def test_a_run_whose_process_dies_gets_the_stated_number_of_attempts(tmp_path, monkeypatch):
    class Dies:
        submitted = 0
        def submit(self, *args, **kwargs):
            Dies.submitted += 1
            return raising(grid_module._WorkerDied('out of memory'))
        def interrupt(self): pass
        def stop(self): pass
    monkeypatch.setattr(grid_module, '_make_workers', lambda n, ray: [Dies()])
    for attempts in (1, 3):
        Dies.submitted = 0
        error, = run_grid([SMALL], tmp_path, attempts=attempts, **quiet)
        assert Dies.submitted == attempts
        assert f'its process was killed {attempts} times; out of memory' in str(error)


def test_there_are_never_more_workers_than_runs_to_train(tmp_path, monkeypatch):
    "A worker without work would keep its share of the threads, and the runs would be slower."
    made, make = [], grid_module._make_workers
    def counted(n, ray):
        made.append(n)
        return make(1, ray)
    monkeypatch.setattr(grid_module, '_make_workers', counted)
    runs = [SMALL.but(epochs=1, seed=s) for s in range(3)]
    run_grid(runs[:1], tmp_path, workers=4, **quiet) # one run
    run_grid(runs, tmp_path, workers=4, **quiet)     # two of the three runs are left
    run_grid(runs, tmp_path, workers=4, **quiet)     # all are finished
    run_grid(runs, tmp_path, workers=2, force=True, **quiet)
    assert made == [1, 2, 1, 2]


def raising(error):
    job = Future()
    job.set_exception(error)
    return job


def test_a_grid_plans_teachers_without_weights(tmp_path):
    "A teacher with a result but without weights is trained again, before its student and with weights."
    teacher = SMALL.but(n_train=60, bs=30, epochs=1, split=0)
    student = teacher.but(method='distillation', teachers=teacher, seed=1)
    run(teacher, tmp_path, **quiet)
    assert grid_module._plan([student], tmp_path, False) == {student: dict(force=False, weights=False)}
    (tmp_path / teacher.name / 'weights.pt').unlink()
    plan = grid_module._plan([student], tmp_path, False)
    assert plan == {student: dict(force=False, weights=False), teacher: dict(force=False, weights=True)}
    assert grid_module._unfinished(plan, tmp_path).keys() == {student, teacher}


def test_the_time_left_counts_epochs_images_and_passes():
    base = grid_module._work(SMALL)
    longer = SMALL.but(epochs=3 * SMALL.epochs)
    assert grid_module._work(longer) == 3 * base
    assert grid_module._work(SMALL.but(method='sam')) == 2 * base
    assert grid_module._work(SMALL.but(n_train=2 * SMALL.n_train)) == 2 * base
    assert grid_module._work(Run(data='digits', epochs=2, valid=0.)) == 2 * 1437
    assert grid_module._work(Run(data='/a/folder', epochs=2, n_train=70)) == 140


def test_the_time_left_counts_measures(tmp_path):
    "A run that is trained already can wait for its measures; its work is theirs alone."
    trained, fresh = SMALL.but(seed=1), SMALL.but(seed=2)
    run(trained, tmp_path, **quiet)
    plan = {cfg: dict(force=False, weights=True) for cfg in (trained, fresh)}
    names = {trained: ['gradient_norm'], fresh: ['gradient_norm', 'average_sharpness']}
    measuring = grid_module._left_to_measure(plan, tmp_path, names, 50)
    assert measuring == {trained: 50 * 1, fresh: 50 * (1 + 12)}
    measure_run(trained, tmp_path, names[trained], 50)
    assert grid_module._left_to_measure(plan, tmp_path, names, 50).keys() == {fresh}
    again = {trained: dict(force=True, weights=True)}
    assert grid_module._left_to_measure(again, tmp_path, names, 50) == {trained: 50}
    work = grid_module._Work(plan, tmp_path, measuring)
    training = grid_module._work(fresh)
    assert work.left == {fresh: training + 50 * 13, trained: 50}
    work.begins(trained)
    assert not work.ends(trained, failed=False), 'it was only measured'
    assert work.done == 50
    work.start -= 10
    assert work.time_left() == duration(10 * (training + 650) / 50)
    work.begins(fresh)
    assert work.ends(fresh, failed=False)
    assert work.done == 50 + training + 650


def test_a_run_without_stored_epochs_has_trained_none(tmp_path):
    work = grid_module._Work({SMALL: dict(force=False, weights=False)}, tmp_path, {})
    work.begins(SMALL)
    assert work.under_way(SMALL) == 0
    assert work.time_left() == ''


def test_processes_share_a_batch(monkeypatch):
    "One process keeps its loaders; two get half a batch each, and no other number of images fits."
    dls = run_loaders(SMALL.but(n_train=60, bs=30, valid=.1), 'cpu')
    before = list(dls.loaders)
    _share_among_ranks(dls, SMALL.but(bs=30))
    assert all(a is b for a, b in zip(dls.loaders, before, strict=True))
    monkeypatch.setattr(learner, 'n_ranks', lambda: 2)
    with pytest.raises(ValueError, match='2 processes cannot share batches of 25 images.*a multiple of 2'):
        _share_among_ranks(dls, SMALL.but(bs=25))
    _share_among_ranks(dls, SMALL.but(bs=30))
    assert dls.train.bs == 15
    assert dls[1] is before[1]


@pytest.mark.parametrize('options', [
    dict(data='digits', bs=7, valid=.2, n_train=60, seed=3, split=4, crop=4, pad_mode='reflect', flip=True,
         rotate=9., autoaugment='svhn', cutout=5, cutout_inside=True, cutout_fill='mean', cutmix=.5,
         channels_last=False, drop_last=False),
    dict(data='digits', resized_crop=.4)])
def test_options_of_the_data_reach_its_loaders(options, monkeypatch):
    seen = {}
    monkeypatch.setattr(learner, 'get_dls', lambda data, **given: seen.update(given, data=data))
    run_loaders(Run(**options), 'cpu')
    assert {name: seen[name] for name in options} == options
    assert seen['device'] == 'cpu'
    own = (.1, .2, .3), (.4, .5, .6)
    for given, expected in (('', (0, 1)), ('data', ('data', 'data')), (own, own)):
        run_loaders(Run(**options, normalize=given))
        assert (seen['mean'], seen['std']) == expected


def test_a_plan_trains_the_teachers_of_unfinished_students_only(tmp_path, monkeypatch):
    teacher = SMALL.but(valid=0.)
    student = SMALL.but(valid=0., method='distillation', teachers=teacher, seed=1)
    finished, trained = [], []
    monkeypatch.setattr(grid_module, 'read_result', lambda cfg, root: cfg in finished)
    monkeypatch.setattr(grid_module, 'is_trained', lambda cfg, root: cfg in trained)
    def planned(force): return set(grid_module._plan([student], tmp_path, force))
    assert planned(False) == {student, teacher}
    finished.append(student)
    assert planned(False) == {student}
    assert planned(True) == {student, teacher}
    trained.append(teacher)
    assert planned(True) == {student}


def test_tf32_ends_with_the_block(precision_outside):
    for on in (True, False):
        with runner._tf32(on): assert torch.get_float32_matmul_precision() == ('high' if on else 'highest')
        assert torch.get_float32_matmul_precision() == precision_outside


def test_the_number_of_threads_is_restored(tmp_path, monkeypatch):
    mine = torch.get_num_threads()
    monkeypatch.setattr(runner, '_threads_of_checkpoint', lambda cfg, root: mine + 1)
    with pytest.warns(UserWarning, match=f'began with {mine + 1} CPU threads'):
        with runner._same_threads(SMALL, tmp_path): assert torch.get_num_threads() == mine + 1
    assert torch.get_num_threads() == mine


def test_only_the_epochs_that_a_grid_has_trained_count_as_its_work(tmp_path):
    cfg = SMALL.but(epochs=4)
    work = grid_module._Work({}, tmp_path, {cfg: 5})
    work.training, work.before = {cfg: 12}, {cfg: 1}
    assert work.ends(cfg, False) is True
    assert work.done == 12 * 3 / 4 + 5
