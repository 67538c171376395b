"Configurations of runs: equal runs have equal keys, keys never change, and nothing unknown is accepted."
import hashlib
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cells_of
from sadt_nb.commands import cli
from sadt_nb.data import datasets
from sadt_nb.data.augment import CropFlip, CutMix
from sadt_nb.data.datasets import DATASETS, channel_statistics, get_dls, load_data
from sadt_nb.data.loader import ImageData, TensorDL
from sadt_nb.experiments import config, grid, runner, sweep as sweeps
from sadt_nb.experiments.archive import stored_runs
from sadt_nb.experiments.config import OPTIMIZERS, Run
from sadt_nb.experiments.report import published
from sadt_nb.experiments.sweep import SWEEPS
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.models.registry import MODELS, make_model
from sadt_nb.papers.grids import PAPER_ENSEMBLES, PAPER_GRIDS, paper_ensembles

STORED_NAMES = Path(__file__).with_name('preset_names.json') # written before keys had a normal form
FRAMES = dict(whole=(1., ''), part=(.1, 'bf16'))


def digest(runs):
    "Return a hash of the names of runs and of their teachers."
    names = [r.name for r in runs] + [t.name for r in runs for t in r.teachers]
    return hashlib.sha256('\n'.join(names).encode()).hexdigest()[:16]


def preset_digests():
    "Return a hash for each preset and each search: `table` and `table in part`."
    found = {}
    for name in PAPER_GRIDS:
        for frame, (scale, amp) in FRAMES.items():
            runs = [c.run for c in cells_of(name, scale, amp)]
            if name in PAPER_ENSEMBLES:
                for e in paper_ensembles(name, scale, amp): runs += e.members
            found[f'{name} {frame}'] = digest(runs)
    for name, cases in SWEEPS.items(): found[name] = digest([run for run, _ in cases().values()])
    return found


@pytest.mark.parametrize('field', ['data_args', 'model_args', 'method_args', 'opt_args'])
@pytest.mark.parametrize('value', [None, 5, 'size'])
def test_options_must_be_a_dict(field, value):
    with pytest.raises(ValueError, match=f'`{field}` must be a dict, got {value!r}'): Run(**{field: value})


def test_numbers_and_switches_cannot_be_none():
    for field in fields(Run):
        if field.type not in (float, bool): continue
        must = 'a number' if field.type is float else 'True or False'
        with pytest.raises(ValueError, match=f'`{field.name}` must be {must}, got None'):
            Run(**{field.name: None})


@pytest.mark.parametrize('size', [0, -3, 7.5, 'a', True])
def test_a_size_is_a_whole_number_of_pixels(size, tmp_path):
    for data in ('cifar10', 'tiny_imagenet', str(tmp_path)):
        with pytest.raises(ValueError, match='`size` must be a whole number of pixels'):
            Run(data=data, data_args=dict(size=size))
    with pytest.raises(ValueError, match='`size` must be a whole number of pixels'):
        load_data(tmp_path, size=size)
    assert Run(data='cifar10', data_args=dict(size=24)).data_args == (('size', 24),)


@pytest.mark.parametrize('noise', [-.1, 1., 7])
def test_noise_out_of_range_is_refused_before_the_data_is_read(noise):
    for data in ('noisy_digits', 'noisy_cifar10'):
        with pytest.raises(ValueError, match=r'`noise` must lie in \[0, 1\)'):
            Run(data=data, data_args=dict(noise=noise))


def test_keys_of_presets_are_those_of_earlier_versions():
    stored = json.loads(STORED_NAMES.read_text())
    now = preset_digests()
    assert {k: now.get(k) for k in stored} == stored


def test_stored_runs_keep_their_names():
    found = stored_runs(published())
    assert len(found) > 1000
    for folder, parts in found: assert Run.from_dict(parts['config']).name == folder.name


