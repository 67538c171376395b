"SAF and MESA in two readings, the strength of a loss term, and every preset's network at its image size."
import math

import pytest
import torch
from conftest import cells_of
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.cost import run_cost
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.report import load_results
from sadt_nb.experiments.runner import run
from sadt_nb.methods.mesa import MESA
from sadt_nb.methods.registry import make_method
from sadt_nb.methods.saf import SAF
from sadt_nb.models.registry import make_model
from sadt_nb.models.weights import weights_checksum
from sadt_nb.papers.base import same_share
from sadt_nb.papers.grids import PAPER_GRIDS, scaled
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models

SMALL = Run(epochs=3, n_train=60, bs=20, valid=0., split=0, lr=1e-2, opt='sgd', model_args=dict(dropout=0.))
TERMS = {
    'saf': dict(method='saf', method_args=dict(lag=1, start_epoch=1)),
    'mesa': dict(method='mesa', method_args=dict(beta=.5, start_epoch=1)),
    'distillation': dict(method='distillation', teachers=SMALL.but(epochs=1, seed=9)),
}
quiet = dict(progress=False)
pytestmark = pytest.mark.usefixtures('narrow')


def with_tau_squared(name):
    options = dict(TERMS[name]['method_args'], tau_squared=True)
    return dict(TERMS[name], method_args=options)


@pytest.mark.parametrize('cls', [SAF, MESA])
@pytest.mark.parametrize('tau_squared', [False, True])
def test_the_gradient_is_that_of_the_formula(cls, tau_squared):
    "By hand: lam (tau**2) KL(softmax(past / tau) || softmax(now / tau)), mean over the batch."
    g = torch.Generator().manual_seed(0)
    past, now = torch.randn(2, 6, 5, generator=g, dtype=torch.float64)
    now.requires_grad_()
    p, q = (past / 4).softmax(1), (now / 4).softmax(1)
    by_hand = .7 * (p * (p.log() - q.log())).sum(1).mean() * (16 if tau_squared else 1)
    expected, = torch.autograd.grad(by_hand, now)
    cb = cls(.7, 4., start_epoch=0, tau_squared=tau_squared)
    cb.compare = lambda a, b, tau: F.kl_div((b / tau).log_softmax(1), (a / tau).softmax(1),
                                            reduction='batchmean')
    cb._past = cb._target = past
    cb.learn = type('Learn', (), dict(_replaying=True, yb=()))()
    found, = torch.autograd.grad(cb.term(now, None), now)
    assert torch.allclose(found, expected, rtol=1e-12)


READINGS = { # method: options that `spec='code'` stands for
    'saf': dict(lag=2, start_epoch=6, tau_squared=True),
    'mesa': dict(start_epoch=6, tau_squared=True),
    'esam': dict(whole_norm=False),
}


@pytest.mark.parametrize('name', READINGS)
def test_spec_chooses_the_options_of_the_authors_code(name):
    by_spec, = make_method(name, spec='code')
    one_by_one, = make_method(name, **READINGS[name])
    paper, = make_method(name)
    for option, value in READINGS[name].items():
        assert getattr(by_spec, option) == getattr(one_by_one, option) == value
        assert getattr(paper, option) != value
        given, = make_method(name, spec='code', **{option: getattr(paper, option)})
        assert getattr(given, option) == getattr(paper, option) # a given option wins
    assert repr(paper) == f'{type(paper).__name__}()'
    assert repr(by_spec) == f"{type(paper).__name__}(spec='code')"
    assert repr(one_by_one) != repr(paper)
    with pytest.raises(ValueError, match="`spec` must be 'paper' or 'code', got 'article'"):
        make_method(name, spec='article')


def test_a_run_with_spec_trains_as_with_the_options(tmp_path):
    found = []
    for options in (dict(spec='code'), READINGS['saf'], {}):
        cfg = SMALL.but(epochs=8, method='saf', method_args=options)
        found.append(run(cfg, tmp_path, **quiet)['weights_crc32'])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize('name', ['saf', 'mesa'])
def test_tau_squared_makes_the_stored_ratio_25_times_as_large(name, tmp_path):
    "Epoch 1 has no term; at the first measured batch the weights of both runs are still the same."
    first = {}
    for reading, change in (('paper', TERMS[name]), ('code', with_tau_squared(name))):
        cfg = SMALL.but(bs=60, **change) # a single batch per epoch
        run(cfg, tmp_path / reading, **quiet)
        rows = load_results(tmp_path / reading)['history'][0]
        assert 'term_ratio' not in rows[0]
        first[reading] = rows[1]['term_ratio']
    assert first['paper'] > 0
    assert first['code'] == pytest.approx(25 * first['paper'], rel=1e-3)


