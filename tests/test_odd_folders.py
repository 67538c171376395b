"Folders of images that a network cannot train on are named before training, by the option that helps."
import os
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from sadt_nb.commands import cli
from sadt_nb.data.datasets import data_checksums, get_dls, load_data
from sadt_nb.data.loader import ImageData
from sadt_nb.data.mapped import mapped_folder
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.measure import _files_checksum
from sadt_nb.experiments.runner import run


def folder(root, size, train=16, test=4):
    rng = np.random.default_rng(0)
    for part, n in (('train', train), ('test', test)):
        for i in range(n):
            place = root / part / 'ab'[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(place / f'{i}.png')
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))


def error(capsys, f, **options):
    with pytest.raises(SystemExit) as stopped: f(**options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


SMALL = dict(epochs=1, bs=8, valid=.25)


def test_images_of_another_size_are_named_before_training(tmp_path, capsys):
    data, root = folder(tmp_path / 'photos', 48), tmp_path / 'runs'
    said = error(capsys, cli.sadt_train, data=str(data), root=root, **SMALL)
    assert 'model simple_cnn cannot process images of 48x48 pixels' in said and "'size=32'" in said
    assert not list(root.rglob('result.json'))
    cli.sadt_train(data=str(data), root=root, data_args='size=32', **SMALL)
    cli.sadt_train(data=str(data), root=root, model='resnet20', **SMALL)
    assert len(list(root.rglob('result.json'))) == 2


@pytest.mark.parametrize('options', [dict(n_train=9), dict(n_train=8, bs=1)])
def test_a_batch_of_one_image_is_named_before_training(tmp_path, options):
    data = folder(tmp_path / 'photos', 32)
    cfg = Run(data=str(data), **{**SMALL, 'valid': 0., **options})
    with pytest.raises(ValueError, match=f'bs={cfg.bs} leave a batch of one image.*choose another bs$'):
        make_learner(cfg, 'cpu')
    if cfg.bs > 1:
        for fine in (cfg.but(drop_last=True), cfg.but(bs=5), cfg.but(model='resnet20')):
            make_learner(fine, 'cpu').fit(1)


def test_compare_advises_an_option_that_it_has(tmp_path, capsys):
    data = folder(tmp_path / 'photos', 32)
    said = error(capsys, cli.sadt_compare, data=str(data), n_train=9, bs=8, epochs=4, minutes=.1,
                 root=tmp_path / 'runs')
    assert 'leave a batch of one image' in said
    assert 'drop_last' not in said


def test_the_first_error_of_a_grid_is_one_line_without_tabs(tmp_path, capsys, monkeypatch):
    "fastai puts a line with the name of the callback before the message, and a tab into it."
    cfg = Run(data='digits', n_train=32, bs=16, valid=0., epochs=1, lookahead=100)
    with pytest.raises(ValueError) as raised: make_learner(cfg, 'cpu').fit(1)
    assert '\n' in str(raised.value)
    def all_failed(runs, *args, **kwargs): return [raised.value] * len(runs)
    monkeypatch.setattr(cli.grid, 'run_grid', all_failed)
    said = error(capsys, cli.sadt_grid, name='sadt/figure2', root=tmp_path)
    assert 'the first error is: `every`' in said
    assert '\t' not in said


def test_the_checks_change_no_bit(tmp_path, monkeypatch):
    "Neither weights, nor BatchNorm's averages, nor random numbers, nor the mode of the network."
    from sadt_nb.experiments import learner
    def start():
        cfg = Run(data='digits', n_train=33, bs=16, valid=0., epochs=1, model='resnet20')
        learn = make_learner(cfg, 'cpu')
        return learn.model.training, learn.model.state_dict(), torch.rand(3)
    mode, state, drawn = start()
    monkeypatch.setattr(learner, '_check_images', lambda *args: None)
    mode_without, without, drawn_without = start()
    assert mode == mode_without and torch.equal(drawn, drawn_without)
    assert all(torch.equal(v, without[n]) for n, v in state.items())


def test_the_search_takes_options_of_the_data(tmp_path, capsys):
    pytest.importorskip('optuna', reason='the search needs pip install sadt_nb[sweep]')
    data = folder(tmp_path / 'photos', 48)
    options = dict(data=str(data), methods='baseline', trials=1, seeds=1, epochs=1, bs=8, valid=.25,
                   root=tmp_path / 'runs')
    assert 'cannot process images of 48x48' in error(capsys, cli.sadt_sweep, **options)
    cli.sadt_sweep(data_args='size=32', **options)
    assert 'baseline' in capsys.readouterr().out


def test_a_changed_file_behind_a_link_is_decoded_again(tmp_path):
    real, linked = folder(tmp_path / 'real', 8), tmp_path / 'linked'
    for part in ('train', 'test'):
        (linked / part).mkdir(parents=True)
        for label in 'ab': (linked / part / label).symlink_to(real / part / label)
    def state(): return len(load_data(linked)[0]), data_checksums(linked), _files_checksum(linked / 'train')
    n, checksums, names = state()
    shutil.copy(real / 'train' / 'a' / '0.png', real / 'train' / 'a' / 'another.png')
    after = state()
    assert after[0] == n + 1
    assert after[1]['train_crc32'] != checksums['train_crc32']
    assert after[2] != names


def test_the_classes_do_not_depend_on_what_was_read_before(tmp_path, monkeypatch):
    "fastai's CIFAR-100 has folders of superclasses: an image folder has 20 classes, `cifar100` has 100."
    image = np.zeros((2, 2, 3), np.uint8)
    for part in ('train', 'test'):
        for i in range(100):
            place = tmp_path / 'cifar100' / part / f'superclass {i // 5}' / f'class {i}'
            place.mkdir(parents=True)
            Image.fromarray(image).save(place / '1.png')
    def classes(name, **options):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # says to which class the images belong
            return len(load_data(name, **options)[0].vocab)
    for order in ((0, 1), (1, 0)):
        monkeypatch.setenv('SADT_CACHE', str(tmp_path / f'cache {order}'))
        for i in (*order, *order):
            if i: assert classes('cifar100', path=tmp_path / 'cifar100') == 100
            else: assert classes(tmp_path / 'cifar100') == 20


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_names_that_are_no_text(tmp_path):
    data = folder(tmp_path / 'photos', 32)
    names = os.fsencode(data / 'train' / 'a')
    os.rename(names + b'/0.png', names + b'/\xfc.png')
    assert len(load_data(data)[0]) == 16
    assert len(mapped_folder(data, tmp_path / 'cache', 16)[0]) == 16
    assert _files_checksum(data / 'train')
    cfg = Run(data=str(data), epochs=1, bs=8, valid=0.)
    assert run(cfg, tmp_path / 'runs', progress=False) == run(cfg, tmp_path / 'runs', progress=False)


@pytest.mark.parametrize('options, message', [
    (dict(valid=.1), 'images as there are classes, 2, but `valid` 0.1 holds out 1 of 9 training images'),
    (dict(valid=.9), '`valid` 0.9 holds out 9 of 9 training images'),
    (dict(valid=0., n_train=8), '`n_train` must be from 2, the number of classes, to 7, or 9'),
    (dict(valid=0., n_train=1), '`n_train` must be from 2, the number of classes, to 7, or 9'),
    (dict(valid=.3, n_train=5), 'to 4, or 6, the number of training images that validation leaves; got 5'),
])
def test_parts_that_cannot_be_split_off_are_named(options, message, tmp_path):
    data = folder(tmp_path / 'photos', 8, train=9)
    with pytest.raises(ValueError, match=message): get_dls(data, bs=2, **options)


@pytest.mark.parametrize('option', [dict(valid=.5), dict(n_train=3, valid=0.)])
def test_a_class_with_one_image_is_named(option, tmp_path):
    data = folder(tmp_path / 'photos', 8)
    for i in range(3, 16, 2): (data / 'train' / 'b' / f'{i}.png').unlink()
    assert len(get_dls(data, bs=2, valid=0.).train_ds) == 9
    message = f"`{next(iter(option))}` divides the images of each class, but class 'b' has one training image"
    with pytest.raises(ValueError, match=message): get_dls(data, bs=2, **option)


@pytest.mark.parametrize('valid', [.11, .2, .5, .77])
@pytest.mark.parametrize('n_train', [None, 2])
def test_every_allowed_split_can_be_made(valid, n_train, tmp_path):
    "What the checks let through, scikit-learn can split."
    data = folder(tmp_path / 'photos', 8, train=18)
    dls = get_dls(data, bs=1, valid=valid, n_train=n_train)
    assert len(dls.valid_ds) == np.ceil(valid * 18)
    assert len(dls.train_ds) == (n_train or 18 - len(dls.valid_ds))


@pytest.mark.parametrize('y, message', [
    ([0., .9, 1.7], 'whole numbers, got fractions'), ([0., 1., float('nan')], 'whole numbers, got fractions'),
    (['a', 'b', 'a'], 'must be class indices'), (np.array(['a', 'b', 'a']), 'must be class indices'),
    (np.eye(2)[[0, 1, 1]], r'one class index per image, got shape \(3, 2\)'),
    (np.array([[0], [1], [1]]), r'one class index per image, got shape \(3, 1\)'),
    (1, r'one class index per image, got shape \(\)'),
    (torch.zeros(3, dtype=torch.complex64), 'whole numbers, got complex numbers'),
])
def test_labels_that_are_no_class_indices_are_refused(y, message):
    x = np.zeros((3, 2, 2, 3), np.uint8)
    for fine in ([0, 1, 1], [0., 1., 1.], [False, True, True], np.array([0, 1, 1], np.uint8)):
        assert ImageData(x, fine, 'ab').y.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=message): ImageData(x, y, 'ab')


@pytest.mark.parametrize('test', [2, 4])
def test_too_few_test_images_for_the_rule_of_the_release_are_named(test, tmp_path):
    data = folder(tmp_path / 'photos', 32, train=4, test=test)
    cfg = Run(data=str(data), epochs=1, bs=2, valid=0., select='release')
    if test > 2: assert 0 <= run(cfg, tmp_path, progress=False)['accuracy_others'] <= 1
    else:
        with pytest.raises(ValueError, match="select='release' needs at least 3 test images, got 2"):
            make_learner(cfg, 'cpu')
