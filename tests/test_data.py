"Loading from every source, augmentation, the loader, and CIFAR-10 itself where SADT_DATA points to it."
import hashlib
import os
import pickle
import tarfile
from collections import Counter
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from sadt_nb.data import datasets, loader
from sadt_nb.data.augment import CropFlip, Cutout, CutMix, ResizedCrop
from sadt_nb.data.autoaugment import AutoAugment, BatchedOps
from sadt_nb.data.datasets import digits, get_dls, load_data, wrong_labels
from sadt_nb.data.loader import ImageData, TensorDL
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.runner import run
from scipy.io import savemat
from scipy.stats import chisquare
from sklearn.datasets import load_digits
from torchvision.transforms import InterpolationMode, autoaugment

needs_cifar = pytest.mark.skipif(not os.environ.get('SADT_DATA'), reason='SADT_DATA does not name CIFAR-10')
CIFAR10_CLASSES = 'airplane automobile bird cat deer dog frog horse ship truck'.split()


@needs_cifar
def test_cifar10_is_complete_and_cached():
    train, test = load_data('cifar10')
    assert len(train) == 50_000
    assert len(test) == 10_000
    assert train.x.shape[1:] == (32, 32, 3)
    assert torch.bincount(train.y).tolist() == [5000] * 10
    assert torch.bincount(test.y).tolist() == [1000] * 10
    assert train.vocab == CIFAR10_CLASSES
    again = load_data('cifar10')
    assert torch.equal(again[0].x[::5000], train.x[::5000])


@needs_cifar
def test_cifar10_is_not_cifar100():
    source = datasets._find_cifar('cifar10', None)
    with pytest.raises(ValueError, match='has 10 classes, not 100'): load_data('cifar100', path=source)


def test_missing_data_raises_an_error_that_names_sadt_data(monkeypatch):
    monkeypatch.delenv('SADT_DATA', raising=False)
    def offline(url): raise OSError('no network')
    monkeypatch.setattr(datasets, 'untar_data', offline)
    with pytest.raises(FileNotFoundError, match='set SADT_DATA'): load_data('cifar10')


def fake_official(folder, cls, monkeypatch):
    "Write batches in the official format, and patch the published MD5 sums with theirs."
    folder.mkdir()
    rng = np.random.default_rng(0)
    def write(name, obj):
        raw = pickle.dumps(obj, protocol=2)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]
    def part():
        return {'data': rng.integers(0, 256, (20, 3072), dtype=np.uint8), 'labels': list(range(10)) * 2}
    monkeypatch.setattr(cls, 'train_list', [write('data_batch_1', part())])
    monkeypatch.setattr(cls, 'test_list', [write('test_batch', part())])
    name, md5 = write('batches.meta', {'label_names': [f'c{i}' for i in range(10)]})
    monkeypatch.setattr(cls, 'meta', dict(filename=name, key='label_names', md5=md5))


def test_official_batches_are_read_when_their_sums_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'cifar-10-batches-py'
    fake_official(folder, datasets.CIFAR10, monkeypatch)
    for path in (tmp_path, folder):
        train, test = load_data('cifar10', path=path)
        assert len(train) == 20
        assert train.vocab[3] == 'c3'
    stored = pickle.loads((folder / 'data_batch_1').read_bytes())['data']
    assert np.array_equal(train.x[4].permute(2, 0, 1).numpy(), stored[4].reshape(3, 32, 32))

    archive = tmp_path / datasets.CIFAR10.filename
    with tarfile.open(archive, 'w:gz') as tar: tar.add(folder, 'cifar-10-batches-py')
    monkeypatch.setattr(datasets.CIFAR10, 'tgz_md5', hashlib.md5(archive.read_bytes()).hexdigest())
    assert torch.equal(load_data('cifar10', path=archive)[0].x, train.x)


def test_a_tampered_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    fake_official(tmp_path / 'cifar-10-batches-py', datasets.CIFAR10, monkeypatch)
    evil = tmp_path / 'cifar-10-batches-py' / 'data_batch_1'
    flag = tmp_path / 'opened'
    evil.write_bytes(f"cos\nmkdir\n(S'{flag}'\ntR.".encode())
    with pytest.raises(ValueError, match='MD5'): load_data('cifar10', path=tmp_path)
    assert not flag.exists()
    pickle.loads(evil.read_bytes())
    assert flag.exists(), 'the pickle does harm when it is opened, so the test can fail'


