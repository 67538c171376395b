"The fast recipe against plain loops: steps, data, views, resumed runs, and errors for wrong options."
import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import batches, flat, learner, mlp
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Recorder
from PIL import Image
from sadt_nb.core.recipe import Lookahead, decoupled_groups
from sadt_nb.data import datasets
from sadt_nb.data.augment import Cutout, crop_windows
from sadt_nb.data.datasets import channel_statistics, digits, get_dls, wrong_labels
from sadt_nb.data.loader import ImageData
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_ensemble
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.results import RunRecorder, VIEWS, evaluate, packed, unpacked
from sadt_nb.experiments.run_folder import load_model
from sadt_nb.experiments.runner import run
from sadt_nb.methods.registry import METHODS
from sadt_nb.models.fast_cnn import FastGroup
from scipy.stats import chisquare
from test_resume import interrupted, outcome, quiet, same
from torch import nn
from torch.nn import functional as F

NETWORK = dict(widths=(8, 8, 8), whiten_bias_epochs=1)
RECIPE = dict(model='fast_cnn', model_args=NETWORK, lr=2., opt='decoupled_sgd', sched='triangle',
              opt_args=dict(momentum=.85, weight_decay=.0153), crop=2, pad_mode='reflect', flip='alternate',
              normalize='data', label_smoothing=.2, drop_last=True, lookahead=5, valid=0.)