def test_the_ratio_is_that_of_gradients_at_the_logits(tmp_path):
    "A run in one batch, repeated by hand from the teacher's and the student's starting logits."
    cfg = SMALL.but(bs=60, epochs=1, method='distillation', teachers=SMALL.but(epochs=1, seed=9),
                    method_args=dict(alpha=.25, temperature=2.))
    run(cfg, tmp_path, **quiet)
    learn = make_learner(cfg, 'cpu', root=tmp_path)
    x, y = learn.dls.train.new(shuffle=False).one_batch() # one batch holds every image, whatever its order
    logits = learn.model.train()(x).detach().requires_grad_()
    target = learn.distillation.teacher.eval()(x).detach()
    plain, = torch.autograd.grad(.25 * F.cross_entropy(logits, y), logits)
    kl = F.kl_div((logits / 2).log_softmax(1), (target / 2).softmax(1), reduction='batchmean')
    term, = torch.autograd.grad(.75 * 4 * kl, logits)
    results = load_results(tmp_path)
    row = next(r['history'] for _, r in results.iterrows() if r['run'] == cfg)[0]
    assert row['term_ratio'] == pytest.approx(float(term.norm() / plain.norm()), rel=1e-4)


@pytest.mark.parametrize('name', TERMS)
def test_measuring_the_ratio_changes_no_bit(name, tmp_path, monkeypatch):
    cfg = SMALL.but(model_args={}, **TERMS[name]) # with dropout, which draws random numbers
    found = run(cfg, tmp_path / 'a', **quiet)
    assert any('term_ratio' in row for row in load_results(tmp_path / 'a')['history'].iloc[-1])
    monkeypatch.setattr('sadt_nb.experiments.results._TermRatio.start', lambda self: None)
    without = run(cfg, tmp_path / 'b', **quiet)
    assert found['weights_crc32'] == without['weights_crc32']
    assert all('term_ratio' not in row for row in load_results(tmp_path / 'b')['history'].iloc[-1])


def test_runs_without_a_term_store_no_ratio(tmp_path):
    run(SMALL.but(epochs=1, method='sam'), tmp_path, **quiet)
    assert 'term_ratio' not in load_results(tmp_path)['history'][0][0]


def test_the_readings_of_saf_and_mesa():
    "The code: tau**2, records two epochs old, six epochs without the term, warm-up and smoothed labels."
    for table, lam_mesa, beta in (('saf/table3_code', .8, .9995), ('saf/table1_code', .8, .9998)):
        for c in cells_of(table):
            r = c.run
            assert (r.warmup, r.warmup_lr, r.label_smoothing) == (3, 1e-4, .1)
            if table == 'saf/table1_code':
                assert (r.bs, r.lr, r.epochs, dict(r.opt_args)['weight_decay']) == (1024, .4, 90, 1e-4)
            cb = {type(m).__name__: m for m in make_method(r.method, **dict(r.method_args))}
            if r.method == 'saf':
                s = cb['SAF']
                assert (s.tau_squared, s.lag, s.start_epoch, s.lam, s.tau) == (True, 2, 6, .3, 5)
            if r.method == 'mesa':
                m = cb['MESA']
                assert (m.tau_squared, m.start_epoch, m.lam, m.tau, m.beta) == (True, 6, lam_mesa, 5, beta)
    for c in [*cells_of('saf/table3'), *cells_of('saf/table1')]:
        assert not dict(c.run.method_args).get('tau_squared')
        assert (c.run.warmup, c.run.label_smoothing) == (0, 0)


def test_shorter_training_keeps_the_share_of_start_and_average():
    assert same_share('mesa', dict(lam=.8), .5) == dict(lam=.8, start_epoch=2, beta=round(.9995**2, 6))
    full = Run(data='cifar10', model='resnet20', method='mesa', epochs=200)
    for factor in (.5, .1):
        short = scaled(full, factor)
        options = dict(short.method_args)
        assert options['beta']**short.epochs == pytest.approx(.9995**full.epochs, rel=1e-4)
        assert options['start_epoch'] == round(5 * factor)
        saf = scaled(full.but(method='saf', method_args=dict(start_epoch=10)), factor)
        assert dict(saf.method_args) == dict(start_epoch=round(10 * factor))
        esam = full.but(method='esam', method_args=dict(beta=.6))
        assert scaled(esam, factor).method_args == esam.method_args, "ESAM's beta is a probability"
    assert scaled(full, 1) is full
    small = {c.label: dict(c.run.method_args) for c in cells_of('saf/cifar_small')}
    remembered = [options['beta']**(16 * 79) for label, options in small.items() if 'mesa' in label]
    assert remembered == pytest.approx([.9995**(200 * 391)] * 6, rel=.02)


TORCHVISION = dict(resnet50=models.ResNet50_Weights, resnet101=models.ResNet101_Weights,
                   resnet152=models.ResNet152_Weights)
