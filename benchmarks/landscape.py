"""The cost of a point of a loss surface, against a bare forward pass, and of a Hessian-vector product.

    python -m benchmarks.landscape
        [--model simple_cnn] [--samples 1000] [--points 5] [--bs 500] [--repeats 5] [--out FILE]

The surface and the same number of bare passes take turns in one process; then follow one gradient and one
product. A bare pass goes over the same samples in evaluation and inference mode, channels_last, and computes
the loss only. A surface of n x n points costs n x n times as much as one point. The images are random,
32 pixels wide, in single precision."""
import argparse
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sadt_nb.experiments.run_folder import provenance, write_json
from sadt_nb.experiments.runner import keep_pages
from sadt_nb.measures.hessian import top_eigenvalues
from sadt_nb.measures.landscape import loss_surface
from sadt_nb.measures.sharpness import gradient_norm
from sadt_nb.models.registry import make_model
from torch import nn


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def random_batches(samples, bs):
    "Return random images and labels, channels_last."
    out = []
    for ids in torch.arange(samples).split(bs):
        x = torch.randn(len(ids), 3, 32, 32).contiguous(memory_format=torch.channels_last)
        out.append((x, torch.randint(10, (len(ids),))))
    return out


def in_turn(sides, points, repeats):
    "Return the seconds per point of each side in each round."
    taken = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, f in sides.items():
            s = timed(f) / points
            if i: taken[name].append(s) # the first round allocates
    return taken


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='simple_cnn')
    p.add_argument('--samples', type=int, default=1000)
    p.add_argument('--points', type=int, default=5)
    p.add_argument('--bs', type=int, default=500)
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    keep_pages()
    torch.manual_seed(0)
    model = make_model(a.model, 10).eval().to(memory_format=torch.channels_last)
    data = random_batches(a.samples, a.bs)
    learn = Learner(DataLoaders(data, data), model, loss_func=nn.CrossEntropyLoss())

    def surface(): loss_surface(learn, points=a.points, dl=data, progress=False)
    @torch.inference_mode()
    def bare():
        for _ in range(a.points**2):
            for x, y in data: nn.functional.cross_entropy(model(x), y)
    def products(): top_eigenvalues(learn, dl=data, max_products=3, progress=False)

    taken = in_turn(dict(surface=surface, bare=bare), a.points**2, a.repeats)
    ratios = [x / y for x, y in zip(taken['surface'], taken['bare'])]
    ratio = statistics.median(ratios)
    point = {name: statistics.median(values) for name, values in taken.items()}
    gradient = timed(lambda: gradient_norm(learn, data))
    product = timed(products) / 3
    print(f'{a.model}, {a.samples} samples: a point {1000 * point["surface"]:.0f} ms, '
          f'a bare pass {1000 * point["bare"]:.0f} ms, '
          f'ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}); '
          f'51 x 51 points: {point["surface"] * 51**2 / 60:.1f} minutes; '
          f'gradient {gradient:.2f} s, hessian_product {product:.2f} s')
    if a.out:
        found = dict(seconds=point, ratio=ratio, ratios=ratios, gradient=gradient, hessian_product=product)
        settings = dict(model=a.model, samples=a.samples, points=a.points)
        write_json(a.out, dict(**settings, **found, **provenance(torch.device('cpu'))))


if __name__ == '__main__': main()
