"""Which samples a batch holds: with fastai's and PyTorch's loaders, workers, skipped samples, and in SAF."""
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import as_loader, batches, learner, mlp
from fastai.callback.core import Callback, CancelBatchException, TrainEvalCallback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader, SkipItemException
from fastai.data.block import RegressionBlock
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.tabular.core import TabDataLoader, TabularPandas, TabWeightedDL
from fastai.text.data import LMDataLoader, SortedDL
from torch import nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler
from torch.utils.data import DataLoader as TorchLoader

from sadt_nb.core.loss_terms import SampleIds
from sadt_nb.methods import saf
from sadt_nb.methods.saf import SAF, Records
from sadt_nb.methods.sam import SAM

N = 22


class Items:
    "Item i has the input i; those in `skipped` are left out, as unreadable files are."
    def __init__(self, skipped=()): self.skipped = set(skipped)
    def __len__(self): return N
    def __getitem__(self, i):
        if i in self.skipped: raise SkipItemException()
        return torch.full((5,), float(i)), torch.zeros(2)


class Check(Callback):
    run_valid = False
    def before_fit(self):
        SampleIds.install(self.learn)
        self.seen = []
    def after_pred(self):
        expected = self.learn.xb[-1][:, 0].long() # the last input, for tables
        assert torch.equal(self.sample_ids.ids, expected), (self.sample_ids.ids, expected)
        self.seen += expected.tolist()


def fit(dl, *cbs, epochs=2):
    learn = Learner(DataLoaders(dl, dl), nn.Linear(5, 2), loss_func=F.mse_loss, opt_func=SGD, lr=1e-9,
                    default_cbs=False, cbs=[TrainEvalCallback, *cbs])
    learn.fit(epochs)
    return learn


SKIPPED = (0, 3, 4, 9, 17, 21)


@pytest.mark.parametrize('options', [dict(), dict(shuffle=True), dict(shuffle=True, drop_last=True)])
@pytest.mark.parametrize('skipped', [(), SKIPPED])
def test_fastai_loaders(options, skipped):
    check = Check()
    dl = DataLoader(Items(skipped), bs=4, **options)
    fit(dl, check)
    kept = N - len(skipped)
    if options.get('drop_last'): kept -= kept % 4
    assert len(check.seen) == 2 * kept and not set(check.seen) & set(skipped)
    assert not {'get_idxs', 'do_item'} & set(vars(dl))


def test_skips_in_worker_processes_are_an_error():
    with pytest.raises(Exception, match='sample 3; with worker processes, .* are then unknown'):
        fit(DataLoader(Items([3]), bs=4, num_workers=2), Check())
    fit(DataLoader(Items(), bs=4, num_workers=2, shuffle=True), Check())


@pytest.mark.parametrize('options', [
    dict(batch_size=4), dict(batch_size=4, shuffle=True), dict(batch_size=4, shuffle=True, drop_last=True),
    dict(batch_size=4, shuffle=True, num_workers=2),
    dict(batch_size=4, shuffle=True, num_workers=2, persistent_workers=True)])
def test_pytorch_loaders(options):
    check, dl = Check(), TorchLoader(Items(), **options)
    sampler = dl.batch_sampler
    fit(dl, check)
    assert len(check.seen) == 2 * (20 if options.get('drop_last') else N) and dl.batch_sampler is sampler


def test_a_batch_sampler_of_ones_own():
    items = Items()
    sampler = BatchSampler(RandomSampler(items, replacement=True, num_samples=30), 7, False)
    check = Check()
    fit(TorchLoader(items, batch_sampler=sampler), check)
    assert len(check.seen) == 60


def test_a_fit_after_an_exception_starts_with_a_clean_loader():
    class Stop(Callback):
        def after_pred(self):
            if self.iter == 2: raise RuntimeError('stopped')
    for dl in (DataLoader(Items(), bs=4), TorchLoader(Items(), batch_size=4)):
        with pytest.raises(RuntimeError): fit(dl, Check(), Stop())
        fit(dl, Check())


