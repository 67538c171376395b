"""Images per second of `TensorDL` against fastai's folder pipeline, and the cost of `AutoAugment` per batch.

    SADT_DATA=cifar10.tgz python -m benchmarks.data_throughput
        [--only loader|autoaugment] [--bs 512] [--repeats 3] [--out FILE]

loader       Both sides load CIFAR-10's training images with flip, padded crop and CutMix. The folder pipeline
             is `ImageDataLoaders.from_folder` with two workers; CutMix on its batches is torchvision's.
autoaugment  Milliseconds of `AutoAugment` on a batch, against torchvision's, which takes image by image, in
             at least 7 rounds, each on another batch.

In each part the two sides take turns. FILE keeps the results of the part that did not run."""
import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import numpy as np
import torch
from fastai.vision.augment import CropPad, Flip, RandomCrop
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sadt_nb.data.autoaugment import AutoAugment
from sadt_nb.data.datasets import get_dls, load_data
from sadt_nb.experiments.run_folder import provenance, write_json
from torchvision.transforms import autoaugment, v2


def write_folder(root, data):
    "Write the images as PNG files in fastai's layout."
    for part, d in zip(('train', 'test'), data):
        for c in d.vocab: (root / part / c).mkdir(parents=True)
        for i, (x, y) in enumerate(zip(d.x.numpy(), d.y.tolist())):
            file = root / part / d.vocab[y] / f'{i:05}.png'
            Image.fromarray(x).save(file, compress_level=1)


def folder_loader(folder, bs):
    "Return fastai's loader of the training images in a folder."
    dls = ImageDataLoaders.from_folder(
        folder, valid='test', bs=bs, num_workers=2, device=torch.device('cpu'), shuffle=True,
        item_tfms=[CropPad(40, pad_mode='zeros'), RandomCrop(32)], batch_tfms=[Flip()])
    dls.train.drop_last = False
    return dls.train


def seconds(batches, mix=None):
    "Return seconds of one pass over `batches`, and the number of images."
    n = 0
    start = time.perf_counter()
    for x, y in batches:
        if mix: x, y = mix(x, y)
        n += len(x)
    return time.perf_counter() - start, n


def medians(samples): return {name: statistics.median(values) for name, values in samples.items()}


def loader(bs, repeats):
    "Time passes over the training images with both loaders."
    ours = get_dls('cifar10', bs=bs, valid=0., crop=4, flip=True, cutmix=.25, device='cpu').train
    rates = {'TensorDL': [], 'folder': []}
    cutmix = v2.CutMix(num_classes=10, alpha=.25)
    def mix(x, y): return cutmix(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))
    with tempfile.TemporaryDirectory() as tmp:
        train, test = load_data('cifar10')
        write_folder(Path(tmp), (train, test.subset(slice(0, 100))))
        theirs = folder_loader(tmp, bs)
        list(ours) # the first use allocates memory
        for _ in range(repeats):
            for name, args in (('TensorDL', (ours,)), ('folder', (theirs, mix))):
                s, n = seconds(*args)
                assert n == 50_000
                rates[name].append(n / s)
    ratios = [x / y for x, y in zip(rates['TensorDL'], rates['folder'])]
    speed = medians(rates)
    for name, rate in speed.items(): print(f'{name:12} {rate:,.0f} images/s')
    return dict(images_per_second=speed, ratio=statistics.median(ratios), ratios=ratios)


def augment(bs, repeats):
    "Time the CIFAR-10 policy on one batch after another; each side gets its own byte layout."
    train, _ = load_data('cifar10')
    ours = AutoAugment('cifar10')
    theirs = autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy.CIFAR10)
    rng = np.random.default_rng(0)
    sides = {'AutoAugment': lambda x: ours(x, None, rng), 'torchvision': lambda x: [theirs(im) for im in x]}
    taken = {name: [] for name in sides}
    for i in range(max(7, repeats) + 1):
        x = train.x[i * bs:(i + 1) * bs]
        inputs = {'AutoAugment': x, 'torchvision': x.permute(0, 3, 1, 2).contiguous()}
        for name, f in sides.items():
            start = time.perf_counter()
            f(inputs[name])
            milliseconds = 1000 * (time.perf_counter() - start)
            if i: taken[name].append(milliseconds) # the first use allocates memory and makes tables
    median = medians(taken)
    for name, ms in median.items(): print(f'{name:12} {ms:,.1f} ms')
    ratios = [y / x for x, y in zip(taken['AutoAugment'], taken['torchvision'])]
    return dict(milliseconds=median, ratio=median['torchvision'] / median['AutoAugment'], ratios=ratios)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', choices=('loader', 'autoaugment'))
    p.add_argument('--out', type=Path)
    p.add_argument('--bs', type=int, default=512)
    p.add_argument('--repeats', type=int, default=3)
    a = p.parse_args()
    results = json.loads(a.out.read_text()) if a.out and a.out.exists() else {}
    for part, measure in (('loader', loader), ('autoaugment', augment)):
        if a.only not in (None, part): continue
        found = dict(bs=a.bs, **measure(a.bs, a.repeats), **provenance(torch.device('cpu')))
        ratios = found['ratios']
        print(f'{"ratio":12} {found["ratio"]:.1f}  ({min(ratios):.1f} to {max(ratios):.1f})')
        results |= found if part == 'loader' else {part: found}
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, results)


if __name__ == '__main__': main()
