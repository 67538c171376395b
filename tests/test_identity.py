"A stored result is the result of what it says: of these data, these teachers, these weights, as a whole."
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from fastai.callback.core import CancelFitException
from PIL import Image
from sadt_nb.core import checkpoint
from sadt_nb.data.datasets import data_checksums, load_data
from sadt_nb.data.mapped import mapped_folder
from sadt_nb.experiments import runner
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.measure import measure_run
from sadt_nb.experiments.results import RunRecorder
from sadt_nb.experiments.run_folder import RunDiverged, RunError, load_model, read_result
from sadt_nb.experiments.runner import run
from test_resume import begin, child, outcome, same, stop_in, wait_for

pytestmark = pytest.mark.usefixtures('narrow')
quiet = dict(progress=False, minutes=0)
SMALL = Run(epochs=3, n_train=40, bs=20, valid=0., split=0)


def picture(seed): return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture
def images(tmp_path, monkeypatch):
    "Return a folder with 20 training and 4 test images of two classes, and a cache of its own."
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'imgs'
    for i in range(24):
        place = folder / ('train' if i < 20 else 'test') / 'ab'[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(place / f'{i:02}.png')
    return folder


def of_folder(folder): return Run(data=str(folder), epochs=3, bs=10, valid=0., split=0)
def first(folder): return sorted(folder.iterdir())[0]


def change_pixels(file):
    picture_now = np.array(Image.open(file))
    picture_now[3, 3, 0] ^= 1
    Image.fromarray(picture_now).save(file)


CHANGES = {
    'a training pixel': ('training', lambda f: change_pixels(first(f / 'train' / 'a'))),
    'a test pixel': ('test', lambda f: change_pixels(first(f / 'test' / 'b'))),
    'a class': ('training', lambda f: first(f / 'train' / 'a').rename(f / 'train' / 'b' / '99.png')),
    'more': ('training', lambda f: shutil.copytree(f / 'test' / 'a', f / 'train' / 'a', dirs_exist_ok=True)),
    'one less': ('test', lambda f: (f / 'test' / 'a' / '22.png').unlink()),
    'the order': ('training', lambda f: first(f / 'train' / 'a').rename(f / 'train' / 'a' / '99.png')),
}


@pytest.mark.parametrize('part, change', CHANGES.values(), ids=CHANGES)
def test_a_result_of_other_images_is_not_used(part, change, images, tmp_path):
    cfg = of_folder(images)
    result = run(cfg, tmp_path / 'runs', **quiet)
    for file in images.rglob('*.png'): os.utime(file) # other dates, the same images
    assert run(cfg, tmp_path / 'runs', **quiet) == result
    change(images)
    message = f'the {part} data of .*imgs. have changed since .*force=True .--force.'
    with pytest.raises(RunError, match=message): run(cfg, tmp_path / 'runs', **quiet)
    with pytest.raises(RunError, match=message): measure_run(cfg, tmp_path / 'runs', ['sharpness'], 10)
    assert read_result(cfg, tmp_path / 'runs') == result
    again = run(cfg, tmp_path / 'runs', force=True, **quiet)
    assert again['data_facts'] != result['data_facts']
    assert run(cfg, tmp_path / 'runs', **quiet) == again


def test_another_folder_under_the_same_name(images, tmp_path, monkeypatch):
    "`Run(data='imgs')` in one working directory and in another."
    cfg = of_folder('imgs')
    other = tmp_path / 'elsewhere'
    shutil.copytree(images, other / 'imgs')
    monkeypatch.chdir(tmp_path)
    result = run(cfg, tmp_path / 'runs', **quiet)
    monkeypatch.chdir(other)
    assert run(cfg, tmp_path / 'runs', **quiet) == result, 'a copy is the same data'
    change_pixels(first(other / 'imgs' / 'train' / 'b'))
    with pytest.raises(RunError, match='the training data of .* have changed since'):
        run(cfg, tmp_path / 'runs', **quiet)


def stored(cfg, root, name='result'): return json.loads((root / cfg.name / f'{name}.json').read_text())


def make_older(cfg, root):
    "Remove from a stored result what earlier versions did not store."
    result = stored(cfg, root)
    for key in ('weights_crc32', 'teachers_crc32'): result.pop(key, None)
    result['data_facts'].pop('train_crc32')
    (root / cfg.name / 'result.json').write_text(json.dumps(result))
    return result


def test_a_result_of_an_earlier_version_stays_valid(images, tmp_path):
    cfg = of_folder(images)
    run(cfg, tmp_path / 'runs', **quiet)
    older = make_older(cfg, tmp_path / 'runs')
    change_pixels(first(images / 'train' / 'a'))
    assert run(cfg, tmp_path / 'runs', **quiet) == older


def test_data_that_are_elsewhere_do_not_contradict(images, tmp_path):
    cfg = of_folder(images)
    result = run(cfg, tmp_path / 'runs', **quiet)
    images.rename(tmp_path / 'moved')
    assert run(cfg, tmp_path / 'runs', **quiet) == result


@pytest.mark.parametrize('part, change', list(CHANGES.values())[:2], ids=list(CHANGES)[:2])
def test_a_run_does_not_continue_with_other_images(part, change, images, tmp_path, monkeypatch):
    cfg = of_folder(images)
    with monkeypatch.context() as m:
        stop_in(m, 2, 1)
        with pytest.raises(KeyboardInterrupt): run(cfg, tmp_path, **quiet)
    change(images)
    message = f"checkpoint of '{part} data .*', not of '{part} data .*'.*force=True"
    with pytest.raises(RunError, match=message): run(cfg, tmp_path, **quiet)
    assert run(cfg, tmp_path, force=True, **quiet)['resumed'] == 0


def test_checksums_are_remembered_and_follow_the_files(images, monkeypatch):
    "The oracle is the data themselves; without a change, nothing is decoded or read again."
    before = data_checksums(images)
    assert [before['train_crc32'], before['test_crc32']] == [d.checksum() for d in load_data(images)]
    with monkeypatch.context() as m:
        m.setattr('sadt_nb.data.datasets.load_data', lambda *a, **k: pytest.fail('read again'))
        assert data_checksums(images) == before
    change_pixels(first(images / 'test' / 'a'))
    after = data_checksums(images)
    assert after['test_crc32'] != before['test_crc32']
    assert after['train_crc32'] == before['train_crc32']
    assert data_checksums('noisy_digits', noise=.1) != data_checksums('noisy_digits', noise=.2)


def test_images_on_disk_have_the_checksum_of_their_bytes(images, tmp_path):
    train, test = mapped_folder(images, tmp_path / 'mapped', 8)
    for data in (train, test):
        in_memory = data.subset(range(len(data)))
        assert data.checksum() == in_memory.checksum() == data.checksum()
    change_pixels(first(images / 'train' / 'a'))
    Image.fromarray(picture(77)).save(first(images / 'train' / 'a'))
    assert mapped_folder(images, tmp_path / 'mapped', 8)[0].checksum() != train.checksum()
    raw = bytearray(train.file.read_bytes())
    raw[-1] ^= 1
    train.file.write_bytes(raw)
    changed = type(train)(np.load(train.file, mmap_mode='c'), train.y, train.vocab, train.file)
    assert changed.checksum() == changed.subset(range(len(changed))).checksum()


# Teachers and weights

TEACHER = SMALL.but(epochs=1)
STUDENT = SMALL.but(method='distillation', teachers=TEACHER, seed=1)


def flipped(file, position, bit):
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


@pytest.mark.parametrize('older', [False, True], ids=['this version', 'an earlier version'])
def test_a_flipped_bit_in_weights_is_noticed_or_harmless(older, tmp_path):
    run(TEACHER, tmp_path, **quiet)
    if older: make_older(TEACHER, tmp_path)
    file = tmp_path / TEACHER.name / 'weights.pt'
    whole = file.read_bytes()
    right = load_model(TEACHER, tmp_path, 10).state_dict()
    rnd = random.Random(1)
    noticed = 0
    for _ in range(40):
        flipped(file, rnd.randrange(len(whole)), rnd.randrange(8))
        try:
            found = load_model(TEACHER, tmp_path, 10).state_dict()
            assert all(torch.equal(v, found[k]) for k, v in right.items())
        except RunError as e:
            assert 'force=True' in str(e)
            noticed += 1
        file.write_bytes(whole)
    assert noticed > 30
    load_model(TEACHER, tmp_path, 10)


def test_weights_of_another_training_are_noticed(tmp_path):
    "The file is whole, but the result is not its result."
    run(TEACHER, tmp_path, **quiet)
    other = TEACHER.but(seed=5)
    run(other, tmp_path, **quiet)
    shutil.copy(tmp_path / other.name / 'weights.pt', tmp_path / TEACHER.name / 'weights.pt')
    with pytest.raises(RunError, match='weights.pt does not belong to the stored result'):
        run(STUDENT, tmp_path, **quiet)


def replace_teacher(root):
    "Put other weights and their result in the place of the teacher."
    other = TEACHER.but(seed=5)
    run(other, root, **quiet)
    for name in ('weights.pt', 'result.json'):
        shutil.copy(root / other.name / name, root / TEACHER.name / name)


def test_a_result_with_another_teacher_is_not_used(tmp_path):
    result = run(STUDENT, tmp_path, **quiet)
    assert result['teachers_crc32'] == [stored(TEACHER, tmp_path)['weights_crc32']]
    replace_teacher(tmp_path)
    changed = f'weights of its teacher {TEACHER.name} have changed since .*force=True'
    with pytest.raises(RunError, match=changed): run(STUDENT, tmp_path, **quiet)
    assert run(STUDENT, tmp_path, force=True, **quiet)['teachers_crc32'] != result['teachers_crc32']


def test_a_run_does_not_continue_with_another_teacher(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        stop_in(m, 2, 1)
        with pytest.raises(KeyboardInterrupt): run(STUDENT, tmp_path, **quiet)
    replace_teacher(tmp_path)
    with pytest.raises(RunError, match="'teacher .*', not of 'teacher .*force=True"):
        run(STUDENT, tmp_path, **quiet)


# A result stands until a new one is whole

def of_files(cfg, root):
    "Return the bytes of a finished run's files."
    return {f.name: f.read_bytes() for f in (root / cfg.name).glob('[!.]*') if f.is_file()}


@pytest.fixture
def finished(tmp_path):
    "Return a finished run, its root and its files, made on other images than those of now."
    run(SMALL, tmp_path, **quiet)
    return SMALL, tmp_path, of_files(SMALL, tmp_path)


def check_that_force_goes_on(cfg, root, files, resumed):
    "The old files stand, and the next `force` continues and replaces them."
    assert of_files(cfg, root) == files
    assert run(cfg, root, **quiet) == json.loads(files['result.json'])
    time.sleep(1.1) # `started` has seconds
    again = run(cfg, root, force=True, **quiet)
    assert again['resumed'] == resumed
    assert again['started'] != json.loads(files['result.json'])['started']
    assert run(cfg, root, **quiet) == again
    assert of_files(cfg, root).keys() == files.keys()
    assert of_files(cfg, root)['weights.pt'] == files['weights.pt']
    assert not (root / cfg.name / 'new').exists()


def test_force_that_is_interrupted(finished, monkeypatch):
    cfg, root, files = finished
    with monkeypatch.context() as m:
        stop_in(m, 2, 1)
        with pytest.raises(KeyboardInterrupt): run(cfg, root, force=True, **quiet)
    check_that_force_goes_on(cfg, root, files, 2)


def forced(cfg, root):
    begin()
    real = RunRecorder.after_epoch
    def after_epoch(self):
        real(self)
        time.sleep(.3)
    RunRecorder.after_epoch = after_epoch
    run(cfg, root, force=True, **quiet)


def test_force_that_is_killed(finished):
    cfg, root, files = finished
    p = child(forced, cfg, root)
    wait_for((root / cfg.name / 'new' / 'checkpoint.pt').exists)
    os.kill(p.pid, signal.SIGKILL)
    p.join()
    assert of_files(cfg, root) == files
    again = run(cfg, root, force=True, **quiet)
    assert again['resumed'] > 0
    assert of_files(cfg, root)['weights.pt'] == files['weights.pt']


def test_force_that_diverges(finished, monkeypatch):
    cfg, root, files = finished
    def bad(self):
        self.failed = 'the loss became NaN'
        raise CancelFitException()
    with monkeypatch.context() as m:
        m.setattr(RunRecorder, '_stop_if_bad', bad)
        with pytest.raises(RunDiverged): run(cfg, root, force=True, **quiet)
    check_that_force_goes_on(cfg, root, files, 0)


class Died(BaseException): pass


@pytest.mark.parametrize('step', range(4))
def test_force_that_dies_while_it_replaces(step, finished, monkeypatch):
    "After none to three moved files, the next run completes the move without training."
    cfg, root, files = finished
    measures = dict(measures={}, weights='0')
    (root / cfg.name / 'measures.json').write_text(json.dumps(measures))
    moved = []
    real = os.replace
    def replace(source, target):
        if os.path.basename(source) in ('weights.pt', 'history.json', 'result.json'):
            if len(moved) == step: raise Died()
            moved.append(target)
        real(source, target)
    with monkeypatch.context() as m:
        m.setattr(os, 'replace', replace)
        with suppress(Died): run(cfg, root, force=True, **quiet)
    monkeypatch.setattr(runner, '_train', lambda *a: pytest.fail('trained again'))
    old = json.loads(files['result.json'])
    result = run(cfg, root, **quiet)
    assert result['wall_seconds'] != old['wall_seconds']
    assert stored(cfg, root) == result
    assert of_files(cfg, root).keys() == files.keys(), 'measures of other weights are gone'
    assert not (root / cfg.name / 'new').exists()
    load_model(cfg, root, 10)


# Threads

def with_threads(n, monkeypatch, *args, stop=None, **kwargs):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        with monkeypatch.context() as m:
            if stop: stop_in(m, *stop)
            return run(*args, **quiet, **kwargs)
    finally:
        assert torch.get_num_threads() == n, 'the number of threads is put back'
        torch.set_num_threads(before)


def test_a_run_keeps_its_number_of_threads(tmp_path, monkeypatch):
    cfg = SMALL.but(n_train=200, bs=100)
    with_threads(1, monkeypatch, cfg, tmp_path / 'whole')
    with pytest.raises(KeyboardInterrupt): with_threads(1, monkeypatch, cfg, tmp_path / 'cut', stop=(2, 1))
    with pytest.warns(UserWarning, match='began with 1 CPU threads and continues with 1, not 2.*--force'):
        result = with_threads(2, monkeypatch, cfg, tmp_path / 'cut')
    assert result['resumed'] == 2
    assert result['hardware']['threads'] == 1
    assert same(outcome(cfg, tmp_path / 'whole'), outcome(cfg, tmp_path / 'cut'))


def test_force_starts_anew_with_another_number_of_threads(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt): with_threads(1, monkeypatch, SMALL, tmp_path, stop=(2, 1))
    result = with_threads(2, monkeypatch, SMALL, tmp_path, force=True)
    assert (result['resumed'], result['hardware']['threads']) == (0, 2)


def test_a_tag_says_what_differs(tmp_path):
    "Tags of the same number of parts are compared part by part."
    assert checkpoint._other_tag('a 1, b 2, c 3', 'a 1, b 4, c 3') == "'b 2', not of 'b 4'"
    assert checkpoint._other_tag('a 1', 'a 1, b 4') == "'a 1', not of 'a 1, b 4'"
