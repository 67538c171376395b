"""Trains with sharded parameters in two processes; test_sharded.py starts them. With torchrun:

    torchrun --nproc_per_node 2 sharded_worker.py OUT

Rank 0 writes to OUT, by kind of sharding and by case, the final weights, and the errors that were raised.
test_sharded.py runs the same cases in one process, with ordinary parameters and the same global batches."""
import sys
import warnings

warnings.filterwarnings('ignore')

import torch
from conftest import learner
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import SGD, OptimWrapper
from sadt_nb.all import AGC, ASAM, ESAM, GSAM, MESA, SADT, SAM, GradientCentralization, LookSAM, RepeatStep
from sadt_nb.all import MethodOptimizer, asam_step, esam_step, gsam_step, sadt_step, sam_sharpness, sam_step
from sadt_nb.all import weight_noise
from sadt_nb.core.optim import KerasAdam
from sadt_nb.core.perturb import global_dot, global_norm, perturbed, trainable_params
from sadt_nb.core.ranks import this_rank
from sadt_nb.core.recipe import Lookahead
from sadt_nb.measures.landscape import random_direction
from sadt_nb.methods.agc import clip_units_
from sadt_nb.methods.gradient_centralization import centralize_
from sadt_nb.methods.sadt import gradient_ascent, normalized_ascent
from torch import distributed, nn
from torch.nn import functional as F

BS = 8 # of the global batch


def network():
    "Return a network whose layers have sizes that two processes cannot halve."
    torch.manual_seed(1)
    layers = nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3)
    return nn.Sequential(*layers).double()


def global_batches(n=4):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(n * BS, 5, generator=g, dtype=torch.float64)
    y = torch.randint(0, 3, (n * BS,), generator=g)
    return list(zip(x.split(BS), y.split(BS)))


