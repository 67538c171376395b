"What measures read and what they leave alone: loaders, random numbers, modes of layers, buffers."
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from sadt_nb.core.fixed_loss import FixedLoss, collect_batches
from sadt_nb.data.datasets import get_dls
from sadt_nb.measures.calibration import calibration_error
from sadt_nb.measures.hessian import hessian_trace, top_eigenvalues
from sadt_nb.measures.landscape import direction_between, loss_line
from sadt_nb.measures.sharpness import FlatnessRecorder, gradient_norm, sam_sharpness
from sadt_nb.measures.similarity import agreement, diversity, logit_mse
from torch import nn
from torch.func import functional_call
from torch.utils.data import BatchSampler, DataLoader as TorchLoader, IterableDataset, SequentialSampler
from torch.utils.data import SubsetRandomSampler, WeightedRandomSampler

N = 50


def samples():
    "Return 50 samples in the order of their five labels; the first input is the position."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 6, generator=g)
    x[:, 0] = torch.arange(N)
    return list(zip(x, torch.arange(N) // 10))


def learner(dls, net=None, **options):
    if net is None:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5)).eval()
    loss = nn.CrossEntropyLoss()
    return Learner(dls, net, loss_func=loss, lr=.05, opt_func=SGD, default_cbs=False, **options)


def random_numbers(): return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()


def seed_all():
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def loaders(kind):
    if kind == 'fastai':
        return DataLoaders(DataLoader(samples(), bs=8, shuffle=True, num_workers=0), [])
    if kind == 'torch': return DataLoaders(TorchLoader(samples(), 8, shuffle=True), [])
    if kind == 'torch with a generator':
        g = torch.Generator().manual_seed(0)
        return DataLoaders(TorchLoader(samples(), 8, shuffle=True, generator=g), [])
    dls = get_dls('digits', bs=16, n_train=64, crop=2, device='cpu', seed=0)
    return DataLoaders(dls.train, [])


def draws(learn, dl):
    "A measure that draws from all global random generators."
    random_numbers()
    return 0.


KINDS = ['fastai', 'torch', 'torch with a generator', 'ours']


@pytest.mark.parametrize('given', [None, 'samples', 'loader'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_recorder_changes_no_bit_of_the_training(kind, given):
    def trained(recorded):
        seed_all()
        dls = loaders(kind)
        first = nn.Linear(3072 if kind == 'ours' else 6, 8)
        net = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(8), nn.Dropout(.3), nn.Linear(8, 10))
        options = {None: {}, 'samples': dict(samples=20), 'loader': dict(dl=dls.train)}[given]
        measures = dict(sharpness=sam_sharpness, draws=draws)
        recorder = [FlatnessRecorder(measures, **options)] if recorded else []
        learn = learner(dls, net, cbs=[TrainEvalCallback(), *recorder])
        for _ in range(2): learn.fit(2)
        return net.state_dict(), random_numbers()
    plain, numbers = trained(False)
    with_recorder, same_numbers = trained(True)
    assert all(torch.equal(a, b) for a, b in zip(plain.values(), with_recorder.values(), strict=True))
    assert numbers == same_numbers


@pytest.mark.parametrize('kind', KINDS)
def test_reading_batches_leaves_random_numbers_alone(kind):
    seed_all()
    expected = random_numbers()
    dls = loaders(kind)
    learn = learner(dls)
    for options in (dict(), dict(samples=20), dict(dl=dls.train)):
        seed_all()
        collect_batches(learn, **options)
        assert random_numbers() == expected


@pytest.mark.parametrize('measure', [agreement, logit_mse, lambda a, b, dl: diversity([a, b], dl)])
def test_similarity_leaves_frozen_layers_frozen(measure):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3))
    other = deepcopy(net).eval()
    other[1].train()
    net[1][0].eval()
    nets = nn.ModuleList([net, other])
    modes = [m.training for m in nets.modules()]
    measure(net, other, [(torch.randn(4, 6),)])
    assert [m.training for m in nets.modules()] == modes
    with pytest.raises(RuntimeError): measure(net, other, [(torch.randn(4, 5),)])
    assert [m.training for m in nets.modules()] == modes


