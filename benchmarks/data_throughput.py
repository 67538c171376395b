"""Images per second of `TensorDL` against fastai's folder pipeline, both with flip, padded crop and CutMix, on CIFAR-10's training images.

    SADT_DATA=cifar10.tgz python -m benchmarks.data_throughput [--bs 512] [--repeats 3] [--out FILE]

The two take turns. The folder pipeline is `ImageDataLoaders.from_folder` with two workers; CutMix on its batches is torchvision's."""
import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import torch
from fastai.vision.augment import CropPad, Flip, RandomCrop
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from sadt_nb.data.datasets import get_dls, load_data
from sadt_nb.experiments.runner import _hardware, _versions, write_json
from torchvision.transforms import v2


def write_folder(root, data):
    "The images as PNG files in fastai's layout."
    for part, d in zip(('train', 'test'), data):
        for c in d.vocab: (root / part / c).mkdir(parents=True)
        for i, (x, y) in enumerate(zip(d.x.numpy(), d.y.tolist())): Image.fromarray(x).save(root / part / d.vocab[y] / f'{i:05}.png', compress_level=1)


def seconds(batches, mix=None):
    start, n = time.perf_counter(), 0
    for x, y in batches:
        if mix: x, y = mix(x, y)
        n += len(x)
    return time.perf_counter() - start, n


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--bs', type=int, default=512); p.add_argument('--repeats', type=int, default=3); p.add_argument('--out', type=Path)
    a = p.parse_args()
    ours = get_dls('cifar10', bs=a.bs, valid=0., crop=4, flip=True, cutmix=.25, device='cpu').train
    with tempfile.TemporaryDirectory() as tmp:
        train, test = load_data('cifar10')
        write_folder(Path(tmp), (train, test.subset(slice(0, 100))))
        folder = ImageDataLoaders.from_folder(tmp, valid='test', bs=a.bs, num_workers=2, device=torch.device('cpu'), item_tfms=[CropPad(40, pad_mode='zeros'), RandomCrop(32)],
                                              batch_tfms=[Flip()], shuffle=True).train
        folder.drop_last = False
        cutmix = v2.CutMix(num_classes=10, alpha=.25)
        mix = lambda x, y: cutmix(x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor))
        list(ours) # first use allocates
        rates = {'TensorDL': [], 'folder': []}
        for _ in range(a.repeats):
            for name, args in (('TensorDL', (ours,)), ('folder', (folder, mix))):
                s, n = seconds(*args)
                assert n == 50_000
                rates[name].append(n / s)
    ratio = [x / y for x, y in zip(rates['TensorDL'], rates['folder'])]
    for name, r in rates.items(): print(f'{name:10} {statistics.median(r):,.0f} images/s')
    print(f'ratio      {statistics.median(ratio):.0f}  ({min(ratio):.0f} to {max(ratio):.0f})')
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, dict(bs=a.bs, images_per_second={k: statistics.median(v) for k, v in rates.items()}, ratio=statistics.median(ratio), ratios=ratio,
                               versions=_versions(), hardware=_hardware(torch.device('cpu'))))


if __name__ == '__main__': main()
