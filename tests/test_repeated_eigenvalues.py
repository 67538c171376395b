"Repeated eigenvalues of the Hessian, against dense Hessians and given spectra."
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from sadt_nb.measures import hessian
from sadt_nb.measures.hessian import top_eigenvalues, top_eigenvectors
from torch import nn
from torch.func import functional_call

quiet = dict(progress=False)


def regression(inputs, outputs):
    "Return a Learner for linear regression, whose Hessian has each eigenvalue `outputs` times."
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, inputs, generator=g, dtype=torch.float64)
    y = torch.randn(40, outputs, generator=g, dtype=torch.float64)
    batches = list(zip(x.split(16), y.split(16)))
    torch.manual_seed(0)
    net = nn.Linear(inputs, outputs).double().eval()
    return Learner(DataLoaders(batches, batches), net, loss_func=nn.MSELoss())


def network():
    "Return a Learner whose network has distinct eigenvalues, apart from zeros."
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 4, generator=g).double(), torch.randint(0, 3, (30,), generator=g)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    return Learner(DataLoaders([(x, y)], [(x, y)]), net, loss_func=nn.CrossEntropyLoss())


def exact(learn):
    "Return the dense Hessian of the mean loss."
    x = torch.cat([x for x, _ in learn.dls.train])
    y = torch.cat([y for _, y in learn.dls.train])
    named = {n: p.detach() for n, p in learn.model.named_parameters()}
    sizes = [p.numel() for p in named.values()]
    def f(w):
        parts = {n: v.view(p.shape) for (n, p), v in zip(named.items(), w.split(sizes))}
        return learn.loss_func(functional_call(learn.model, parts, (x,)), y)
    return torch.func.hessian(f)(torch.cat([p.flatten() for p in named.values()]))


def check(learn, k, **options):
    "Compare values and directions with the dense Hessian; return what `top_eigenvalues` returns."
    H = exact(learn)
    expected = torch.linalg.eigvalsh(H).flip(0)[:k]
    found = top_eigenvalues(learn, k, **quiet, **options)
    assert found.converged
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-12)
    assert ((found.values - expected).abs() <= found.error + 1e-14).all()
    again, directions = top_eigenvectors(learn, k, **quiet, **options)
    assert torch.equal(again.values, found.values)
    assert again.n == found.n
    U = torch.stack([torch.cat([t.flatten() for t in d.values()]) for d in directions])
    torch.testing.assert_close(U @ U.T, torch.eye(k, dtype=U.dtype), rtol=0, atol=1e-8)
    assert (H @ U.T - U.T * found.values).norm() <= 1e-4 * expected[0]
    return found


@pytest.mark.parametrize('k', [1, 2, 3, 4, 6, 7, 14, 15])
def test_a_regression_with_three_outputs(k):
    check(regression(4, 3), k)


@pytest.mark.parametrize('k', [1, 2, 5, 6, 12])
def test_a_regression_with_five_outputs(k):
    check(regression(20, 5), k)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('k', [1, 2, 10])
def test_an_ordinary_network(k, seed):
    check(network(), k, seed=seed)


class Quadratic(nn.Module):
    "A network whose output has the Hessian `A`."
    def __init__(self, A):
        super().__init__()
        self.register_buffer('A', A)
        self.w = nn.Parameter(torch.zeros(len(A), dtype=A.dtype))
    def forward(self, x): return (self.w @ self.A @ self.w / 2).expand(len(x))


def of_spectrum(values, dtype=torch.float64):
    "Return a Learner whose loss has the Hessian with these eigenvalues, in random directions."
    g = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    A = (Q * torch.tensor(values, dtype=torch.float64)) @ Q.T
    data = [(torch.zeros(2, 1), torch.zeros(2))]
    def loss(out, y): return out.mean()
    return Learner(DataLoaders(data, data), Quadratic(A.to(dtype)).eval(), loss_func=loss)


BULK = [i / 100 for i in range(-40, 40)]
SPECTRA = {
    'largest twice': [9., 9., 4., 1., *BULK],
    'second thrice': [9., 4., 4., 4., 1., *BULK],
    'all pairs': [9., 9., 4., 4., 2., 2., 1., 1., *BULK],
    'zeros': [3., 3., *[0.] * 60],
    'negative': [-1., -1., -1., *[-5 - v for v in BULK]],
    'a multiple of one': [2.] * 30,
    'distinct': [9., 8., 4., 3., 2., 1.5, *BULK],
}


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('k', [1, 2, 3, 6])
@pytest.mark.parametrize('name', SPECTRA)
def test_a_given_spectrum(name, k, dtype):
    found = top_eigenvalues(of_spectrum(SPECTRA[name], dtype), k, **quiet)
    expected = torch.tensor(SPECTRA[name], dtype=torch.float64).sort(descending=True).values[:k]
    assert found.converged
    near = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.values, expected, rtol=2e-5, atol=near)


def test_the_last_process_adds_few_products(monkeypatch):
    "The largest eigenvalues of 84 are distinct, so the second process is the last, and it is short."
    ends, run = [], hessian._Largest.run
    def counted(self, most):
        done = run(self, most)
        ends.append(self.h.n)
        return done
    monkeypatch.setattr(hessian._Largest, 'run', counted)
    for k in (1, 2, 6):
        ends.clear()
        assert top_eigenvalues(of_spectrum(SPECTRA['distinct']), k, **quiet).converged
        assert len(ends) == 2
        assert ends[1] - ends[0] <= 16


def test_without_products_for_the_last_process_the_result_has_not_converged():
    learn = of_spectrum(SPECTRA['largest twice'])
    whole = top_eigenvalues(learn, 2, **quiet)
    part = top_eigenvalues(learn, 2, max_products=whole.n - 1, **quiet)
    assert not part.converged
    assert part.n == whole.n - 1
    torch.testing.assert_close(part.values, whole.values, rtol=1e-5, atol=0)


def test_an_eigenvalue_that_exists_is_hardly_ever_excluded():
    "The bound allows one case in a thousand; the process excludes values that no eigenvalue has."
    values = [1., *[i / 100 for i in range(80)]]
    with hessian._Products(of_spectrum(values), None, None, False, '', None) as h:
        g = torch.Generator().manual_seed(0)
        wrong, right = 0, 0
        for _ in range(150):
            p = hessian._Process(h, hessian._Basis(), g)
            for _ in range(12):
                p.step(g)
                if p.excludes(1.): wrong += 1
            right += p.excludes(2.)
    assert wrong <= 2
    assert right == 150