SAM = dict(method='sam')
SGD = dict(opt='sgd')
EQUAL = {
    'a number': [dict(lr=v) for v in (1, 1., np.float64(1), np.float32(1), np.int64(1), np.array(1.))],
    'a count': [dict(bs=v) for v in (64, np.int64(64), np.uint8(64))],
    'a seed': [dict(seed=v) for v in (3, np.int32(3), np.array(3))],
    'a switch': [dict(tf32=v) for v in (True, np.bool_(True))],
    'epochs': [dict(epochs=v) for v in (5, 5., np.float32(5))],
    'a share': [dict(valid=v, split=0) for v in (0, 0., np.float64(0))],
    'an option': [dict(**SAM, method_args=dict(rho=v)) for v in (1, 1., np.float32(1), np.int8(1))],
    'a counting option': [dict(**SAM, method_args=dict(interval=v)) for v in (2, 2., np.int64(2))],
    'an option of the optimizer': [dict(**SGD, opt_args=dict(weight_decay=v, momentum=v)) for v in (0, 0.)],
    'a switching option': [dict(model_args=dict(bottleneck=v)) for v in (True, np.bool_(True))],
    'a list': [dict(model='fast_cnn', model_args=dict(widths=v)) for v in
               ([16, 32, 32], (16., 32, 32), np.array([16, 32, 32]))],
    'betas': [dict(opt_args=dict(betas=v)) for v in ([0, .9], (0., .9), np.array([0, .9]))],
    'normalize': [dict(normalize=v) for v in ((0, 1), [0., 1.], (np.float64(0), 1))],
    'data': [dict(data=v) for v in ('some/folder', Path('some/folder'))],
    'an option without a type': [dict(data='x', data_args=dict(size=v)) for v in (32, 32., np.int64(32))],
}


@pytest.mark.parametrize('changes', EQUAL.values(), ids=EQUAL)
def test_equal_runs_have_equal_keys(changes):
    runs = [Run(**c) for c in changes]
    assert all(r == runs[0] for r in runs)
    assert len({r.key for r in runs}) == 1
    for r in runs: assert Run.from_dict(json.loads(json.dumps(r.to_dict()))).key == r.key


BAD_NUMBERS = [float('nan'), float('inf'), -float('inf'), np.float32('nan'), np.array([.1, float('nan')])]
NUMBERS = [f for f in Run.__dataclass_fields__ if isinstance(getattr(Run(), f), (int, float))]


def said(changes):
    "Return the message of the error that a `Run` with these changes raises."
    with pytest.raises(ValueError) as e: Run(**changes)
    return str(e.value)


@pytest.mark.parametrize('field', [*NUMBERS, 'n_train', 'split', 'normalize'])
def test_no_field_takes_a_number_that_is_not_finite(field):
    for bad in BAD_NUMBERS: assert f'`{field}` must be finite' in said({field: bad})


def test_no_option_takes_a_number_that_is_not_finite():
    cases = [(dict(**SAM), 'method_args', 'rho'), (dict(**SGD), 'opt_args', 'momentum'),
             (dict(), 'model_args', 'dropout'), (dict(data='noisy_digits'), 'data_args', 'noise'),
             (dict(opt='adam'), 'opt_args', 'betas')]
    for changes, field, option in cases:
        for bad in BAD_NUMBERS:
            assert f'`{field} {option}` must be finite' in said({**changes, field: {option: bad}})