class Stream(IterableDataset):
    def __iter__(self): return iter([Items()[i] for i in range(8)])


@pytest.mark.parametrize('make', [
    lambda: [(torch.zeros(4, 5), torch.zeros(4, 2))], lambda: TorchLoader(Stream(), batch_size=4),
    lambda: TorchLoader(Items(), batch_size=None)])
def test_loaders_without_an_order_are_refused(make):
    with pytest.raises(ValueError, match='sample ids need'): fit(make(), Check())


# Other loaders of fastai

class Table(nn.Module):
    "A network for the two inputs of a table: categories and numbers."
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)
    def forward(self, categories, numbers): return self.linear(numbers)


def table(cls, **options):
    "Return a loader over a table whose row i has the number i; its target is 0."
    frame = pd.DataFrame(dict(number=np.arange(N, dtype='float32'), target=np.zeros(N, dtype='float32')))
    rows = TabularPandas(frame, cont_names=['number'], y_names='target', y_block=RegressionBlock())
    return cls(rows, bs=4, **options)


def weights(): return np.arange(1., N + 1)
def in_part(dl, rank=1):
    "Return the loader of one of two processes, without messages between processes."
    pytest.importorskip('accelerate', reason='fastai distributes through accelerate')
    from fastai.distributed import DistributedDL
    part = DistributedDL(dl, rank, 2)
    part._broadcast = lambda idxs, rank: list(map(int, idxs))
    return part


FASTAI_LOADERS = dict(
    sorted=lambda **kw: SortedDL(Items(), res=[(7 * i) % 5 for i in range(N)], bs=4, num_workers=0, **kw),
    weighted=lambda **kw: WeightedDL(Items(), bs=4, wgts=weights(), num_workers=0, **kw),
    partial=lambda **kw: PartialDL(Items(), bs=4, partial_n=11, num_workers=0, **kw),
    table=lambda **kw: table(TabDataLoader, **kw),
    weighted_table=lambda **kw: table(TabWeightedDL, wgts=weights(), **kw))


@pytest.mark.parametrize('distributed', [False, True], ids=['alone', 'part'])
@pytest.mark.parametrize('shuffle', [False, True], ids=['in order', 'shuffled'])
@pytest.mark.parametrize('name', FASTAI_LOADERS)
def test_loaders_of_fastai_with_an_order_of_their_own(name, shuffle, distributed):
    dl = FASTAI_LOADERS[name](shuffle=shuffle)
    if distributed: dl = in_part(dl)
    check = Check()
    net = Table() if 'table' in name else nn.Linear(5, 2)
    learn = Learner(DataLoaders(dl, dl), net, loss_func=lambda p, y: p.square().mean(), opt_func=SGD, lr=1e-9,
                    default_cbs=False, cbs=[TrainEvalCallback, check])
    learn.fit(2)
    if name in ('sorted', 'table') and not distributed: assert sorted(check.seen) == sorted([*range(N)] * 2)
    whole = 11 if name == 'partial' else N
    assert len(check.seen) == 2 * (math.ceil(whole / 2) if distributed else whole)


@pytest.mark.parametrize('distributed', [False, True], ids=['alone', 'part'])
@pytest.mark.parametrize('shuffle', [False, True], ids=['in order', 'shuffled'])
def test_a_loader_of_a_language_model_is_refused(shuffle, distributed):
    "It cuts the texts, one after another, into pieces, and shuffling changes every piece."
    texts = [(torch.arange(30 * i, 30 * i + 30),) for i in range(10)]
    dl = LMDataLoader(texts, bs=4, seq_len=7, shuffle=shuffle)
    if distributed: dl = in_part(dl)
    learn = Learner(DataLoaders(dl, dl), nn.Linear(7, 2), loss_func=nn.CrossEntropyLoss(), opt_func=SGD,
                    default_cbs=False, cbs=[TrainEvalCallback, SAF(start_epoch=0)])
    with pytest.raises(ValueError, match='LMDataLoader joins all texts'): learn.fit(1)


