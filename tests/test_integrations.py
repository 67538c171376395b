"""Methods in the loops of other libraries: each makes the steps of a plain loop, or is an error."""
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sadt_nb.core.closures import MethodOptimizer
from sadt_nb.core.multi_optimizer import MultiOptimizer
from sadt_nb.methods.asam import ASAM
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.gsam import GSAM
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM, sam_step

INSTALL = 'not installed: pip install sadt_nb[integrations]'
ONE_PASS = { # methods with one pass at perturbed weights
    'sam': partial(SAM, .1), 'sam keep': partial(SAM, .1, bn='keep'),
    'sam replay': partial(SAM, .1, rng='replay'), 'sam every second': partial(SAM, .1, interval=2),
    'asam': partial(ASAM, .5), 'gsam': partial(GSAM, .1, .1), 'looksam': partial(LookSAM, .1, k=3),
}
CLOSE = dict(rtol=1e-11, atol=1e-13)


@pytest.fixture(autouse=True)
def no_accelerator_remains():
    yield
    if 'accelerate.state' not in sys.modules: return
    state = sys.modules['accelerate.state']
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()


def batches(n=6, bs=8):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n * bs, 1, 6, 6, generator=gen, dtype=torch.float64)
    y = torch.randint(0, 3, (n * bs,), generator=gen)
    return list(zip(x.split(bs), y.split(bs)))


def loader(): return DataLoader(TensorDataset(*(torch.cat(part) for part in zip(*batches()))), 8)


def network(dropout=0.):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Dropout(dropout),
                         nn.Linear(64, 3)).double().train()


def sgd(net): return torch.optim.SGD(net.parameters(), lr=.1, momentum=.9, weight_decay=1e-3)


def values(net): return torch.cat([v.flatten().double() for v in net.state_dict().values()]).detach()


def dropout_of(name): return .5 if 'replay' in name else 0.


def by_hand(method, net, accumulate=1, max_norm=None, epochs=1):
    "The plain loop that the others are compared with."
    opt = MethodOptimizer(method, sgd(net), net, max_norm=max_norm)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, .9)
    for _ in range(epochs):
        for i, (x, y) in enumerate(batches()):
            torch.manual_seed(i) # of the dropout masks
            opt.backward(lambda: F.cross_entropy(net(x), y) / accumulate)
            if (i + 1) % accumulate: continue
            opt.step()
            opt.zero_grad()
        schedule.step()
    return values(net)


# Lightning

@pytest.fixture(scope='session')
def lightning():
    return pytest.importorskip('lightning', reason=f'lightning is {INSTALL}')


def lightning_module(lightning, net, make=sgd):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.steps, self.clipped = net, [], 0

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log('train_loss', loss, on_epoch=True, on_step=False)
            self.log_dict({'seen': float(len(x))}, on_epoch=True, on_step=False, reduce_fx='sum')
            return dict(loss=loss)

        def configure_optimizers(self):
            opt = make(self.net)
            return [opt], [torch.optim.lr_scheduler.ExponentialLR(opt, .9)]

        def on_train_batch_end(self, *args): self.steps.append(self.global_step)
    return Module()


QUIET = dict(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False)


def by_lightning(lightning, method, net, epochs=1, cbs=(), make=sgd, **kwargs):
    module = lightning_module(lightning, net, make)
    return module, fit_lightning(lightning, method, module, epochs, cbs, **kwargs)


def fit_lightning(lightning, method, module, epochs=1, cbs=(), ckpt_path=None, **kwargs):
    from sadt_nb.core.lightning import MethodCallback
    def seed_masks(trainer, module, batch, batch_idx): torch.manual_seed(batch_idx)
    masks = lightning.pytorch.callbacks.LambdaCallback(on_train_batch_start=seed_masks)
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=[masks, MethodCallback(method), *cbs],
                                precision='64-true', **QUIET | kwargs)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('max_norm', [None, .05])
