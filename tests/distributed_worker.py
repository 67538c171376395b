"""Trains every method in two processes; test_distributed.py starts them. With torchrun:

    torchrun --nproc_per_node 2 distributed_worker.py OUT

Rank 0 writes a dictionary to OUT. By method it has the final weights, whether all processes ended with the
same weights, how many gradient messages each batch took, and the number of calls of `all_reduce`."""
import sys
import warnings

warnings.filterwarnings('ignore')

import torch
from conftest import batches, cnn, flat, learner, needed
from documented_methods import registered
from fastai.callback.core import Callback
from fastai.data.load import DataLoader
from fastai.distributed import DistributedDL, rank_distrib
from fastai.optimizer import SGD
from fastai.torch_core import defaults
from sadt_nb.data.datasets import get_dls
from sadt_nb.methods.registry import METHODS, make_method, method_options
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

BS = 4 # per process
EPOCHS = 3


def options(name):
    """Return options with which the few steps here show an effect.

    A method that skips batches makes its extra pass in every second one, and teachers share no trunk."""
    known = method_options(name)
    found = dict(METHODS[name].few_steps)
    for k, v in METHODS[name].every_batch.items(): found[k] = 2 * v
    if 'share_trunk' in known: found['share_trunk'] = False
    return found


def momentum_sgd(params, lr): return SGD(params, lr=lr, mom=.9)
def order(epoch, n): return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).tolist()


class Ordered(DataLoader):
    "A loader that shuffles each pass with the number of the pass as seed."
    def get_idxs(self):
        self.passes = getattr(self, 'passes', -1) + 1
        return order(self.passes, self.n)


class AsTwoProcesses(Ordered):
    "A loader for one process: a batch of `2 * BS` joins the batches of two processes, rank 0's half first."
    def get_idxs(self):
        idxs = super().get_idxs()
        half = len(idxs) // 2
        first, second = idxs[:half], idxs[half:]
        out = []
        for k in range(0, half, BS): out += first[k:k + BS] + second[k:k + BS]
        return out


def samples():
    "Return images and labels of the small data set, one pair per sample."
    out = []
    for x, y in batches(n=24, bs=8, conv=True): out += list(zip(x, y))
    return out


class CountMessages(Callback):
    "Counts how often gradients are averaged between processes, batch by batch."
    order = 12 # after `DistributedTrainer`, which wraps the model
    run_valid = False
    def before_fit(self):
        self.counts = []
        def counting(state, bucket):
            if bucket.is_last(): self.counts[-1] += 1
            return allreduce_hook(state, bucket)
        self.learn.model.register_comm_hook(None, counting)
    def before_batch(self): self.counts.append(0)


def broadcast_on_cpu(self, t, rank):
    "Replaces `DistributedDL._broadcast`, which moves the list to a GPU."
    t = torch.tensor(t)
    distributed.broadcast(t, rank)
    return t.tolist()


def count_all_reduce():
    "Make `all_reduce` count its calls; return the list whose one item is the count."
    calls = [0]
    all_reduce = distributed.all_reduce
    def counted(*args, **kwargs):
        calls[0] += 1
        return all_reduce(*args, **kwargs)
    distributed.all_reduce = counted
    return calls


def train(name, direct):
    "Train with one method and return what rank 0 stores of it."
    net = cnn(bn=False)
    count = CountMessages()
    cbs = [*make_method(name, **needed(name), **options(name)), count]
    learn = learner(net, cbs, None, opt_func=momentum_sgd)
    learn.dls.loaders = [Ordered(samples(), bs=BS), Ordered(samples(), bs=BS)]
    direct[0] = 0
    with learn.distrib_ctx(sync_bn=False, cpu=True): learn.fit(EPOCHS)
    w = flat(learn.model)
    everywhere = [torch.empty_like(w) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everywhere, w)
    same = all(torch.equal(w, v) for v in everywhere)
    return dict(weights=w, same=same, messages=count.counts, direct=direct[0])


def load_images():
    "Return the sample ids that each process gets from a `TensorDL`, and shape, type and range of its images."
    dls = get_dls('digits', bs=10, n_train=200, valid=0., device='cpu', seed=0)
    mine = DistributedDL(dls.train, device='cpu')
    ids = []
    shapes = set()
    for x, _ in mine:
        ids += dls.train.ids.tolist()
        shapes.add((tuple(x.shape[1:]), x.dtype, x.abs().max().item() < 20))
    both = [None, None]
    distributed.all_gather_object(both, ids)
    return dict(ids=both, shapes=shapes)


def main(out):
    defaults.use_cuda = False
    DistributedDL._broadcast = broadcast_on_cpu
    direct = count_all_reduce()
    with registered(): results = {name: train(name, direct) for name in METHODS}
    results['TensorDL'] = load_images()
    if rank_distrib() == 0: torch.save(results, out)


if __name__ == '__main__': main(sys.argv[1])
