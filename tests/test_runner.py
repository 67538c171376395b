"Stored runs: atomic, skipped when finished, the same however they are run."
import json
import warnings

import pytest
import torch
from fastai.callback.core import CancelBatchException
from sadt_nb.experiments import runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.report import load_results, results_table
from sadt_nb.experiments.runner import RunRecorder, make_learner, read_result, run
from sadt_nb.models.vit import vit

SMALL = Run(epochs=2, n_train=200, bs=50)
quiet = dict(progress=False)


def test_a_run_is_repeatable_and_skipped_when_finished(tmp_path, monkeypatch):
    a, b = run(SMALL, tmp_path / 'a', **quiet), run(SMALL, tmp_path / 'b', **quiet)
    wa, wb = (torch.load(tmp_path / d / SMALL.name / 'weights.pt', weights_only=True) for d in 'ab')
    assert all(torch.equal(wa[k], wb[k]) for k in wa) and a['accuracy'] == b['accuracy']
    def fail(*a, **k): raise AssertionError('trained again')
    monkeypatch.setattr(runner, 'make_learner', fail)
    assert run(SMALL, tmp_path / 'a', **quiet) == a


def test_processes_give_the_same_numbers(tmp_path):
    grid = [SMALL.but(seed=s, epochs=1) for s in range(2)] + [SMALL.but(opt='sgd', lr=1e30, epochs=3, sched='constant')]
    one, two = run_grid(grid, tmp_path / 'one', **quiet), run_grid(grid, tmp_path / 'two', workers=2, **quiet)
    assert isinstance(one[2], runner.RunError) and isinstance(two[2], runner.RunError) and 'epoch 1' in str(two[2])
    for a, b in zip(one[:2], two[:2]): assert abs(a['accuracy'] - b['accuracy']) < .02 # thread counts differ, so roundings may


def test_the_history_is_kept_when_the_loss_diverges(tmp_path):
    wild = SMALL.but(opt='sgd', lr=1e30, epochs=3, sched='constant')
    with pytest.raises(runner.RunError, match='epoch 1, batch'): run(wild, tmp_path, **quiet)
    assert json.loads((tmp_path / wild.name / 'result.json').read_text())['status'] == 'diverged' and read_result(wild, tmp_path) is None


def test_a_damaged_result_is_made_again(tmp_path):
    run(SMALL, tmp_path, **quiet)
    (tmp_path / SMALL.name / 'result.json').write_text('{"status": "fini')
    assert read_result(SMALL, tmp_path) is None and run(SMALL, tmp_path, **quiet)['status'] == 'finished'


def test_writes_are_atomic(tmp_path):
    runner.write_json(tmp_path / 'x.json', {'a': 1})
    with pytest.raises(TypeError): runner.write_json(tmp_path / 'x.json', {'a': object()})
    assert json.loads((tmp_path / 'x.json').read_text()) == {'a': 1}


def test_cosine_ends_at_zero_and_restart_starts_anew(tmp_path):
    run(SMALL.but(epochs=3), tmp_path, **quiet)
    lrs = [r['lr'] for r in json.loads((tmp_path / SMALL.but(epochs=3).name / 'history.json').read_text())]
    assert lrs[0] > lrs[1] > lrs[2] and lrs[2] < .1 * lrs[0]

    learn = make_learner(SMALL.but(sched='restart', opt='keras_adam', method='sadt1'))
    seen = []
    class See(runner.Callback):
        run_valid = False
        def after_batch(self):
            st = next(iter(self.opt.opt.state.values()))
            seen.append((self.epoch, st['step'], self.opt.hypers[-1]['lr']))
    learn.add_cb(See())
    learn.fit(2)
    assert [s for _, s, _ in seen] == [2, 4, 6, 8] * 2, 'two steps per batch, from zero in each epoch'
    assert seen[0][2] == pytest.approx(1e-3 * .9**(1 / 1000)) and seen[4][2] == seen[0][2]


def test_without_validation_the_test_set_is_not_looked_at_while_training():
    learn = make_learner(SMALL.but(valid=0.))
    looked = []
    test = learn.dls[2]
    batch = test.batch
    test.batch = lambda ids: (looked.append(1), batch(ids))[1]
    learn.fit(2)
    assert not looked and len(list(learn.dls[2])) and looked


