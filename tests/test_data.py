"Loading from every source, the loader, and CIFAR-10 itself where SADT_DATA points to it."
import hashlib
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from sadt_nb.data import datasets
from sadt_nb.data.augment import CropFlip, CutMix
from sadt_nb.data.datasets import get_dls, load_data
from sadt_nb.data.loader import ImageData, TensorDL

needs_cifar = pytest.mark.skipif(not os.environ.get('SADT_DATA'), reason='SADT_DATA does not point to CIFAR-10')


@needs_cifar
def test_cifar10_is_complete_and_cached():
    train, test = load_data('cifar10')
    assert len(train) == 50_000 and len(test) == 10_000 and train.x.shape[1:] == (32, 32, 3)
    assert torch.bincount(train.y).tolist() == [5000] * 10 and torch.bincount(test.y).tolist() == [1000] * 10
    assert train.vocab == ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']
    again = load_data('cifar10')
    assert torch.equal(again[0].x[::5000], train.x[::5000])


@needs_cifar
def test_cifar10_is_not_cifar100():
    with pytest.raises(ValueError, match='10 classes, cifar100 has 100'): load_data('cifar100')


def test_nothing_to_find_says_what_to_do(monkeypatch):
    monkeypatch.delenv('SADT_DATA', raising=False)
    def offline(url): raise OSError('no network')
    monkeypatch.setattr(datasets, 'untar_data', offline)
    with pytest.raises(FileNotFoundError, match='set SADT_DATA'): load_data('cifar10')


def fake_official(folder, cls, monkeypatch):
    "Batches in the official format whose MD5 sums are entered as the published ones."
    folder.mkdir()
    rng = np.random.default_rng(0)
    def write(name, obj):
        raw = pickle.dumps(obj, protocol=2)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]
    part = lambda: {'data': rng.integers(0, 256, (20, 3072), dtype=np.uint8), 'labels': list(range(10)) * 2}
    monkeypatch.setattr(cls, 'train_list', [write('data_batch_1', part())])
    monkeypatch.setattr(cls, 'test_list', [write('test_batch', part())])
    name, md5 = write('batches.meta', {'label_names': [f'c{i}' for i in range(10)]})
    monkeypatch.setattr(cls, 'meta', dict(filename=name, key='label_names', md5=md5))


def test_official_batches_are_read_when_their_sums_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    fake_official(tmp_path / 'cifar-10-batches-py', datasets.CIFAR10, monkeypatch)
    for path in (tmp_path, tmp_path / 'cifar-10-batches-py'):
        train, test = load_data('cifar10', path=path)
        assert len(train) == 20 and train.vocab[3] == 'c3'
    raw = pickle.loads((tmp_path / 'cifar-10-batches-py' / 'data_batch_1').read_bytes())['data'][4].reshape(3, 32, 32)
    assert np.array_equal(train.x[4].permute(2, 0, 1).numpy(), raw)

    archive = tmp_path / datasets.CIFAR10.filename
    with tarfile.open(archive, 'w:gz') as tar: tar.add(tmp_path / 'cifar-10-batches-py', 'cifar-10-batches-py')
    monkeypatch.setattr(datasets.CIFAR10, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    assert torch.equal(load_data('cifar10', path=archive)[0].x, train.x)


def test_a_tampered_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    fake_official(tmp_path / 'cifar-10-batches-py', datasets.CIFAR10, monkeypatch)
    evil, flag = tmp_path / 'cifar-10-batches-py' / 'data_batch_1', tmp_path / 'opened'
    evil.write_bytes(f"cos\nmkdir\n(S'{flag}'\ntR.".encode())
    with pytest.raises(ValueError, match='MD5'): load_data('cifar10', path=tmp_path)
    assert not flag.exists()
    pickle.loads(evil.read_bytes())
    assert flag.exists(), 'the pickle does harm when it is opened, so the test can fail'


def test_nested_superclasses_and_other_sizes(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    for part in ('train', 'test'):
        for sup, cls, color in (('fish', 'ray', 10), ('fish', 'shark', 20), ('trees', 'oak', 30)):
            f = tmp_path / 'nested' / part / sup / cls / 'a.png'
            f.parent.mkdir(parents=True)
            Image.new('RGB', (8, 8), (color,) * 3).save(f)
    train, _ = load_data(tmp_path / 'nested')
    assert train.vocab == ['oak', 'ray', 'shark']
    assert {train.vocab[y]: int(x[0, 0, 0]) for x, y in zip(train.x, train.y)} == {'ray': 10, 'shark': 20, 'oak': 30}
    assert load_data(tmp_path / 'nested', size=16)[0].x.shape[1:] == (16, 16, 3)


def test_a_changed_folder_is_read_again_and_a_damaged_cache_is_ignored(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    def write(value):
        for part in ('train', 'test'):
            f = tmp_path / 'd' / part / 'a' / 'x.png'
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (4, 4), (value,) * 3).save(f)
            os.utime(f, (value, value))
    write(1); assert load_data(tmp_path / 'd')[0].x.max() == 1
    write(2); assert load_data(tmp_path / 'd')[0].x.max() == 2
    for f in (tmp_path / 'cache').iterdir(): f.write_bytes(b'damaged')
    assert load_data(tmp_path / 'd')[0].x.max() == 2


def test_order_and_augmentation_have_generators_of_their_own():
    data = ImageData(torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8), torch.arange(40) % 4, 'abcd')
    def ids(tfms):
        dl = TensorDL(data, 8, shuffle=True, seed=3, tfms=tfms, device='cpu')
        return [(b, dl.ids.tolist())[1] for _ in range(3) for b in dl]
    assert ids([]) == ids([CropFlip(2), CutMix(4, 1.)])
    a, b = (list(TensorDL(data, 8, shuffle=True, seed=3, tfms=[CropFlip(2), CutMix(4, 1.)], device='cpu')) for _ in range(2))
    assert all(torch.equal(p[0], q[0]) and torch.equal(p[1], q[1]) for p, q in zip(a, b))


def test_the_loader_continues_from_its_state():
    data = ImageData(torch.randint(0, 256, (20, 4, 4, 3), dtype=torch.uint8), torch.zeros(20), 'a')
    make = lambda: TensorDL(data, 5, shuffle=True, seed=1, tfms=[CropFlip(1)], device='cpu')
    a, b = make(), make()
    list(a); state = a.state_dict(); b.load_state_dict(state)
    assert all(torch.equal(p[0], q[0]) for p, q in zip(a, b))


def test_mixing_keeps_labels_a_distribution_and_leaves_the_data_alone():
    dls = get_dls('digits', bs=100, cutmix=1., crop=2, flip=True, device='cpu')
    before = dls.train.dataset.x.clone()
    for x, y in dls.train: assert torch.allclose(y.sum(1), torch.ones(len(y))) and (y >= 0).all() and x.min() >= 0 and x.max() <= 1
    assert torch.equal(dls.train.dataset.x, before)
    assert dls.valid.one_batch()[1].ndim == 1, 'validation is not mixed'


def test_noise_is_seeded_and_spares_the_test_labels():
    a, b, c = (load_data('noisy_digits', seed=s)[0].y for s in (0, 0, 1))
    clean = load_data('digits')[0].y
    assert torch.equal(a, b) and not torch.equal(a, c) and (a != clean).sum() == round(.4 * len(clean))
    with pytest.raises(ValueError, match='noise'): load_data('noisy_digits', noise=1.)
