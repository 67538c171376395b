"The gradient at a random point nearby: SAM without its direction."
import torch
from sadt_nb.core.perturb import global_norm
from sadt_nb.core.perturbed_passes import PerturbedPass
from sadt_nb.methods.registry import Method


class RandomNeighbour(PerturbedPass):
    def __init__(self, rho=.05, seed=0):
        super().__init__()
        if not rho > 0: raise ValueError(f'`rho` must be positive, got {rho}')
        self.rho = rho
        self.generator = torch.Generator().manual_seed(seed)

    def perturbation(self, params, grads):
        noise = {}
        for name, g in grads.items():
            noise[name] = torch.randn(g.shape, generator=self.generator, dtype=g.dtype)
        scale = self.rho / global_norm(noise.values())
        return {name: v * scale for name, v in noise.items()}


METHOD = Method(RandomNeighbour, 'gradient at a random neighbour', passes=2, memory='1 x weights',
                seeded=True, key='`rho` = 0.05', avoid='where SAM can be afforded, which costs the same')
