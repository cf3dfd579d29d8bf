"""A network and a batch to measure on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from laplace_ws.models import WideResNet

Work = Callable[[], object]


class NotOffered(Exception):
    """A library has no notion of the case; the message is the reason."""


class DoesNotFit(Exception):
    """There is not enough memory; the message says how much there is."""


@dataclass(frozen=True)
class Setting:
    """What a contestant is given.

    Attributes:
        model: a network of its own, in eval mode.
        x: images.
        y: labels.
        kfac_approx: expand or reduce.
        curvature: ggn, ggn_mc, ef or another that we have.
    """

    model: WideResNet
    x: Tensor
    y: Tensor
    kfac_approx: str
    curvature: str


def make_network(depth: int, width: int, n_classes: int, norm: str, image_size: int, seed: int) -> WideResNet:
    """A network whose every parameter matters: zeros at the start are moved, statistics of norms are those of a batch.

    Its logits have a standard deviation of 1. On a network that is sure of its classes, most columns of the exact GGN vanish; ours leaves
    those out, and would look cheaper than it is.
    """
    torch.manual_seed(seed)
    model = WideResNet(depth, width, 3, n_classes, norm=norm)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        x = torch.randn(8, 3, image_size, image_size)
        model(x)
        scale = model.eval()(x).std()
        for p in model.classifier.parameters():
            p.div_(scale)
    return model


def make_batch(n: int, n_classes: int, image_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, image_size, image_size, generator=generator)
    return x, torch.randint(n_classes, (n,), generator=generator)


class TrainingStep:
    """Forward pass, mean cross entropy and full backward pass: the unit of every ratio."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor):
        self._model, self._x, self._y = model.train(), x, y

    def __call__(self) -> None:
        """Take the step, from no gradients."""
        self.forget()
        F.cross_entropy(self._model(self._x), self._y).backward()

    def forget(self) -> None:
        """Drop the gradients of the last step."""
        self._model.zero_grad()
