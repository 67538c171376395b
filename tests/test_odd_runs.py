"Options without effect, counts that are no whole numbers, files and weights that change, teachers' labels."
import warnings
import zlib
from functools import partial

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from PIL import Image
from sadt_nb.commands import cli
from sadt_nb.core.arguments import parameters_of
from sadt_nb.core.fixed_loss import collect_batches
from sadt_nb.experiments import grid, measure
from sadt_nb.experiments.config import Run, saw_validation
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.learner import make_learner, run_loaders
from sadt_nb.experiments.measure import MEASURES, measure_run, missing_measures
from sadt_nb.experiments.results import RunRecorder
from sadt_nb.experiments.run_folder import RunError, write_json
from sadt_nb.experiments.runner import run
from sadt_nb.experiments.sweep import SWEEPS, sweep
from sadt_nb.measures.calibration import calibration_error
from sadt_nb.measures.hessian import hessian_trace, spectral_density, top_eigenvalues
from sadt_nb.measures.landscape import loss_surface
from sadt_nb.measures.sharpness import FlatnessRecorder, average_sharpness, gradient_norm
from sadt_nb.papers import any_data
from torch import nn

pytestmark = pytest.mark.usefixtures('narrow')
SMALL = Run(epochs=1, n_train=100, bs=50, valid=0.)
quiet = dict(progress=False)

# Another value for every option that a search by name sets
OTHER = dict(methods='asam', data='noisy_digits', model='resnet20', epochs=3, bs=64, lr=.1, valid=.1,
             n_train=60, opt='sgd', opt_args='weight_decay=0.1', data_args='size=16')


def test_a_search_by_name_refuses_every_option_that_it_would_ignore(tmp_path, monkeypatch, capsys):
    "The options that are left are those of the search itself: its size, its folder and its output."
    left = {*parameters_of(cli.sadt_sweep)} - {*OTHER}
    assert left == {'name', 'trials', 'seeds', 'top', 'root', 'workers', 'json'}
    def begun(): raise ValueError('the search began')
    monkeypatch.setitem(SWEEPS, 'sadt_parts', begun)
    for option, value in OTHER.items():
        with pytest.raises(SystemExit) as e: cli.sadt_sweep('sadt_parts', root=tmp_path, **{option: value})
        error = capsys.readouterr().err
        assert e.value.code == 2
        assert f'--{option} has no effect' in error
    assert not [*tmp_path.iterdir()]


def damaged(cfg, root):
    "Store another configuration in a run's folder."
    folder = root / cfg.name
    folder.mkdir(parents=True)
    write_json(folder / 'config.json', cfg.but(lr=.5).to_dict())


COMMANDS = [
    (cli.sadt_compare, dict(methods='sam', minutes=5., epochs=2, n_train=60, bs=30)),
    (cli.sadt_sweep, dict(methods='baseline', trials=1, epochs=1, n_train=60, bs=30, seeds=1)),
]


@pytest.mark.parametrize('command, options', COMMANDS, ids=[c.__name__ for c, _ in COMMANDS])
def test_the_advice_of_a_command_can_be_followed(command, options, tmp_path, monkeypatch, capsys):
    "Both commands have no --force; after the folder is deleted, as the message says, they work."
    if command is cli.sadt_sweep: pytest.importorskip('optuna', reason='sadt_sweep needs Optuna')
    assert 'force' not in parameters_of(command)
    monkeypatch.setattr(any_data, 'seconds_per_run', lambda plain, root: 60 * 5 / 3 / 2) # two seeds
    seen = []
    real = grid.run
    def first_is_damaged(cfg, root, **kwargs):
        if not seen: damaged(cfg, root)
        seen.append(cfg)
        return real(cfg, root, **kwargs)
    monkeypatch.setattr(grid, 'run', first_is_damaged)
    try: command(root=tmp_path, **options)
    except SystemExit: pass
    said = ' '.join(capsys.readouterr())
    assert 'holds another configuration' in said
    assert 'delete its folder' in said
    assert '(--force)' not in said
    for f in (tmp_path / seen[0].name).iterdir(): f.unlink()
    (tmp_path / seen[0].name).rmdir()
    command(root=tmp_path, **options)
    assert 'holds another configuration' not in ' '.join(capsys.readouterr())


