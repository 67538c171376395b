"Loading from every source, the loader, and CIFAR-10 itself where SADT_DATA points to it."
import hashlib
import os
import pickle
import tarfile
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from sadt_nb.data import datasets
from sadt_nb.data.augment import AutoAugment, BatchedOps, CropFlip, Cutout, CutMix
from sadt_nb.data.datasets import get_dls, load_data
from sadt_nb.data.loader import ImageData, TensorDL
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.runner import run
from scipy.io import savemat
from scipy.stats import chisquare
from torchvision.transforms import InterpolationMode, autoaugment

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
    source = datasets._find_cifar('cifar10', None)
    with pytest.raises(ValueError, match='10 classes, cifar100 has 100'): load_data('cifar100', path=source)


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


SPACE = autoaugment.AutoAugment()._augmentation_space(10, (32, 32))
EVERY_OP = [(name, level, sign) for name, (m, signed) in SPACE.items() for level in (range(10) if m.ndim else [None]) for sign in ((1, -1) if signed else (1,))]


def hard_images(n, h, w):
    "Noise, and images of one colour, of two, of the darkest bytes, with a white line, with a black one."
    x = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2] = 77, x[1] // 128 * 200, x[2] // 64
    x[3, 0], x[4, :, 0] = 255, 0
    return x


@pytest.mark.parametrize('fill', [0, (10, 20, 30)], ids=['black', 'coloured'])
@pytest.mark.parametrize('size', [(32, 32), (28, 40), (5, 7), (3, 3)], ids=lambda s: f'{s[0]}x{s[1]}')
def test_each_operation_equals_torchvision_on_single_images(size, fill):
    x, space = hard_images(7, *size), autoaugment.AutoAugment()._augmentation_space(10, size)
    ops = BatchedOps(EVERY_OP, fill)
    for i, (name, level, sign) in enumerate(EVERY_OP):
        m = 0. if level is None else sign * float(space[name][0][level])
        want = [autoaugment._apply_op(im, name, m, InterpolationMode.NEAREST, [float(f) for f in fill] if fill else None) for im in x]
        assert torch.equal(ops(x, np.full(7, i)), torch.stack(want)), (name, m)


def test_images_with_different_operations_keep_their_places():
    x = hard_images(203, 8, 8)
    order, ops = np.random.default_rng(0).permutation(203), BatchedOps(EVERY_OP)
    alone = torch.cat([ops(x[i:i + 1], order[i:i + 1]) for i in range(203)])
    assert torch.equal(ops(x, order), alone)
    assert torch.equal(ops(x, np.full(203, -1)), x)


@pytest.mark.parametrize('policy', ['cifar10', 'svhn', 'imagenet'])
def test_autoaugment_equals_torchvision_under_the_same_numbers(policy):
    images = hard_images(200, 20, 12)
    n, oracle = len(images), autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(policy), fill=[1., 2., 3.])
    rng = np.random.default_rng(0)
    numbers = zip(rng.integers(0, 25, n), rng.random((n, 2)), rng.integers(0, 2, (n, 2)))
    oracle.get_params = lambda _: next(numbers)
    got, _ = AutoAugment(policy, fill=(1, 2, 3))(images.permute(0, 2, 3, 1), None, np.random.default_rng(0))
    assert torch.equal(got.permute(0, 3, 1, 2), torch.stack([oracle(im) for im in images]))


@pytest.mark.parametrize('policy', ['cifar10', 'svhn'])
def test_what_is_drawn_has_the_published_probabilities(policy):
    expected = Counter()
    for pair in autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy(policy)).policies:
        first, second = ([(None, 1 - p), *(((name, level, s), p / 2) for s in (1, -1))] if SPACE[name][1] else [(None, 1 - p), ((name, level, 1), p)] for name, p, level in pair)
        for (a, pa), (b, pb) in product(first, second): expected[a, b] += pa * pb / 25
    tfm, n = AutoAugment(policy), 50_000
    name = [*tfm.batched.ops, None] # -1 is nothing
    counts = Counter((name[a], name[b]) for a, b in tfm.draw(n, np.random.default_rng(1)))
    possible = [k for k, p in expected.items() if p > 1e-12]
    assert set(counts) <= set(possible)
    assert chisquare([counts[k] for k in possible], [n * expected[k] for k in possible]).pvalue > .001


