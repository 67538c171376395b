"Methods in trainings that are evaluated, interrupted or unfrozen, and in several Learners."
import gc
import weakref
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import as_loader, batches, cnn, evaluating_within, flat, learner, mlp, needed, sgd_for
from fastai.callback.core import Callback
from sadt_nb.core.closures import MethodOptimizer, closure_step
from sadt_nb.core.fits import LoopMethod
from sadt_nb.core.steps import StepGrads
from sadt_nb.methods.looksam import LookSAM
from sadt_nb.methods.registry import METHODS, make_method, method_options
from sadt_nb.methods.sadt import SADT
from sadt_nb.methods.sam import SAM
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KINDS = {
    **{name: partial(make_method, name) for name in METHODS},
    'sam only norm': lambda: [SAM(.5, only='norm', rng='replay')],
    'sam in chunks': lambda: [SAM(.5, m=4, rng='replay')],
    'sadt without a first step': lambda: [SADT(1, noise_scale=1e3, first_step=False, rng='replay')],
}


def make(kind):
    "Make the callbacks of a kind; an extra pass replays the masks of the first pass if it has this option."
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
        with evaluating_within(self.learn), torch.random.fork_rng(): # a loader draws a seed
            self.learn.validate(dl=loader(16))
            self.learn.get_preds(dl=loader(16))

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


# Parameters that are unfrozen during training
CHOICES = {'not norm': ('0.', '4.'), 'norm': ('1.',), None: ('0.', '1.', '4.')}


def flat_norm(tensors): return torch.stack([t.norm() for t in tensors] or [torch.ones(())]).norm()


def sam_step_by_hand(net, x, y, rho, lr, chosen):
    "Make one step of SAM that perturbs the trainable parameters whose names begin with one of `chosen`."
    params = {n: p for n, p in net.named_parameters() if p.requires_grad}
    grads = dict(zip(params, torch.autograd.grad(F.cross_entropy(net(x), y), params.values())))
    up = {n: g for n, g in grads.items() if n.startswith(chosen)}
    norm = flat_norm(up.values())
    with torch.no_grad():
        for n, g in up.items(): params[n] += rho * g / norm
    second = dict(zip(params, torch.autograd.grad(F.cross_entropy(net(x), y), params.values())))
    with torch.no_grad():
        for n, g in up.items(): params[n] -= rho * g / norm
        for n, p in params.items(): p -= lr * second[n]


@pytest.mark.parametrize('only', [*CHOICES, lambda name, p: name.startswith(('0.', '4.'))])
@pytest.mark.parametrize('in_learner', [False, True])
def test_only_also_chooses_parameters_that_are_unfrozen_or_frozen_later(only, in_learner):
    def thaw(net, i):
        if i == 1: net[0].requires_grad_(True)
        if i == 2: net[1].requires_grad_(False) # with `only='norm'`, nothing is left to perturb
    class Thaws(Callback):
        run_valid = False
        def before_batch(self): thaw(self.model, self.iter)
    nets = mlp(bn=True), mlp(bn=True)
    for net in nets: net[0].requires_grad_(False)
    data = batches(24)
    opt = torch.optim.SGD(nets[0].parameters(), lr=.1)
    if in_learner:
        everything = dict(splitter=lambda net: list(net.parameters())) # also what is frozen at the start
        learner(nets[0], [SAM(.5, only=only), Thaws()], data, lr=.1, **everything).fit(1)
    else: method = MethodOptimizer(SAM(.5, only=only), opt, nets[0])
    for i, (x, y) in enumerate(data):
        thaw(nets[1], i)
        sam_step_by_hand(nets[1], x, y, .5, .1, CHOICES.get(only, ('0.', '4.')))
        if in_learner: continue
        thaw(nets[0], i)
        opt.zero_grad()
        method.step(lambda x=x, y=y: F.cross_entropy(nets[0](x), y))
    torch.testing.assert_close(flat(nets[0], True), flat(nets[1], True), rtol=1e-12, atol=1e-12)


