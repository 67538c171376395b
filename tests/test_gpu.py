"""Tests that need a GPU: the numbers of the CPU, half precision, CUDA graphs, resumed runs.

They are skipped on a machine without a CUDA GPU."""
import gc
import os
from functools import partial

# cuBLAS then sums in a fixed order, which the test of resumed runs needs
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')

import pytest
import torch
from conftest import as_loader, batches, cnn, flat, learner, needed
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.optimizer import OptimWrapper
from fastai.torch_core import default_device, defaults
from sadt_nb.core.passes import ExtraPass
from sadt_nb.core.precision import DeviceMixedPrecision
from sadt_nb.data.datasets import get_dls
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.measure import measure_run
from sadt_nb.experiments.run_folder import read_result
from sadt_nb.measures.hessian import hessian_trace, top_eigenvalues
from sadt_nb.measures.landscape import loss_surface
from sadt_nb.measures.sharpness import sam_sharpness
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.methods.sam import SAM
from sadt_nb.models.simple_cnn import simple_cnn
from test_fast import RESUMED as FAST_RESUMED, check_killed_run
from test_resume import interrupted, of, outcome, same
from torch import nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
ALL = pytest.mark.parametrize('name', METHODS)
NOISELESS = {f'sadt{v}': dict(noise_scale=0.) for v in (1, 2, 3)} # GPU and CPU draw different noise


@pytest.fixture(autouse=True)
def on_gpu(on_cpu, monkeypatch):
    "Run on the GPU in full precision, without TF32, which keeps 10 bits of a float32."
    monkeypatch.setattr(defaults, 'use_cuda', True)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def fit(name, device, net=None, epochs=3, cbs=(), opts=None, dtype=torch.float64, **kw):
    "Train by the method on the device; `opts` are options of the method. Return the Learner."
    net = (cnn(dtype=dtype) if net is None else net).to(device)
    options = {**needed(name), **METHODS[name].few_steps, **(opts or {})}
    if 'teacher' in options: options['teacher'] = options['teacher'].to(device)
    learn = learner(net, [*make_method(name, **options), *cbs], **kw)
    learn.dls = DataLoaders(as_dl(dtype, device), as_dl(dtype, device))
    learn.fit(epochs)
    return learn


def as_dl(dtype, device):
    return as_loader(batches(conv=True, dtype=dtype), device=torch.device(device))


@ALL
def test_the_weights_are_those_of_the_cpu(name):
    options = NOISELESS.get(name, {})
    gpu = fit(name, 'cuda', opts=options).model
    cpu = fit(name, 'cpu', opts=options).model
    assert next(gpu.parameters()).is_cuda
    assert not next(cpu.parameters()).is_cuda
    torch.testing.assert_close(flat(gpu, True).cpu(), flat(cpu, True), rtol=1e-9, atol=1e-11)


class StepGradients(Callback):
    "Keeps the gradients of every step, as one vector each."
    run_valid = False
    def before_fit(self):
        self.seen = []
        step = self.opt.step
        def recording_step(*args, **kwargs):
            grads = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            self.seen.append(torch.cat(grads))
            return step(*args, **kwargs)
        self.opt.step = recording_step
    def after_fit(self): del self.opt.step


@ALL
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_half_precision_has_nearly_the_gradients_of_float32(name, mode):
    def gradients(*amp):
        steps = StepGradients()
        net = fit(name, 'cuda', epochs=1, cbs=[steps, *amp], dtype=torch.float32).model
        assert {p.dtype for p in net.parameters()} == {torch.float32}
        assert torch.isfinite(flat(net)).all()
        return steps.seen
    scale = dict(init_scale=1024.) if mode == 'fp16' else {}
    half = gradients(DeviceMixedPrecision(mode, **scale))
    full = gradients()
    assert len(half) == len(full) == 3 * METHODS[name].steps
    for h, f in zip(half, full):
        assert not torch.equal(h, f), 'of another precision'
        assert torch.cosine_similarity(h, f, 0) > (.999 if mode == 'fp16' else .93)
        assert .9 < h.norm() / f.norm() < 1.1, 'unscaled'


