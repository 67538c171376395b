"Distillation beside other methods, and teachers that are runs."
import json

import pandas as pd
import pytest
import torch
from conftest import as_loader, batches, cnn, flat, learner, needed
from fastai.callback.core import Callback
from sadt_nb.core.loss_terms import LossTerm
from sadt_nb.core.passes import ExtraPass
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.experiments import runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_ensemble, run_grid
from sadt_nb.experiments.report import labels
from sadt_nb.experiments.runner import is_trained, read_result, run
from sadt_nb.methods.controls import RepeatStep
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.saf import SAF
from sadt_nb.methods.sam import SAM
from torch.nn import functional as F

quiet = dict(progress=False)
conv = lambda **kw: batches(conv=True, **kw)


def elder(): return needed('distillation')['teacher'].double().eval()


def fit(cbs, net=None, data=None, epochs=2, **kw):
    learn = learner(cnn(bn=False) if net is None else net, cbs, as_loader(conv() if data is None else data), **kw)
    learn.fit(epochs)
    return learn


def loss(net, z_t, x, y, alpha=.3, tau=3.):
    z = net(x)
    p = (z_t / tau).softmax(1)
    return alpha * F.cross_entropy(z, y) + (1 - alpha) * tau**2 * (p * (p.log() - (z / tau).log_softmax(1))).sum(1).mean()


def sam_oracle(rho, keep=None):
    net, teacher = cnn(bn=False), elder()
    params = list(net.parameters())
    for x, y in conv() * 2:
        with torch.no_grad(): z_t, before = teacher(x), F.cross_entropy(net(x), y, reduction='none')
        grads = torch.autograd.grad(loss(net, z_t, x, y), params)
        copies, norm = [p.detach().clone() for p in params], sum((g**2).sum() for g in grads).sqrt()
        with torch.no_grad():
            for p, g in zip(params, grads): p += rho * g / norm
        rows = slice(None)
        if keep:
            with torch.no_grad(): rows = (F.cross_entropy(net(x), y, reduction='none') - before).topk(keep).indices
        grads = torch.autograd.grad(loss(net, z_t[rows], x[rows], y[rows]), params)
        with torch.no_grad():
            for p, c, g in zip(params, copies, grads): p.copy_(c - .1 * g)
    return flat(net)


def test_sam_perturbs_and_steps_along_the_whole_distilled_loss():
    d = lambda: Distillation(elder(), alpha=.3, temperature=3.)
    torch.testing.assert_close(flat(fit([SAM(.3), d()]).model), sam_oracle(.3), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flat(fit([d(), ESAM(.3, beta=1, gamma=.5)]).model), sam_oracle(.3, keep=4), rtol=1e-10, atol=1e-12)


def test_sadt_without_its_divergence_is_two_steps_on_the_distilled_loss():
    d = lambda: Distillation(elder(), alpha=.3)
    assert torch.equal(flat(fit([SADT(1, kl_weight=0), d()]).model), flat(fit([RepeatStep(2), d()]).model))
    assert not torch.allclose(flat(fit([SADT(1, noise_scale=100.), d()]).model), flat(fit([RepeatStep(2), d()]).model))


@pytest.mark.parametrize('method', [lambda: SAM(.1), lambda: ESAM(.1), lambda: SADT(1)], ids=['sam', 'esam', 'sadt'])
def test_the_teacher_answers_once_per_batch(method):
    calls, teacher = [], elder()
    teacher.register_forward_hook(lambda *_: calls.append(1))
    fit([Distillation(teacher), method()])
    assert len(calls) == 6


def test_alpha_weighs_the_labels_and_no_other_term():
    assert torch.equal(flat(fit([Distillation(elder(), alpha=1), SAF(2., 1., lag=1, start_epoch=1)]).model), flat(fit([SAF(2., 1., lag=1, start_epoch=1)]).model))
    seen = []
    class Extra(LossTerm):
        def term(self, logits, rows): return 5 * logits.square().mean()
    class See(Callback):
        run_valid = False
        def before_backward(self): seen.append((self.loss_grad.item(), self.loss.item(), *(t.clone() for t in (self.pred.detach(), self.x, self.y))))
    teacher = elder()
    fit([Extra(), Distillation(teacher, .3, 3.), See()])
    for total, shown, z, x, y in seen:
        with torch.no_grad(): expected = loss(lambda _: z, teacher(x), x, y) + 5 * z.square().mean()
        assert abs(total - expected.item()) < 1e-12 and abs(shown - F.cross_entropy(z, y).item()) < 1e-12


