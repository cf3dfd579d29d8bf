"""A small problem for several processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

N = 23


def make_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    return net.double()


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 1, 6, 6, dtype=torch.float64, generator=generator)
    return TensorDataset(x, torch.randint(0, 4, (N,), generator=generator))


def raised(run: Callable[[], Any]) -> str:
    """What a call raises, with its type; "nothing" for nothing."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
