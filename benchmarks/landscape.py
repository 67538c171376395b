"""What a point of a loss surface costs beside a bare forward pass of the same samples, and what a Hessian-vector product does.

    python -m benchmarks.landscape [--model simple_cnn] [--samples 1000] [--points 5] [--repeats 5] [--out FILE]

The surface and as many bare passes (evaluation mode, inference mode, channels_last, the loss and nothing else) take turns, in one process; then one
gradient and one product. A surface of n x n points costs n x n times its point. Single precision on images of 32 pixels, made up by chance."""
import argparse
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings('ignore')

import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sadt_nb.experiments.runner import keep_pages, provenance, write_json
from sadt_nb.measures.hessian import top_eigenvalues
from sadt_nb.measures.landscape import loss_surface
from sadt_nb.measures.sharpness import gradient_norm
from sadt_nb.models.registry import make_model
from torch import nn


def timed(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('samples', 1000), ('points', 5), ('repeats', 5), ('bs', 500)): p.add_argument(f'--{name}', type=int, default=default)
    p.add_argument('--model', default='simple_cnn')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    keep_pages()
    torch.manual_seed(0)
    model = make_model(a.model, 10).eval().to(memory_format=torch.channels_last)
    data = [(torch.randn(len(i), 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(10, (len(i),))) for i in torch.arange(a.samples).split(a.bs)]
    learn = Learner(DataLoaders(data, data), model, loss_func=nn.CrossEntropyLoss())

    @torch.inference_mode()
    def bare():
        for _ in range(a.points**2):
            for x, y in data: nn.functional.cross_entropy(model(x), y)
    def surface(): loss_surface(learn, points=a.points, dl=data, progress=False)
    sides, taken = dict(surface=surface, bare=bare), dict(surface=[], bare=[])
    for i in range(a.repeats + 1):
        for name, f in sides.items():
            s = timed(f) / a.points**2
            if i: taken[name].append(s) # the first round allocates
    ratios = [x / y for x, y in zip(*taken.values())]
    product = dict(gradient=timed(lambda: gradient_norm(learn, data)), hessian_product=timed(lambda: top_eigenvalues(learn, dl=data, max_products=3, progress=False)) / 3)
    point = {k: statistics.median(v) for k, v in taken.items()}
    print(f"{a.model}, {a.samples} samples: a point {1000 * point['surface']:.0f} ms, a bare pass {1000 * point['bare']:.0f} ms, ratio {statistics.median(ratios):.3f} "
          f"({min(ratios):.3f} to {max(ratios):.3f}); 51 x 51 points: {point['surface'] * 51**2 / 60:.1f} minutes; " + ', '.join(f'{k} {v:.2f} s' for k, v in product.items()))
    if a.out: write_json(a.out, dict(model=a.model, samples=a.samples, points=a.points, seconds=point, ratio=statistics.median(ratios), ratios=ratios, **product, **provenance(torch.device('cpu'))))


if __name__ == '__main__': main()
