"A shifted test set in folders: ImageNetV2's names, images of any size, and the classes that they stand for."
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from PIL import Image
from sadt_nb.measures.robustness import IMAGENETV2, effective_robustness, shifted_accuracy
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
    with pytest.raises(ValueError, match='differ in size; give `size`'): shifted_accuracy(learner(), folder)
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


def test_names_that_are_no_classes(tmp_path):
    folder = pictures(tmp_path)
    with pytest.raises(ValueError, match='give numbered=True'): shifted_accuracy(learner(), folder, size=16)
    (tmp_path / '12').mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / '12' / 'a.png')
    with pytest.raises(ValueError, match='0 to 11'):
        shifted_accuracy(learner(), folder, size=16, numbered=True)
    with pytest.raises(ValueError, match='for a folder'):
        shifted_accuracy(learner(), (tmp_path / 'x.npy', tmp_path / 'y.npy'), size=16)


def test_the_line_of_imagenetv2_is_that_of_torchvisions_networks():
    "Torchvision states its weights' accuracies on ImageNet; on ImageNetV2 all lose 11 to 13 points."
    for name, (original, shifted) in IMAGENETV2.items():
        stated = models.get_model_weights(name).IMAGENET1K_V1.meta['_metrics']['ImageNet-1K']['acc@1']
        assert 100 * original == pytest.approx(stated, abs=.01), name
        assert .10 < original - shifted < .13, name
    v1, v2 = zip(*IMAGENETV2.values())
    on_it = effective_robustness(v1, v2, v1, v2)
    assert abs(on_it.value).max() < .01