def positions(batches): return torch.cat([x[:, 0] for (x,), _ in batches]).long().tolist()
def read(loader, **options): return positions(collect_batches(learner(DataLoaders(loader, [])), **options))


@pytest.mark.parametrize('options', [dict(), dict(shuffle=True), dict(shuffle=True, drop_last=True),
                                     dict(shuffle=True, num_workers=1), dict(sampler=list(range(N)))])
def test_a_torch_loader_gives_all_samples_in_order_or_some_at_random(options):
    dl = TorchLoader(samples(), 8, **options)
    assert read(dl) == list(range(N))
    some = read(dl, samples=20)
    assert len(set(some)) == len(some) == 20
    assert {i // 10 for i in some} == set(range(5)), 'all labels'
    assert read(dl, samples=20) == some
    assert read(dl, dl=dl, samples=20) == some


def test_measures_of_a_torch_loader_are_repeatable():
    data = samples()
    learn = learner(DataLoaders(TorchLoader(data, 8, shuffle=True, drop_last=True), []))
    x, y = torch.stack([x for x, _ in data]), torch.tensor([int(y) for _, y in data])
    loss = nn.functional.cross_entropy(learn.model(x), y).item()
    assert FixedLoss(learn)() == pytest.approx(loss, rel=1e-5)
    assert len({sam_sharpness(learn, samples=20) for _ in range(3)}) == 1


def test_a_loader_keeps_its_batch_size_and_collate_function():
    def doubled(batch): return torch.stack([2 * x for x, _ in batch]), torch.stack([y for _, y in batch])
    dl = TorchLoader(samples(), 8, shuffle=True, collate_fn=doubled)
    batches = collect_batches(learner(DataLoaders(dl, [])))
    assert [len(y) for _, y in batches] == [8] * 6 + [2]
    assert positions(batches) == [2 * i for i in range(N)]
    whole = TorchLoader([tuple(map(torch.stack, zip(*samples()[i:i + 10]))) for i in range(0, N, 10)],
                        batch_size=None, shuffle=True)
    assert read(whole) == list(range(N))
    assert len(read(whole, samples=20)) == 20


def test_a_subset_stays_a_subset():
    chosen = list(range(5, 45, 2))
    dl = TorchLoader(samples(), 8, sampler=SubsetRandomSampler(chosen))
    assert read(dl) == chosen
    some = read(dl, samples=12)
    assert len(some) == 12
    assert set(some) < set(chosen)
    assert read(dl, samples=12) == some
    weights = [0.] * 40 + [1.] * 10
    dl = TorchLoader(samples(), 8, sampler=WeightedRandomSampler(weights, 30))
    assert min(read(dl)) >= 40
    assert read(dl) == read(dl)


class Stream(IterableDataset):
    def __iter__(self): return iter(samples())


class Pairs(BatchSampler):
    "Batches of two neighbours, the last pair first."
    def __init__(self): super().__init__(SequentialSampler(range(N)), 2, False)
    def __iter__(self): return reversed([[i, i + 1] for i in range(0, N, 2)])


def test_loaders_that_cannot_be_copied_are_read_as_they_are():
    stream, pairs = TorchLoader(Stream(), 8), TorchLoader(samples(), batch_sampler=Pairs())
    assert read(stream) == list(range(N))
    assert read(stream, samples=20) == list(range(20))
    assert read(pairs, samples=4) == [48, 49, 46, 47]
    assert sorted(read(pairs)) == list(range(N))


def test_samples_of_a_loader_that_records_positions():
    "During training with SAF, a recorder gets the loader whose batch sampler is wrapped."
    from sadt_nb.methods.saf import SAF
    seen = []
    def labels(learn, dl):
        seen.append(torch.cat([y for *_, y in dl]).unique().tolist())
        return 0.
    dl = TorchLoader(samples(), 8, shuffle=True)
    torch.manual_seed(0)
    recorder = FlatnessRecorder(dict(labels=labels, again=lambda learn, dl: labels(
        learn, [(*xb, y) for xb, y in collect_batches(learn, samples=20)])), samples=20)
    learner(DataLoaders(dl, []), cbs=[TrainEvalCallback(), SAF(start_epoch=0), recorder]).fit(1)
    assert seen == [[0, 1, 2, 3, 4]] * 2


class Attention(nn.Module):
    "One layer of causal attention over six numbers."
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(1, 4)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(4, 3)
        self.register_buffer('mask', nn.Transformer.generate_square_subsequent_mask(6))
    def forward(self, x):
        h = self.norm(self.q(x[..., None]))
        weights = (h @ h.transpose(1, 2) + self.mask).softmax(-1)
        return self.out((weights @ h).mean(1))


def attention(seed):
    torch.manual_seed(seed)
    net = Attention().double()
    for _ in range(3): net(torch.randn(8, 6, dtype=torch.float64))
    return net.eval()


def test_a_mask_with_infinity_is_measured():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 6, generator=g).double(), torch.arange(20) % 3
    net, other = attention(0), attention(1)
    learn = learner(DataLoaders([(x, y)], [(x, y)]), net)
    named = {n: p.detach() for n, p in net.named_parameters()}
    sizes = [p.numel() for p in named.values()]
    def f(w):
        parts = {n: v.view(p.shape) for (n, p), v in zip(named.items(), w.split(sizes))}
        return nn.functional.cross_entropy(functional_call(net, parts, (x,)), y)
    w = torch.cat([p.flatten() for p in named.values()])
    H = torch.func.hessian(f)(w)
    assert FixedLoss(learn)() == pytest.approx(f(w).item(), rel=1e-12)
    assert gradient_norm(learn) == pytest.approx(torch.func.grad(f)(w).norm().item(), rel=1e-9)
    assert hessian_trace(learn, progress=False).value == pytest.approx(H.trace().item(), rel=1e-9)
    values = torch.linalg.eigvalsh(H).flip(0)[:3]
    found = top_eigenvalues(learn, 3, progress=False).values
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-10)
    assert 0 <= calibration_error(learn).value <= 1
    way = direction_between(net, other)
    assert all(t.isfinite().all() for t in way.values())
    assert set(way) == {*named, 'norm.running_mean', 'norm.running_var'}
    line = loss_line(learn, way, span=(0., 1.), points=3, progress=False)
    ends = [nn.functional.cross_entropy(m(x), y).item() for m in (net, other)]
    assert line.loss[[0, 2]].tolist() == pytest.approx(ends, rel=1e-9)
    assert np.isfinite(line.loss).all()