@pytest.mark.parametrize('name', ONE_PASS)
def test_lightning_makes_the_steps_of_a_plain_loop(lightning, name, max_norm, accumulate):
    net = network(dropout_of(name))
    module, trainer = by_lightning(lightning, ONE_PASS[name](), net, epochs=2, gradient_clip_val=max_norm,
                                   accumulate_grad_batches=accumulate)
    other = network(dropout_of(name))
    expected = by_hand(ONE_PASS[name](), other, accumulate, max_norm, epochs=2)
    torch.testing.assert_close(values(net), expected, **CLOSE)
    assert trainer.global_step == 12 // accumulate and module.steps[-1] == trainer.global_step
    assert trainer.callback_metrics['seen'] == 48 # each sample is logged once, not once per pass


# methods with a state; a run is stopped after six steps, in the middle of their cycle of four
EVERY_FOURTH = {'looksam': partial(LookSAM, .1, k=4), 'sam': partial(SAM, .1, interval=4)}


@pytest.mark.parametrize('name', EVERY_FOURTH)
def test_a_lightning_run_resumes_with_the_methods_state(lightning, name, tmp_path):
    whole, net, resumed = network(), network(), network()
    by_lightning(lightning, EVERY_FOURTH[name](), whole, epochs=2)
    _, trainer = by_lightning(lightning, EVERY_FOURTH[name](), net)
    trainer.save_checkpoint(tmp_path / 'half.ckpt')
    by_lightning(lightning, EVERY_FOURTH[name](), resumed, epochs=2, ckpt_path=str(tmp_path / 'half.ckpt'))
    torch.testing.assert_close(values(resumed), values(whole), rtol=0, atol=0)


def two_as_one(net):
    "SGD for the weights and SGD for the biases, as one optimizer; Lightning's own loop takes only one."
    params = list(net.parameters())
    parts = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
    return MultiOptimizer([torch.optim.SGD(part, lr=.1, momentum=.9, weight_decay=1e-3) for part in parts])


@pytest.mark.parametrize('name', ['sam', 'looksam'])
def test_lightning_steps_two_optimizers_as_one(lightning, name, tmp_path):
    whole, net, resumed = network(), network(), network()
    by_lightning(lightning, ONE_PASS[name](), whole, epochs=2)
    _, trainer = by_lightning(lightning, ONE_PASS[name](), net, make=two_as_one)
    trainer.save_checkpoint(tmp_path / 'half.ckpt')
    by_lightning(lightning, ONE_PASS[name](), resumed, epochs=2, make=two_as_one,
                 ckpt_path=str(tmp_path / 'half.ckpt'))
    torch.testing.assert_close(values(resumed), values(whole), **CLOSE)


