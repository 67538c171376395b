"Distillation beside other methods, and teachers that are runs."
import base64
import json

import pandas as pd
import pytest
import torch
from conftest import as_loader, batches, cells_of, cnn, context, flat, learner, mlp, needed
from fastai.callback.core import Callback
from sadt_nb.core.loss_terms import LossTerm
from sadt_nb.core.passes import ExtraPass
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments import grid, runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_ensemble, run_grid
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.report import labels
from sadt_nb.experiments.run_folder import RunError, is_trained, load_model, read_result
from sadt_nb.experiments.runner import run
from sadt_nb.methods.controls import RepeatBatch, RepeatStep
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM
from sadt_nb.papers.grids import PAPER_GRIDS
from torch import nn
from torch.nn import functional as F

quiet = dict(progress=False)


def image_batches(**kw): return batches(conv=True, **kw)
def make_teacher(): return needed('distillation')['teacher'].double().eval()


def fit(cbs, net=None, data=None, epochs=2, **kw):
    if net is None: net = cnn(bn=False)
    if data is None: data = image_batches()
    learn = learner(net, cbs, as_loader(data), **kw)
    learn.fit(epochs)
    return learn


def fitted_weights(*cbs): return flat(fit(cbs).model)


def loss_of_logits(z, teacher_logits, y, alpha=.3, tau=3.):
    "Return the loss of Hinton et al.: `alpha` times cross-entropy plus `1 - alpha` times tau^2 KL."
    p = (teacher_logits / tau).softmax(1)
    kl = (p * (p.log() - (z / tau).log_softmax(1))).sum(1).mean()
    return alpha * F.cross_entropy(z, y) + (1 - alpha) * tau**2 * kl


def distilled_loss(net, teacher_logits, x, y, **kw): return loss_of_logits(net(x), teacher_logits, y, **kw)


def sam_oracle(rho, keep=None):
    "Return the weights after SAM's steps on the distilled loss, or after ESAM's with the share `keep`."
    net = cnn(bn=False)
    teacher = make_teacher()
    params = list(net.parameters())
    for x, y in image_batches() * 2:
        with torch.no_grad():
            teacher_logits = teacher(x)
            before = F.cross_entropy(net(x), y, reduction='none')
        grads = torch.autograd.grad(distilled_loss(net, teacher_logits, x, y), params)
        copies = [p.detach().clone() for p in params]
        norm = sum((g**2).sum() for g in grads).sqrt()
        with torch.no_grad():
            for p, g in zip(params, grads): p += rho * g / norm
        rows = slice(None)
        if keep:
            with torch.no_grad():
                rise = F.cross_entropy(net(x), y, reduction='none') - before
                rows = rise.topk(keep).indices
        grads = torch.autograd.grad(distilled_loss(net, teacher_logits[rows], x[rows], y[rows]), params)
        with torch.no_grad():
            for p, c, g in zip(params, copies, grads): p.copy_(c - .1 * g)
    return flat(net)


def test_sam_perturbs_and_steps_along_the_whole_distilled_loss():
    def distill(): return Distillation(make_teacher(), alpha=.3, temperature=3.)
    with_sam = fitted_weights(SAM(.3), distill())
    torch.testing.assert_close(with_sam, sam_oracle(.3), rtol=1e-10, atol=1e-12)
    with_esam = fitted_weights(distill(), ESAM(.3, beta=1, gamma=.5))
    torch.testing.assert_close(with_esam, sam_oracle(.3, keep=4), rtol=1e-10, atol=1e-12)


def test_sadt_without_its_divergence_is_two_steps_on_the_distilled_loss():
    def distill(): return Distillation(make_teacher(), alpha=.3)
    two_steps = fitted_weights(RepeatStep(2), distill())
    assert torch.equal(fitted_weights(SADT(1, kl_weight=0), distill()), two_steps)
    assert not torch.allclose(fitted_weights(SADT(1, noise_scale=100.), distill()), two_steps)


