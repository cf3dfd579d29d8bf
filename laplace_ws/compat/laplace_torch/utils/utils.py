"""Small functions that programs for laplace-torch call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from laplace_ws.compat.laplace_torch.utils.data import on_device
from laplace_ws.compat.laplace_torch.utils.enums import LinkApprox, PredType, PriorStructure
from laplace_ws.likelihoods.links import draw_outputs

__all__ = [
    "block_diag",
    "diagonal_add_scalar",
    "expand_prior_precision",
    "fix_prior_prec_structure",
    "get_nll",
    "invsqrt_precision",
    "kron",
    "normal_samples",
    "parameters_per_layer",
    "symeig",
    "validate",
]

Loss = Metric | Callable[..., Any]
"""Of predictions and targets; or of means, variances and targets."""


def get_nll(out_dist: Float[Tensor, "N C"], targets: Tensor) -> Float[Tensor, ""]:
    """Mean negative log probability of labels."""
    return F.nll_loss(out_dist.log(), targets)


class Scorer:
    """The loss of predictions that come batch by batch.

    Args:
        loss: a metric, of which a copy takes in the batches, or a function of the predictions and targets of all batches together.
    """

    def __init__(self, loss: Loss) -> None:
        if not callable(loss):
            raise TypeError(
                f"loss must be a torchmetrics metric or a function of predictions and targets, got {loss!r}."
            )
        self._metric: Metric | None = None
        if isinstance(loss, Metric):
            self._metric = loss.clone()
            self._metric.reset()
        self._loss = loss
        self._seen: list[tuple[Tensor, ...]] = []

    def add(self, prediction: Tensor | tuple[Tensor, ...], y: Tensor) -> None:
        """Take in a batch."""
        parts = prediction if isinstance(prediction, tuple) else (prediction,)
        if self._metric is None:
            self._seen.append((*parts, y))
            return
        try:
            self._metric.update(*parts, y)
        except TypeError:  # a metric of the means alone
            self._metric.update(parts[0], y)

    def result(self) -> float:
        """The loss of all of them; a metric's numbers, one by output, are summed."""
        if self._metric is not None:
            return self._metric.compute().sum().item()
        return float(self._loss(*(torch.cat(parts) for parts in zip(*self._seen, strict=True))))


@torch.no_grad()
def validate(
    laplace: Any,
    val_loader: DataLoader[Any],
    loss: Loss,
    pred_type: PredType | str = PredType.GLM,
    link_approx: LinkApprox | str = LinkApprox.PROBIT,
    n_samples: int = 100,
    dict_key_y: str = "labels",
) -> float:
    """The loss of a posterior's predictions on validation data.

    Args:
        laplace: a fitted posterior of this module.
        val_loader: the data.
        loss: see `Scorer`.
        pred_type, link_approx, n_samples: of the predictions.
        dict_key_y: the entry with the targets, of batches that are mappings.
    """
    scorer = Scorer(loss)
    for x, y in on_device(val_loader, laplace._device, dict_key_y).pairs():
        options = {"pred_type": pred_type, "link_approx": link_approx, "n_samples": n_samples}
        scorer.add(laplace(x, fitting=True, **options), y)
    return scorer.result()


def parameters_per_layer(model: nn.Module) -> list[int]:
    """Number of weights of each parameter tensor."""
    return [p.numel() for p in model.parameters()]


def invsqrt_precision(M: Float[Tensor, "P P"]) -> Float[Tensor, "P P"]:
    """The lower triangular L with L Lᵀ = M⁻¹."""
    reversed_root = torch.linalg.cholesky(M.flip(0, 1)).flip(0, 1).mT
    identity = torch.eye(len(M), dtype=M.dtype, device=M.device)
    return torch.linalg.solve_triangular(reversed_root, identity, upper=False)


def kron(t1: Float[Tensor, "a b"], t2: Float[Tensor, "c d"]) -> Float[Tensor, "a*c b*d"]:
    """Kronecker product."""
    return torch.kron(t1, t2)


def diagonal_add_scalar(X: Float[Tensor, "P P"], value: float | Tensor) -> Float[Tensor, "P P"]:
    """X + value·I."""
    return X + value * torch.eye(len(X), dtype=X.dtype, device=X.device)


def symeig(M: Float[Tensor, "P P"]) -> tuple[Float[Tensor, " P"], Float[Tensor, "P P"]]:
    """Eigenvalues, none of them negative, and eigenvectors of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(M, UPLO="U")
    return values.clamp(min=0), vectors


def block_diag(blocks: Sequence[Tensor]) -> Tensor:
    """The direct sum."""
    return torch.block_diag(*blocks)


def normal_samples(
    mean: Float[Tensor, "N C"], var: Tensor, n_samples: int, generator: torch.Generator | None = None
) -> Float[Tensor, "S N C"]:
    """Draws from Gaussians with the given variances `[N, C]` or covariances `[N, C, C]`, independent of each other."""
    if mean.ndim != 2 or var.shape not in (mean.shape, (*mean.shape, mean.shape[1])):
        raise ValueError(
            f"mean must be [N, C] and var [N, C] or [N, C, C], got {list(mean.shape)} and {list(var.shape)}."
        )
    return draw_outputs(mean, var, n_samples, generator)


def expand_prior_precision(prior_prec: Float[Tensor, " K"], model: nn.Module) -> Float[Tensor, " P"]:
    """The prior precision of every weight that requires grad, from one number, one per parameter tensor, or one per weight."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = torch.tensor([p.numel() for p in parameters], device=prior_prec.device)
    if len(prior_prec) == 1:
        return prior_prec.expand(int(sizes.sum()))
    return prior_prec if len(prior_prec) == sizes.sum() else prior_prec.repeat_interleave(sizes)


def fix_prior_prec_structure(
    prior_prec_init: float | Tensor,
    prior_structure: PriorStructure | str,
    n_layers: int,
    n_params: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, " K"]:
    """One number, repeated as often as a structure has prior precisions."""
    counts = {PriorStructure.SCALAR: 1, PriorStructure.LAYERWISE: n_layers, PriorStructure.DIAG: n_params}
    return torch.full((counts[PriorStructure(prior_structure)],), float(prior_prec_init), device=device, dtype=dtype)


def _is_valid_scalar(scalar: Any) -> bool:
    if isinstance(scalar, Tensor):
        return scalar.ndim <= 1 and scalar.numel() == 1
    return isinstance(scalar, Real) and not (isinstance(scalar, float) and math.isnan(scalar))


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