def test_a_pass_with_a_loss_of_its_own_is_left_alone():
    seen = []
    class Other(ExtraPass):
        def after_backward(self):
            if not self.replaying: self.replay(loss_func=lambda z, y: z.square().mean())
        def before_backward(self):
            if self.replaying: seen.append((self.learn.loss_grad.item(), self.learn.pred.square().mean().item()))
    fit([Distillation(elder(), alpha=.3), Other()])
    assert len(seen) == 6 and all(a == b for a, b in seen)


def test_alpha_and_temperature_can_be_scheduled():
    d, seen = Distillation(elder()), []
    class Move(Callback):
        run_valid = False
        def before_batch(self): d.alpha, d.temperature = .1 * self.iter, 1. + self.iter; seen.append(None)
    net, teacher = cnn(bn=False), elder()
    for i, (x, y) in enumerate(conv() * 2):
        net.zero_grad()
        with torch.no_grad(): z_t = teacher(x)
        loss(net, z_t, x, y, .1 * (i % 3), 1. + i % 3).backward()
        with torch.no_grad():
            for p in net.parameters(): p -= .1 * p.grad
    torch.testing.assert_close(flat(fit([Move(), d]).model), flat(net), rtol=1e-10, atol=1e-12)


def test_the_teacher_works_in_half_precision_with_the_student():
    dtypes, teacher = set(), elder().float()
    teacher.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    learn = fit([Distillation(teacher), DeviceMixedPrecision('bf16')], cnn(dtype=torch.float32), conv(dtype=torch.float32))
    assert dtypes == {torch.bfloat16} and torch.isfinite(flat(learn.model)).all()


def test_one_teacher_in_a_list_is_that_teacher_and_validation_asks_nobody():
    assert torch.equal(flat(fit([Distillation([elder()])]).model), flat(fit([Distillation(elder())]).model))
    teacher = elder()
    learn = fit([Distillation(teacher)])
    def fail(*_): raise AssertionError('asked in validation')
    teacher.register_forward_hook(fail)
    learn._do_epoch_validate()


# runs

ZERO = Run(epochs=2, n_train=200, bs=50, split=0)
def student(teachers, seed, **kw): return ZERO.but(method='distillation', method_args=dict(alpha=.2), teachers=teachers, seed=seed, **kw)


def test_keys_of_older_runs_do_not_change():
    assert Run(method='sam', method_args=dict(rho=.1), epochs=5).name == 'sam-simple_cnn-82a834a9491c', 'results that are stored would no longer be found'
    from sadt_nb.experiments.papers import PAPER_GRIDS, paper_grid
    for grid in PAPER_GRIDS:
        for c in paper_grid(grid): assert Run.from_dict(json.loads(json.dumps(c.run.to_dict()))) == c.run


def test_a_student_is_the_same_whether_its_teacher_was_there_or_not(tmp_path):
    a = run(student(ZERO, 1), tmp_path / 'a', **quiet)
    run(ZERO, tmp_path / 'b', **quiet)
    before = (tmp_path / 'b' / ZERO.name / 'weights.pt').stat().st_mtime_ns
    b = run(student(ZERO, 1), tmp_path / 'b', **quiet)
    assert a['accuracy'] == b['accuracy'] and a['teacher'] == b['teacher'] and (tmp_path / 'b' / ZERO.name / 'weights.pt').stat().st_mtime_ns == before


@pytest.mark.parametrize('workers', [1, 2])
def test_a_family_is_trained_in_order_and_each_member_once(tmp_path, monkeypatch, capfd, workers):
    one, two = student(ZERO, 1), student(ZERO, 2)
    grand = student((one, two), 3)
    results = run_grid([grand, two, one], tmp_path, workers=workers)
    lines = [l for l in capfd.readouterr().out.splitlines() if l.startswith('[')]
    names = [l.split()[1] for l in lines]
    assert len(names) == 4 and names[0] == ZERO.name and names[3] == grand.name and set(names[1:3]) == {one.name, two.name}
    assert [r['status'] for r in results] == ['finished'] * 3 and results[0]['teacher']['accuracy'] > 0
    def fail(*a, **k): raise AssertionError('trained again')
    monkeypatch.setattr(runner, 'make_learner', fail)
    assert run_grid([grand, two, one], tmp_path, **quiet) == results