def grey(level, side): return np.full((side, side, 3), level, dtype=np.uint8)


def write_image(file, pixels):
    "Write an array of bytes `(height, width, 3)` as an image, and make the folders above it."
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def test_nested_superclasses_and_other_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    root = tmp_path / 'nested'
    for part in ('train', 'test'):
        write_image(root / part / 'fish' / 'ray' / 'a.png', grey(10, 8))
        write_image(root / part / 'fish' / 'shark' / 'a.png', grey(20, 8))
        write_image(root / part / 'trees' / 'oak' / 'a.png', grey(30, 8))
    with pytest.warns(UserWarning, match='belong to the class of the outer folder'):
        train, _ = load_data(root)
    assert train.vocab == ['fish', 'trees']
    assert sorted((train.vocab[y], int(x[0, 0, 0])) for x, y in zip(train.x, train.y)) == [
        ('fish', 10), ('fish', 20), ('trees', 30)]
    with pytest.warns(UserWarning): assert load_data(root, size=16)[0].x.shape[1:] == (16, 16, 3)


def test_classes_of_cifar100_are_the_innermost_folders(tmp_path, monkeypatch):
    "fastai's archive has twenty superclasses around the hundred classes."
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    for part in ('train', 'test'):
        for i in range(100):
            folder = tmp_path / 'c' / part / f'super{i % 20}' / f'class{i:02}'
            write_image(folder / 'a.png', grey(i, 8))
    train, _ = load_data('cifar100', path=tmp_path / 'c')
    assert train.vocab == [f'class{i:02}' for i in range(100)]
    assert [int(x[0, 0, 0]) for x in train.x[train.y.argsort()]] == list(range(100))


def test_a_changed_folder_is_read_again_and_a_damaged_cache_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    root = tmp_path / 'd'
    def write(value):
        for part in ('train', 'test'):
            file = root / part / 'a' / 'x.png'
            write_image(file, grey(value, 4))
            os.utime(file, (value, value))
    write(1)
    assert load_data(root)[0].x.max() == 1
    write(2)
    assert load_data(root)[0].x.max() == 2
    for f in (tmp_path / 'cache').iterdir(): f.write_bytes(b'damaged')
    assert load_data(root)[0].x.max() == 2


def test_order_and_augmentation_have_generators_of_their_own():
    x = torch.randint(0, 256, (40, 8, 8, 3), dtype=torch.uint8)
    data = ImageData(x, torch.arange(40) % 4, 'abcd')
    def loader(tfms): return TensorDL(data, 8, shuffle=True, seed=3, tfms=tfms, device='cpu')
    def ids_of_three_epochs(tfms):
        dl, seen = loader(tfms), []
        for _ in range(3):
            for _ in dl: seen.append(dl.ids.tolist())
        return seen
    assert ids_of_three_epochs([]) == ids_of_three_epochs([CropFlip(2), CutMix(4, 1.)])
    first, second = loader([CropFlip(2), CutMix(4, 1.)]), loader([CropFlip(2), CutMix(4, 1.)])
    for (xa, ya), (xb, yb) in zip(first, second, strict=True):
        assert torch.equal(xa, xb)
        assert torch.equal(ya, yb)


def test_the_loader_continues_from_its_state():
    data = ImageData(torch.randint(0, 256, (20, 4, 4, 3), dtype=torch.uint8), torch.zeros(20), 'a')
    def make(): return TensorDL(data, 5, shuffle=True, seed=1, tfms=[CropFlip(1)], device='cpu')
    first, second = make(), make()
    list(first)
    second.load_state_dict(first.state_dict())
    for (xa, _), (xb, _) in zip(first, second, strict=True): assert torch.equal(xa, xb)


def test_mixing_keeps_labels_a_distribution_and_leaves_the_data_alone():
    dls = get_dls('digits', bs=100, cutmix=1., crop=2, flip=True, device='cpu')
    before = dls.train.dataset.x.clone()
    for x, y in dls.train:
        assert torch.allclose(y.sum(1), torch.ones(len(y)))
        assert (y >= 0).all()
        assert x.min() >= 0
        assert x.max() <= 1
    assert torch.equal(dls.train.dataset.x, before)
    assert dls.valid.one_batch()[1].ndim == 1, 'validation is not mixed'