PUBLISHED = { # (network, pixels, classes): millions of parameters, billions of multiply-adds
    **{(name, 224, 1000): (w.IMAGENET1K_V1.meta['num_params'] / 1e6, w.IMAGENET1K_V1.meta['_ops'])
       for name, w in TORCHVISION.items()},
    ('resnet18 imagenet', 32, 10): (11.69, .0372), # 1,000 outputs
    ('resnet18', 32, 10): (11.17, .556),
    ('resnet18', 32, 100): (11.22, .556),
    ('resnet20', 32, 10): (.27, .041),
    ('wide_resnet_28_10', 32, 10): (36.5, 5.25),
    ('wide_resnet_28_10', 32, 100): (36.5, 5.25),
    ('vit_s32', 224, 1000): (22.9, 1.15),
}
PARAMETERS = { # millions; only the number of parameters is published
    ('pyramidnet_110', 32, 10): 28.3, # Han et al. 2017, Table 4, alpha of 270
    ('fast_cnn', 32, 10): 1.97,       # the code of Jordan 2024; its default widths
    ('vgg16', 32, 10): 14.7,          # the thirteen convolutions of Simonyan and Zisserman, one dense layer
}
NO_PUBLISHED_SIZE = { # network and pixels: the papers use it at this size and do not print its size
    ('simple_cnn', 32), ('vgg16_slim', 32), ('inception_resnet_slim', 32), # the SADT paper's networks
    ('resnet101', 32), ('resnet18', 64), ('vit_s32', 32), ('vit_b32', 32), ('clip_resnet50', 224),
    ('clip_resnet101', 224),
    ('pyramidnet_110', 32), ('vgg16', 32), ('fast_cnn', 32), # with other widths or numbers of classes
}
PIXELS, CLASSES = dict(tiny_imagenet=64, imagenet=224), dict(cifar100=100, tiny_imagenet=200, imagenet=1000)


NOT_SHAPES = ('pretrained', 'zero_shot', 'dropout', 'init') # options that do not decide the size


def networks(names):
    "Return each network of the presets once: its name, its options, pixels and classes."
    found = {}
    for name in names:
        for c in cells_of(name):
            for r in (c.run, *c.run.teachers):
                args = {k: v for k, v in r.model_args if k not in NOT_SHAPES}
                place = r.model, tuple(sorted(args.items())), PIXELS.get(r.data, 32), CLASSES.get(r.data, 10)
                found.setdefault(place, r)
    return found


OF_TABLES = ['saf/table1', 'saf/table3', 'sam_study/a', 'sam_study/a_code', 'sam_study/a_small']


@pytest.mark.parametrize('names', [OF_TABLES, pytest.param(list(PAPER_GRIDS), marks=pytest.mark.slow)],
                         ids=['some', 'all'])
def test_every_presets_network_has_its_published_size(names):
    "At its image size, on the meta device; a network for CIFAR at 224 pixels costs sixteen times as much."
    seen = set()
    for (model, args, pixels, classes), r in networks(names).items():
        try:
            with torch.device('meta'): net = make_model(model, classes, **dict(args)).eval()
        except ImportError: continue # an optional package is missing
        with torch.device('meta'): x = torch.empty(1, 3, pixels, pixels)
        with FlopCounterMode(display=False) as counter, torch.no_grad(): y = net(x)
        assert y.shape == (1, dict(args).get('outputs', classes)), (model, args)
        key = f"{model} imagenet" if pixels == 32 and dict(args).get('stem') else model, pixels, classes
        whole = dict(args).get('norm', True) and dict(args).get('skip', True)
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        if key in PARAMETERS and 'widths' not in dict(args):
            assert parameters == pytest.approx(PARAMETERS[key], rel=.01), key
        if key not in PUBLISHED or not whole:
            assert not whole or (model, pixels) in NO_PUBLISHED_SIZE, f'{key} has no size to compare with'
            continue
        seen.add(key)
        millions, operations = PUBLISHED[key]
        assert parameters == pytest.approx(millions, rel=.01), key
        assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=.02), key
        if r.data in ('cifar10', 'cifar100', 'imagenet') and not r.teachers:
            assert math.isfinite(run_cost(r).flops)
    needs_timm = {('vit_s32', 224, 1000)}
    assert seen >= PUBLISHED.keys() - needs_timm


def test_weights_of_a_small_run_follow_the_reading(tmp_path):
    "The term changes what is trained; without it, the runs would be equal."
    sums = set()
    for name in ('saf', 'mesa'):
        for change in (TERMS[name], with_tau_squared(name)):
            learn = make_learner(SMALL.but(**change), 'cpu', root=tmp_path)
            learn.fit(3)
            sums.add(weights_checksum(learn.model.state_dict()))
    assert len(sums) == 4