WRONG = [
    (dict(seed=-1), '`seed` must be a whole number from 0'), (dict(seed=2**32), '`seed` must'),
    (dict(split=-1), '`split` must'), (dict(seed=1.5), '`seed` must'), (dict(seed=True), '`seed` must'),
    (dict(n_train=0), '`n_train` must'), (dict(crop=1.5), '`crop` must'), (dict(cutout=-1), '`cutout` must'),
    (dict(lr='fast'), '`lr` must be a number'), (dict(lr=True), '`lr` must be a number'),
    (dict(lr=10**400), '`lr` must be finite'), (dict(tf32=1), '`tf32` must be True or False'),
    (dict(data=5), '`data` must be a string'), (dict(lr=torch.ones(1)), '`lr` must be a number'),
    (dict(**SAM, method_args=dict(adaptive=1)), '`method_args adaptive` must be True or False'),
    (dict(**SAM, method_args=dict(interval=1.5)), '`method_args interval` must be a whole number'),
    (dict(**SAM, method_args=dict(rho='big')), '`method_args rho` must be a number'),
    (dict(**SGD, opt_args=dict(momentum=-1)), '`opt_args`: sgd does not accept'),
    (dict(opt='keras_adam', opt_args=dict(betas=(2., .9))), '`opt_args`: keras_adam does not accept'),
    (dict(method='sma'), "did you mean 'sam'?"), (dict(model='resnet_20'), "did you mean 'resnet20'?"),
    (dict(opt='SGD'), "did you mean 'sgd'?"), (dict(sched='cosin'), "did you mean 'cosine'?"),
    (dict(resized_crop=.1, crop=4), '`crop` and `resized_crop` cannot be used together, got 4 and 0.1'),
    (dict(pad_mode='reflect'), "pad_mode='reflect' needs random crops, but `crop` is 0"),
    (dict(cutout_fill='mean'), '`cutout_fill` needs the square of Cutout, but `cutout` is 0'),
    (dict(cutout_inside=True), '`cutout_inside` needs the square of Cutout, but `cutout` is 0'),
    (dict(normalize=(.5, 0.)), '`normalize` must be'), (dict(warmup_lr=.1), '`warmup_lr` needs a warm-up'),
    (dict(warmup=1, opt='decoupled_sgd'), "opt='decoupled_sgd' has no warm-up; set `warmup` to 0"),
    (dict(warmup=1, sched='triangle_to_zero'), "sched='triangle_to_zero' has no warm-up; set `warmup` to 0"),
    (dict(sched='restart', opt='decoupled_sgd'), "opt='decoupled_sgd' has several"),
    (dict(sched='restart', epochs=1.5), "sched='restart' needs a whole number of epochs, got 1.5"),
    (dict(epochs=.5), '`epochs` must be a number of at least 1, got 0.5'),
    (dict(epochs=.5, model='vit_s32', model_args=dict(pretrained=True)), '`epochs` must be 0 or a number of'),
    (dict(teachers=Run()), 'method baseline takes no teachers'),
    (dict(method='distillation'), 'method distillation needs a teacher; set `teachers`'),
    (dict(method='distillation', teachers=(5,)), 'each teacher must be a `Run`, got int'),
]


@pytest.mark.parametrize('changes, message', WRONG, ids=[str(w[0])[:60] for w in WRONG])
def test_wrong_values_are_named(changes, message): assert message in said(changes)


def with_options(field):
    "Return, for each kind of what has options, the changes that choose it."
    kinds = dict(data_args=('data', [*DATASETS, 'a/folder', 'an/archive.tgz']), model_args=('model', MODELS),
                 method_args=('method', METHODS), opt_args=('opt', OPTIMIZERS))
    what, names = kinds[field]
    return [{what: name} for name in names]


FIELDS = ('data_args', 'model_args', 'method_args', 'opt_args')
TAKERS = [(field, changes) for field in FIELDS for changes in with_options(field)]


@pytest.mark.parametrize('field, changes', TAKERS, ids=[f'{f} {[*c.values()][0]}' for f, c in TAKERS])
def test_nothing_takes_an_unknown_option(field, changes):
    "Also refused is what a run fills in itself, as it would be given twice or be overwritten."
    if changes.get('method') == 'distillation': changes = {**changes, 'teachers': Run()}
    for option in ('nosie', 'classes', 'lr', 'seed', 'params', 'after_batch'):
        message = said({**changes, field: {option: 1}})
        assert f'`{field}`: ' in message and f'no option {option!r}' in message


def test_the_nearest_option_is_suggested():
    cases = [(dict(data='noisy_digits', data_args=dict(nosie=.9)), 'noise'),
             (dict(data='a/folder', data_args=dict(sise=32)), 'size'),
             (dict(model_args=dict(droput=.1)), 'dropout'),
             (dict(**SAM, method_args=dict(Rho=.1)), 'rho'),
             (dict(**SGD, opt_args=dict(momentun=.9)), 'momentum')]
    for changes, near in cases:
        message = said(changes)
        assert f'did you mean {near!r}?' in message and 'It has ' in message