def test_label_noise_depends_on_the_seed_and_changes_forty_percent():
    def labels(seed): return load_data('noisy_digits', seed=seed)[0].y
    first, again, other = labels(0), labels(0), labels(1)
    clean = load_data('digits')[0].y
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first != clean).sum() == round(.4 * len(clean))
    with pytest.raises(ValueError, match='noise'): load_data('noisy_digits', noise=1.)


SPACE = autoaugment.AutoAugment()._augmentation_space(10, (32, 32))


def every_operation():
    "Return AutoAugment's operations as (name, level, sign): every level and sign that an operation has."
    ops = []
    for name, (strengths, signed) in SPACE.items():
        levels = range(10) if strengths.ndim else [None]
        signs = (1, -1) if signed else (1,)
        ops += product([name], levels, signs)
    return ops


EVERY_OP = every_operation()


def hard_images(n, h, w):
    "Return noise and images with one colour, two colours, the darkest bytes, a white line, a black line."
    x = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[0] = 77
    x[1] = x[1] // 128 * 200
    x[2] = x[2] // 64
    x[3, 0] = 255
    x[4, :, 0] = 0
    return x


@pytest.mark.parametrize('fill', [0, (10, 20, 30)], ids=['black', 'coloured'])
@pytest.mark.parametrize('size', [(32, 32), (28, 40), (5, 7), (3, 3)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_each_operation_equals_torchvision_on_single_images(size, fill):
    x = hard_images(7, *size)
    space = autoaugment.AutoAugment()._augmentation_space(10, size)
    ops = BatchedOps(EVERY_OP, fill)
    fills = [float(f) for f in fill] if fill else None
    for i, (name, level, sign) in enumerate(EVERY_OP):
        strength = 0. if level is None else sign * float(space[name][0][level])
        want = [autoaugment._apply_op(im, name, strength, InterpolationMode.NEAREST, fills) for im in x]
        assert torch.equal(ops(x, np.full(7, i)), torch.stack(want)), (name, strength)


def test_images_with_different_operations_keep_their_places():
    x = hard_images(203, 8, 8)
    order = np.random.default_rng(0).permutation(203)
    ops = BatchedOps(EVERY_OP)
    alone = torch.cat([ops(x[i:i + 1], order[i:i + 1]) for i in range(203)])
    assert torch.equal(ops(x, order), alone)
    assert torch.equal(ops(x, np.full(203, -1)), x)


@pytest.mark.parametrize('policy', ['cifar10', 'svhn', 'imagenet'])
def test_autoaugment_equals_torchvision_under_the_same_numbers(policy):
    images = hard_images(200, 20, 12)
    n = len(images)
    oracle = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(policy), fill=[1., 2., 3.])
    rng = np.random.default_rng(0)
    numbers = zip(rng.integers(0, 25, n), rng.random((n, 2)), rng.integers(0, 2, (n, 2)))
    oracle.get_params = lambda _: next(numbers)
    ours = AutoAugment(policy, fill=(1, 2, 3))
    got, _ = ours(images.permute(0, 2, 3, 1), None, np.random.default_rng(0))
    assert torch.equal(got.permute(0, 3, 1, 2), torch.stack([oracle(im) for im in images]))


def outcomes(name, p, level):
    "Return the possible operations of a policy's entry with their probabilities; `None` is no operation."
    if not SPACE[name][1]: return [(None, 1 - p), ((name, level, 1), p)]
    return [(None, 1 - p), ((name, level, 1), p / 2), ((name, level, -1), p / 2)]


@pytest.mark.parametrize('policy', ['cifar10', 'svhn'])
def test_operations_are_drawn_with_the_published_probabilities(policy):
    expected = Counter()
    for first, second in autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(policy)).policies:
        for (a, pa), (b, pb) in product(outcomes(*first), outcomes(*second)): expected[a, b] += pa * pb / 25
    tfm, n = AutoAugment(policy), 50_000
    name = [*tfm.batched.ops, None] # -1 is nothing
    counts = Counter((name[a], name[b]) for a, b in tfm.draw(n, np.random.default_rng(1)))
    possible = [k for k, p in expected.items() if p > 1e-12]
    assert set(counts) <= set(possible)
    assert chisquare([counts[k] for k in possible], [n * expected[k] for k in possible]).pvalue > .001