def test_table_means_and_spread(tmp_path):
    run_grid([SMALL.but(epochs=1, seed=s, method=m) for s in range(2) for m in ('baseline', 'sam')], tmp_path, **quiet)
    df = load_results(tmp_path)
    table = results_table(df)
    acc = 100 * df[df.method == 'sam'].accuracy
    assert list(table.index) == ['baseline', 'sam'] and table.loc['sam', 'accuracy %'] == f'{acc.mean():.1f} ± {acc.std():.1f}'
    assert (table['n'] == 2).all() and table.loc['sam', 'forward passes'] == 2 * table.loc['baseline', 'forward passes']


def test_the_rate_falls_to_a_tenth_after_every_thirty_epochs():
    learn = make_learner(SMALL.but(sched='step', epochs=61, lr=.5, n_train=50, bs=25))
    seen = []
    class See(runner.Callback):
        order = 70 # after the scheduler
        def before_batch(self):
            if self.training: seen.append((self.epoch, self.opt.hypers[-1]['lr']))
            raise CancelBatchException()
    learn.fit(61, cbs=See())
    assert len(seen) == 122 and all(lr == pytest.approx(.5 * .1**(epoch // 30), rel=1e-12) for epoch, lr in seen)


def test_a_pretrained_network_may_teach_as_it_is(tmp_path):
    pytest.importorskip('timm', reason='timm, the extra sadt_nb[timm], is not installed')
    torch.save(vit(1000, img_size=64).vit.state_dict(), tmp_path / 's.pt')
    teacher = SMALL.but(model='vit_s32', model_args=dict(img_size=64, pretrained=str(tmp_path / 's.pt')), epochs=0, split=0)
    student = SMALL.but(split=0, method='distillation', method_args=dict(alpha=0.), teachers=teacher, seed=1)
    taught, = run_grid([student], tmp_path, **quiet)
    r = read_result(teacher, tmp_path)
    net = make_learner(teacher).model
    assert r['epochs'] == r['steps'] == r['forwards'] == 0 and r['accuracy'] == r['accuracy_bn'] == taught['teacher']['accuracy']
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in torch.load(tmp_path / teacher.name / 'weights.pt', weights_only=True).items())
    assert read_result(teacher, tmp_path) == run(teacher, tmp_path, **quiet)


@pytest.mark.parametrize('capability, warned', [('AVX2', True), ('AVX512', False)])
def test_half_precision_that_is_emulated_is_warned_of(capability, warned, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    for amp in ('bf16', ''):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            make_learner(SMALL.but(amp=amp))
        assert any('emulates half precision' in str(w.message) for w in seen) == (warned and bool(amp))


def test_a_compiled_network_is_trained_stored_and_continued(tmp_path, monkeypatch):
    "Traced, with the operations left as they are: so the bits are those of the network that is not compiled."
    graphs, compile = [], torch.compile
    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward
    monkeypatch.setattr(torch, 'compile', lambda model, mode: compile(model, backend=backend))
    plain = SMALL.but(method='sadt1', model_args=dict(dropout=0.), epochs=3)
    cfg = plain.but(compile=True)
    a, b = run(plain, tmp_path, **quiet), run(cfg, tmp_path, **quiet)
    assert graphs, 'the network was compiled'
    skip = ('seconds', 'train_seconds', 'wall_seconds', 'started')
    assert {k: v for k, v in a.items() if k not in skip} == {k: v for k, v in b.items() if k not in skip}
    x, y = (torch.load(tmp_path / c.name / 'weights.pt', weights_only=True) for c in (plain, cfg))
    assert x.keys() == y.keys() and all(torch.equal(v, y[k]) for k, v in x.items()), 'named as those of the network itself'
    taught = SMALL.but(method='distillation', teachers=cfg, compile=True)
    assert run(taught, tmp_path, **quiet)['status'] == 'finished'


def test_tf32_is_for_one_run(tmp_path, monkeypatch):
    seen, before = [], torch.get_float32_matmul_precision()
    monkeypatch.setattr(RunRecorder, 'before_train', lambda self, real=RunRecorder.before_train: (seen.append(torch.get_float32_matmul_precision()), real(self)))
    for tf32 in (False, True): run(SMALL.but(tf32=tf32, epochs=1), tmp_path, **quiet)
    assert seen == [before, 'high'] and torch.get_float32_matmul_precision() == before