@ALL
def test_an_overflow_leaves_the_weights_alone(name):
    class Watch(Callback):
        run_valid = False
        def before_fit(self): self.skipped, self.moved = [], []
        def before_batch(self): self.weights = flat(self.model).clone()
        def after_batch(self):
            self.skipped.append(self.device_mixed_precision.skipped)
            self.moved.append(not torch.equal(flat(self.model), self.weights))
    watch = Watch()
    cbs = [DeviceMixedPrecision('fp16', init_scale=2.**40), watch]
    learn = fit(name, 'cuda', epochs=20, cbs=cbs, dtype=torch.float32)
    assert watch.skipped[0]
    assert not watch.skipped[-1], 'the scale falls until gradients fit'
    assert watch.moved == [not s for s in watch.skipped]
    assert torch.isfinite(flat(learn.model)).all()


@pytest.mark.parametrize('rng', ['replay', 'fresh'])
def test_dropout_masks_of_the_second_pass(rng):
    "With a radius near zero the second gradient equals the first if the mask is the same, and only then."
    def flat_grad(model): return torch.cat([p.grad.flatten() for p in model.parameters()])
    class BothGradients(Callback):
        order, run_valid = ExtraPass.order - .5, False
        def before_fit(self): self.pairs = []
        def after_backward(self): self.first = flat_grad(self.model)
        def before_step(self): self.pairs.append((self.first, flat_grad(self.model)))
    both = BothGradients()
    learn = learner(cnn(dropout=.5).cuda(), [SAM(rho=1e-12, rng=rng), both])
    learn.dls = DataLoaders(as_dl(torch.float64, 'cuda'), as_dl(torch.float64, 'cuda'))
    learn.fit(2)
    close = [torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in both.pairs]
    if rng == 'replay': assert all(close)
    else: assert not any(close)


RESUMED = [of('baseline'), of('sam'), of('saf'), of('mesa'), of('sadt1'), of('sadt2').but(amp='fp16'),
           of('looksam').but(amp='bf16'),
           of('esam').but(opt='sgd', opt_args=dict(momentum=.9), select='valid')]


@pytest.mark.filterwarnings('ignore:.*deterministic')
@pytest.mark.parametrize('cfg', RESUMED, ids=lambda c: c.method)
def test_a_run_resumed_on_the_gpu_has_the_same_bits(cfg, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run_grid([cfg], tmp_path / 'whole', progress=False)
        whole = outcome(cfg, tmp_path / 'whole')
        interrupted(cfg, tmp_path / 'parts', monkeypatch)
        assert same(whole, outcome(cfg, tmp_path / 'parts'))
    finally: torch.use_deterministic_algorithms(False)
    assert read_result(cfg, tmp_path / 'whole')['hardware']['gpu'] == torch.cuda.get_device_name()


@pytest.mark.filterwarnings('ignore:.*deterministic')
@pytest.mark.parametrize('options', FAST_RESUMED.values(), ids=FAST_RESUMED)
def test_a_run_of_the_fast_recipe_resumed_on_the_gpu_has_the_same_bits(options, tmp_path, monkeypatch):
    "test_fast.py makes the same checks on the CPU."
    torch.use_deterministic_algorithms(True, warn_only=True)
    try: check_killed_run(options, 'cuda', tmp_path, monkeypatch)
    finally: torch.use_deterministic_algorithms(False)


WITH_CUDA_GRAPHS = ['baseline', 'sam', 'esam', 'looksam', 'gsam', 'friendly_sam', 'wsam', 'mesa',
                    'sadt1', 'sadt2', 'repeat_step', 'repeat_batch']


@pytest.mark.parametrize('name', WITH_CUDA_GRAPHS)
def test_cuda_graphs(name):
    """The predictions and gradients of one pass share their memory with those of the next pass.

    fastai's own optimizers would keep the gradients in that memory and set them to zero there."""
    torch._dynamo.reset()
    opts = dict(NOISELESS.get(name, {}))
    if name == 'sadt2': opts['share_trunk'] = False
    momentum = partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)
    eager = fit(name, 'cuda', opts=opts, opt_func=momentum)
    compiled = torch.compile(cnn().cuda(), mode='reduce-overhead')
    graphs = fit(name, 'cuda', net=compiled, opts=opts, opt_func=momentum)
    torch.testing.assert_close(flat(graphs.model), flat(eager.model), rtol=1e-7, atol=1e-9)