@pytest.mark.parametrize('n', [0, 1, 2, 33])
def test_autoaugment_takes_any_number_of_images(n):
    x, y = hard_images(33, 9, 12).permute(0, 2, 3, 1).contiguous()[:n], torch.arange(n)
    kept = x.clone()
    (a, ya), (b, _), (c, _) = (AutoAugment('svhn')(x, y, np.random.default_rng(s)) for s in (0, 0, 1))
    assert a.shape == x.shape and a.dtype == torch.uint8 and a.is_contiguous() and ya is y
    assert torch.equal(a, b) and (n < 2 or not torch.equal(a, c)) and torch.equal(x, kept)


def test_autoaugment_tables_follow_the_size_of_the_images():
    tfm = AutoAugment()
    for size in ((32, 32), (16, 16), (32, 32)):
        x = hard_images(50, *size).permute(0, 2, 3, 1).contiguous()
        assert torch.equal(tfm(x, None, np.random.default_rng(0))[0], AutoAugment()(x, None, np.random.default_rng(0))[0])


def test_cutout_hides_every_centre_alike_and_leaves_its_input_alone():
    x = torch.full((20_000, 4, 6, 3), 255, dtype=torch.uint8)
    y = torch.arange(len(x))
    got, same = Cutout(1)(x, y, np.random.default_rng(0))
    times = (got[..., 0] == 0).sum(0)
    assert same is y and x.min() == 255 and times.sum() == len(x)
    assert ((times - len(x) / 24).abs() < 5 * (len(x) / 24) ** .5).all()
    assert Cutout(4)(x[:0], y[:0], np.random.default_rng(0))[0].shape == (0, 4, 6, 3)


def test_augmentation_refuses_what_it_cannot_do():
    x, rng = hard_images(5, 8, 8).permute(0, 2, 3, 1).contiguous(), np.random.default_rng(0)
    for bad, says in ((lambda: Cutout(0), 'at least 1, got 0'), (lambda: Cutout(2.5), 'whole number'), (lambda: Cutout(9)(x, None, rng), 'at most 8'),
                      (lambda: Cutout(4, fill=256), 'byte'), (lambda: Cutout(4, fill=(1, 2)), 'three'), (lambda: Cutout(4, fill=.5), 'got 0.5'),
                      (lambda: AutoAugment('cifar100'), 'cifar10, svhn'), (lambda: AutoAugment(fill=-1), 'byte'),
                      (lambda: AutoAugment()(x[:, :2], None, rng), 'at least 3 pixels'), (lambda: get_dls('digits', cutout=-1, device='cpu'), 'at least 1'),
                      (lambda: get_dls('digits', cutout=33, device='cpu'), '33'), (lambda: get_dls('digits', autoaugment='cifar', device='cpu'), "got 'cifar'")):
        with pytest.raises(ValueError, match=says): bad()


def test_get_dls_augments_in_the_published_order_and_training_images_only():
    dls = get_dls('digits', bs=64, crop=4, flip=True, autoaugment='svhn', cutout=16, cutmix=1., mean=(.5, .25, 0.), std=(.2, .2, .2), device='cpu')
    crop, policy, cutout, mix = dls.train.tfms
    assert [type(t) for t in dls.train.tfms] == [CropFlip, AutoAugment, Cutout, CutMix] and (crop.pad, cutout.size, mix.alpha) == (4, 16, 1.)
    assert np.array_equal(policy.op, AutoAugment('svhn').op) and policy.batched.ops == AutoAugment('svhn').batched.ops
    assert cutout.fill.tolist() == [128, 64, 0], 'zero after normalisation, to the nearest byte'
    assert not dls.valid.tfms and not dls.loaders[2].tfms
    assert get_dls('digits', autoaugment='cifar10', cutout=8, device='cpu').train.tfms[1].fill.tolist() == [0, 0, 0]
    x, y = dls.train.one_batch()
    assert x.shape == (64, 3, 32, 32) and torch.allclose(y.sum(1), torch.ones(64))
    twins = (list(get_dls('digits', bs=64, autoaugment='cifar10', cutout=8, seed=5, device='cpu').train) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*twins))


