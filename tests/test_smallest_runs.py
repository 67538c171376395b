"The smallest run of every preset trains: one batch of a few images of the right size."
import pytest
import torch
from conftest import covering, cells_of
from PIL import Image
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.cost import run_cost
from sadt_nb.experiments.learner import make_learner
from sadt_nb.experiments.results import RunRecorder
from sadt_nb.experiments.runner import run
from sadt_nb.papers.grids import PAPER_GRIDS

PIXELS = dict(tiny_imagenet=64, imagenet=224)
QUICK = ('sadt/notebook20', 'sadt/table1_code', 'sam_study/c_small', 'saf/cifar_small',
         'distill/digits', 'compare/digits')
CLASSES = 2
TEST = 3 # images; with fewer, `select='release'` cannot leave one out


def pixels_of(cfg): return PIXELS.get(cfg.data, 32)


def n_images(cfg):
    "Return the number of training images; `fast_cnn` takes its first filters from at least 32."
    if cfg.model == 'fast_cnn': return 40
    return 12 if pixels_of(cfg) <= 64 else 4


@pytest.fixture
def folders(tmp_path, monkeypatch):
    "Return a function from a run to a folder of images of its size, three of them for the test."
    monkeypatch.setenv('SADT_CACHE', str(tmp_path / 'cache'))
    def made(cfg):
        pixels, n = pixels_of(cfg), n_images(cfg)
        folder = tmp_path / f'images{pixels}x{n}'
        for i in range(n + TEST):
            place = folder / ('train' if i < n else 'test') / 'ab'[i % CLASSES]
            place.mkdir(parents=True, exist_ok=True)
            noise = torch.randint(256, (pixels, pixels, 3), generator=torch.Generator().manual_seed(i))
            Image.fromarray(noise.byte().numpy()).save(place / f'{i:02}.png')
        return str(folder)
    return made


def tiny(cfg, folder):
    "Return the run with one epoch of one batch of the folder's images, in float32, without lookahead."
    held_out = .25 if cfg.select == 'valid' else 0.
    options = {k: v for k, v in cfg.model_args if k not in ('pretrained', 'zero_shot')}
    method = dict(cfg.method_args)
    if cfg.method in ('saf', 'mesa'): method['start_epoch'] = 0 # so that the term is computed
    teachers = tuple(tiny(t, folder) for t in cfg.teachers[:1])
    bs = round(n_images(cfg) * (1 - held_out))
    return cfg.but(data=folder, data_args={}, n_train=None, epochs=1, bs=bs, valid=held_out, amp='', warmup=0,
                   warmup_lr=0, lookahead=0, model_args=options, method_args=method, teachers=teachers,
                   split=0, track=0)


def smallest(name):
    "Return, for each method of a preset, the run with the least work."
    best = {}
    for c in cells_of(name):
        try: work = run_cost(c.run).flops
        except ImportError: return {} # an optional package is missing
        if c.run.method not in best or work < best[c.run.method][0]: best[c.run.method] = work, c.run
    return {method: cfg for method, (_, cfg) in best.items()}


@pytest.mark.parametrize('name', covering(PAPER_GRIDS, QUICK))
def test_the_smallest_run_of_each_method_trains(name, folders, tmp_path):
    found = smallest(name)
    if not found: pytest.skip('a package that its networks need is not installed')
    for method, cfg in found.items():
        small = tiny(cfg, folders(cfg))
        for t in small.teachers: run(t, tmp_path, progress=False)
        recorder = RunRecorder()
        learn = make_learner(small, 'cpu', [recorder], root=tmp_path)
        before = [p.detach().clone() for p in learn.model.parameters()]
        learn.fit(1)
        assert recorder.failed is None, (method, small)
        assert recorder.counts['steps'] >= 1
        assert any(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters())), (method, small)
        alpha = dict(small.method_args).get('alpha', .5)
        both = method == 'mesa' or (method == 'distillation' and 0 < alpha < 1) # the loss has two parts
        if both: assert recorder.rows[0]['term_ratio'] >= 0
        elif method == 'distillation': assert 'term_ratio' not in recorder.rows[0]


def test_a_network_that_does_not_train_is_found(folders, tmp_path, monkeypatch):
    cfg = Run(model='resnet20')
    cfg = tiny(cfg, folders(cfg))
    monkeypatch.setattr('torch.optim.Adam.step', lambda self, *a, **k: None)
    learn = make_learner(cfg, 'cpu', [RunRecorder()], root=tmp_path)
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit(1)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.parameters()))