def test_images_are_those_of_the_cpu():
    def seen(device):
        dls = get_dls('digits', bs=50, crop=2, flip=True, cutmix=.5, rotate=10., cutout=4,
                      autoaugment='cifar10', seed=3, channels_last=True, device=device)
        batches = list(dls.train)
        if device == 'cuda':
            for x, _ in batches:
                assert x.device.type == 'cuda'
                assert x.is_contiguous(memory_format=torch.channels_last)
        return [(x.cpu(), y.cpu()) for x, y in batches]
    gpu, cpu = seen('cuda'), seen('cpu')
    assert len(gpu) == len(cpu)
    for (gpu_x, gpu_y), (cpu_x, cpu_y) in zip(gpu, cpu):
        share_off = (gpu_x - cpu_x).abs().gt(.05).double().mean()
        assert share_off < 1e-3, 'except for a rounding to the next of 256 values'
        torch.testing.assert_close(gpu_y, cpu_y)


def test_measures_are_those_of_the_cpu():
    def measured(device):
        learn = learner(cnn().to(device), loss_func=nn.CrossEntropyLoss())
        learn.dls = DataLoaders(as_dl(torch.float64, device), as_dl(torch.float64, device))
        learn.model.eval()
        eigenvalues = top_eigenvalues(learn, 3, tol=1e-9, progress=False).values
        sharpness = sam_sharpness(learn)
        surface = loss_surface(learn, points=5, progress=False).loss
        trace = hessian_trace(learn, max_probes=1000, progress=False).value
        return [eigenvalues[:1].cpu(), torch.tensor(sharpness, dtype=torch.float64), torch.as_tensor(surface),
                torch.tensor(trace, dtype=torch.float64)]
    for g, c in zip(measured('cuda'), measured('cpu')): torch.testing.assert_close(g, c, rtol=1e-6, atol=1e-9)


def test_several_runs_share_the_gpu(tmp_path):
    common = Run(epochs=2, n_train=200, bs=50, amp='bf16', tf32=True)
    runs = [common.but(method=method) for method in ('baseline', 'sam', 'sadt1')]
    results = run_grid(runs, tmp_path, workers=2, progress=False)
    for cfg, result in zip(runs, results):
        assert result['status'] == 'finished'
        assert result['hardware']['gpu'] == torch.cuda.get_device_name()
        measured = measure_run(cfg, tmp_path, ('trace', 'sharpness', 'corrupted_accuracy'), samples=50)
        assert measured['hardware']['device'] == 'cuda'
        trace = measured['measures']['trace']['value']
        assert trace == trace, 'not NaN'


def test_memory_beyond_plain_training():
    "Dense layers hold nearly all memory here. SAM keeps a copy of the weights and no second gradient."
    def peak(*cbs):
        "Return the peak memory of training beyond the network, in multiples of the weights."
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(72, 8000), nn.ReLU(), nn.Linear(8000, 3000), nn.Linear(3000, 3)]
        net = nn.Sequential(*layers).cuda()
        weights = sum(p.nbytes for p in net.parameters())
        learn = learner(net, cbs, lr=1e-3, opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
        learn.dls = DataLoaders(as_dl(torch.float32, 'cuda'), as_dl(torch.float32, 'cuda'))
        gc.collect() # a Learner refers to itself
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        learn.fit(1)
        return (torch.cuda.max_memory_allocated() - before) / weights
    peak() # cuBLAS takes memory of its own once
    plain, sam = peak(), peak(SAM(rho=.05))
    assert .9 < plain < 1.2
    assert .9 < sam - plain < 1.1


def test_the_default_device_is_the_gpu():
    assert default_device().type == 'cuda'
    learn = make_learner(Run(n_train=100, bs=20))
    assert isinstance(learn.model, type(simple_cnn(10)))
    assert next(learn.model.parameters()).is_cuda
    assert learn.dls.one_batch()[0].is_cuda