def test_an_interrupted_lightning_run_leaves_unmoved_weights(lightning):
    def fails(trainer, module):
        if trainer.callbacks[1]._passing and trainer.global_step == 3: raise RuntimeError('out of memory')
    net, again = network(), network()
    stops = lightning.pytorch.callbacks.LambdaCallback(on_after_backward=fails)
    with pytest.raises(RuntimeError, match='out of memory'):
        by_lightning(lightning, SAM(.1, bn='keep'), net, cbs=[stops])
    by_lightning(lightning, SAM(.1, bn='keep'), again, limit_train_batches=3)
    for p, q in zip(net.parameters(), again.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


LIGHTNING_ERRORS = {
    'sadt': (lambda cb: cb(SADT()), ValueError, 'SADT does not make exactly one pass'),
    'esam': (lambda cb: cb(ESAM()), ValueError, 'ESAM does not make exactly one pass'),
    'no method': (lambda cb: cb('sam'), TypeError, "got 'sam'"),
}


@pytest.mark.parametrize('name', LIGHTNING_ERRORS)
def test_methods_that_a_training_step_cannot_serve(lightning, name):
    from sadt_nb.core.lightning import MethodCallback
    make, error, words = LIGHTNING_ERRORS[name]
    with pytest.raises(error, match=words): make(MethodCallback)


def test_lightning_modules_and_trainers_that_do_not_fit(lightning):
    from sadt_nb.core.lightning import MethodCallback
    with pytest.raises(RuntimeError, match='more than one stateful callback of type `MethodCallback`'):
        by_lightning(lightning, SAM(), network(), cbs=[MethodCallback(ASAM())])
    module = lightning_module(lightning, network())
    module.automatic_optimization = False
    with pytest.raises(ValueError, match='automatic optimization'): fit_lightning(lightning, SAM(), module)
    module = lightning_module(lightning, network())
    module.configure_optimizers = lambda: MethodOptimizer(SAM(), sgd(module.net), module)
    with pytest.raises(ValueError, match='base optimizer'): fit_lightning(lightning, SAM(), module)
    trainer = lightning.Trainer(max_epochs=1, precision='64-true', **QUIET)
    with pytest.raises(ValueError, match=r'callbacks=\[MethodCallback'): trainer.fit(module, loader())


def two_ranks_by_hand():
    "SAM along each rank's own gradient at every second step; a step takes the mean over the ranks."
    from lightning_worker import batches as of_rank, network as small
    net = small()
    params = list(net.parameters())
    opt = torch.optim.SGD(params, lr=.1, momentum=.9)
    def gradient(x, y): return torch.autograd.grad(F.cross_entropy(net(x), y), params)
    for step, two in enumerate(zip(of_rank(0), of_rank(1))):
        grads = []
        for x, y in two:
            g = gradient(x, y)
            rho = (0. if step % 2 else .1) / torch.cat([t.flatten() for t in g]).norm()
            torch._foreach_add_([p.data for p in params], g, alpha=rho)
            grads.append(gradient(x, y))
            torch._foreach_sub_([p.data for p in params], g, alpha=rho)
        for p, a, b in zip(params, *grads): p.grad = (a + b) / 2
        opt.step()
    return values(net)


def test_two_lightning_processes_perturb_along_their_own_gradients(lightning, tmp_path):
    "Every second step is plain, so both kinds of synchronisation are used."
    out = tmp_path / 'weights.pt'
    worker = Path(__file__).with_name('lightning_worker.py')
    r = subprocess.run([sys.executable, worker, out], capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-3000:]
    got = torch.cat([v.flatten() for v in torch.load(out).values()])
    torch.testing.assert_close(got, two_ranks_by_hand(), **CLOSE)


# Hugging Face

@pytest.fixture(scope='session')
def transformers():
    return pytest.importorskip('transformers', reason=f'transformers is {INSTALL}')


def bert(transformers):
    torch.manual_seed(1)
    config = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=8, max_position_embeddings=8, num_labels=3,
                                     hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    return transformers.BertForSequenceClassification(config).double()


def sentences(n=24):
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (n, 6), generator=gen)
    labels = torch.randint(0, 3, (n,), generator=gen)
    return [dict(input_ids=i, labels=y) for i, y in zip(ids, labels)]


def adamw(net): return torch.optim.AdamW(net.parameters(), lr=.01, weight_decay=.1)


def trainer_class(transformers):
    class MethodTrainer(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            step = super().training_step
            return self.optimizer.optimizer.backward(lambda: step(*args, **kwargs))
    return MethodTrainer


def by_trainer(transformers, method, net, folder, resume=None, **kwargs):
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, seed=0, report_to=[],
        disable_tqdm=True, logging_strategy='no', **dict(save_strategy='no') | kwargs)
    opt = MethodOptimizer(method, adamw(net), net)
    trainer = trainer_class(transformers)(net, args, train_dataset=sentences(), optimizers=(opt, None))
    trainer.model_accepts_loss_kwargs = False # so that the trainer, not the model, divides the loss
    shown = []
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: shown.append(collate(rows)) or shown[-1]
    trainer.train(resume_from_checkpoint=resume)
    return trainer, shown


def trainer_by_hand(transformers, method, net, shown, accumulate, max_norm):
    net.train()
    opt = MethodOptimizer(method, adamw(net), net, max_norm=max_norm)
    steps = len(shown) // accumulate
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: max(0, (steps - i) / steps))
    for i, batch in enumerate(shown):
        opt.backward(lambda: net(**batch).loss / accumulate)
        if (i + 1) % accumulate: continue
        opt.step()
        schedule.step()
        opt.zero_grad()
    return values(net)