# Activation checkpoints
class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(1)
        layers = [torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
        self.net, self.reentrant = torch.nn.Sequential(*layers).double(), reentrant

    def forward(self, x): return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize('options', [{}, dict(m=4)], ids=['whole batch', 'chunks'])
def test_a_reentrant_checkpoint_changes_nothing_of_a_method_with_only(options):
    trained = []
    for reentrant in (False, True):
        learn = learner(Checkpointed(reentrant), [SAM(.5, only='norm', **options)], batches())
        learn.fit(2)
        trained.append(flat(learn.model))
    torch.testing.assert_close(*trained, rtol=1e-12, atol=1e-14)


# One object in several Learners

STATELESS = ['gc', 'agc', 'sam', 'asam', 'gsam', 'wsam', 'msam', 'distillation', 'weight_average',
             'repeat_step', 'repeat_batch']
CARRYING = ['esam', 'looksam', 'friendly_sam', 'saf', 'mesa', 'sadt1', 'sadt2', 'sadt3', 'sam interval']
MAKE = {name: partial(make, name) for name in METHODS} | {'sam interval': lambda: [SAM(.5, interval=3)]}
HELD = [name for name in METHODS if name != 'baseline']

def new_learner(cbs, net=None):
    torch.manual_seed(3)
    return learner(cnn() if net is None else net, cbs, loader(), sgd_for(cbs))


def test_every_method_is_expected_to_carry_a_state_or_not():
    assert sorted(STATELESS + CARRYING) == sorted([*HELD, 'sam interval'])


@pytest.mark.parametrize('kind', STATELESS)
def test_a_method_without_a_state_trains_one_learner_after_another(kind):
    cbs = MAKE[kind]()
    for _ in range(2):
        expected = new_learner(MAKE[kind]())
        expected.fit(2)
        got = new_learner(cbs)
        got.fit(2)
        assert torch.equal(flat(got.model), flat(expected.model))


@pytest.mark.parametrize('kind', CARRYING)
def test_a_method_with_a_state_refuses_a_second_learner(kind):
    cbs = MAKE[kind]()
    new_learner(cbs).fit(2)
    second = new_learner(cbs)
    before = flat(second.model).clone()
    words = f'this {type(cbs[0]).__name__} object has trained another network, and .*; make one'
    with pytest.raises(ValueError, match=words): second.fit(2)
    assert torch.equal(flat(second.model), before)
    second.remove_cbs(cbs)
    second.add_cbs(MAKE[kind]())
    second.fit(2)
    expected = new_learner(MAKE[kind]())
    expected.fit(2)
    assert torch.equal(flat(second.model), flat(expected.model))


@pytest.mark.parametrize('kind', CARRYING)
def test_the_same_network_in_a_new_learner_continues(kind):
    "As a second fit of one Learner; the optimizer of `sgd_for` begins anew in both."
    cbs, others = MAKE[kind](), MAKE[kind]()
    first = new_learner(cbs)
    first.fit(2)
    second = new_learner(cbs, first.model)
    second.fit(1)
    same = new_learner(others)
    same.fit(2)
    torch.manual_seed(3)
    same.create_opt()
    same.fit(1)
    assert torch.equal(flat(second.model), flat(same.model))


@pytest.mark.parametrize('fitted', ['none', 'second', 'second, evaluated'])
@pytest.mark.parametrize('kind', HELD)
def test_two_learners_with_one_object(kind, fitted):
    "The callback knows the Learner that was made last; the first one must not train without its method."
    cbs = MAKE[kind]()
    first, second = new_learner(cbs), new_learner(cbs)
    if fitted != 'none': second.fit(1)
    if 'evaluated' in fitted: second.validate()
    before = flat(first.model).clone(), flat(second.model).clone()
    name = type(cbs[0]).__name__
    first.validate()
    words = f'this {name} object now belongs to another optimizer or Learner; make one {name} object for each'
    with pytest.raises(ValueError, match=words): first.fit(1)
    assert torch.equal(flat(first.model), before[0]) and torch.equal(flat(second.model), before[1])
    second.fit(1)


@pytest.mark.parametrize('kind', ['sam', 'looksam', 'sadt1', 'msam', 'saf', 'gc'])
def test_a_learner_whose_object_was_removed_by_another(kind):
    cbs = MAKE[kind]()
    first = new_learner(cbs)
    other = new_learner(MAKE[kind]())
    other.remove_cbs(list(other.cbs)[1:])
    other.fit(1, cbs=cbs) # fastai adds and removes it
    if isinstance(cbs[0], LoopMethod) or kind == 'gc':
        with pytest.raises(ValueError, match='now belongs to another optimizer or Learner'): first.fit(1)


@pytest.mark.parametrize('kind', ['sam', 'esam', 'sadt1'])
def test_a_learner_whose_object_was_given_to_a_loop(kind):
    cbs = MAKE[kind]()
    first, net = new_learner(cbs), cnn()
    MethodOptimizer(cbs[0], torch.optim.SGD(net.parameters(), lr=.1), net)
    with pytest.raises(ValueError, match='now belongs to another optimizer or Learner'): first.fit(1)


def test_a_state_is_refused_by_the_loop_of_another_network():
    (x, y), method, net, other = batches()[0], LookSAM(), mlp(), mlp()
    def optimizer(net): return torch.optim.SGD(net.parameters(), lr=.1)
    def loss(): return F.cross_entropy(net(x), y)
    for _ in range(2): # another optimizer of the same network goes on
        MethodOptimizer(method, optimizer(net), net).step(loss)
        closure_step(method, net, loss, optimizer(net))
    words = 'this LookSAM object has trained another network'
    with pytest.raises(ValueError, match=words): MethodOptimizer(method, optimizer(other), other)
    with pytest.raises(ValueError, match=words):
        closure_step(method, other, lambda: F.cross_entropy(other(x), y), optimizer(other))


@pytest.mark.parametrize('kind', CARRYING)
def test_a_search_an_evaluation_and_copies_do_not_count_as_training(kind):
    cbs = MAKE[kind]()
    searched = new_learner(cbs)
    searched.lr_finder = object() # as during fastai's `lr_find`
    searched.fit(1)
    del searched.lr_finder
    searched.validate()
    got = new_learner(cbs)
    got.fit(2)
    expected = new_learner(MAKE[kind]())
    expected.fit(2)
    assert torch.equal(flat(got.model), flat(expected.model))
    twin = deepcopy(got)
    twin.fit(1)
    got.fit(1)
    assert torch.equal(flat(twin.model), flat(got.model))
    new_learner(cbs).validate() # an evaluation of another network is no training
    new_learner(cbs).get_preds(dl=loader())


def test_no_learner_is_kept_alive():
    method = SAM()
    first = new_learner([method])
    first.fit(1)
    freed = weakref.ref(first), weakref.ref(first.model)
    second = new_learner([method])
    second.fit(1)
    del first
    gc.collect()
    assert [reference() for reference in freed] == [None, None]
    left = weakref.ref(method)
    del method, second
    gc.collect()
    assert left() is None
