"What only a GPU can show: the numbers of the CPU, half precision, CUDA graphs, resumed runs. Skipped where there is none."
import gc
import os
from functools import partial

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8') # sums in a fixed order, for the test of resumed runs

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
from sadt_nb.experiments.measure import measure_run
from sadt_nb.experiments.runner import make_learner, read_result
from sadt_nb.measures.hessian import hessian_trace, top_eigenvalues
from sadt_nb.measures.landscape import loss_surface
from sadt_nb.measures.sharpness import sam_sharpness
from sadt_nb.methods.registry import METHODS, make_method
from sadt_nb.methods.sam import SAM
from sadt_nb.models.simple_cnn import simple_cnn
from test_every_method import FAST
from test_resume import interrupted, of, outcome, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
ALL = pytest.mark.parametrize('name', METHODS)
NOISELESS = {f'sadt{v}': dict(noise_scale=0.) for v in (1, 2, 3)} # a GPU draws other numbers than a CPU


@pytest.fixture(autouse=True)
def on_gpu(on_cpu, monkeypatch):
    "In full precision: TF32 keeps 10 bits of a float32."
    monkeypatch.setattr(defaults, 'use_cuda', True)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


def fit(name, device, net=None, epochs=3, cbs=(), opts={}, dtype=torch.float64, **kw):
    net = (cnn(dtype=dtype) if net is None else net).to(device)
    options = {**needed(name), **FAST.get(name, {}), **opts}
    if 'teacher' in options: options['teacher'] = options['teacher'].to(device)
    learn = learner(net, [*make_method(name, **options), *cbs], **kw)
    learn.dls = DataLoaders(*(as_dl(dtype, device) for _ in range(2)))
    learn.fit(epochs)
    return learn


def as_dl(dtype, device):
    return as_loader(batches(conv=True, dtype=dtype), device=torch.device(device))


@ALL
def test_the_weights_are_those_of_the_cpu(name):
    gpu, cpu = (fit(name, device, opts=NOISELESS.get(name, {})) for device in ('cuda', 'cpu'))
    assert next(gpu.model.parameters()).is_cuda and not next(cpu.model.parameters()).is_cuda
    torch.testing.assert_close(flat(gpu.model, True).cpu(), flat(cpu.model, True), rtol=1e-9, atol=1e-11)


class Steps(Callback):
    "The gradients of every step, as one vector each."
    run_valid = False
    def before_fit(self):
        self.seen, step = [], self.opt.step
        def kept(*args, **kwargs):
            self.seen.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]))
            return step(*args, **kwargs)
        self.opt.step = kept
    def after_fit(self): del self.opt.step


@ALL
@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_half_precision_has_nearly_the_gradients_of_float32(name, mode):
    def gradients(*amp):
        steps = Steps()
        learn = fit(name, 'cuda', epochs=1, cbs=[steps, *amp], dtype=torch.float32)
        assert {p.dtype for p in learn.model.parameters()} == {torch.float32} and torch.isfinite(flat(learn.model)).all()
        return steps.seen
    half, full = gradients(DeviceMixedPrecision(mode, **(dict(init_scale=1024.) if mode == 'fp16' else {}))), gradients()
    assert len(half) == len(full) == 3 * METHODS[name].steps
    for h, f in zip(half, full):
        assert not torch.equal(h, f), 'of another precision'
        assert torch.cosine_similarity(h, f, 0) > (.999 if mode == 'fp16' else .93) and .9 < h.norm() / f.norm() < 1.1, 'and unscaled'


@ALL
def test_an_overflow_leaves_the_weights_alone(name):
    class Watch(Callback):
        run_valid = False
        def before_fit(self): self.skipped, self.moved = [], []
        def before_batch(self): self.w = flat(self.model).clone()
        def after_batch(self):
            self.skipped.append(self.device_mixed_precision.skipped)
            self.moved.append(not torch.equal(flat(self.model), self.w))
    watch = Watch()
    learn = fit(name, 'cuda', epochs=20, cbs=[DeviceMixedPrecision('fp16', init_scale=2.**40), watch], dtype=torch.float32)
    assert watch.skipped[0] and not watch.skipped[-1], 'the scale falls until gradients fit'
    assert watch.moved == [not s for s in watch.skipped]
    assert torch.isfinite(flat(learn.model)).all()


@pytest.mark.parametrize('rng', ['replay', 'fresh'])
def test_masks_of_dropout(rng):
    "At a radius of nearly nothing the second gradient is the first one, if the mask is the same."
    class Both(Callback):
        order, run_valid = ExtraPass.order - .5, False
        def before_fit(self): self.pairs = []
        def after_backward(self): self.first = flat_grad(self.model)
        def before_step(self): self.pairs.append((self.first, flat_grad(self.model)))
    def flat_grad(model): return torch.cat([p.grad.flatten() for p in model.parameters()])
    both = Both()
    learn = learner(cnn(dropout=.5).cuda(), [SAM(rho=1e-12, rng=rng), both])
    learn.dls = DataLoaders(as_dl(torch.float64, 'cuda'), as_dl(torch.float64, 'cuda'))
    learn.fit(2)
    close = [torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in both.pairs]
    assert all(close) if rng == 'replay' else not any(close)