@pytest.mark.parametrize('n', [0, 1, 2, 33])
def test_autoaugment_takes_any_number_of_images(n):
    x = hard_images(33, 9, 12).permute(0, 2, 3, 1).contiguous()[:n]
    y = torch.arange(n)
    kept = x.clone()
    def augmented(seed): return AutoAugment('svhn')(x, y, np.random.default_rng(seed))
    first, labels = augmented(0)
    again, _ = augmented(0)
    other, _ = augmented(1)
    assert first.shape == x.shape
    assert first.dtype == torch.uint8
    assert first.is_contiguous()
    assert labels is y
    assert torch.equal(first, again)
    assert n < 2 or not torch.equal(first, other)
    assert torch.equal(x, kept)


def test_autoaugment_tables_follow_the_size_of_the_images():
    tfm = AutoAugment()
    for size in ((32, 32), (16, 16), (32, 32)):
        x = hard_images(50, *size).permute(0, 2, 3, 1).contiguous()
        used_before, _ = tfm(x, None, np.random.default_rng(0))
        fresh, _ = AutoAugment()(x, None, np.random.default_rng(0))
        assert torch.equal(used_before, fresh)


def test_cutout_hides_every_pixel_equally_often_and_leaves_its_input_alone():
    x = torch.full((20_000, 4, 6, 3), 255, dtype=torch.uint8)
    y = torch.arange(len(x))
    got, labels = Cutout(1)(x, y, np.random.default_rng(0))
    times = (got[..., 0] == 0).sum(0)
    mean = len(x) / 24
    assert labels is y
    assert x.min() == 255
    assert times.sum() == len(x)
    assert ((times - mean).abs() < 5 * mean**.5).all()
    assert Cutout(4)(x[:0], y[:0], np.random.default_rng(0))[0].shape == (0, 4, 6, 3)


@pytest.mark.parametrize('valid, most, left', [(0., 1437, ''), (.1, 1293, ' that validation leaves')])
def test_as_many_images_as_given_train_or_an_error_says_how_many_there_are(valid, most, left):
    for n in (10, most):
        dls = get_dls('digits', n_train=n, bs=10, valid=valid, device='cpu')
        assert len(dls.train.x) == n
    for n in (9, most + 1):
        limits = (f'from 10, the number of classes, to {most - 10}, or {most}, the number of training images'
                  f'{left}; got {n}$')
        with pytest.raises(ValueError, match=limits):
            get_dls('digits', n_train=n, bs=5, valid=valid, device='cpu')


def test_impossible_augmentations_are_refused():
    x = hard_images(5, 8, 8).permute(0, 2, 3, 1).contiguous()
    rng = np.random.default_rng(0)
    loaders = partial(get_dls, 'digits', device='cpu')
    refused = [
        (partial(Cutout, 0), 'at least 1, got 0'),
        (partial(Cutout, 2.5), 'whole number'),
        (partial(Cutout(9), x, None, rng), 'at most 8'),
        (partial(Cutout, 4, fill=256), 'byte'),
        (partial(Cutout, 4, fill=(1, 2)), 'three'),
        (partial(Cutout, 4, fill=.5), 'got 0.5'),
        (partial(AutoAugment, 'cifar100'), 'cifar10, svhn'),
        (partial(AutoAugment, fill=-1), 'byte'),
        (partial(AutoAugment(), x[:, :2], None, rng), 'at least 3 pixels'),
        (partial(loaders, cutout=-1), 'at least 1'),
        (partial(loaders, cutout=33), '33'),
        (partial(loaders, autoaugment='cifar'), "got 'cifar'")]
    for call, message in refused:
        with pytest.raises(ValueError, match=message): call()