@pytest.mark.parametrize('accumulate', [1, 3])
@pytest.mark.parametrize('name', ['sam', 'asam', 'gsam', 'looksam', 'sam every second'])
def test_hugging_face_makes_the_steps_of_a_plain_loop(transformers, tmp_path, name, accumulate):
    net = bert(transformers)
    trainer, shown = by_trainer(transformers, ONE_PASS[name](), net, tmp_path, max_grad_norm=.5,
                                gradient_accumulation_steps=accumulate)
    expected = trainer_by_hand(transformers, ONE_PASS[name](), bert(transformers), shown, accumulate, .5)
    torch.testing.assert_close(values(net), expected, rtol=1e-9, atol=1e-11)
    assert trainer.state.global_step == 12 // accumulate


@pytest.mark.parametrize('accumulate', [1, 3])
def test_a_training_step_that_calls_sam_step_steps_once(transformers, tmp_path, accumulate):
    "The function steps by itself; the trainer's own step after it finds no gradients."
    class Stepping(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            def closure():
                loss = self.compute_loss(model, inputs) / accumulate
                self.accelerator.backward(loss)
                return loss
            return sam_step(model, closure, self.optimizer, rho=.1)
    net = bert(transformers)
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=2, use_cpu=True, seed=0, report_to=[],
        disable_tqdm=True, logging_strategy='no', save_strategy='no', max_grad_norm=.5,
        gradient_accumulation_steps=accumulate)
    trainer = Stepping(net, args, train_dataset=sentences(), optimizers=(adamw(net), None))
    shown, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: shown.append(collate(rows)) or shown[-1]
    trainer.train()
    expected = trainer_by_hand(transformers, SAM(.1), bert(transformers), shown, accumulate, None)
    torch.testing.assert_close(values(net), expected, rtol=1e-9, atol=1e-11)


def test_a_trainer_that_makes_no_pass_of_the_method_is_an_error(transformers, tmp_path):
    "The trainer's own training step leaves plain gradients: a silent plain training."
    net = bert(transformers)
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True)
    opt = MethodOptimizer(SAM(.1), adamw(net), net)
    trainer = transformers.Trainer(net, args, train_dataset=sentences(), optimizers=(opt, None))
    with pytest.raises(ValueError, match='the gradients are plain, because'): trainer.train()


@pytest.mark.parametrize('name', EVERY_FOURTH)
def test_a_trainer_resumes_with_the_methods_state(transformers, tmp_path, name):
    whole, net, resumed = (bert(transformers) for _ in range(3))
    saving = dict(save_strategy='steps', save_steps=6)
    by_trainer(transformers, EVERY_FOURTH[name](), whole, tmp_path / 'whole', **saving)
    half = str(tmp_path / 'whole' / 'checkpoint-6')
    by_trainer(transformers, EVERY_FOURTH[name](), resumed, tmp_path / 'resumed', resume=half, **saving)
    torch.testing.assert_close(values(resumed), values(whole), rtol=0, atol=0)


# skorch

@pytest.fixture(scope='session')
def skorch(): return pytest.importorskip('skorch', reason=f'skorch is {INSTALL}')


def by_skorch(skorch, method, net, **kwargs):
    class MethodNet(skorch.NeuralNetClassifier):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_ = MethodOptimizer(method, self.optimizer_, self.module_, max_norm=.5)
            return self

    schedule = skorch.callbacks.LRScheduler('ExponentialLR', gamma=.9)
    learner = MethodNet(net, criterion=nn.CrossEntropyLoss, optimizer=torch.optim.SGD, lr=.1, batch_size=8,
                        optimizer__momentum=.9, optimizer__weight_decay=1e-3, max_epochs=2, train_split=None,
                        verbose=0, callbacks=[schedule], **kwargs)
    x, y = (torch.cat(part) for part in zip(*batches()))
    class Masks(skorch.callbacks.Callback):
        def on_batch_begin(self, net, **kwargs): torch.manual_seed(len(net.history[-1]['batches']) - 1)
    learner.set_params(callbacks=[schedule, Masks()])
    learner.fit(x, y)
    return learner