def test_results_without_weights_are_results_until_a_student_needs_them(tmp_path):
    run_grid([student(ZERO, 1)], tmp_path, **quiet)
    (tmp_path / ZERO.name / 'weights.pt').unlink()
    started = read_result(ZERO, tmp_path)['started']
    assert run_grid([student(ZERO, 1), ZERO], tmp_path, **quiet)[1]['started'] == started and not is_trained(ZERO, tmp_path)
    run_grid([student(ZERO, 2)], tmp_path, **quiet)
    assert is_trained(ZERO, tmp_path)


def test_a_teacher_of_another_shape_is_named(tmp_path):
    run(ZERO, tmp_path, **quiet)
    torch.save({'w': torch.zeros(2)}, tmp_path / ZERO.name / 'weights.pt')
    with pytest.raises(runner.RunError, match='of another network'): run(student(ZERO, 1), tmp_path, **quiet)
    class Evil:
        def __reduce__(self): return (print, ('this ran',))
    torch.save(Evil(), tmp_path / ZERO.name / 'weights.pt')
    with pytest.raises(runner.RunError, match='not a plain weights file'): run(student(ZERO, 1), tmp_path, **quiet)


@pytest.mark.parametrize('select', ['valid', 'test'])
def test_the_kept_epoch_is_the_best_and_its_weights_are_stored(tmp_path, select):
    cfg = ZERO.but(select=select, epochs=6, lr=5e-3, bs=25)
    r = run(cfg, tmp_path, **quiet)
    history = json.loads((tmp_path / cfg.name / 'history.json').read_text())
    if select == 'test': assert r['accuracy'] == r['accuracy_kept'] >= r['accuracy_last'] == run(cfg.but(select='last'), tmp_path, **quiet)['accuracy']
    else:
        accuracies = [h['valid_accuracy'] for h in history]
        assert r['accuracy_kept'] == max(accuracies) and r['epoch_kept'] == 1 + accuracies.index(max(accuracies))


def test_clipping_takes_effect(tmp_path):
    class Norms(Callback):
        run_valid, order = False, 500
        def before_fit(self): self.seen = []
        def before_step(self): self.seen.append(torch.stack([p.grad.norm() for p in self.learn.model.parameters()]).norm().item())
    norms = {}
    for clip in (0., .01):
        learn = runner.make_learner(ZERO.but(clip=clip), cbs=[n := Norms()])
        learn.fit(1); norms[clip] = n.seen
    assert max(norms[.01]) < .0101 < min(norms[0.])


def test_an_ensemble_of_runs_is_the_mean_of_their_logits(tmp_path):
    runs = [ZERO.but(seed=s, epochs=3, lr=5e-3) for s in range(3)]
    run_grid(runs, tmp_path, **quiet)
    test = runner.get_dls('digits', bs=50, channels_last=True)[2]
    right, n = 0, 0
    models = [runner.load_model(c, tmp_path, 10) for c in runs]
    for x, y in test:
        with torch.no_grad(): right, n = right + (sum(m(x) for m in models).argmax(1) == y).sum().item(), n + len(y)
    assert abs(run_ensemble(runs, tmp_path)['accuracy'] - right / n) < 1e-9
    assert run_ensemble(runs[::-1], tmp_path) == run_ensemble(runs, tmp_path) and len(list((tmp_path / 'ensembles').iterdir())) == 1


def test_reports_name_rounds_and_numbers_of_teachers(tmp_path):
    family = [ZERO.but(seed=s, split=s) for s in (0, 10)]
    runs = family + [student(t, t.seed + 1, split=t.split) for t in family]
    runs += [student(runs[2], 2), student(tuple(family), 3, valid=0.)]
    names = labels(pd.DataFrame(dict(run=runs)))
    assert names[0] == names[1] and names[2] == names[3] and 'round 1' in names[2] and 'round 2' in names[4] and '2 teachers' in names[5] and len(set(names)) == 4
