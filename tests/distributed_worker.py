"""Trains every method in two processes; started by test_distributed.py through torchrun.

    torchrun --nproc_per_node 2 distributed_worker.py OUT

Rank 0 writes to OUT, by method: the weights, whether all processes ended with the same, and averaged messages per batch."""
import sys
import warnings

warnings.filterwarnings('ignore')

import torch
from conftest import batches, cnn, flat, learner, needed
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL, rank_distrib
from fastai.optimizer import SGD
from fastai.torch_core import defaults
from sadt_nb.data.datasets import get_dls
from sadt_nb.methods.registry import METHODS, make_method
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

BS, EPOCHS = 4, 3 # per process
OPTIONS = {'saf': dict(lam=2., tau=1., lag=1, start_epoch=1), 'mesa': dict(lam=2., tau=1., beta=.8, start_epoch=0), 'looksam': dict(k=2), 'sadt2': dict(share_trunk=False)}


def order(epoch, n): return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()


class Ordered(DataLoader):
    "Shuffles by a seed that counts its passes."
    def get_idxs(self):
        self.passes = getattr(self, 'passes', -1) + 1
        return order(self.passes, self.n)


class AsTwoProcesses(Ordered):
    "One process's order in which each batch of `2 * BS` holds what two processes see at the same time, the first's half first."
    def get_idxs(self):
        idxs = super().get_idxs()
        first, second = idxs[:len(idxs) // 2], idxs[len(idxs) // 2:]
        return [i for k in range(0, len(first), BS) for i in first[k:k + BS] + second[k:k + BS]]


def samples(): return [(x[i], y[i]) for x, y in batches(n=24, bs=8, conv=True) for i in range(len(x))]


class CountMessages(Callback):
    "Averagings of gradients between processes, in each batch."
    order, run_valid = 12, False # `DistributedTrainer` has wrapped the model
    def before_fit(self):
        self.counts = []
        def counting(state, bucket):
            if bucket.is_last(): self.counts[-1] += 1
            return allreduce_hook(state, bucket)
        self.learn.model.register_comm_hook(None, counting)
    def before_batch(self): self.counts.append(0)


def main(out):
    defaults.use_cuda = False
    def broadcast(self, t, rank): # fastai's moves the list to a GPU
        distributed.broadcast(t := torch.tensor(t), rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    results, direct, all_reduce = {}, [0], distributed.all_reduce
    def counted(*args, **kwargs): direct[0] += 1; return all_reduce(*args, **kwargs)
    distributed.all_reduce = counted
    for name in METHODS:
        net, count = cnn(bn=False), CountMessages()
        learn = learner(net, [*make_method(name, **needed(name), **OPTIONS.get(name, {})), count], None, opt_func=lambda p, lr: SGD(p, lr=lr, mom=.9))
        learn.dls.loaders = [Ordered(samples(), bs=BS), Ordered(samples(), bs=BS)]
        direct[0] = 0
        with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(EPOCHS)
        w = flat(learn.model)
        everywhere = [torch.empty_like(w) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everywhere, w)
        results[name] = dict(weights=w, same=all(torch.equal(w, v) for v in everywhere), messages=count.counts, direct=direct[0])
    dls = get_dls('digits', bs=10, n_train=200, valid=0., device='cpu', seed=0)
    mine = DistributedDL(dls.train, device='cpu')
    ids, shapes = [], set()
    for x, y in mine: ids += dls.train.ids.tolist(); shapes.add((tuple(x.shape[1:]), x.dtype, x.abs().max().item() < 20))
    both = [None, None]
    distributed.all_gather_object(both, ids)
    results['TensorDL'] = dict(ids=both, shapes=shapes)
    if rank_distrib() == 0: torch.save(results, out)


if __name__ == '__main__': main(sys.argv[1])
