"""Every method, on every kind of task, in every loop: what the same three steps give.

    python tests/any_loop.py

writes the table that the page "In your loop" shows. `test_any_loop.py` fails where the table is not true."""
import json
import warnings
from functools import partial

import torch
from fastai.callback.core import TrainEvalCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from tasks import NETWORKS, task
from torch import nn

from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.fits import LoopMethod
from sadt_nb.core.losses import divergence_of
from sadt_nb.experiments.report import published
from sadt_nb.methods.distillation import Distillation
from sadt_nb.methods.esam import ESAM
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.methods.sadt import SADT


def last_layer(params, grads, generator): return _noise_on(list(params)[-2:], params, generator)
def last_bias(params, grads, generator): return _noise_on(list(params)[-1:], params, generator)
def _noise_on(names, params, generator):
    "Noise on some parameters, as variant 2 of SADT has it on two layers."
    return {n: .1 * torch.randn(params[n].shape, generator=generator, dtype=torch.float64) for n in names}


TABLE = published('loops') / 'loops.json'
TASKS = [name for name in NETWORKS if name != 'flat regression']
OPTIONS = {'sam': dict(rho=.1), 'asam': dict(rho=.5), 'esam': dict(rho=.1),
           'gsam': dict(rho_max=.1, rho_min=.1, alpha=.1), 'looksam': dict(rho=.1, k=2),
           'friendly_sam': dict(rho=.1), 'wsam': dict(rho=.1, gamma=.8),
           'saf': dict(lam=2., tau=1., lag=1, start_epoch=1),
           'mesa': dict(lam=2., tau=1., beta=.5, start_epoch=0),
           'sadt1': dict(noise_scale=1000.),
           'sadt2': dict(perturb=[last_layer, last_bias], share_trunk=False),
           'sadt3': dict(noise_scale=1000.)}
SAME, OWN, REFUSED = 'same', 'learner', 'refused' # values of the table
ADVICE = ('needs a fastai Learner', 'must return (logits, loss)', 'one loss per sample', 'exactly one pass')


class Case:
    "A method on a task: makes the same network, batches and method again for each loop."
    def __init__(self, method, name): self.method, self.name = method, name

    def network(self): return task(self.name)[0].train()
    def samples(self): return task(self.name)[1]
    def loss(self): return task(self.name)[2]

    def batches(self):
        x, y = (torch.stack(part) for part in zip(*self.samples()))
        return list(zip(x.split(8), y.split(8))) * 2

    def make(self, **kwargs):
        if self.method == 'distillation':
            torch.manual_seed(9)
            return Distillation(NETWORKS[self.name][0]().double(), .5)
        torch.manual_seed(0) # of methods that draw
        callback, = make_method(self.method, **OPTIONS.get(self.method, {}), **kwargs)
        return callback

    def make_for_loop(self):
        "In a plain loop SADT cannot see the loss function, so it is told how predictions are compared."
        sadt = self.method.startswith('sadt')
        return self.make(**dict(divergence=divergence_of(self.loss())) if sadt else {})

    def of_sample(self, out, y):
        "The loss of each sample of a batch."
        one = self.loss()
        return torch.stack([one(o[None], t[None]) for o, t in zip(out, y)])

    def closure(self, method, net, x, y, backward=None):
        "The closure that a method takes; it calls `backward` itself where that is given and possible."
        loss = self.loss()
        def returns():
            value = loss(net(x), y)
            if backward: backward(value)
            return value
        def predicts():
            out = net(x)
            return out, loss(out, y)
        def selects(rows):
            part = slice(None) if rows is None else rows
            return self.of_sample(net(x[part]), y[part])
        if isinstance(method, SADT): return predicts
        return selects if isinstance(method, ESAM) else returns


def sgd(params): return torch.optim.SGD(params, lr=.1, momentum=.9)
def values(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


# The loops: each trains a new network and returns its weights

def pytorch(case):
    net, method = case.network(), case.make_for_loop()
    opt = MethodOptimizer(method, sgd(net.parameters()), net)
    for x, y in case.batches(): opt.step(case.closure(method, net, x, y))
    return values(net)


def function(case):
    net, method = case.network(), case.make_for_loop()
    opt = sgd(net.parameters())
    for x, y in case.batches(): closure_step(method, net, case.closure(method, net, x, y), opt)
    return values(net)


def fastai(case):
    dl = DataLoader(case.samples(), bs=8, shuffle=False)
    opt_func = partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=.9))
    learn = Learner(DataLoaders(dl, dl), case.network(), loss_func=case.loss(), opt_func=opt_func, lr=.1,
                    wd=0., default_cbs=False, cbs=[TrainEvalCallback, case.make()])
    learn.fit(2)
    return values(learn.model)


def accelerate(case):
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    net, method = case.network(), case.make_for_loop()
    opt = MethodOptimizer(method, sgd(net.parameters()), net)
    net, prepared = accelerator.prepare(net, opt)
    for x, y in case.batches():
        opt.backward(case.closure(method, net, x, y, accelerator.backward))
        prepared.step()
        prepared.zero_grad()
    return values(net)


