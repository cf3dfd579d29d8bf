"""SWAG: the moments of the weights along further SGD at a constant learning rate [Maddox et al. 2019]."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.inputs import call_model
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.values import real_number, whole_number

RANK = 20
"""Largest number of deviations that are kept, as in the paper."""


class SwagMoments:
    """Mean, variance and latest deviations of weights that come one after another, float64.

    Args:
        weights: the first, θ_0; it counts in the moments and has no deviation.
    """

    def __init__(self, weights: Float[Tensor, " P"]) -> None:
        self.n: int = 1
        self.mean: Float[Tensor, " P"] = weights.double().clone()
        self._square_sum = torch.zeros_like(self.mean)
        self._deviations: deque[Tensor] = deque(maxlen=RANK)

    def add(self, weights: Float[Tensor, " P"]) -> None:
        """Take in the next weights; the deviation is that from the mean so far, these included."""
        self.n += 1
        before = weights.double() - self.mean
        self.mean = self.mean + before / self.n
        after = weights.double() - self.mean
        # of one sign with its twin, so that rounding makes no variance negative, as it does E θ² − (E θ)²
        self._square_sum += before * after
        self._deviations.append(after)

    @property
    def variance(self) -> Float[Tensor, " P"]:
        """E θ² − (E θ)² over the weights so far."""
        return self._square_sum / self.n

    @property
    def deviations(self) -> Float[Tensor, "P K"]:
        """D, the latest deviations as columns."""
        return torch.stack(list(self._deviations), 1)

    def covariance(self) -> Float[Tensor, "P P"]:
        """½ diag(variance) + D Dᵀ / (2(K − 1)), of at least two deviations; dense, for small P."""
        D = self.deviations
        return 0.5 * self.variance.diag() + D @ D.T / (2 * (D.shape[1] - 1))

    def sample(self, generator: torch.Generator) -> Float[Tensor, " P"]:
        """Weights drawn from N(mean, covariance)."""
        D = self.deviations
        diagonal, low_rank = (torch.randn(n, dtype=D.dtype, device=D.device, generator=generator) for n in D.shape)
        return self.mean + (0.5 * self.variance).sqrt() * diagonal + D @ low_rank / math.sqrt(2 * (D.shape[1] - 1))


@torch.enable_grad()
def swag_variances(
    model: nn.Module,
    train_loader: Data,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    n_snapshots: int = 40,
    epochs_between: int = 1,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
) -> Float[Tensor, " P"]:
    """The variance of each weight that requires grad over snapshots along SGD, which a copy of the model takes; float64.

    Args:
        model: a trained network, which is left as it is.
        train_loader: the training data.
        loss: of outputs and targets of a batch, a mean over its examples.
        n_snapshots: how many; the first is taken after the first epoch.
        epochs_between: from one snapshot to the next.
        lr, momentum, weight_decay: of SGD.

    Raises:
        FloatingPointError: the weights left the finite numbers.
    """
    whole_number("n_snapshots", n_snapshots, least=2)
    whole_number("epochs_between", epochs_between, least=1)
    follower = copy.deepcopy(model).train()
    parameters = list(trainable_parameters(follower).values())
    lr = real_number("lr", lr, above=0)
    sgd = torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    batches = Batches.of(train_loader, follower)
    moments: SwagMoments | None = None
    for epoch in range(epochs_between * (n_snapshots - 1) + 1):
        for x, y in batches:
            sgd.zero_grad()
            loss(at_least_float32(call_model(follower, x)), y).backward()
            sgd.step()
        if epoch % epochs_between:
            continue
        weights = flat(parameters)
        if not weights.isfinite().all():
            raise FloatingPointError(f"the SGD of SWAG diverged in epoch {epoch + 1} at lr={lr:g}; lower it.")
        if moments is None:
            moments = SwagMoments(weights)
        else:
            moments.add(weights)
    assert moments is not None
    return moments.variance


def flat(parameters: Sequence[Tensor]) -> Float[Tensor, " P"]:
    """A copy of the weights, one after another."""
    return torch.cat([p.detach().flatten() for p in parameters])
