"Trains in a loop of two processes with options of `DistributedDataParallel`; test_ddp_loops.py starts it."
import warnings
from contextlib import nullcontext

warnings.filterwarnings('ignore')

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sadt_nb.all import ASAM, ESAM, GSAM, MSAM, SADT, SAM, WSAM, FriendlySAM, LookSAM, MethodOptimizer

METHODS = {
    'sam': lambda: SAM(.1), 'asam': lambda: ASAM(.5), 'gsam': lambda: GSAM(.1, .1),
    'esam': lambda: ESAM(.1, beta=1., gamma=1.), 'looksam': lambda: LookSAM(.1, k=2),
    'friendly_sam': lambda: FriendlySAM(.1), 'wsam': lambda: WSAM(.1), 'msam': lambda: MSAM(.1),
    'sadt1': lambda: SADT(1, noise_scale=1000.),
    'two teachers': lambda: SADT(perturb=[uphill(.1), uphill(.2)]),
}
OPTIONS = {'plain': {}, 'views': dict(gradient_as_bucket_view=True),
           'unused': dict(find_unused_parameters=True), 'static': dict(static_graph=True)}
STEPS, MICRO = 3, 2


def uphill(lr): return lambda params, grads, generator: {n: lr * g for n, g in grads.items()}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (8,), generator=g)


def micro_batch(step, k, rank): return batch(100 * step + 10 * k + rank)
def weights(net): return torch.cat([p.detach().flatten() for p in net.parameters()])
def momentum(net): return torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)


def trained(name, option, no_sync):
    "Return the weights after steps of several micro-batches, or the message of an error."
    rank = distributed.get_rank()
    ddp = DistributedDataParallel(network(), **OPTIONS[option])
    method = METHODS[name]()
    opt = MethodOptimizer(method, momentum(ddp), ddp)
    for step in range(STEPS):
        for k in range(MICRO):
            x, y = micro_batch(step, k, rank)
            def closure(x=x, y=y):
                logits = ddp(x)
                loss = F.cross_entropy(logits, y) / MICRO
                return (logits, loss) if isinstance(method, SADT) else loss
            last = k == MICRO - 1
            try:
                with nullcontext() if last or not no_sync else ddp.no_sync(): opt.backward(closure)
            except (ValueError, RuntimeError) as e: return str(e)
        opt.step()
        opt.zero_grad()
    return weights(ddp)


class Tasks(nn.Module):
    "A network with a layer for each task; no process has the last task."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.double()
    def forward(self, x, task): return self.heads[task](torch.tanh(self.body(x)))


HEADS = {'gsam': lambda: GSAM(.1, .1, alpha=0.), 'wsam': lambda: WSAM(.1, gamma=.5),
         'wsam, one step': lambda: WSAM(.1, gamma=.5, decouple=False), 'sam': lambda: SAM(.1)}


def one_task_each(name):
    "Return the weights after a step in which each process trains another task, and which gradients exist."
    rank = distributed.get_rank()
    ddp = DistributedDataParallel(Tasks(), find_unused_parameters=True)
    opt = MethodOptimizer(HEADS[name](), torch.optim.SGD(ddp.parameters(), lr=.1), ddp)
    x, y = batch(rank)
    opt.step(lambda: F.cross_entropy(ddp(x, rank), y))
    return weights(ddp), [p.grad is not None for p in ddp.parameters()]


def main(out):
    distributed.init_process_group('gloo')
    got = {(name, option, no_sync): trained(name, option, no_sync)
           for name in METHODS for option in OPTIONS for no_sync in (False, True)}
    got |= {('tasks', name): one_task_each(name) for name in HEADS}
    both = [None, None]
    distributed.all_gather_object(both, got)
    if distributed.get_rank() == 0: torch.save(both, out)
    distributed.destroy_process_group()