@pytest.mark.parametrize('name', ONE_PASS)
def test_skorch_makes_the_steps_of_a_plain_loop(skorch, name):
    learner = by_skorch(skorch, ONE_PASS[name](), network(dropout_of(name)))
    expected = by_hand(ONE_PASS[name](), network(dropout_of(name)), max_norm=.5, epochs=2)
    torch.testing.assert_close(values(learner.module_), expected, **CLOSE)


# timm

def timm_rate(t): # of a cosine schedule over 12 updates with 2 of warm-up
    return .01 + t * (.1 - .01) / 2 if t < 2 else .05 * (1 + math.cos(math.pi * t / 12))


@pytest.mark.parametrize('name', ONE_PASS)
def test_timm_makes_the_steps_of_a_plain_loop(name):
    optim, scheduler, utils = (pytest.importorskip(f'timm.{part}', reason=f'timm is {INSTALL}')
                               for part in ('optim', 'scheduler', 'utils'))
    net, other = network(dropout_of(name)), network(dropout_of(name))
    base = optim.create_optimizer_v2(net, 'momentum', lr=.1, weight_decay=1e-3, momentum=.9)
    opt = MethodOptimizer(ONE_PASS[name](), base, net)
    schedule = scheduler.CosineLRScheduler(opt, t_initial=12, warmup_t=2, warmup_lr_init=.01,
                                                t_in_epochs=False)
    averaged = utils.ModelEmaV3(net, decay=.9)
    plain = torch.optim.SGD([dict(params=[p for p in other.parameters() if p.ndim > 1], weight_decay=1e-3),
                             dict(params=[p for p in other.parameters() if p.ndim == 1])], momentum=.9)
    expected = MethodOptimizer(ONE_PASS[name](), plain, other, max_norm=.5)
    for i, (x, y) in enumerate(batches() + batches()):
        torch.manual_seed(i)
        opt.backward(lambda: F.cross_entropy(net(x), y))
        utils.dispatch_clip_grad(net.parameters(), value=.5, mode='norm')
        opt.step()
        opt.zero_grad()
        averaged.update(net)
        schedule.step_update(i + 1)
        torch.manual_seed(i)
        for group in plain.param_groups: group['lr'] = timm_rate(i)
        expected.step(lambda: F.cross_entropy(other(x), y))
    torch.testing.assert_close(values(net), values(other), **CLOSE)
    assert (values(averaged.module) - values(net)).abs().max() > 1e-4


# accelerate

@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip('accelerate', reason=f'accelerate is {INSTALL}')
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision='bf16')


@pytest.mark.parametrize('name', ONE_PASS)
def test_accelerate_with_autocast_makes_the_steps_of_a_plain_loop(accelerator, name):
    net, other = network(dropout_of(name)).float(), network(dropout_of(name)).float()
    opt = MethodOptimizer(ONE_PASS[name](), sgd(net), net)
    prepared, prepared_opt = accelerator.prepare(net, opt)
    expected = MethodOptimizer(ONE_PASS[name](), sgd(other), other, max_norm=.5)
    for i, (x, y) in enumerate(batches()):
        x = x.float()
        torch.manual_seed(i)
        with accelerator.accumulate(prepared):
            def closure():
                loss = F.cross_entropy(prepared(x), y)
                accelerator.backward(loss)
                return loss
            opt.backward(closure)
            if accelerator.sync_gradients: accelerator.clip_grad_norm_(prepared.parameters(), .5)
            prepared_opt.step()
            prepared_opt.zero_grad()
        torch.manual_seed(i)
        def by_hand():
            with torch.autocast('cpu', torch.bfloat16, cache_enabled=False): out = other(x)
            return F.cross_entropy(out.float(), y) / 2
        expected.backward(by_hand)
        if i % 2:
            expected.step()
            expected.zero_grad()
    torch.testing.assert_close(values(net), values(other), rtol=1e-6, atol=1e-7)


def test_a_repeated_training_step_logs_nothing():
    pytest.importorskip('lightning', reason=f'lightning is {INSTALL}')
    from sadt_nb.core.lightning import _without_logs
    module = nn.Module()
    with _without_logs(module):
        module.log('loss', 1.)
        module.log_dict(dict(loss=1.))
    assert not {'log', 'log_dict'} & vars(module).keys()