def _lightning(case, module, cbs=()):
    import lightning
    quiet = dict(accelerator='cpu', logger=False, enable_checkpointing=False, enable_progress_bar=False,
                 enable_model_summary=False)
    trainer = lightning.Trainer(max_epochs=2, precision='64-true', callbacks=list(cbs), **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(case.samples(), 8))
    return values(module.net)


def lightning_automatic(case):
    import lightning
    from sadt_nb.core.lightning import MethodCallback
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.loss = case.network(), case.loss()
        def training_step(self, batch): return self.loss(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return sgd(self.parameters())
    return _lightning(case, Module(), [MethodCallback(case.make_for_loop())])


def lightning_manual(case):
    import lightning
    method = case.make_for_loop()
    class Module(lightning.LightningModule):
        automatic_optimization = False
        def __init__(self):
            super().__init__()
            self.net = case.network()
        def training_step(self, batch):
            self.optimizers().step(case.closure(method, self.net, *batch, self.manual_backward))
        def configure_optimizers(self): return MethodOptimizer(method, sgd(self.parameters()), self)
    return _lightning(case, Module())


class WithLoss(nn.Module):
    "A network that returns its loss, as the Trainer of Hugging Face needs it."
    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x, labels):
        out = self.net(x)
        return dict(loss=self.loss(out, labels), logits=out)


def hugging_face(case):
    import tempfile
    import transformers
    class MethodTrainer(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            step = super().training_step
            return self.optimizer.optimizer.backward(lambda: step(*args, **kwargs))
        def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(self.train_dataset)
    net = WithLoss(case.network(), case.loss())
    opt = MethodOptimizer(case.make_for_loop(), sgd(net.parameters()), net)
    constant = torch.optim.lr_scheduler.ConstantLR(opt, factor=1.)
    rows = [dict(x=x, labels=y) for x, y in case.samples()]
    def collate(rows): return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            folder, per_device_train_batch_size=8, num_train_epochs=2, max_grad_norm=0, use_cpu=True,
            report_to=[], disable_tqdm=True, save_strategy='no', logging_strategy='no')
        trainer = MethodTrainer(net, args, train_dataset=rows, data_collator=collate,
                                optimizers=(opt, constant))
        trainer.train()
    return values(net)


def skorch(case):
    import skorch
    class MethodNet(skorch.NeuralNet):
        def initialize_optimizer(self, *args, **kwargs):
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_ = MethodOptimizer(case.make_for_loop(), self.optimizer_, self.module_)
            return self
    x, y = (torch.stack(part) for part in zip(*case.samples()))
    learner = MethodNet(case.network(), criterion=case.loss, optimizer=torch.optim.SGD, lr=.1, max_epochs=2,
                        optimizer__momentum=.9, batch_size=8, train_split=None, verbose=0)
    learner.fit(x, y)
    return values(learner.module_)


def timm(case):
    from timm.optim import create_optimizer_v2
    net, method = case.network(), case.make_for_loop()
    base = create_optimizer_v2(net, 'momentum', lr=.1, momentum=.9, weight_decay=0.)
    opt = MethodOptimizer(method, base, net)
    for x, y in case.batches():
        opt.backward(case.closure(method, net, x, y))
        opt.step()
        opt.zero_grad()
    return values(net)


LOOPS = {'fastai': fastai, 'function': function, 'PyTorch': pytorch, 'accelerate': accelerate,
         'Lightning': lightning_automatic, 'Lightning, manual': lightning_manual,
         'Hugging Face': hugging_face, 'skorch': skorch, 'timm': timm}


def outcome(method, name, loop, expected):
    "Return what a loop did with a method: 'same' weights as `expected`, 'refused', or fastai's 'learner'."
    case = Case(method, name)
    refusals = ValueError, TypeError
    try: got = LOOPS[loop](case)
    except refusals as e:
        if any(words in str(e) for words in ADVICE): return REFUSED
        raise
    if expected is None: return OWN
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
    return SAME


def plain(name):
    "Return the weights of plain training."
    net, loss = task(name)[0], task(name)[2]
    opt = sgd(net.parameters())
    for x, y in Case('baseline', name).batches():
        opt.zero_grad()
        loss(net(x), y).backward()
        opt.step()
    return values(net)


def expected_of(method, name):
    "Return the weights after a PyTorch loop, or `None` for a method that only a Learner serves."
    served = isinstance(Case(method, name).make(), LoopMethod)
    return pytorch(Case(method, name)) if served else None


def row(method, name, loops=LOOPS):
    "Return the outcomes of a method on a task by loop."
    expected = expected_of(method, name)
    return {loop: outcome(method, name, loop, expected) for loop in loops}


def methods(): return [name for name in METHODS if name != 'baseline']


def main():
    warnings.filterwarnings('ignore')
    table = {method: {name: row(method, name) for name in TASKS} for method in methods()}
    TABLE.write_text(json.dumps(table, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