def test_a_repeated_batch_has_the_distilled_loss_in_both_steps():
    def distill(): return Distillation(make_teacher(), alpha=.3)
    def trained(times, *cbs):
        return flat(fit(cbs, data=[b for b in image_batches() for _ in range(times)]).model)
    torch.testing.assert_close(trained(1, RepeatBatch(), distill()), trained(2, distill()), rtol=1e-12,
                               atol=1e-14)
    assert not torch.allclose(trained(1, RepeatBatch(), distill()), trained(1, RepeatBatch()), rtol=.01)


@pytest.mark.parametrize('method, option', [(SAM, .1), (ESAM, .1), (SADT, 1)], ids=['sam', 'esam', 'sadt'])
def test_the_teacher_is_evaluated_once_per_batch(method, option):
    calls = []
    teacher = make_teacher()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    fit([Distillation(teacher), method(option)])
    assert len(calls) == 6


def test_alpha_one_switches_distillation_off_and_leaves_saf():
    def saf(): return SAF(2., 1., lag=1, start_epoch=1)
    assert torch.equal(fitted_weights(Distillation(make_teacher(), alpha=1), saf()), fitted_weights(saf()))


def test_alpha_weighs_the_labels_and_no_other_term():
    seen = []
    class Extra(LossTerm):
        def term(self, logits, rows): return 5 * logits.square().mean()
    class RecordLoss(Callback):
        run_valid = False
        def before_backward(self):
            tensors = [t.clone() for t in (self.pred.detach(), self.x, self.y)]
            seen.append((self.loss_grad.item(), self.loss.item(), *tensors))
    teacher = make_teacher()
    fit([Extra(), Distillation(teacher, .3, 3.), RecordLoss()])
    for total, shown, z, x, y in seen:
        with torch.no_grad():
            expected = loss_of_logits(z, teacher(x), y) + 5 * z.square().mean()
        assert abs(total - expected.item()) < 1e-12
        assert abs(shown - F.cross_entropy(z, y).item()) < 1e-12


def test_distillation_does_not_change_an_extra_pass_with_its_own_loss():
    seen = []
    class Other(ExtraPass):
        def after_backward(self):
            if not self.replaying: self.replay(loss_func=lambda z, y: z.square().mean())
        def before_backward(self):
            if self.replaying:
                loss = self.learn.loss_grad.item()
                expected = self.learn.pred.square().mean().item()
                seen.append((loss, expected))
    fit([Distillation(make_teacher(), alpha=.3), Other()])
    assert len(seen) == 6
    assert all(loss == expected for loss, expected in seen)


def test_alpha_and_temperature_can_be_scheduled():
    distillation = Distillation(make_teacher())
    class Schedule(Callback):
        run_valid = False
        def before_batch(self):
            distillation.alpha = .1 * self.iter
            distillation.temperature = 1. + self.iter
    net = cnn(bn=False)
    teacher = make_teacher()
    for i, (x, y) in enumerate(image_batches() * 2):
        net.zero_grad()
        with torch.no_grad(): teacher_logits = teacher(x)
        distilled_loss(net, teacher_logits, x, y, alpha=.1 * (i % 3), tau=1. + i % 3).backward()
        with torch.no_grad():
            for p in net.parameters(): p -= .1 * p.grad
    torch.testing.assert_close(fitted_weights(Schedule(), distillation), flat(net), rtol=1e-10, atol=1e-12)


def test_the_teacher_works_in_half_precision_with_the_student():
    dtypes = set()
    teacher = make_teacher().float()
    teacher.register_forward_hook(lambda module, inputs, out: dtypes.add(out.dtype))
    cbs = [Distillation(teacher), DeviceMixedPrecision('bf16')]
    learn = fit(cbs, cnn(dtype=torch.float32), image_batches(dtype=torch.float32))
    assert dtypes == {torch.bfloat16}
    assert torch.isfinite(flat(learn.model)).all()