def test_svhn_from_torchvisions_files(tmp_path, monkeypatch):
    rng, sets, lists = np.random.default_rng(0), {}, dict(datasets.SVHN.split_list)
    (folder := tmp_path / 'svhn').mkdir()
    for part, n in (('train', 30), ('test', 20)):
        x, y = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
        savemat(folder / f'{part}_32x32.mat', dict(X=x.transpose(1, 2, 3, 0), y=np.where(y == 0, 10, y)[:, None])) # the files call zero ten
        sets[part] = x, y
    with pytest.raises(ValueError, match='MD5'): load_data('svhn', path=folder)
    monkeypatch.setattr(datasets.SVHN, 'split_list', {p: [u, f, hashlib.md5((folder / f).read_bytes()).hexdigest()] for p, (u, f, _) in lists.items() if p in sets})
    monkeypatch.setenv('SADT_DATA', str(tmp_path))
    for d, part in zip(load_data('svhn'), sets): assert np.array_equal(d.x.numpy(), sets[part][0]) and np.array_equal(d.y.numpy(), sets[part][1])
    monkeypatch.setenv('SADT_DATA', str(tmp_path / 'elsewhere'))
    with pytest.raises(FileNotFoundError, match='set SADT_DATA'): load_data('svhn')


def test_tiny_imagenet_as_distributed_and_as_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    def save(file): file.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    labels = ['n01', 'n02', 'n03']
    for l in labels:
        for i in range(4): save(tmp_path / 'tiny' / 'train' / l / 'images' / f'{l}_{i}.png')
    rows = [(f'val_{i}.png', labels[(2 * i + 1) % 3]) for i in range(6)]
    for name, _ in rows: save(tmp_path / 'tiny' / 'val' / 'images' / name)
    (tmp_path / 'tiny' / 'val' / 'val_annotations.txt').write_text(''.join(f'{n}\t{l}\t0\t0\t7\t7\n' for n, l in rows))
    train, test = load_data('tiny_imagenet', path=tmp_path / 'tiny')
    assert train.vocab == test.vocab == labels and train.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and test.y.tolist() == [labels.index(l) for _, l in rows]
    assert np.array_equal(test.x[5].numpy(), np.asarray(Image.open(tmp_path / 'tiny' / 'val' / 'images' / 'val_5.png')))
    for name, l in rows:
        (f := tmp_path / 'plain' / 'test' / l / name).parent.mkdir(parents=True, exist_ok=True)
        f.write_bytes((tmp_path / 'tiny' / 'val' / 'images' / name).read_bytes())
    for f in (tmp_path / 'tiny' / 'train').glob('*/images/*'):
        (g := tmp_path / 'plain' / 'train' / f.parents[1].name / f.name).parent.mkdir(parents=True, exist_ok=True)
        g.write_bytes(f.read_bytes())
    plain = load_data('tiny_imagenet', path=tmp_path / 'plain')
    assert torch.equal(plain[0].x, train.x) and sorted(map(bytes, plain[1].x.numpy())) == sorted(map(bytes, test.x.numpy()))


@pytest.mark.parametrize('mean, std', [((.1, .2, .3), 2.), (.5, (1., 2., 4.)), ((.1, .2, .3), (1., 2., 4.))])
@pytest.mark.parametrize('channels_last', [False, True])
def test_one_number_may_stand_for_three_channels(mean, std, channels_last):
    x = torch.randint(0, 256, (6, 5, 4, 3), dtype=torch.uint8)
    got = TensorDL(ImageData(x, torch.arange(6), list(range(6))), bs=6, mean=mean, std=std, channels_last=channels_last, dtype=torch.float64, device='cpu').one_batch()[0]
    m, s = (torch.as_tensor(v, dtype=torch.float64).expand(3).view(3, 1, 1) for v in (mean, std))
    torch.testing.assert_close(got, (x.permute(0, 3, 1, 2) / 255. - m) / s, rtol=1e-6, atol=1e-7)


def test_imagenet_is_read_from_disk_and_runs(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for part, n in (('train', 9), ('val', 6)):
        for i in range(n):
            (folder := tmp_path / 'imagenet' / part / f'n{i % 3}').mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)).save(folder / f'{part}_{i}.JPEG')
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('SADT_DATA', str(tmp_path))
    dls = get_dls('imagenet', bs=3, valid=0., size=32, device='cpu')
    assert dls.c == 3 and len(dls.train.dataset) == 9 and len(dls[2].dataset) == 6 and dls.train.dataset.to('meta') is dls.train.dataset
    result = run(Run(data='imagenet', data_args=dict(size=32), bs=3, epochs=1, valid=0.), tmp_path / 'runs', progress=False)
    assert result['status'] == 'finished' and result['steps'] == 3
    with pytest.raises(FileNotFoundError, match='val'): load_data('imagenet', path=tmp_path / 'imagenet' / 'train')
