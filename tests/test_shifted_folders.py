"A shifted test set in folders: ImageNetV2's names, images of any size, and the classes that they stand for."
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from PIL import Image, UnidentifiedImageError
from sadt_nb.commands.cli import sadt_measure
from sadt_nb.data.datasets import digits
from sadt_nb.experiments.config import Run
from sadt_nb.experiments.grid import run_grid
from sadt_nb.experiments.learner import stored_learner
from sadt_nb.experiments.measure import measure_run, missing_measures
from sadt_nb.experiments.runner import run
from sadt_nb.measures.robustness import IMAGENETV2, effective_robustness, shifted_accuracy
from sadt_nb.papers.grids import paper_grid
from torch import nn
from torchvision import models, transforms

CLASSES = 12


class Reads(nn.Module):
    "Answers with the class that the red of the centre stands for: class c has a red of 20 c."
    def __init__(self, size=None):
        super().__init__()
        self.scale, self.size = nn.Parameter(torch.tensor(255 / 20.)), size
        self.seen = []
    def forward(self, x):
        if self.size: assert x.shape[2:] == (self.size, self.size)
        self.seen.append(x)
        red = x[:, 0, x.shape[2] // 2, x.shape[3] // 2] * self.scale
        return -(red[:, None] - torch.arange(CLASSES)).abs()


def learner(size=None, vocab=None):
    dls = DataLoaders([], [])
    dls.vocab = vocab or [f'n{i:04}' for i in range(CLASSES)]
    return Learner(dls, Reads(size).eval(), loss_func=nn.CrossEntropyLoss())


def pictures(root, name=str, sizes=((40, 50), (90, 64))):
    "Write two images of each class, in folders named by `name(class)`."
    for c in range(CLASSES):
        for i, (h, w) in enumerate(sizes):
            x = np.zeros((h, w, 3), np.uint8)
            x[..., 0] = 20 * c
            (root / name(c)).mkdir(exist_ok=True, parents=True)
            Image.fromarray(x).save(root / name(c) / f'{i}.png')
    return root


def test_folders_with_numbers_are_read_as_numbers(tmp_path):
    "Sorted as text, class 10 would come after 1; all images but a few would then have another label."
    folder = pictures(tmp_path)
    found = shifted_accuracy(learner(32), folder, bs=5, size=32, numbered=True)
    assert (found.value, found.n) == (1., 24)
    as_text = sorted(map(str, range(CLASSES)))
    assert as_text != list(map(str, range(CLASSES)))
    wrong = learner(32, as_text) # the network's outputs in the order of the text
    assert shifted_accuracy(wrong, folder, size=32).value < .2


def test_folders_with_names_may_have_images_of_any_size(tmp_path):
    folder = pictures(tmp_path, 'n{:04}'.format)
    assert shifted_accuracy(learner(16), folder, size=16).value == 1
    with pytest.raises(ValueError, match='differ in size; pass `size`'): shifted_accuracy(learner(), folder)
    same = pictures(tmp_path / 'same', 'n{:04}'.format, sizes=[(24, 24)])
    assert shifted_accuracy(learner(24), same).value == 1


def test_the_resize_is_the_standard_one(tmp_path):
    "The oracle is torchvision's pipeline: the shorter side to 8/7 of the size, then the centre."
    x = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    (tmp_path / '3').mkdir()
    Image.fromarray(x).save(tmp_path / '3' / 'a.png')
    learn = learner(28)
    shifted_accuracy(learn, tmp_path, size=28, numbered=True)
    steps = [transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()]
    assert torch.allclose(learn.model.seen[0][0], transforms.Compose(steps)(Image.fromarray(x)), atol=1e-6)


def test_only_formats_of_the_list_are_opened(tmp_path):
    "Pillow would start Ghostscript for this file, whatever its name is."
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n'
    (tmp_path / '3').mkdir()
    (tmp_path / '3' / 'a.png').write_bytes(eps)
    with pytest.raises(UnidentifiedImageError):
        shifted_accuracy(learner(16), tmp_path, size=16, numbered=True)


def test_names_that_are_no_classes(tmp_path):
    folder = pictures(tmp_path)
    with pytest.raises(ValueError, match='pass numbered=True'): shifted_accuracy(learner(), folder, size=16)
    (tmp_path / '12').mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / '12' / 'a.png')
    with pytest.raises(ValueError, match='0 to 11'):
        shifted_accuracy(learner(), folder, size=16, numbered=True)
    with pytest.raises(ValueError, match='for a folder'):
        shifted_accuracy(learner(), (tmp_path / 'x.npy', tmp_path / 'y.npy'), size=16)


