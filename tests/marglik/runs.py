"""Small data, networks and options that the tests of training share."""

from __future__ import annotations

import math

import torch
from torch import nn

from laplace_ws.data import TensorLoader

QUICK = {
    "n_epochs": 6, "n_epochs_burnin": 2, "marglik_frequency": 2, "fit_fraction": 1.0, "n_hypersteps": 5, "progress_bar": False,
}  # fmt: skip
"""With frequency and fraction given, so that nothing depends on measured times."""
SGD = {"lr": 0.02, "momentum": 0.9}


def noisy_sine(n: int = 160, sigma: float = 0.2, batch_size: int = 40) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 6 - 3
    y = torch.sin(x) + sigma * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return TensorLoader(x, y, batch_size=batch_size, shuffle=True, seed=3)


def blobs(n: int = 60, batch_size: int = 16) -> TensorLoader:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) + 2 * nn.functional.one_hot(y, 4)
    return TensorLoader(x, y, batch_size=batch_size, shuffle=True, seed=3)


def mlp(n_in: int = 4, n_out: int = 3, width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, width), nn.Tanh(), nn.Linear(width, n_out)).double()


class Poisoned(TensorLoader):
    """Gives NaN inputs from one pass on; the pass that checks the data counts as pass 0."""

    from_pass = 0

    def __iter__(self):
        self.n_passes = getattr(self, "n_passes", -1) + 1
        for x, y in super().__iter__():
            yield (x * math.nan if self.n_passes >= self.from_pass else x), y


def norm_net() -> nn.Sequential:
    """A network whose state is more than its parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


class Distances(nn.Module):
    """Its weight has no curvature block."""

    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.cdist(x, self.centres)


class Never(torch.optim.SGD):
    """Proves that no step was taken."""

    def step(self, closure=None):
        raise AssertionError("training began")


def as_found(model: nn.Module) -> tuple:
    modes = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return modes, grads, torch.get_rng_state(), [p.requires_grad for p in model.parameters()]


def assert_as_found(model: nn.Module, before: tuple) -> None:
    modes, grads, rng, requires_grad = as_found(model)
    assert modes == before[0]
    for got, want in zip(grads, before[1], strict=True):
        assert (got is None and want is None) or torch.equal(got, want)
    assert torch.equal(rng, before[2])
    assert requires_grad == before[3]


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, copied."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_equal_states(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
