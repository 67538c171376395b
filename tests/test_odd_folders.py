"Folders of images that a network cannot train on are named before training, by the option that helps."
import numpy as np
import pytest
import torch
from PIL import Image

from sadt_nb.commands import cli
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.learner import make_learner


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