def test_a_list_of_one_teacher_is_the_same_and_validation_does_not_call_it():
    in_a_list = fitted_weights(Distillation([make_teacher()]))
    assert torch.equal(in_a_list, fitted_weights(Distillation(make_teacher())))
    teacher = make_teacher()
    learn = fit([Distillation(teacher)])
    def fail(*_): raise AssertionError('the teacher was called in validation')
    teacher.register_forward_hook(fail)
    learn._do_epoch_validate()


# Teachers that are runs

ZERO = Run(epochs=2, n_train=200, bs=50, split=0)
pytestmark = pytest.mark.usefixtures('narrow')


def student(teachers, seed, **kw):
    return ZERO.but(method='distillation', method_args=dict(alpha=.2), teachers=teachers, seed=seed, **kw)


def forbid_training(monkeypatch):
    def fail(*args, **kwargs): raise AssertionError('trained again')
    monkeypatch.setattr(runner, 'make_learner', fail)


def test_keys_of_older_runs_do_not_change():
    known = Run(method='sam', method_args=dict(rho=.1), epochs=5)
    assert known.name == 'sam-simple_cnn-82a834a9491c', 'results that are stored would no longer be found'
    for cfg in {c.run.but(seed=0) for name in PAPER_GRIDS for c in cells_of(name)}:
        stored = json.loads(json.dumps(cfg.to_dict()))
        assert Run.from_dict(stored) == cfg


def test_a_student_is_the_same_whether_or_not_its_teacher_was_trained_before(tmp_path):
    a = run(student(ZERO, 1), tmp_path / 'a', **quiet)
    run(ZERO, tmp_path / 'b', **quiet)
    weights = tmp_path / 'b' / ZERO.name / 'weights.pt'
    before = weights.stat().st_mtime_ns
    b = run(student(ZERO, 1), tmp_path / 'b', **quiet)
    assert a['accuracy'] == b['accuracy']
    assert a['teacher'] == b['teacher']
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize('workers', [1, 2])
def test_teachers_are_trained_before_their_students_and_each_once(tmp_path, monkeypatch, capfd, workers):
    # the two workers are forked; test_runner.py has new processes
    monkeypatch.setattr(grid, 'get_context', lambda method: context)
    one = student(ZERO, 1)
    two = student(ZERO, 2)
    student_of_both = student((one, two), 3)
    results = run_grid([student_of_both, two, one], tmp_path, workers=workers)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith('[')]
    names = [line.split()[1] for line in lines]
    assert len(names) == 4
    assert names[0] == ZERO.name
    assert names[3] == student_of_both.name
    assert set(names[1:3]) == {one.name, two.name}
    assert [r['status'] for r in results] == ['finished'] * 3
    assert results[0]['teacher']['accuracy'] > 0
    forbid_training(monkeypatch)
    assert run_grid([student_of_both, two, one], tmp_path, **quiet) == results


def test_a_result_without_weights_counts_until_a_student_needs_the_weights(tmp_path):
    run_grid([student(ZERO, 1)], tmp_path, **quiet)
    (tmp_path / ZERO.name / 'weights.pt').unlink()
    started = read_result(ZERO, tmp_path)['started']
    results = run_grid([student(ZERO, 1), ZERO], tmp_path, **quiet)
    assert results[1]['started'] == started
    assert not is_trained(ZERO, tmp_path)
    run_grid([student(ZERO, 2)], tmp_path, **quiet)
    assert is_trained(ZERO, tmp_path)


def test_a_teacher_of_another_shape_is_named(tmp_path):
    run(ZERO, tmp_path, **quiet)
    torch.save({'w': torch.zeros(2)}, tmp_path / ZERO.name / 'weights.pt')
    with pytest.raises(RunError, match='does not fit'): run(student(ZERO, 1), tmp_path, **quiet)
    class Evil:
        def __reduce__(self): return (print, ('this ran',))
    torch.save(Evil(), tmp_path / ZERO.name / 'weights.pt')
    with pytest.raises(RunError, match='not a plain weights file'):
        run(student(ZERO, 1), tmp_path, **quiet)


