"Methods in trainings that are evaluated, interrupted, unfrozen, checkpointed or repeated with other networks."
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import as_loader, batches, cnn, flat, learner, needed, sgd_for
from fastai.callback.core import Callback
from sadt_nb.core.passes import StepGrads
from sadt_nb.methods.registry import METHODS, make_method, method_options
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM

KINDS = {
    **{name: partial(make_method, name) for name in METHODS},
    'sam only norm': lambda: [SAM(.5, only='norm', rng='replay')],
    'sam in chunks': lambda: [SAM(.5, m=4, rng='replay')],
    'sadt without a first step': lambda: [SADT(1, noise_scale=1e3, first_step=False, rng='replay')],
}


def make(kind):
    "Make the callbacks of a kind; where there is a choice, the extra passes have the masks of the first pass."
    if kind not in METHODS: return KINDS[kind]()
    replays = dict(rng='replay') if 'rng' in method_options(kind) else {}
    return make_method(kind, **needed(kind), **METHODS[kind].every_batch, **replays)


def loader(n=24): return as_loader(batches(n, conv=True))


def fit(net, cbs, epochs=2):
    torch.manual_seed(3)
    learn = learner(net, cbs, loader(), sgd_for(cbs))
    learn.fit(epochs)
    return learn


# Evaluations inside a fit
class Evaluates(Callback):
    "Evaluates the network on other data in the middle and at the end of every epoch."
    order, run_valid = 2000, False
    def after_batch(self):
        if self.iter != 1: return
        names = 'epoch', 'n_iter', 'dl', 'iter', 'pct_train', 'train_iter'
        held = {k: getattr(self.learn, k) for k in names}
        with torch.random.fork_rng(): # a loader draws a seed
            self.learn.validate(dl=loader(16))
            self.learn.get_preds(dl=loader(16))
        for k, v in held.items(): setattr(self.learn, k, v)
        self.learn.model.train()
        self.learn.training = True

    def after_epoch(self): # evaluations send this event, too, and cannot be nested
        if self.learn.lock.locked(): return
        with torch.random.fork_rng(): self.learn.validate(dl=loader(16))


@pytest.mark.parametrize('kind', KINDS)
def test_an_evaluation_inside_a_fit_changes_nothing(kind):
    plain, evaluated = cnn(dropout=.5), cnn(dropout=.5)
    fit(plain, make(kind))
    fit(evaluated, [*make(kind), Evaluates()])
    assert torch.equal(flat(plain, True), flat(evaluated, True))


# Fits that an exception ends
EVENTS = ('before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step',
          'after_cancel_step', 'after_step', 'after_batch')


class Interrupts(Callback):
    "Raises `KeyboardInterrupt` at an event of the second batch."
    run_valid = False
    def __init__(self, event, order):
        self.order = order
        setattr(self, event, self.stop)
    def stop(self):
        if self.iter == 1: raise KeyboardInterrupt


def interrupted(kind, event, order):
    "Return a Learner whose fit was interrupted, and its method's callbacks."
    cbs, stop = make(kind), Interrupts(event, order)
    torch.manual_seed(3)
    learn = learner(cnn(dropout=.5), [*cbs, stop], loader(), sgd_for(cbs))
    try: learn.fit(1)
    except KeyboardInterrupt: pass
    learn.remove_cb(stop)
    for p in learn.model.parameters(): p.grad = None # fastai leaves the gradients of the interrupted batch
    return learn, cbs


def fit_again(learn):
    torch.manual_seed(5)
    learn.fit(2, reset_opt=True)
    return flat(learn.model, True)


# before all callbacks of the library, and after them
INTERRUPTS = [(event, 2000) for event in EVENTS]
INTERRUPTS += [(event, -50) for event in ('after_loss', 'before_step', 'after_step')]
ADD_NOTHING = ('baseline', 'gc', 'agc', 'mesa', 'distillation', 'weight_average')
INTERRUPTED = pytest.mark.parametrize('kind', [kind for kind in KINDS if kind not in ADD_NOTHING])


@INTERRUPTED
def test_a_removed_method_leaves_nothing_after_an_interrupt(kind):
    for event, order in INTERRUPTS:
        learn, cbs = interrupted(kind, event, order)
        fresh = learner(cnn(dropout=.5), [], loader(), sgd_for(cbs))
        fresh.model.load_state_dict(learn.model.state_dict())
        learn.remove_cbs(cbs)
        assert torch.equal(fit_again(learn), fit_again(fresh)), (event, order)
        assert not any(isinstance(cb, StepGrads) for cb in learn.cbs), (event, order)
        assert not any(m._forward_pre_hooks for m in learn.model.modules()), (event, order)
        assert '_backward' not in vars(learn), (event, order)


@INTERRUPTED
def test_a_method_starts_cleanly_after_an_interrupt(kind):
    for event, order in INTERRUPTS:
        learn, cbs = interrupted(kind, event, order)
        others = make(kind)
        for cb, other in zip(cbs, others):
            if hasattr(type(cb), 'state_dict'): other.load_state_dict(deepcopy(cb.state_dict()))
        net = cnn(dropout=.5)
        net.load_state_dict(learn.model.state_dict())
        fresh = learner(net, others, loader(), sgd_for(others))
        assert torch.equal(fit_again(learn), fit_again(fresh)), (event, order)


def test_a_method_may_be_away_for_an_evaluation():
    "`removed_cbs` inside a fit takes the method out and puts it back, without a new `before_fit`."
    class Away(Callback):
        run_valid = False
        def __init__(self, cb): self.cb = cb
        def before_epoch(self):
            with self.learn.removed_cbs(self.cb): self.learn.model.eval()(torch.zeros(4, 2, 6, 6).double())
    nets = cnn(dropout=.5), cnn(dropout=.5)
    for net, n in zip(nets, (0, 1)):
        sam = SAM(rng='replay')
        fit(net, [sam, *[Away(sam)] * n])
    assert torch.equal(flat(nets[0]), flat(nets[1]))