def halves(batches, rank): return [(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in batches]
def momentum(net): return torch.optim.SGD(net.parameters(), lr=.1, momentum=.9)
def seeded(): return torch.Generator().manual_seed(5 + this_rank()) # the draws of rank 0 must count
def closure(net, x, y, share=1.): return lambda: F.cross_entropy(net(x), y) * share


# Plain functions, and the optimizer around another one

def with_function(step, **options):
    def train(net, batches):
        opt = momentum(net)
        for x, y in batches: step(net, closure(net, x, y), opt, **options)
    return train


def with_esam(gamma, **options):
    def train(net, batches):
        opt = momentum(net)
        generator = seeded()
        for x, y in batches:
            esam_step(net, losses(net, x, y), opt, rho=1., gamma=gamma, generator=generator, **options)
    return train


def losses(net, x, y):
    "Return a closure for ESAM."
    def of(rows=None):
        xs, ys = (x, y) if rows is None else (x[rows], y[rows])
        return F.cross_entropy(net(xs), ys, reduction='none')
    return of


def logits_and_loss(net, x, y):
    "Return a closure for SADT."
    def of():
        logits = net(x)
        return logits, F.cross_entropy(logits, y)
    return of


def with_sadt(*perturb):
    def train(net, batches):
        opt = momentum(net)
        generator = seeded()
        for x, y in batches:
            sadt_step(net, logits_and_loss(net, x, y), opt, perturb=perturb, generator=generator)
    return train


def with_optimizer(method, micro=1, **options):
    "Train with a `MethodOptimizer`; every step has `micro` batches."
    def train(net, batches):
        opt = MethodOptimizer(method(), momentum(net), net, **options)
        for i, (x, y) in enumerate(batches):
            opt.backward(closure(net, x, y, 1 / micro))
            if i % micro == micro - 1: opt.step()
    return train


def with_late_averaging(net, batches):
    "Train with micro-batches; the loop lets FSDP2 average gradients in the last backward of a step only."
    opt = MethodOptimizer(GSAM(1., 1.), momentum(net), net)
    for i, (x, y) in enumerate(batches):
        if hasattr(net, 'set_requires_gradient_sync'): net.set_requires_gradient_sync(i % 2 == 1)
        opt.backward(closure(net, x, y, 1 / 2))
        if i % 2: opt.step()


def with_two_steps(net, batches):
    opt = MethodOptimizer(SAM(1.), momentum(net), net)
    for x, y in batches:
        for step in (opt.first_step, opt.second_step):
            opt.zero_grad()
            F.cross_entropy(net(x), y).backward()
            step()


def resumed(net, batches):
    "Train with LookSAM, whose direction goes through a state and another optimizer."
    first = MethodOptimizer(LookSAM(1., k=3), momentum(net), net)
    for x, y in batches[:2]: first.step(closure(net, x, y))
    second = MethodOptimizer(LookSAM(1., k=3), momentum(net), net)
    second.load_state_dict(first.state_dict())
    for x, y in batches[2:]: second.step(closure(net, x, y))


# fastai's Learner

def fastai_sgd(params, lr): return SGD(params, lr=lr, mom=.9)
def torch_sgd(params, lr): return OptimWrapper(params, torch.optim.SGD, lr=lr, momentum=.9)
def keras(params, lr): return OptimWrapper(params, KerasAdam, lr=lr)


class OwnBackward(Callback):
    "Adds the gradient of a term of its own before the Learner's backward."
    run_valid = False
    def before_batch(self): (.1 * self.learn.model(self.xb[0]).square().mean()).backward()


def with_learner(*cbs, opt_func=fastai_sgd, accumulate=None):
    def train(net, batches):
        learn = learner(net, [make() for make in cbs], batches, opt_func=opt_func)
        if accumulate: learn.add_cb(GradientAccumulation(accumulate * len(batches[0][0])))
        learn.dls.loaders[1] = [] # a validation would not change anything
        learn.fit(1)
    return train


CASES = dict(
    sam=with_function(sam_step, rho=1.),
    adaptive=with_function(sam_step, rho=1., adaptive=True),
    asam=with_function(asam_step, rho=1.),
    gsam=with_function(gsam_step, rho=1., alpha=.4),
    esam=with_esam(gamma=1.),
    sadt_noise=with_sadt(weight_noise(.3)),
    sadt_ascent=with_sadt(gradient_ascent(1., .3), normalized_ascent(1.)),
    optimizer_clip=with_optimizer(lambda: SAM(1.), max_norm=.05),
    optimizer_micro=with_optimizer(lambda: GSAM(1., 1.), micro=2),
    optimizer_late=with_late_averaging,
    optimizer_looksam=with_optimizer(lambda: LookSAM(1., k=2)),
    two_steps=with_two_steps,
    resumed=resumed,
    learner_sam=with_learner(lambda: SAM(1.)),
    learner_torch=with_learner(lambda: ASAM(1.), opt_func=torch_sgd),
    learner_gsam=with_learner(lambda: GSAM(1., 1.), lambda: GradientClip(.05)), # torch clips no mixed lists
    learner_looksam=with_learner(lambda: LookSAM(1., k=2)),
    learner_esam=with_learner(lambda: ESAM(1., beta=.5, gamma=1.)),
    learner_accumulates=with_learner(lambda: SAM(1.), accumulate=2),
    learner_own_backward=with_learner(OwnBackward, lambda: SAM(1.)),
    learner_sadt=with_learner(lambda: SADT(3, noise_scale=1000.)),
    learner_sadt_up=with_learner(lambda: SADT(rho=1., grad_at='up')),
    learner_repeat=with_learner(RepeatStep),
    learner_agc=with_learner(lambda: AGC(clip=.01)),
    learner_gc=with_learner(GradientCentralization),
    learner_lookahead=with_learner(lambda: Lookahead(every=2)),
    learner_keras=with_learner(lambda: SAM(1.), opt_func=keras),
)


# Ways to distribute the parameters

def by_layer(net, mesh):
    from torch.distributed.fsdp import fully_shard
    for m in net:
        if isinstance(m, nn.Linear): fully_shard(m, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(net, mesh):
    "Shard the network as one group, which stays gathered after a forward without a backward."
    from torch.distributed.fsdp import fully_shard
    return fully_shard(net, mesh=mesh)


def never_dropped(net, mesh):
    "Shard the network, and keep what is gathered until somebody drops it."
    net = whole(net, mesh)
    net.set_reshard_after_backward(False)
    return net


def tensor_parallel(net, mesh):
    "Split the dense layers over processes; all processes see the same batch, and some weights are ordinary."
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor import Replicate
    plan = {'0': ColwiseParallel(output_layouts=Replicate()), '3': RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(net, mesh, plan)


def sequence_parallel(net, mesh):
    "As `tensor_parallel`, but half of the batch goes through the norm, whose gradient is a pending sum."
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.distributed.tensor import Shard
    plan = {'0': ColwiseParallel(output_layouts=Shard(0)), '2': SequenceParallel(sequence_dim=0),
            '3': RowwiseParallel(input_layouts=Shard(0))}
    return parallelize_module(net, mesh, plan)


KINDS = dict(by_layer=by_layer, whole=whole, never_dropped=never_dropped, tensor_parallel=tensor_parallel,
             sequence_parallel=sequence_parallel)
RUNS = dict( # the cases of each kind: all, or those for which the kind makes a difference
    by_layer=list(CASES),
    whole=['sam', 'gsam', 'sadt_ascent', 'optimizer_looksam', 'optimizer_late', 'learner_sam',
           'learner_sadt_up'],
    never_dropped=['sam', 'two_steps', 'learner_sam', 'learner_sadt_up'],
    tensor_parallel=['sam', 'asam', 'gsam', 'esam', 'sadt_noise', 'optimizer_clip', 'resumed', 'learner_sam',
                     'learner_agc', 'learner_gc', 'learner_lookahead', 'learner_keras'],
    sequence_parallel=['sam', 'gsam', 'optimizer_micro', 'optimizer_clip', 'learner_looksam', 'learner_sadt',
                       'learner_agc', 'learner_keras'])


def full_weights(net):
    out = []
    for p in trainable_params(net).values():
        p = p.detach()
        out.append((p.full_tensor() if hasattr(p, 'full_tensor') else p).flatten().clone())
    return torch.cat(out)


def message(f):
    "Return the message of the `ValueError` that a function raises, or what happened without one."
    try: f()
    except ValueError as e: return str(e)
    except Exception as e: return f'{type(e).__name__}: {e}'
    return 'no error'


def errors(mesh, batches):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    found = {}
    def fsdp1(case, **options): return message(lambda: case(FSDP(network(), **options), batches))
    cpu = dict(device_id=torch.device('cpu'))
    found['fsdp1_orig'] = fsdp1(CASES['sam'], use_orig_params=True, **cpu)
    found['fsdp1_flat'] = fsdp1(CASES['sam'], use_orig_params=False, **cpu)
    found['fsdp1_learner'] = fsdp1(with_learner(SADT), **cpu)
    net = whole(network(), mesh)
    found['mesa'] = message(lambda: with_learner(lambda: MESA(start_epoch=0))(net, batches))
    learn = learner(net.eval(), data=batches)
    with torch.no_grad(): net(batches[0][0]) # leaves the whole weights gathered
    found['sharpness'] = message(lambda: sam_sharpness(learn, dl=batches))
    found['direction'] = message(lambda: random_direction(net))
    return found


def overflow(mesh, batches):
    "Return whether an infinite number in the part of one process stops the step in both, and the new scale."
    net = whole(network(), mesh)
    before = full_weights(net)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    opt = MethodOptimizer(SAM(1.), momentum(net), net, scaler=scaler)
    x, y = batches[0]
    opt.backward(closure(net, x, y))
    part = net[0].weight.grad.to_local()
    if distributed.get_rank() == 0: part[0, 0] = float('inf')
    opt.step()
    scaler.update()
    outcome = torch.tensor([float(torch.equal(full_weights(net), before)), scaler.get_scale()])
    both = [torch.empty_like(outcome) for _ in range(2)]
    distributed.all_gather(both, outcome)
    return torch.stack(both)


def without_backward(net, x):
    "Return outputs of forward passes alone: before, inside and between two perturbations, and afterwards."
    params = trainable_params(net)
    deltas = [{n: size * torch.ones_like(p) for n, p in params.items()} for size in (.5, -1.)]
    with torch.no_grad():
        seen = [net(x)]
        for change in deltas:
            with perturbed(params, change): seen.append(net(x))
            seen.append(net(x))
    return torch.stack(seen)


def agc(p, g): clip_units_([p], [g], .5)
def gc(p, g): centralize_([g])


def reductions():
    "Return norms, products, clipped and centralized gradients for several placements, and the right values."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    g = torch.Generator().manual_seed(2)
    a, b, plain = (torch.randn(6, 4, generator=g, dtype=torch.float64) for _ in range(3))
    found = {}
    for shape in ((2,), (2, 1), (1, 2)):
        mesh = init_device_mesh('cpu', shape)
        for places in ([Shard(0)], [Shard(1)], [Replicate()]):
            if len(shape) == 2: places = [*places, Replicate()] if shape[0] == 2 else [Replicate(), *places]
            da, db = distribute_tensor(a, mesh, places), distribute_tensor(b, mesh, places)
            at = f'{shape} {places}'
            found[f'norm {at}'] = global_norm([da, plain, db]), global_norm([a, plain, b])
            found[f'dot {at}'] = global_dot([da, plain], [db, plain]), global_dot([a, plain], [b, plain])
            for name, change in dict(agc=agc, gc=gc).items():
                mine, right = db.clone(), b.clone()
                change(da, mine)
                change(a, right)
                found[f'{name} {at}'] = mine.full_tensor(), right
    unfinished = DTensor.from_local(a, init_device_mesh('cpu', (2,)), [Partial()])
    return found, message(lambda: global_norm([unfinished]))


def main(out):
    from torch.distributed.device_mesh import init_device_mesh
    distributed.init_process_group('gloo')
    rank = distributed.get_rank()
    mesh = init_device_mesh('cpu', (2,))
    all_batches = global_batches()
    mine = halves(all_batches, rank)
    results = dict(errors=errors(mesh, mine), overflow=overflow(mesh, mine), reductions=reductions())
    for kind, shard in KINDS.items():
        results[kind] = {}
        for name in RUNS[kind]:
            net = shard(network(), mesh)
            CASES[name](net, all_batches if 'parallel' in kind else mine)
            results[kind][name] = full_weights(net)
    x = all_batches[0][0] # the same in both processes
    results['without_backward'] = {kind: without_backward(shard(network(), mesh), x)
                                   for kind, shard in KINDS.items() if kind != 'sequence_parallel'}
    net = by_layer(network(), mesh)
    with_esam(gamma=.5, beta=1.)(net, mine)
    results['esam_selects'] = full_weights(net)
    if rank == 0: torch.save(results, out)
    distributed.destroy_process_group()


if __name__ == '__main__': main(sys.argv[1])