@pytest.mark.parametrize('samples', [2.5, 0, -1, float('nan'), float('inf')])
def test_a_number_of_samples_is_a_whole_number(samples, tmp_path):
    "A measure without an own error would be stored with a number of samples that no call can ask for."
    learn = Learner(run_loaders(SMALL), nn.Linear(2, 2), loss_func=nn.CrossEntropyLoss())
    calls = [lambda: measure_run(SMALL, tmp_path, ['calibration_error'], samples),
             lambda: measure_run(SMALL, tmp_path, ['sharpness'], samples),
             lambda: run_grid([SMALL], tmp_path, samples=samples, **quiet),
             lambda: collect_batches(learn, samples=samples)]
    for call in calls:
        with pytest.raises(ValueError, match='`samples` must be'): call()
    assert not [*tmp_path.iterdir()]


def test_other_counts_are_whole_numbers(tmp_path):
    with pytest.raises(ValueError, match='`every` must be a whole number, got 1.5'):
        FlatnessRecorder(every=1.5)
    with pytest.raises(ValueError, match='`workers` must be a whole number'):
        run_grid([SMALL], tmp_path, workers=1.5, **quiet)


def test_another_image_of_the_same_size_is_measured_anew(tmp_path, monkeypatch):
    "The file has the same name, number of bytes and, in the end, date."
    folder = tmp_path / 'shifted'
    for c in '01':
        (folder / c).mkdir(parents=True)
        Image.new('RGB', (32, 32), 'red').save(folder / c / 'a.bmp')
    monkeypatch.setenv('SADT_SHIFTED', str(folder))
    run(SMALL, tmp_path, **quiet)
    measure_run(SMALL, tmp_path, ['shifted_accuracy'])
    assert not missing_measures(SMALL, tmp_path, ['shifted_accuracy'])
    file = folder / '1' / 'a.bmp'
    before = file.stat()
    Image.new('RGB', (32, 32), 'blue').save(file)
    assert file.stat().st_size == before.st_size
    assert missing_measures(SMALL, tmp_path, ['shifted_accuracy']) == ['shifted_accuracy']
    Image.new('RGB', (32, 32), 'red').save(file) # the same images again, with another date
    assert not missing_measures(SMALL, tmp_path, ['shifted_accuracy'])


def test_a_measure_of_an_earlier_version_has_a_checksum_of_names_and_sizes(tmp_path, monkeypatch):
    (tmp_path / 'shifted' / '0').mkdir(parents=True)
    (tmp_path / 'shifted' / '0' / 'a.png').write_bytes(b'abc')
    monkeypatch.setenv('SADT_SHIFTED', str(tmp_path / 'shifted'))
    known = dict(shifted_accuracy=dict(files=f'{zlib.crc32(b"0/a.png 3"):08x}'))
    assert not measure._is_of_other_files('shifted_accuracy', known)
    (tmp_path / 'shifted' / '0' / 'a.png').write_bytes(b'abcd')
    assert measure._is_of_other_files('shifted_accuracy', known)


def test_two_processes_that_measure_one_run_keep_both_measures(tmp_path, monkeypatch):
    "The other process stores a measure while this one computes."
    run(SMALL, tmp_path, **quiet)
    def slow(learn, samples):
        measure_run(SMALL, tmp_path, ['gradient_norm'], 20)
        return 1.
    monkeypatch.setitem(MEASURES, 'sharpness', slow)
    assert set(measure_run(SMALL, tmp_path, ['sharpness'], 20)['measures']) == {'sharpness', 'gradient_norm'}
    assert not missing_measures(SMALL, tmp_path, ['sharpness', 'gradient_norm'], 20)


def test_weights_that_are_replaced_while_they_are_measured(tmp_path, monkeypatch):
    "The number belongs to the old weights, so it must not be stored as a measure of the new ones."
    run(SMALL, tmp_path, **quiet)
    def slow(learn, samples):
        file = tmp_path / SMALL.name / 'weights.pt'
        weights = torch.load(file)
        torch.save({k: v + 1 if v.is_floating_point() else v for k, v in weights.items()}, file)
        return 1.
    monkeypatch.setitem(MEASURES, 'sharpness', slow)
    with pytest.raises(RunError, match='trained again while it was measured'):
        measure_run(SMALL, tmp_path, ['sharpness'], 20)
    assert missing_measures(SMALL, tmp_path, ['sharpness'], 20) == ['sharpness']