def test_get_dls_augments_in_the_published_order_and_training_images_only():
    dls = get_dls('digits', bs=64, crop=4, flip=True, autoaugment='svhn', cutout=16, cutmix=1.,
                  mean=(.5, .25, 0.), std=(.2, .2, .2), device='cpu')
    crop, policy, cutout, mix = dls.train.tfms
    assert [type(t) for t in dls.train.tfms] == [CropFlip, AutoAugment, Cutout, CutMix]
    assert (crop.pad, cutout.size, mix.alpha) == (4, 16, 1.)
    assert np.array_equal(policy.op, AutoAugment('svhn').op)
    assert policy.batched.ops == AutoAugment('svhn').batched.ops
    assert cutout.fill.tolist() == [128, 64, 0], 'zero after normalisation, to the nearest byte'
    assert not dls.valid.tfms
    assert not dls.loaders[2].tfms
    black = get_dls('digits', autoaugment='cifar10', cutout=8, device='cpu').train.tfms[1]
    assert black.fill.tolist() == [0, 0, 0]
    x, y = dls.train.one_batch()
    assert x.shape == (64, 3, 32, 32)
    assert torch.allclose(y.sum(1), torch.ones(64))
    def seeded(): return get_dls('digits', bs=64, autoaugment='cifar10', cutout=8, seed=5, device='cpu').train
    for (xa, _), (xb, _) in zip(seeded(), seeded(), strict=True): assert torch.equal(xa, xb)