@pytest.mark.parametrize('select', ['valid', 'test'])
def test_the_kept_epoch_is_the_best_and_its_weights_are_stored(tmp_path, select):
    cfg = ZERO.but(select=select, epochs=6, lr=5e-3, bs=25)
    r = run(cfg, tmp_path, **quiet)
    history = json.loads((tmp_path / cfg.name / 'history.json').read_text())
    if select == 'test':
        last = run(cfg.but(select='last'), tmp_path, **quiet)
        assert r['accuracy'] == r['accuracy_kept']
        assert r['accuracy_kept'] >= r['accuracy_last']
        assert r['accuracy_last'] == last['accuracy']
    else:
        accuracies = [h['valid_accuracy'] for h in history]
        assert r['accuracy_kept'] == max(accuracies)
        assert r['epoch_kept'] == 1 + accuracies.index(max(accuracies))


class GradientNorms(Callback):
    "Records the norm of the whole gradient before each step."
    run_valid = False
    order = 500
    def before_fit(self): self.norms = []
    def before_step(self):
        norms = [p.grad.norm() for p in self.learn.model.parameters()]
        self.norms.append(torch.stack(norms).norm().item())


def test_clipping_takes_effect(tmp_path):
    norms = {}
    for clip in (0., .01):
        recorder = GradientNorms()
        make_learner(ZERO.but(clip=clip), cbs=[recorder]).fit(1)
        norms[clip] = recorder.norms
    assert max(norms[.01]) < .0101
    assert .0101 < min(norms[0.])


def test_an_ensemble_of_runs_is_the_mean_of_their_logits(tmp_path):
    runs = [ZERO.but(seed=s, epochs=3, lr=5e-3) for s in range(3)]
    run_grid(runs, tmp_path, **quiet)
    test = get_dls('digits', bs=50, channels_last=True)[2]
    models = [load_model(c, tmp_path, 10) for c in runs]
    right = []
    for x, y in test:
        with torch.no_grad(): logits = sum(m(x) for m in models)
        right += (logits.argmax(1) == y).tolist()
    found = run_ensemble(runs, tmp_path)
    assert abs(found['accuracy'] - sum(right) / len(right)) < 1e-9
    assert found['data_facts'] == dict(test=len(right), classes=10)
    assert 0 < sum(right) < len(right)
    eights = [right[i:i + 8] + [False] * (i + 8 - len(right)) for i in range(0, len(right), 8)]
    by_hand = bytes(sum(128 >> i for i, hit in enumerate(eight) if hit) for eight in eights)
    assert base64.b64decode(found['right']) == by_hand, 'eight images to a byte, as in the result of a run'
    assert run_ensemble(runs[::-1], tmp_path) == found
    file, = (tmp_path / 'ensembles').iterdir()
    earlier = {k: v for k, v in found.items() if k not in ('right', 'data_facts')}
    file.write_text(json.dumps(earlier))
    assert run_ensemble(runs, tmp_path) == earlier, 'a result of an earlier version is read as it is'


def test_reports_name_rounds_and_numbers_of_teachers(tmp_path):
    family = [ZERO.but(seed=s, split=s) for s in (0, 10)]
    first_round = [student(t, t.seed + 1, split=t.split) for t in family]
    second_round = student(first_round[0], 2)
    of_two_teachers = student(tuple(family), 3, valid=0.)
    runs = [*family, *first_round, second_round, of_two_teachers]
    names = labels(pd.DataFrame(dict(run=runs)))
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert 'round 1' in names[2]
    assert 'round 2' in names[4]
    assert '2 teachers' in names[5]
    assert len(set(names)) == 4


def test_a_teacher_with_other_outputs_is_refused():
    teacher = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match=r'outputs of one shape, got \(8, 4\) and \(8, 3\)'):
        learner(mlp(), [Distillation(teacher)]).fit(1)