def test_a_stream_with_a_number_of_samples_is_refused():
    with pytest.raises(ValueError, match='sample ids need'): fit(DataLoader(Stream(), bs=4, n=8), Check())


def test_a_collate_function_that_drops_samples_is_refused():
    def collate(items): return torch.utils.data.default_collate(items[1:])
    with pytest.raises(ValueError, match='the sampler gave 4 samples, but the batch has 3'):
        fit(TorchLoader(Items(), batch_size=4, collate_fn=collate), Check())


@pytest.mark.parametrize('make', [
    lambda skipped: DataLoader(Items(skipped), bs=4, shuffle=True),
    lambda skipped: TorchLoader(Items(), batch_size=4, shuffle=True)])
def test_records_of_saf_belong_to_their_samples(make):
    "At a rate of 0 the record of sample i is the network's output for it."
    skipped = SKIPPED if make(()).__class__ is DataLoader else ()
    saf = SAF(1., 1., lag=1, start_epoch=1)
    learn = fit(make(skipped), saf)
    outputs = learn.model(torch.stack([torch.full((5,), float(i)) for i in range(N)])).detach()
    kept = [i for i in range(N) if i not in skipped]
    torch.testing.assert_close(saf.records.logits[0][kept].float(), outputs[kept], rtol=2e-3, atol=2e-3)
    assert (saf.records.written[0][list(skipped)] < 0).all()


class SkipBatches(Callback):
    "Cancels the first batches of an epoch, before anyone has seen them, as a run that continues does."
    order = -100
    def before_batch(self):
        if self.iter < 2: raise CancelBatchException()


@pytest.mark.parametrize('make', [
    lambda: DataLoader(Items(), bs=4, shuffle=True), lambda: DataLoader(Items(SKIPPED), bs=4, shuffle=True),
    lambda: TorchLoader(Items(), batch_size=4, shuffle=True)])
def test_batches_may_be_cancelled(make):
    check = Check()
    fit(make(), check, SkipBatches(), epochs=1)
    assert 0 < len(check.seen) < N - 6


# What SAF records

def test_records_of_large_logits_stay_finite():
    records = Records.empty(1, 3, 2)
    ids = torch.arange(3)
    logits = torch.tensor([[1e6, -1e6], [65504., -65504.], [.1, 2.]])
    assert torch.equal(records.exchange(ids, logits, 0), logits)
    past = records.exchange(ids, torch.zeros(3, 2), 1)
    expected = torch.tensor([[65504., -65504.], [65504., -65504.], [.1, 2.]])
    torch.testing.assert_close(past, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize('extra', [[], ['sam']])
def test_records_are_of_the_weights_and_not_of_a_perturbed_point(extra):
    net = mlp()
    x, y = batches(n=8)[0]
    with torch.no_grad(): expected = net(x)
    saf = SAF(lag=1, start_epoch=0)
    cbs = [saf, *([SAM(5.)] if extra else [])]
    learn = learner(net, cbs, as_loader([(x, y)]))
    learn.fit(1)
    assert torch.equal(saf.records.logits[0], expected.half())
    with torch.no_grad(): assert not torch.equal(net(x), expected), 'the fit has moved the weights'


def test_records_of_two_processes_that_wrote_the_same_sample(monkeypatch):
    "The other process has the same records, so each sum is twice that of this process."
    group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2,
                            all_reduce=lambda t: t.mul_(2))
    monkeypatch.setattr(saf, 'distributed', group)
    records = Records.empty(1, 3, 2)
    logits = torch.tensor([[1., -2.], [3., .5]])
    records.logits[0, :2], records.written[0, :2] = logits.half(), 0
    records.merge(0)
    assert torch.equal(records.logits[0, :2].float(), logits)
    assert records.written[0, :2].tolist() == [0, 0]
    assert records.written[0, 2] < 0