def test_svhn_from_torchvisions_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / 'svhn'
    folder.mkdir()
    sets, with_our_sums = {}, {}
    for part, n in (('train', 30), ('test', 20)):
        x = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        y = np.arange(n) % 10
        labels = np.where(y == 0, 10, y)[:, None] # the files call zero ten
        url, name, _ = datasets.SVHN.split_list[part]
        savemat(folder / name, dict(X=x.transpose(1, 2, 3, 0), y=labels))
        sets[part] = x, y
        with_our_sums[part] = [url, name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
    with pytest.raises(ValueError, match='MD5'): load_data('svhn', path=folder)
    monkeypatch.setattr(datasets.SVHN, 'split_list', with_our_sums)
    monkeypatch.setenv('SADT_DATA', str(tmp_path))
    for loaded, (x, y) in zip(load_data('svhn'), sets.values(), strict=True):
        assert np.array_equal(loaded.x.numpy(), x)
        assert np.array_equal(loaded.y.numpy(), y)
    monkeypatch.setenv('SADT_DATA', str(tmp_path / 'elsewhere'))
    with pytest.raises(FileNotFoundError, match='set SADT_DATA'): load_data('svhn')


def copy_file(source, target):
    "Copy a file, and make the folders above the copy."
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def test_tiny_imagenet_as_distributed_and_as_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    def save(file): write_image(file, rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    tiny, plain = tmp_path / 'tiny', tmp_path / 'plain'
    labels = ['n01', 'n02', 'n03']
    for label in labels:
        for i in range(4): save(tiny / 'train' / label / 'images' / f'{label}_{i}.png')
    rows = [(f'val_{i}.png', labels[(2 * i + 1) % 3]) for i in range(6)]
    for name, _ in rows: save(tiny / 'val' / 'images' / name)
    annotations = ''.join(f'{name}\t{label}\t0\t0\t7\t7\n' for name, label in rows)
    (tiny / 'val' / 'val_annotations.txt').write_text(annotations)
    train, test = load_data('tiny_imagenet', path=tiny)
    assert train.vocab == test.vocab == labels
    assert train.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert test.y.tolist() == [labels.index(label) for _, label in rows]
    assert np.array_equal(test.x[5].numpy(), np.asarray(Image.open(tiny / 'val' / 'images' / 'val_5.png')))

    for name, label in rows: copy_file(tiny / 'val' / 'images' / name, plain / 'test' / label / name)
    for f in (tiny / 'train').glob('*/images/*'): copy_file(f, plain / 'train' / f.parents[1].name / f.name)
    train_again, test_again = load_data('tiny_imagenet', path=plain)
    assert torch.equal(train_again.x, train.x)
    assert sorted(map(bytes, test_again.x.numpy())) == sorted(map(bytes, test.x.numpy()))


@pytest.mark.parametrize('mean, std', [((.1, .2, .3), 2.), (.5, (1., 2., 4.)), ((.1, .2, .3), (1., 2., 4.))])
@pytest.mark.parametrize('channels_last', [False, True])
def test_mean_and_std_are_one_number_or_three(mean, std, channels_last):
    x = torch.randint(0, 256, (6, 5, 4, 3), dtype=torch.uint8)
    data = ImageData(x, torch.arange(6), list(range(6)))
    dl = TensorDL(data, bs=6, mean=mean, std=std, channels_last=channels_last, dtype=torch.float64,
                  device='cpu')
    got, _ = dl.one_batch()
    m, s = (torch.as_tensor(v, dtype=torch.float64).expand(3).view(3, 1, 1) for v in (mean, std))
    torch.testing.assert_close(got, (x.permute(0, 3, 1, 2) / 255. - m) / s, rtol=1e-6, atol=1e-7)


def test_imagenet_is_read_from_disk_and_runs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    root = tmp_path / 'imagenet'
    for part, n in (('train', 9), ('val', 6)):
        for i in range(n):
            pixels = rng.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)
            write_image(root / part / f'n{i % 3}' / f'{part}_{i}.JPEG', pixels)
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('SADT_DATA', str(tmp_path))
    dls = get_dls('imagenet', bs=3, valid=0., size=32, device='cpu')
    assert dls.c == 3
    assert len(dls.train.dataset) == 9
    assert len(dls[2].dataset) == 6
    assert dls.train.dataset.to('meta') is dls.train.dataset
    cfg = Run(data='imagenet', data_args=dict(size=32), bs=3, epochs=1, valid=0.)
    result = run(cfg, tmp_path / 'runs', progress=False)
    assert result['status'] == 'finished'
    assert result['steps'] == 3
    with pytest.raises(FileNotFoundError, match='val'): load_data('imagenet', path=root / 'train')


def test_every_offset_of_a_crop_is_drawn_equally_often():
    "A single bright pixel shows the offset: 0, 1 and 2 along each axis for a border of 1."
    n = 1800
    x = torch.zeros(n, 3, 3, 3, dtype=torch.uint8)
    x[:, 1, 1] = 255
    cropped, _ = CropFlip(1, flip=False)(x, torch.zeros(n), np.random.default_rng(0))
    places = Counter(map(tuple, cropped[..., 0].nonzero()[:, 1:].tolist()))
    assert set(places) == set(product(range(3), repeat=2))
    assert sum(places.values()) == n
    assert chisquare([*places.values()]).pvalue > 1e-3


def test_digits_are_the_scans_of_scikit_learn():
    "White ink on black, 0 to 16 as 0 to 255, each pixel as 4 x 4; no scan is lost and each keeps its class."
    parts = digits()
    assert [len(p) for p in parts] == [1437, 360]
    found = Counter()
    for p in parts:
        x = p.x.numpy()
        assert (x == x[:, ::4, ::4, :1].repeat(4, 1).repeat(4, 2)).all()
        small = np.round(x[:, ::4, ::4, 0] / 255 * 16).astype(int)
        found.update((scan.tobytes(), label) for scan, label in zip(small, p.y.tolist()))
    raw = load_digits()
    assert found == Counter((s.astype(int).tobytes(), int(t)) for s, t in zip(raw.images, raw.target))
    assert {p.x.max().item() for p in parts} == {255}


@pytest.mark.parametrize('changed', ['size', 'date'])
def test_the_cache_notices_other_sizes_and_other_dates(changed, tmp_path, monkeypatch):
    "A file of the same name is decoded anew if only its date, or only its size, has changed."
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    root = tmp_path / 'd'
    def write(value, extra=b'', date=1000):
        for part in ('train', 'test'):
            file = root / part / 'a' / 'x.bmp' # all of them have the same size
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(file)
            file.write_bytes(file.read_bytes() + extra)
            os.utime(file, (date, date))
    write(1)
    assert load_data(root)[0].x.max() == 1
    write(2)
    assert load_data(root)[0].x.max() == 1, 'the same size and date: not opened'
    write(3, **dict(size=dict(extra=b'0'), date=dict(date=2000))[changed])
    assert load_data(root)[0].x.max() == 3


class Planted:
    "Something that writes a file when it is unpickled."
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')


def test_a_cache_with_a_pickle_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    root = tmp_path / 'd'
    for part in ('train', 'test'): write_image(root / part / 'a' / 'x.png', grey(7, 4))
    load_data(root)
    cache, = (tmp_path / 'cache').iterdir()
    arrays = dict(np.load(cache))
    arrays['vocab'] = np.array([Planted(tmp_path / 'opened')], dtype=object)
    np.savez(cache, **arrays)
    assert load_data(root)[0].x.max() == 7
    assert not (tmp_path / 'opened').exists()


def test_every_process_has_the_same_order_and_other_augmentation(monkeypatch):
    data = ImageData(torch.zeros(40, 4, 4, 3, dtype=torch.uint8), torch.zeros(40), 'a')
    orders, draws = [], []
    for rank in range(3):
        monkeypatch.setattr(loader, 'rank_distrib', lambda rank=rank: rank)
        dl = TensorDL(data, 8, shuffle=True, seed=1, device='cpu')
        orders.append([dl.get_idxs().tolist() for _ in range(3)])
        draws.append(dl.tfm_rng.random())
    assert orders[0] == orders[1] == orders[2]
    assert len(set(draws)) == 3
    for order in orders[0]: assert sorted(order) == [*range(40)]
    first, second, third = orders[0]
    assert first != second != third != first, 'each epoch has an order of its own'
    plain = TensorDL(data, 8, seed=1, device='cpu')
    assert [plain.get_idxs().tolist() for _ in range(2)] == [[*range(40)]] * 2


def test_titles_of_images():
    "A class by its name; a mixture by the shares of its classes, largest first, without the tiny ones."
    assert loader._class_title(torch.tensor(1), ['cat', 'dog']) == 'dog'
    assert loader._class_title(torch.tensor([.299, .7, .001]), ['cat', 'dog', 'cow']) == '70% dog\n30% cat'


@pytest.mark.parametrize('position', [0, -1])
@pytest.mark.parametrize('n', [0, 1, 3])
def test_a_single_operation_takes_any_number_of_images(n, position):
    x = hard_images(5, 4, 4)[:n]
    done = BatchedOps([('Invert', None, 1)])(x, np.full(n, position))
    assert torch.equal(done, x if position else 255 - x)


@pytest.mark.parametrize('h, w, window', [(4, 40, (0, 17, 4, 5)), (40, 4, (17, 0, 5, 4))])
def test_a_part_that_fits_nowhere_is_the_middle(h, w, window):
    "As in torchvision: the largest middle part whose sides are as 3 to 4 or as 4 to 3."
    found = ResizedCrop(smallest=1.).windows(3, h, w, np.random.default_rng(0))
    assert [v.tolist() for v in found] == [[v] * 3 for v in window]


@pytest.mark.parametrize('train, test', [('ab', 'a'), ('a', 'ab')])
def test_a_class_needs_images_in_both_parts(train, test):
    found = {part: [('file', label, 'name') for label in classes]
             for part, classes in (('train', train), ('test', test))}
    with pytest.raises(ValueError, match="class 'b' has no images in t"): datasets._check_parts(found, 'here')


@pytest.mark.parametrize('flip', [True, False])
def test_images_are_mirrored_only_if_asked(flip):
    tfms = get_dls('digits', crop=2, flip=flip, device='cpu').train.tfms
    crop, = [t for t in tfms if isinstance(t, CropFlip)]
    assert crop.flip is flip


def test_rectangles_have_their_centres_in_every_row_and_column():
    top, bottom, left, right = CutMix(2).boxes(500, 3, 3, np.random.default_rng(0))
    smallest = (bottom - top == 1) & (right - left == 1)
    assert {*zip(top[smallest].tolist(), left[smallest].tolist())} == {*product(range(3), range(3))}


@pytest.mark.parametrize('y', [[], np.zeros(0), torch.zeros(0, dtype=torch.long)])
def test_no_images_have_no_labels(y):
    data = ImageData(np.zeros((0, 8, 8, 3), np.uint8), y, ['a', 'b'])
    assert len(data) == 0 and data.y.dtype == torch.long


@pytest.mark.parametrize('kind', [np.uint8, np.int32, bool, np.float32])
def test_whole_numbers_of_any_type_are_labels(kind):
    data = ImageData(np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1], kind), ['a', 'b'])
    assert data.y.tolist() == [0, 1]


def test_a_wrong_label_needs_a_second_class():
    data = ImageData(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, ['a'])
    with pytest.raises(ValueError, match='at least two classes'): wrong_labels(data, .5)
    assert wrong_labels(data, 0.).y.tolist() == [0] * 4


def test_a_stratified_part_leaves_out_none_or_one_of_each_class():
    assert len(get_dls('digits', n_train=1283, bs=10, device='cpu').train.x) == 1283
    for n in (1284, 1292):
        with pytest.raises(ValueError, match=f'from 10, the number of classes, to 1283, or 1293.*got {n}'):
            get_dls('digits', n_train=n, bs=10, device='cpu')
