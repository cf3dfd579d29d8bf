"""What the rows of the tables refer to: models, data, and short names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import laplace_ws as lw
from laplace_ws import curvature, data, marglik, memory, metrics, models, optim
from laplace_ws.posterior import subnetwork

N = 12


def mlp(n_outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, n_outputs))


class Ending(nn.Module):
    """A linear layer, and something that is done to its outputs."""

    def __init__(self, end):
        super().__init__()
        self.layer, self.end = nn.Linear(3, 3), end

    def forward(self, x):
        return self.end(self.layer(x))


def compiled_in_place() -> nn.Module:
    model = mlp()
    model.compile(backend="eager")
    return model


def posterior(likelihood="classification", **options) -> lw.Laplace:
    return lw.Laplace(mlp(), likelihood, **options)


def with_free(n_mebibytes: int, call: Callable[[], Any]) -> Any:
    """What a call gives where this is the memory that is free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "free_memory", lambda device: n_mebibytes * 2**20)
        return call()


def fit(batches, likelihood="classification", model=None, n_data=None, **options) -> lw.Laplace:
    la = lw.Laplace(model or mlp(), likelihood, **options)
    la.fit(batches, n_data=n_data)
    return la


def train(loader=None, model=None, **options):
    loader = [(x, labels)] if loader is None else loader
    options = {"n_epochs": 1, "n_epochs_burnin": 0, "progress_bar": False, **options}
    return marglik.marglik_training(model or mlp(), loader, **options)


def kfac(model=None, params=None, **options) -> optim.KFAC:
    return optim.KFAC(model or mlp(), params, **options)


def kfac_step(model=None, inputs=None, n_passes=1, mode=True, **options):
    """A step of K-FAC after a pass in train mode or another, whose loss is differentiated once or more often."""
    model = model or mlp()
    optimizer = kfac(model, **options)
    loss = model.train(mode)(x if inputs is None else inputs).square().mean()
    for _ in range(n_passes):
        loss.backward(retain_graph=True)
    optimizer.step()


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)

    def forward(self, tokens):
        return self.embed(tokens).mean(1) @ self.embed.weight.T


class OnNodes(nn.Module):
    """A layer on nodes, and one number for each of two graphs; nobody says which node belongs to which."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, nodes):
        return self.layer(nodes)[:2]


class TimeMajor(nn.Module):
    """A layer on rows that are ordered by time and then by example."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, sequences):
        rows = sequences.transpose(0, 1).reshape(-1, 3)
        return self.layer(rows).unflatten(0, (-1, len(sequences))).mean(0)


def estimators():
    return pytest.importorskip("laplace_ws.sklearn", exc_type=ImportError)


class Table:
    """What other libraries keep numbers in, as pandas does."""

    shape = (1, 1)

    def __array__(self):
        raise AssertionError


def tensors(**options) -> data.TensorLoader:
    return data.TensorLoader(x, labels, **{"batch_size": 4, **options})


_draws = torch.Generator().manual_seed(0)
x = torch.randn(N, 3, generator=_draws)
images = torch.rand(2, 3, 8, 8, generator=_draws)
probs = torch.rand(N, 3, generator=_draws).softmax(-1)
tokens = torch.arange(6).reshape(3, 2) % 5
labels = torch.arange(N) % 3
targets = torch.randn(N, 3, generator=_draws)
one_hot = nn.functional.one_hot(labels, 3)
graph = (torch.rand(3, 2, generator=_draws), torch.tensor([[0, 1], [1, 2]]))


def names() -> dict[str, Any]:
    """All of this, with posteriors that have been fitted."""
    pair = [(x, labels)]
    of_classes = fit(pair)
    return {
        **{name: getattr(lw, name) for name in lw.__all__},
        **{name: getattr(curvature, name) for name in curvature.__all__},
        **{name: getattr(data, name) for name in data.__all__},
        **{name: getattr(marglik, name) for name in marglik.__all__},
        **{name: getattr(metrics, name) for name in metrics.__all__},
        **{name: getattr(models, name) for name in models.__all__},
        **{name: value for name, value in vars(subnetwork).items() if not name.startswith("_")},
        **globals(),
        "pair": pair,
        "la": of_classes,
        "la_regression": fit([(x, targets)], "regression"),
        "la_binary": fit([(x, one_hot.float())], "binary"),
        "la_diag": fit(pair, hessian_structure="diag"),
        "la_asdl": fit(pair, backend="asdl"),
        "estimators": estimators(),
        "math": math,
        "nn": nn,
        "torch": torch,
    }