def shifted_digits(root, moved, n=40):
    "Write test digits, moved to the right, as pictures in folders with the numbers of their classes."
    images, labels = digits()[1].x.numpy(), digits()[1].y.numpy()
    for i in range(n):
        file = root / str(labels[i]) / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(images[i], moved, axis=1)).save(file)
    return root


@pytest.mark.usefixtures('narrow')
def test_a_stored_run_is_measured_on_a_folder(tmp_path, monkeypatch, capsys):
    """The oracle is the network's answers, image by image.

    Another folder is measured anew; the same folder is not, and without a folder the stored number stays."""
    cfg = Run(epochs=8, n_train=400, bs=40, normalize='data', model_args=dict(dropout=0.))
    run(cfg, tmp_path, progress=False)
    folder = tmp_path / cfg.name
    still, moved = (shifted_digits(tmp_path / f'moved {n}', n) for n in (0, 6))
    learn = stored_learner(cfg, tmp_path)
    test = learn.dls[2]
    def expected(by):
        x, y = digits()[1].x[:40], digits()[1].y[:40]
        z = torch.roll(x, by, 2).permute(0, 3, 1, 2) / 255
        mean, std = (torch.as_tensor(v).reshape(-1, 1, 1) for v in (test.mean, test.std))
        with torch.no_grad(): return (learn.model((z - mean) / std).argmax(1) == y).float().mean().item()
    monkeypatch.setenv('SADT_SHIFTED', str(still))
    sadt_measure(folder, 'shifted_accuracy')
    assert 'shifted_accuracy' in capsys.readouterr().out
    def found(): return measure_run(cfg, tmp_path, ['shifted_accuracy'])['measures']['shifted_accuracy']
    first = found()
    assert (first['value'], first['n']) == (pytest.approx(expected(0)), 40)
    assert first == found(), 'not measured again'
    monkeypatch.setenv('SADT_SHIFTED', str(moved))
    assert missing_measures(cfg, tmp_path, ['shifted_accuracy']) == ['shifted_accuracy']
    assert found()['value'] == pytest.approx(expected(6))
    assert expected(6) < expected(0) - .2
    monkeypatch.delenv('SADT_SHIFTED')
    assert found()['value'] == pytest.approx(expected(6))
    assert 'shifted_accuracy' not in missing_measures(Run(seed=9), tmp_path)


@pytest.mark.parametrize('given', [None, 'nowhere'])
def test_figure_9_needs_its_test_set_before_training_begins(given, tmp_path, monkeypatch):
    monkeypatch.delenv('SADT_SHIFTED', raising=False)
    if given: monkeypatch.setenv('SADT_SHIFTED', given)
    cells = paper_grid('distill/figure9')
    assert {c.measures for c in cells} == {('shifted_accuracy',)}
    message = f'set the environment variable SADT_SHIFTED to a folder.*{given or ""}'
    with pytest.raises(ValueError, match=message):
        run_grid([Run()], tmp_path, measures={Run(): cells[0].measures}, progress=False)
    assert not list(tmp_path.glob('*/*.pt'))


def test_the_line_of_imagenetv2_is_that_of_torchvisions_networks():
    "Torchvision states its weights' accuracies on ImageNet; on ImageNetV2 all lose 11 to 13 points."
    for name, (original, shifted) in IMAGENETV2.items():
        stated = models.get_model_weights(name).IMAGENET1K_V1.meta['_metrics']['ImageNet-1K']['acc@1']
        assert 100 * original == pytest.approx(stated, abs=.01), name
        assert .10 < original - shifted < .13, name
    v1, v2 = zip(*IMAGENETV2.values())
    on_it = effective_robustness(v1, v2, v1, v2)
    assert abs(on_it.value).max() < .01
