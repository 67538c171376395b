"""Small tasks of every kind that the methods serve: a network, samples and the loss function of each."""
import torch
from torch import nn
from fastai.losses import CrossEntropyLossFlat, MSELossFlat


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_layers(outputs, *more): return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs), *more)


NETWORKS = { # make a network, shape of an input, make n targets, loss function
    'classification': (lambda: two_layers(3), (4,), lambda n: torch.randint(0, 3, (n,)),
                       nn.CrossEntropyLoss()),
    'segmentation': (lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 3, 1)),
                     (2, 6, 6), lambda n: torch.randint(0, 3, (n, 6, 6)), CrossEntropyLossFlat(axis=1)),
    'text': (lambda: two_layers(7), (5, 4), lambda n: torch.randint(0, 7, (n, 5)), CrossEntropyLossFlat()),
    'multi-label': (lambda: two_layers(5), (4,), lambda n: torch.randint(0, 2, (n, 5)).double(),
                    nn.BCEWithLogitsLoss()),
    'one logit': (lambda: two_layers(1), (4,), lambda n: torch.randint(0, 2, (n, 1)).double(),
                  nn.BCEWithLogitsLoss()),
    'regression': (lambda: two_layers(1), (4,), lambda n: normal(n, 1, seed=5), MSELossFlat()),
    'flat regression': (lambda: two_layers(1, nn.Flatten(0)), (4,), lambda n: normal(n, seed=5),
                        MSELossFlat()),
}


def task(name):
    "Return a network, 16 samples as pairs, and the loss function."
    make, shape, labels, loss = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make().double(), normal(16, *shape)
    return net, list(zip(x, labels(16))), loss