NOISY = Run(data='noisy_digits', valid=.2, split=0, epochs=1, n_train=100, bs=50)


def held_out(cfg):
    "Return the images that a run holds out, as a set of their bytes."
    return {image.numpy().tobytes() for image in run_loaders(cfg)[1].dataset.x}


@pytest.mark.parametrize('noise', [0., .2, .4, None])
def test_other_labels_hold_out_other_images(noise, tmp_path):
    "The oracle reads the images themselves. Without `noise`, the data set has its default, 0.4."
    teacher = NOISY.but(data_args={} if noise is None else dict(noise=noise))
    student = NOISY.but(method='distillation', teachers=teacher, data_args=dict(noise=.4))
    kept = {image.numpy().tobytes() for image in run_loaders(teacher.but(n_train=None))[0].dataset.x}
    assert saw_validation(teacher, student) == bool(held_out(student) & kept)
    assert not saw_validation(teacher, student.but(valid=0.))
    run(teacher, tmp_path, **quiet)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        make_learner(student.but(select='valid'), root=tmp_path)
    said = [str(w.message) for w in found if 'the teacher has other labels' in str(w.message)]
    assert len(said) == saw_validation(teacher, student)
    assert all("select='valid' chooses the epoch by them" in text for text in said)


@pytest.mark.parametrize('noise', [0., .2])
def test_a_search_refuses_a_teacher_with_other_labels(noise):
    pytest.importorskip('optuna', reason='the search needs pip install sadt_nb[sweep]')
    student = NOISY.but(method='distillation', teachers=NOISY.but(data_args=dict(noise=noise)))
    with pytest.raises(ValueError, match='the teacher has other labels'): sweep(dict(a=student), 'nowhere')


def test_a_teacher_has_images_of_the_same_size():
    teacher = Run(data='cifar10', data_args=dict(size=64))
    for size in ({}, dict(size=32)):
        with pytest.raises(ValueError, match='the teacher was trained on images of size=64'):
            Run(data='cifar10', method='distillation', teachers=teacher, data_args=size)
    Run(data='cifar10', method='distillation', teachers=teacher, data_args=dict(size=64))


@pytest.mark.parametrize('as_column', [False, True])
def test_a_recorder_counts_labels_of_any_form(as_column):
    "With labels of shape (n, 1), each counted as class 0 before."
    class Rows:
        device = torch.device('cpu')
        def __iter__(self):
            y = torch.tensor([0, 1, 2, 2])
            yield torch.eye(3)[[0, 1, 2, 0]] * 5, y[:, None] if as_column else y
        def __len__(self): return 1
        def to(self, device): return self
    def loss(pred, y): return nn.functional.cross_entropy(pred, y.reshape(-1))
    net = nn.Linear(3, 3, bias=False)
    nn.init.eye_(net.weight)
    recorder = RunRecorder()
    learn = Learner(DataLoaders(Rows(), Rows()), net, loss_func=loss, lr=1e-9, cbs=recorder)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    recorder.unhook()
    assert recorder.rows[0]['train_accuracy'] == recorder.rows[0]['valid_accuracy'] == .75


NO_NUMBER = dict(eigenvalues=top_eigenvalues, two=partial(top_eigenvalues, k=2), density=spectral_density,
                 surface=loss_surface, no_loader=lambda learn: 1., more=lambda learn, other, dl: 1.)


@pytest.mark.parametrize('name', NO_NUMBER)
def test_a_measure_without_a_number_is_refused_before_training(name):
    with pytest.raises(ValueError, match=f"`measures`: '{name}' "): FlatnessRecorder({name: NO_NUMBER[name]})


def test_measures_with_a_number_are_taken():
    def tensor(learn, dl) -> torch.Tensor: return torch.ones(())
    FlatnessRecorder(dict(trace=hessian_trace, norm=gradient_norm, mean=average_sharpness, tensor=tensor,
                          calibration=calibration_error, by=lambda learn, dl: 1.))
