"""Trains with `only` and `m` in two processes; test_sam_options.py starts them. With torchrun:

    torchrun --nproc_per_node 2 sam_options_worker.py OUT

Rank 0 writes to OUT what `distributed_worker.train` returns, by case."""
import sys
import warnings

warnings.filterwarnings('ignore')

import distributed_worker as worker
import torch
from conftest import cnn, flat, learner
from fastai.distributed import DistributedDL, rank_distrib
from fastai.torch_core import defaults
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.sam import SAM
from torch import distributed


def kernels(name, parameter): return parameter.ndim > 1


CASES = {'only': lambda: SAM(.3, only=kernels), 'm': lambda: SAM(.3, m=2), # of 4 samples per process
         'm and only': lambda: ASAM(.3, m=3, only=kernels),
         'late': lambda: SAM(.3, start=1/3)} # a third of 9 batches


def train(make, direct):
    "Train with one method, and return its weights and messages."
    count = worker.CountMessages()
    learn = learner(cnn(bn=False), [make(), count], None, opt_func=worker.momentum_sgd)
    learn.dls.loaders = [worker.Ordered(worker.samples(), bs=worker.BS) for _ in range(2)]
    direct[0] = 0
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(worker.EPOCHS)
    w = flat(learn.model)
    everywhere = [torch.empty_like(w) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, w)
    same = all(torch.equal(w, v) for v in everywhere)
    return dict(weights=w, same=same, messages=count.counts, direct=direct[0])


def main(out):
    defaults.use_cuda = False
    DistributedDL._broadcast = worker.broadcast_on_cpu
    direct = worker.count_all_reduce()
    results = {name: train(make, direct) for name, make in CASES.items()}
    if rank_distrib() == 0: torch.save(results, out)


if __name__ == '__main__': main(sys.argv[1])