@pytest.mark.filterwarnings('ignore:.*deterministic')
@pytest.mark.parametrize('cfg', [of('baseline'), of('sam'), of('saf'), of('mesa'), of('sadt1'), of('sadt2').but(amp='fp16'), of('looksam').but(amp='bf16'), of('esam').but(opt='sgd', opt_args=dict(momentum=.9), select='valid')], ids=lambda c: c.method)
def test_a_run_resumed_on_the_gpu_has_the_same_bits(cfg, tmp_path, monkeypatch):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run_grid([cfg], tmp_path / 'whole', progress=False)
        whole = outcome(cfg, tmp_path / 'whole')
        interrupted(cfg, tmp_path / 'parts', monkeypatch)
        assert same(whole, outcome(cfg, tmp_path / 'parts'))
    finally: torch.use_deterministic_algorithms(False)
    assert read_result(cfg, tmp_path / 'whole')['hardware']['gpu'] == torch.cuda.get_device_name()


@pytest.mark.parametrize('name', ['baseline', 'sam', 'esam', 'looksam', 'gsam', 'mesa', 'sadt1', 'sadt2', 'repeat_step'])
def test_cuda_graphs(name):
    "Predictions, and gradients, of one pass share their memory with those of the next. fastai's own optimizers would keep the gradients there to zero them."
    torch._dynamo.reset()
    how = dict(opts={**NOISELESS.get(name, {}), **(dict(share_trunk=False) if name == 'sadt2' else {})}, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9))
    eager = fit(name, 'cuda', **how)
    graphs = fit(name, 'cuda', net=torch.compile(cnn().cuda(), mode='reduce-overhead'), **how)
    torch.testing.assert_close(flat(graphs.model), flat(eager.model), rtol=1e-7, atol=1e-9)


def test_images_are_those_of_the_cpu():
    def seen(device):
        dl = get_dls('digits', bs=50, crop=2, flip=True, cutmix=.5, rotate=10., cutout=4, autoaugment='cifar10', seed=3, channels_last=True, device=device).train
        return [(x.cpu(), y.cpu(), x.device.type, x.is_contiguous(memory_format=torch.channels_last)) for x, y in dl]
    gpu, cpu = seen('cuda'), seen('cpu')
    assert len(gpu) == len(cpu) and all(g[2:] == ('cuda', True) for g in gpu)
    for g, c in zip(gpu, cpu):
        assert (g[0] - c[0]).abs().gt(.05).double().mean() < 1e-3, 'but for a rounding to the next of 256 values'
        torch.testing.assert_close(g[1], c[1])


def test_measures_are_those_of_the_cpu():
    def measured(device):
        learn = learner(cnn().to(device), loss_func=torch.nn.CrossEntropyLoss())
        learn.dls = DataLoaders(as_dl(torch.float64, device), as_dl(torch.float64, device))
        learn.model.eval()
        few = dict(progress=False)
        return [top_eigenvalues(learn, 3, tol=1e-9, **few).values[:1].cpu(), torch.tensor(sam_sharpness(learn), dtype=torch.float64),
                torch.as_tensor(loss_surface(learn, points=5, **few).loss), torch.tensor(hessian_trace(learn, max_probes=1000, **few).value, dtype=torch.float64)]
    for g, c in zip(measured('cuda'), measured('cpu')): torch.testing.assert_close(g, c, rtol=1e-6, atol=1e-9)


def test_several_runs_share_the_gpu(tmp_path):
    runs = [Run(epochs=2, n_train=200, bs=50, method=m, amp='bf16', tf32=True) for m in ('baseline', 'sam', 'sadt1')]
    results = run_grid(runs, tmp_path, workers=2, progress=False)
    for cfg, r in zip(runs, results):
        assert r['status'] == 'finished' and r['hardware']['gpu'] == torch.cuda.get_device_name()
        m = measure_run(cfg, tmp_path, ('trace', 'sharpness', 'corrupted_accuracy'), samples=50)
        assert m['hardware']['device'] == 'cuda' and m['measures']['trace']['value'] == m['measures']['trace']['value']


def test_memory_beyond_plain_training():
    "Dense layers hold nearly all memory here: SAM keeps a copy of the weights, and no second gradient beside it."
    def peak(*cbs):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(72, 8000), torch.nn.ReLU(), torch.nn.Linear(8000, 3000), torch.nn.Linear(3000, 3)).cuda()
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
    assert .9 < plain < 1.2 and .9 < sam - plain < 1.1


def test_the_default_device_is_the_gpu():
    assert default_device().type == 'cuda'
    learn = make_learner(Run(n_train=100, bs=20))
    assert isinstance(learn.model, type(simple_cnn(10))) and next(learn.model.parameters()).is_cuda and learn.dls.one_batch()[0].is_cuda