@pytest.mark.parametrize('name', ['q.weight', 'norm.running_var', 'norm.weight'])
def test_weights_and_statistics_must_be_finite(name):
    net = attention(0)
    with torch.no_grad(): net.state_dict()[name].fill_(float('inf'))
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    with pytest.raises(ValueError, match=f"'{name}' holds values that are not finite"):
        FixedLoss(learner(DataLoaders([(x, y)], [(x, y)]), net))


class ComplexLayer(nn.Module):
    "Multiplies by complex weights; the outputs are the squared lengths."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(6, 3, dtype=torch.complex128))
    def forward(self, x): return (x.to(self.w.dtype) @ self.w).abs().square()


@pytest.mark.parametrize('bad', [complex(np.nan, 0), complex(0, np.nan), complex(0, np.inf)])
def test_both_parts_of_complex_weights_must_be_finite(bad):
    net = ComplexLayer().eval()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.arange(4) % 3
    learn = learner(DataLoaders([(x, y)], [(x, y)]), net)
    by_hand = nn.functional.cross_entropy((x.sum(1)**2)[:, None].expand(4, 3), y).item()
    assert FixedLoss(learn)() == pytest.approx(by_hand, rel=1e-12)
    with torch.no_grad(): net.w[2, 1] = bad
    with pytest.raises(ValueError, match="'w' holds values that are not finite"): FixedLoss(learn)
