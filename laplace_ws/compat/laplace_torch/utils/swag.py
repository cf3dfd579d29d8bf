"""The variance of the weights along further SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from laplace_ws.compat.laplace_torch.utils.data import on_device
from laplace_ws.posterior.swag import swag_variances

__all__ = ["fit_diagonal_swag_var"]


def fit_diagonal_swag_var(
    model: nn.Module,
    train_loader: DataLoader[Any],
    criterion: Callable[[Tensor, Tensor], Tensor],
    n_snapshots_total: int = 40,
    snapshot_freq: int = 1,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
    min_var: float = 1e-30,
) -> Float[Tensor, " P"]:
    """The variance of each weight over snapshots of a copy of the model, at least `min_var`; see `posterior.swag.swag_variances`."""
    weights = parameters_to_vector(model.parameters())
    variances = swag_variances(
        model,
        on_device(train_loader, weights.device, "labels"),
        criterion,
        n_snapshots=n_snapshots_total,
        epochs_between=snapshot_freq,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
    )
    return variances.clamp(min=min_var).to(weights.dtype)