DIGITS = Run(data='digits', n_train=128, bs=32, epochs=1.5, **RECIPE)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    "Make 150 training and 30 test images of noise; the upper bits of red and green hold an image's number."
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for part, n in (('train', 150), ('test', 30)):
        for i in range(n):
            image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            image[..., :2] = image[..., :2] % 16 + (i // 16 * 16, i % 16 * 16)
            file = root / part / 'abc'[3 * i // n] / f'{i:03}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('SADT_CACHE', str(root / 'cache'))
        yield str(root)


def shown_in(x, dl):
    "Return the bytes of a normalised batch, `(n, height, width, 3)`, and the number of each image."
    mean, std = (torch.as_tensor(v).double().expand(3) for v in (dl.mean, dl.std))
    shown = (255 * (x.double().permute(0, 2, 3, 1) * std + mean)).round().byte()
    return shown, shown[:, 0, 0, 0].long() // 16 * 16 + shown[:, 0, 0, 1].long() // 16


def exact_learner(cfg):
    "Return the run's Learner in double precision."
    learn = make_learner(cfg)
    learn.model.double()
    learn.dls.train.dtype = torch.float64
    return learn


class Look(Callback):
    "Calls a function with the Learner after all other callbacks have finished the batch."
    order, run_valid = 10_000, False
    def __init__(self, look): self.look = look
    def after_batch(self): self.look(self.learn)


def by_hand(model, passes, epochs=2.5, bs=20, lr=2., momentum=.85, decay=.0153, smoothing=.2, bias_scale=64,
            start=.2, peak=.23, end=.07, every=5, slow_decay=.95, learns=1):
    "Train by the recipe in plain PyTorch, with the loss summed over the batch as in its paper."
    kilostep = 1024 * (1 + 1 / (1 - momentum))
    shrink = decay * bs / kilostep
    norms, others = [], []
    for name, p in model.named_parameters():
        if p.requires_grad: (norms if 'norm' in name else others).append(p)
    members = [norms, others]
    rates = [lr / kilostep * bias_scale, lr / kilostep]
    groups = [dict(params=ps, lr=rate, weight_decay=shrink / rate) for ps, rate in zip(members, rates)]
    opt = torch.optim.SGD(groups, momentum=momentum, nesterov=True)
    fast = [t for t in model.state_dict().values() if t.is_floating_point()]
    slow = [t.clone() for t in fast]

    def pull(kept):
        for s, t in zip(slow, fast):
            s.copy_(kept * s + (1 - kept) * t)
            t.copy_(s)

    steps = math.ceil(epochs * len(passes[0]))
    batches = [(epoch, x, y) for epoch, loader in enumerate(passes) for x, y in loader]
    for i, (epoch, x, y) in enumerate(batches[:steps]):
        for group, rate in zip(opt.param_groups, rates):
            group['lr'] = rate * np.interp(i / steps, [0, peak, 1], [start, 1, end])
        logp = model(x).log_softmax(1)
        wanted = (1 - smoothing) * F.one_hot(y, logp.shape[1]) + smoothing / logp.shape[1]
        model.zero_grad()
        (-wanted * logp).sum().backward()
        if epoch >= learns:
            model.whiten.bias.grad = None
        opt.step()
        if (i + 1) % every == 0:
            pull(slow_decay**every * ((i + 1) / steps)**3)
    pull(1)
    return model.state_dict()


def test_a_run_makes_the_steps_of_a_plain_loop(images):
    "Eighteen steps, with pulls after 5, 10 and 15. A change of any part of the recipe exceeds the tolerance."
    cfg = Run(data=images, data_args=dict(size=24), bs=20, epochs=2.5, **RECIPE)
    learn, twin = exact_learner(cfg), exact_learner(cfg)
    passes = [[(x.clone(), y.clone()) for x, y in twin.dls.train] for _ in range(3)]
    assert [[len(y) for _, y in batches] for batches in passes] == [[20] * 7] * 3 # ten images are left out
    learn.fit(3)
    got, want = learn.model.state_dict(), by_hand(deepcopy(twin.model), passes)
    assert want['group1.norm1.num_batches_tracked'] == 18
    for name, t in want.items():
        torch.testing.assert_close(got[name], t, rtol=1e-8, atol=1e-8, msg=name)
    changes = dict(lr=2.1, momentum=.8, decay=.02, smoothing=.1, bias_scale=32, start=.3, peak=.3, end=.1,
                   every=4, slow_decay=.9, learns=3)
    for name, value in changes.items():
        other = by_hand(deepcopy(twin.model), passes, **{name: value})
        assert max((other[k] - want[k]).abs().max() for k in want) > 1e-5, name


def test_the_schedule_of_the_larger_recipe(images):
    "It peaks after a tenth of the steps and ends at zero; the steps are those of the plain loop."
    options = {**RECIPE, 'sched': 'triangle_to_zero'}
    cfg = Run(data=images, data_args=dict(size=24), bs=20, epochs=2, **options)
    learn, twin = exact_learner(cfg), exact_learner(cfg)
    passes = [[(x.clone(), y.clone()) for x, y in twin.dls.train] for _ in range(2)]
    rates = []
    learn.fit(2, cbs=Look(lambda learn: rates.append(learn.opt.param_groups[-1]['lr'])))
    peak = 2 / (1024 * (1 + 1 / (1 - .85))) * 20 # for the mean of 20 losses
    falling = [1 - (i / 14 - .1) / .9 for i in range(2, 14)]
    assert rates == pytest.approx([peak * f for f in (.2, .2 + .8 / 1.4, *falling)], rel=1e-12)
    want = by_hand(deepcopy(twin.model), passes, epochs=2, peak=.1, end=0)
    for name, t in want.items():
        torch.testing.assert_close(learn.model.state_dict()[name], t, rtol=1e-8, atol=1e-8, msg=name)


# Forward and backward passes of the network in six steps, where the registry's number does not give them.
# LookSAM has extra passes in every fifth step only, ESAM passes some rows only, MESA begins in the second
# epoch, distillation also passes through a teacher, and the teachers of SADT-2 share a trunk.
COUNTED = dict(looksam=(8, 8), esam=(18, 12), mesa=(8, 6), distillation=(6, 6), sadt2=(18, 12))
OPTIONS = dict(saf=dict(start_epoch=1, lag=1), mesa=dict(start_epoch=1))


@pytest.mark.parametrize('method', METHODS)
def test_every_method_trains_by_the_recipe(method, tmp_path):
    "Of six steps, the last two freeze the whitening bias, and lookahead ends with the weights of step 4."
    teachers = dict(teachers=DIGITS.but(lookahead=4)) if METHODS[method].needs_teacher else {}
    cfg = DIGITS.but(method=method, method_args=OPTIONS.get(method, {}), lookahead=4, **teachers)
    for teacher in cfg.teachers:
        run(teacher, tmp_path, **quiet)
    seen, recorder = [], RunRecorder()
    look = Look(lambda learn: seen.append(deepcopy(learn.model.state_dict())))
    learn = make_learner(cfg, cbs=[recorder, look], root=tmp_path)
    learn.fit(2)
    recorder.unhook()
    passes, counts = round(6 * METHODS[method].passes), recorder.counts
    assert (counts['forwards'], counts['backwards']) == COUNTED.get(method, (passes, passes))
    assert counts['steps'] == 6 * METHODS[method].steps
    assert not recorder.failed
    def unchanged(name): return [torch.equal(a[name], b[name]) for a, b in zip(seen, seen[1:])]
    assert unchanged('whiten.bias') == [False] * 3 + [True] * 2
    assert not any(unchanged('classifier.weight'))
    for name, t in learn.model.state_dict().items():
        assert t.isfinite().all()
        if method == 'weight_average': continue # the average of steps 5 and 6, before the last pull
        if t.is_floating_point(): assert torch.equal(t, seen[3][name])


RESUMED = dict(baseline={}, sadt1=dict(method='sadt1'), bf16=dict(amp='bf16'),
               saf=dict(method='saf', method_args=dict(start_epoch=1, lag=2)))


def check_killed_run(options, device, tmp_path, monkeypatch):
    """Check that a run of the recipe that is killed twice ends with the same bits; also for test_gpu.py.

    The run stops in the third epoch and in the fourth, half as long one; most pulls are within an epoch."""
    cfg = DIGITS.but(epochs=3.5, n_train=96, bs=16, lookahead=4, **options)
    whole = run(cfg, tmp_path / 'whole', **quiet)
    assert whole['hardware']['device'] == device
    cut = interrupted(cfg, tmp_path / 'cut', monkeypatch, at=((2, 1), (3, 2)))
    assert cut['hardware']['device'] == device
    assert cut['resumed'] == 3
    assert cut['steps'] == 21 * METHODS[cfg.method].steps
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


@pytest.mark.filterwarnings('ignore:this processor emulates')
@pytest.mark.parametrize('options', RESUMED.values(), ids=RESUMED)
def test_a_killed_run_ends_with_the_same_bits(options, tmp_path, monkeypatch):
    check_killed_run(options, 'cpu', tmp_path, monkeypatch)


def mirrored_in(dl, pad=2):
    "Return the order of the images in one pass, and which of them are windows of their mirror image."
    order, mirrored = [], {}
    for x, y in dl:
        shown, ids = shown_in(x, dl)
        assert torch.equal(ids, dl.ids)
        assert torch.equal(y, dl.dataset.y[ids])
        for i, image in zip(ids.tolist(), shown.numpy()):
            wide = np.pad(dl.dataset.x[i].numpy(), ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
            windows = np.lib.stride_tricks.sliding_window_view(wide, (32, 32, 3)).reshape(-1, 32, 32, 3)
            plain = (windows == image).all((1, 2, 3)).any()
            flipped = (windows[:, :, ::-1] == image).all((1, 2, 3)).any()
            assert plain != flipped
            order.append(i)
            mirrored[i] = flipped
    return order, np.array([mirrored[i] for i in range(len(order))])


def test_each_pass_mirrors_the_images_that_the_last_pass_did_not(images):
    "The images are whole windows of the reflected image, in the order of a loader that does not mirror."
    options = dict(bs=64, valid=0., mean=.25, std=.5, crop=2, pad_mode='reflect', device='cpu')
    alternate = get_dls(images, flip='alternate', **options).train
    plain = get_dls(images, flip=False, **options).train
    first = None
    for epoch in range(4):
        order, mirrored = mirrored_in(alternate)
        plain_order, never = mirrored_in(plain)
        first = mirrored if first is None else first
        assert order == plain_order
        assert not never.any()
        assert np.array_equal(mirrored, first ^ bool(epoch % 2))
    assert abs(first.mean() - .5) < 4 * .5 / 150**.5
    other = get_dls(images, flip='alternate', seed=1, **options).train
    assert not np.array_equal(first, mirrored_in(other)[1])


def test_saf_keeps_the_logits_of_the_right_image(images):
    "Each record holds the logits of the image that the network saw, mirrored or not."
    latest, wrong = torch.zeros(150, 3), []
    def look(learn):
        _, ids = shown_in(learn.xb[0], learn.dls.train)
        wrong.append(int((ids != learn.sample_ids.ids).sum()))
        latest[ids] = learn.pred.detach().clone()
    options = dict(method='saf', method_args=dict(start_epoch=1, lag=1))
    learn = make_learner(Run(data=images, bs=20, epochs=2.5, **options, **RECIPE), cbs=[Look(look)])
    learn.fit(3)
    assert wrong == [0] * 18
    assert latest.any(1).sum() > 140
    assert torch.equal(learn.saf.records.logits[0], latest.half())


@pytest.mark.parametrize('pad', [1, 2, 5])
def test_a_reflected_border_equals_numpys(pad):
    x = torch.randint(0, 256, (300, 7, 6, 3), dtype=torch.uint8)
    top, left = torch.randint(0, 2 * pad + 1, (2, 300))
    wide = np.pad(x.numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode='reflect')
    want = [w[t:t + 7, l:l + 6] for w, t, l in zip(wide, top, left)]
    assert np.array_equal(crop_windows(x, pad, top, left, 'reflect'), want)


def test_cutout_inside_hides_whole_squares_at_every_place_equally_often():
    x = torch.full((24_000, 6, 8, 3), 255, dtype=torch.uint8)
    hidden = Cutout(3, inside=True)(x, torch.zeros(len(x)), np.random.default_rng(0))[0] == 0
    corner = hidden[..., 0].flatten(1).int().argmax(1)
    want = torch.zeros_like(hidden)
    for i, c in enumerate(corner.tolist()):
        want[i, c // 8:c // 8 + 3, c % 8:c % 8 + 3] = True
    assert torch.equal(hidden, want)
    assert (hidden[..., 0].sum((1, 2)) == 9).all()
    times = np.bincount(corner, minlength=48).reshape(6, 8)[:4, :6]
    assert times.sum() == len(x)
    assert times.min() > 0
    assert chisquare(times.ravel()).pvalue > .001


def test_views_of_one_image_by_hand():
    "A linear network in float64: a view is a product of two vectors."
    rng = np.random.default_rng(0)
    image, weight = rng.normal(size=(3, 5, 6)), rng.normal(size=(4, 90))
    net = nn.Sequential(nn.Flatten(), nn.Linear(90, 4, bias=False)).double()
    net[1].weight.data = torch.tensor(weight)
    wide = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode='reflect')
    def both(im): return (weight @ im.ravel() + weight @ im[..., ::-1].ravel()) / 2
    shifted = (both(wide[:, :5, :6]) + both(wide[:, 2:, 2:])) / 2
    by_level = [weight @ image.ravel(), both(image), (both(image) + shifted) / 2]
    for level, logits in enumerate(by_level):
        x, y = torch.tensor(image)[None], torch.tensor([2])
        np.testing.assert_allclose(VIEWS[level](net, x)[0].detach(), logits, rtol=0, atol=1e-12)
        found = evaluate(net, [(x, y)], level)
        assert abs(found['loss'] - (np.log(np.exp(logits).sum()) - logits[2])) < 1e-12
        assert found['accuracy'] == (logits.argmax() == 2)


def test_a_result_stores_one_bit_per_test_image(tmp_path):
    rng = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 1000):
        flags = rng.random(n) < .5
        assert np.array_equal(unpacked(packed(torch.tensor(flags)), n), flags)
    cfg = DIGITS.but(epochs=8, lr=11.5, views=2)
    result = run(cfg, tmp_path, **quiet)
    test, net = make_learner(cfg).dls[2], load_model(cfg, tmp_path, 10)
    right = torch.cat([net(x).argmax(1) == y for x, y in test]).numpy()
    assert np.array_equal(unpacked(result['right'], 360), right)
    assert 0 < right.mean() < 1
    assert right.mean() == result['accuracy']
    assert unpacked(result['right_bn'], 360).mean() == result['accuracy_bn']
    assert list(result['views'].values()) == [evaluate(net, test, level)['accuracy'] for level in (1, 2)]


@pytest.mark.parametrize('bs', [256, 1024])
def test_a_mean_loss_makes_the_steps_of_the_published_sum(bs):
    "Compares with Nesterov's steps written out, with rate and decay for the summed loss."
    ours = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    theirs = deepcopy(ours)
    kilostep = 1024 * (1 + 1 / (1 - .85))
    opt = torch.optim.SGD(decoupled_groups(ours, 11.5, bs))
    speed = {name: 0. for name, _ in theirs.named_parameters()}
    for factor in (.2, .6, 1., .5, .07): # of a schedule
        x, y = torch.randn(bs, 5).double(), torch.randint(0, 3, (bs,))
        ours.zero_grad()
        F.cross_entropy(ours(x), y).backward()
        for group in opt.param_groups:
            group['lr'] = group['initial_lr'] * factor
        opt.step()
        theirs.zero_grad()
        F.cross_entropy(theirs(x), y, reduction='sum').backward()
        for name, p in theirs.named_parameters():
            rate = 11.5 / kilostep * (64 if name == '1.bias' else 1)
            g = p.grad + .0153 * bs / kilostep / rate * p.detach()
            speed[name] = .85 * speed[name] + g
            p.data -= rate * factor * (g + .85 * speed[name])
        for p, q in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


NAN = float('nan')
NOT_NORMALISATIONS = ('imagenet', (.5, 0), 5, None, ('data', 'data'), ('a', .5), (NAN, .5),
                      ((.5, .5), .5), (.5, (.1, .2)), (.5, math.inf))
REFUSED = {
    '`widths`': [dict(model_args=dict(widths=(8, 8))), dict(model_args=dict(widths=(8, 0, 8)))],
    '`epochs`': [dict(epochs=.5), dict(epochs=NAN), dict(epochs=math.inf)],
    '`bs` must be at most 150, .*, got 151': [dict(bs=151)],
    'at least 32 images, got 31; pass more images': [dict(bs=10, n_train=31)],
    '9x9 pixels, got 8x8.*`size` in `data_args`': [dict(data_args=dict(size=8))],
    '`flip`': [dict(flip='no'), dict(flip=1)],
    '`pad_mode`': [dict(pad_mode='wrap'), dict(crop=0)],
    '`crop` must be from 0 to 31': [dict(crop=32)],
    '`label_smoothing`': [dict(label_smoothing=1), dict(label_smoothing='a')],
    '`lookahead`': [dict(lookahead=-1), dict(lookahead=True)],
    '`views`': [dict(views=3), dict(views=1.)],
    '`normalize`': [dict(normalize=v) for v in NOT_NORMALISATIONS],
    "sched='restart' needs a whole number of epochs":
        [dict(sched='restart', opt='adam', opt_args={}, epochs=1.5)],
    '`opt_args`': [dict(opt_args=dict(bs=3))],
}
CASES = [(bad, message) for message, cases in REFUSED.items() for bad in cases]


@pytest.mark.parametrize('bad, message', CASES, ids=str)
def test_impossible_options_are_refused_by_name(bad, message, images):
    with pytest.raises(ValueError, match=message):
        make_learner(Run(**{**RECIPE, 'data': images, 'bs': 50, 'epochs': 1, **bad}))


@pytest.mark.parametrize('side', [24, 32, 48, 64])
def test_images_of_other_sizes_train(side, images):
    options = {**RECIPE, 'lookahead': 0, 'data_args': dict(size=side)}
    learn = make_learner(Run(data=images, bs=100, epochs=1, **options))
    before = deepcopy(learn.model.state_dict())
    shapes = []
    learn.fit(1, cbs=Look(lambda learn: shapes.append(learn.xb[0].shape)))
    assert shapes == [(100, 3, side, side)]
    for name, p in learn.model.named_parameters():
        assert p.isfinite().all()
        assert torch.equal(p, before[name]) != p.requires_grad


def test_names_of_runs_stay_the_same():
    assert Run().key == '44136fa355b3'
    assert Run(method='sam').key == 'f96ee463f355'
    assert Run(epochs=10.0).key == Run().key
    assert type(Run(epochs=10.0).epochs) is int
    colours = (.5, .4, .3), (.2, .2, .2)
    every = Run(epochs=9.9, cutout=4, cutout_inside=True, views=2, **{**RECIPE, 'normalize': colours})
    again = Run.from_dict(json.loads(json.dumps(every.to_dict())))
    assert again == every
    assert again.key == every.key
    assert hash(again) == hash(every)
    as_list = DIGITS.but(model_args=dict(NETWORK, widths=[8, 8, 8]))
    assert as_list == DIGITS
    assert as_list.key == DIGITS.key
    fields = 'epochs flip cutout_inside normalize label_smoothing drop_last lookahead views'.split()
    others = {every.but(**{name: getattr(Run(), name)}).key for name in fields}
    assert len(others | {every.key}) == 1 + len(fields)


@pytest.mark.parametrize('noise', [0., .2, .4, .8])
def test_the_share_of_wrong_labels_is_the_noise(noise, monkeypatch):
    clean, test = digits()
    monkeypatch.setattr(datasets, 'cifar10', lambda path, size: (clean, test))
    noisy, same_test = datasets.noisy_cifar10(noise, seed=3)
    assert torch.equal(clean.y, digits()[0].y)
    assert torch.equal(noisy.x, clean.x)
    assert same_test is test
    off = (noisy.y - clean.y) % 10
    assert (off > 0).sum() == round(noise * len(clean))
    if noise:
        times = torch.bincount(off, minlength=10)[1:]
        assert times.min() > 0
        assert chisquare(times).pvalue > .001
        assert not torch.equal(noisy.y, wrong_labels(clean, noise, 4).y)
        assert torch.equal(noisy.y, wrong_labels(clean, noise, 3).y)


def test_statistics_of_channels_equal_numpys():
    x = torch.randint(0, 256, (6000, 3, 5, 3), dtype=torch.uint8) # more than one part of 5,000
    x[..., 1] //= 3
    found = channel_statistics(ImageData(x, torch.zeros(len(x)), 'a'))
    scaled = x.numpy() / 255.
    np.testing.assert_allclose(found, [scaled.mean((0, 1, 2)), scaled.std((0, 1, 2))], rtol=1e-12)


def test_the_whole_training_set_has_mean_zero_and_deviation_one(images):
    plain = {**RECIPE, 'crop': 0, 'pad_mode': 'zeros', 'drop_last': False}
    learn = exact_learner(Run(data=images, bs=40, **plain))
    whole = torch.cat([x for x, _ in learn.dls.train]).transpose(0, 1).flatten(1)
    assert whole.shape == (3, 150 * 32 * 32)
    np.testing.assert_allclose(whole.mean(1), [0] * 3, atol=1e-6)
    np.testing.assert_allclose(whole.std(1, correction=0), [1] * 3, atol=1e-6)


def test_a_stored_result_reads_as_it_was_returned(tmp_path):
    cfg = DIGITS.but(views=1)
    assert run(cfg, tmp_path, **quiet) == run(cfg, tmp_path, **quiet)


def test_a_learning_rate_search_makes_num_it_steps():
    learn = make_learner(DIGITS, cbs=[Recorder()])
    learn.lr_find(show_plot=False, num_it=20, suggest_funcs=())
    assert len(learn.recorder.losses) == 20


def test_whitening_uses_images_of_all_classes(images):
    "The folder's images are sorted by class; the filters come from images of all classes."
    cfg = Run(data=images, bs=50, epochs=1, **RECIPE)
    learn = make_learner(cfg)
    dl = learn.dls.train.new(tfms=[], shuffle=False, bs=150)
    x, y = dl.one_batch()
    patches = F.unfold(x.double(), 2).transpose(1, 2).reshape(-1, 12)
    moment = patches.T @ patches / len(patches)
    filters = learn.model.whiten.weight[:12].detach().flatten(1).double()
    values = torch.linalg.eigvalsh(moment).flip(0)
    want = torch.diag(values / (values + 5e-4)) # the moments of patches after the filters
    torch.testing.assert_close(filters @ moment @ filters.T, want, rtol=0, atol=1e-3) # float32 sums
    of_one_class = patches[y.repeat_interleave(31 * 31) == 0]
    other = of_one_class.T @ of_one_class / len(of_one_class)
    assert (filters @ other @ filters.T - want).abs().max() > .01, 'images of one class have other moments'


def test_lookahead_needs_more_steps_than_one_interval(images):
    learn = make_learner(Run(data=images, bs=100, epochs=2, **RECIPE))
    with pytest.raises(ValueError, match='`lookahead` of a run. is 5 batches, but training has 2'):
        learn.fit(2)
    learn = make_learner(Run(data=images, bs=50, epochs=1.3, **RECIPE))
    with pytest.raises(ValueError, match='`lookahead` of a run. is 5 batches, but training has 4'):
        learn.fit(2)


def test_an_ensemble_sees_normalised_images(images, tmp_path):
    "An ensemble of one run has that run's accuracy."
    cfg = Run(data=images, bs=20, epochs=2, **RECIPE)
    result = run(cfg, tmp_path, **quiet)
    alone = run_ensemble([cfg], tmp_path)
    assert alone['accuracy'] == result['accuracy'] == alone['members'][cfg.name]
    model, test = load_model(cfg, tmp_path, 3), make_learner(cfg).dls[2]
    raw = torch.cat([model((x * test.std[0] + test.mean[0])) for x, _ in test])
    seen = torch.cat([model(x) for x, _ in test])
    assert (raw - seen).abs().max() > .01, 'the images matter to the network'


def test_teacher_and_student_see_the_same_images():
    with pytest.raises(ValueError, match='normalize'):
        DIGITS.but(method='distillation', teachers=DIGITS.but(normalize=''))


def test_validation_batches_are_no_steps_of_lookahead():
    "Five training batches and a pull after every third: the number of validation batches has no effect."
    ended = []
    for n_valid in (1, 5):
        learn = learner(mlp(), [Lookahead(every=3)], batches(n=40))
        learn.dls = DataLoaders(batches(n=40), batches(n=8 * n_valid))
        learn.fit(2)
        ended.append(flat(learn.model))
    assert torch.equal(*ended)
    assert not torch.equal(ended[0], flat(mlp()))


@torch.no_grad()
def test_a_group_of_three_convolutions_adds_its_first_activation():
    torch.manual_seed(0)
    group = FastGroup(2, 3, depth=3).double().eval()
    x = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    def convolved(x, i): return F.conv2d(x, getattr(group, f'conv{i}').weight, padding=1)
    first = F.gelu(F.max_pool2d(convolved(x, 1), 2)) # BatchNorm has seen nothing yet: mean 0, variance 1
    second = F.gelu(convolved(first, 2))
    expected = F.gelu(convolved(second, 3) + first)
    torch.testing.assert_close(group(x), expected, rtol=1e-9, atol=1e-9)