def test_the_functions_that_take_options_refuse_them_themselves(tmp_path):
    (tmp_path / 'train').mkdir()
    for f, args in ((load_data, ('digits',)), (load_data, (tmp_path,)), (make_model, ('resnet20',)),
                    (make_method, ('baseline',)), (make_method, ('gc',))):
        with pytest.raises(ValueError, match="has no option 'nosie'"): f(*args, nosie=.9)


def test_what_depends_on_the_images_is_refused_by_name(tmp_path):
    "These values are known to be wrong only when the images are there, and before any training."
    one_class = ImageData(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, ['cat'])
    grey = ImageData(np.zeros((4, 8, 8, 3), np.uint8), [0, 1] * 2, ['cat', 'dog'])
    nan, inf = float('nan'), float('inf')
    for options, message in [(dict(crop=100_000), r'`crop` must be from 0 to 31'), (dict(crop=32), '`crop`'),
                             (dict(crop=-1), '`crop`'), (dict(std=0.), '`std` must'),
                             (dict(std=-1.), '`std`'),
                             (dict(std=nan), '`std`'), (dict(mean=inf), '`mean` must'),
                             (dict(mean=nan), '`mean`'),
                             (dict(std=(1., 1., 0.)), '`std`'), (dict(cutmix=nan), '`cutmix`'),
                             (dict(cutmix=inf), '`cutmix`'), (dict(valid=nan), '`valid`'),
                             (dict(flip='no'), '`flip`'), (dict(rotate=nan), '`degrees`')]:
        with pytest.raises(ValueError, match=message): get_dls('digits', **options)
    get_dls('digits', crop=31)
    with pytest.raises(ValueError, match="one class, 'cat'"):
        datasets._check_sizes(one_class, 2, 0, 0, 0)
    with pytest.raises(ValueError, match='`std`.*a channel is constant'):
        TensorDL(grey, 2, mean=0., std=channel_statistics(grey)[1])
    with pytest.raises(ValueError, match='`flip` must be True or False'): CropFlip(2, flip='no')
    with pytest.raises(ValueError, match='`alpha`'): CutMix(10, nan)


@pytest.mark.parametrize('command, options', [
    (cli.sadt_sweep, dict(seeds=0)), (cli.sadt_sweep, dict(top=0)),
    (cli.sadt_report, dict(figure='no/x.png')),
    (cli.sadt_demo, dict(figure='no/x.png')), (cli.sadt_demo, dict(figure='.'))])
def test_commands_name_a_wrong_option_before_they_work(command, options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ('run_grid', 'sweep', 'run'):
        for module in (grid, sweeps, runner):
            if hasattr(module, name): monkeypatch.setattr(module, name, lambda *a, **k: pytest.fail('worked'))
    with pytest.raises(SystemExit) as stopped: command(**options)
    assert stopped.value.code == 2
    assert f'--{[*options][0]}' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_values_of_options_without_a_type():
    "A whole float and the equal integer are one option; other floats keep their fraction."
    cases = [(2., 2), (2, 2), (.5, .5), (-3., -3), ((1., .5), (1, .5)), (True, True), (None, None)]
    for given, stored in cases:
        found = config._typed('x', given, None)
        assert found == stored
        assert type(found) is type(stored)
        if isinstance(stored, tuple): assert [*map(type, found)] == [*map(type, stored)]


BOUNDS = [ # field, allowed, refused
    ('resized_crop', (0, .5, 1), (-.01, 1.01)), ('rotate', (0, 90., 180), (-1, 181)),
    ('valid', (0, .99), (-.1, 1)), ('cutmix', (0, 7.), (-.1,)), ('crop', (0, 4), (-1, 1.5)),
    ('bs', (1, 7), (0, -1, 2.5)), ('lr', (1e-9,), (0, -1)),
    ('seed', (0, 2**32 - 1), (-1, 2**32)), ('n_train', (None, 1), (0, -5))]


@pytest.mark.parametrize('field, allowed, refused', BOUNDS, ids=[b[0] for b in BOUNDS])
def test_the_bounds_of_an_option_are_the_documented_ones(field, allowed, refused):
    for value in allowed: assert getattr(Run(**{field: value}), field) == value
    for value in refused:
        with pytest.raises(ValueError, match=field): Run(**{field: value})
