"""What every curvature matrix can do, whatever its structure."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.errors import NumericalRepairWarning


class CurvatureMatrix(ABC):
    """A positive semi-definite matrix H over the parameters of a model, in nats, and the algebra of s·H + diag(δ).

    A vector over the parameters is flat, `[P]`: the parameters in the order of `shapes`, each row-major. The damping δ is a scalar, one
    number a parameter tensor (`[len(shapes)]`), or, where the structure allows it, one a weight (`[P]`).

    Attributes:
        shapes: shape of each parameter, by name.
    """

    shapes: Mapping[str, torch.Size]

    @property
    def n_params(self) -> int:
        """P, the number of weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    @abstractmethod
    def __add__(self, other: CurvatureMatrix) -> CurvatureMatrix:
        """The curvature of both data sets together."""

    @abstractmethod
    def __mul__(self, factor: float) -> CurvatureMatrix:
        """The curvature of a data set `factor` times as large."""

    @abstractmethod
    def to_dense(self) -> Float[Tensor, "P P"]:
        """The matrix in full."""

    @abstractmethod
    def log_det(self, scale: Float[Tensor, ""], delta: Float[Tensor, ...]) -> Float[Tensor, ""]:
        """log det(scale·H + diag(δ)) in float64, differentiable in both arguments."""

    @abstractmethod
    def solve(self, vectors: Float[Tensor, "S P"], scale: Tensor, delta: Tensor) -> Float[Tensor, "S P"]:
        """(scale·H + diag(δ))⁻¹ v for each row v."""

    @abstractmethod
    def inv_sqrt(self, vectors: Float[Tensor, "S P"], scale: Tensor, delta: Tensor) -> Float[Tensor, "S P"]:
        """L v for each row v, with L Lᵀ = (scale·H + diag(δ))⁻¹: turns white noise into posterior samples."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore the matrix."""

    @classmethod
    @abstractmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> CurvatureMatrix:
        """Restore what `state_dict` gave."""

    def _check_same_parameters(self, other: CurvatureMatrix) -> None:
        if type(self) is not type(other) or dict(self.shapes) != dict(other.shapes):
            raise ValueError(f"cannot add {other!r} to {self!r}: they differ in structure or in parameters.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.shapes)} parameters, {self.n_params} weights)"


def expand_per_weight(delta: Tensor, shapes: Mapping[str, torch.Size]) -> Float[Tensor, " P"]:
    """Damping of every weight, given a scalar, one number a parameter tensor, or one a weight."""
    n_params = sum(shape.numel() for shape in shapes.values())
    if delta.ndim == 0:
        return delta.expand(n_params)
    if delta.shape == (len(shapes),):
        repeats = torch.tensor([shape.numel() for shape in shapes.values()], device=delta.device)
        return delta.repeat_interleave(repeats)
    if delta.shape == (n_params,):
        return delta
    raise ValueError(
        f"the precision must be a scalar, {len(shapes)} numbers (one a parameter tensor) or {n_params} (one a weight), "
        f"got shape {tuple(delta.shape)}."
    )


def eigh(matrix: Float[Tensor, "*G D D"], what: str) -> tuple[Float[Tensor, "*G D"], Float[Tensor, "*G D D"]]:
    """Eigenvalues and eigenvectors of a positive semi-definite matrix, in float64; see `clamp_eigenvalues`.

    The divide-and-conquer routine behind torch sometimes fails on wide matrices of low rank; LAPACK's relatively robust
    representations, through scipy, then take its place.
    """
    wide = matrix.double()
    try:
        values, vectors = torch.linalg.eigh(wide)
    except torch.linalg.LinAlgError:  # pyright: ignore
        blocks = wide.reshape(-1, *wide.shape[-2:]).cpu().numpy()
        pairs = [scipy.linalg.eigh(block, driver="evr") for block in blocks]
        values = torch.from_numpy(np.stack([pair[0] for pair in pairs])).to(wide).reshape(wide.shape[:-1])
        vectors = torch.from_numpy(np.stack([pair[1] for pair in pairs])).to(wide).reshape(wide.shape)
    return clamp_eigenvalues(values, torch.finfo(matrix.dtype).eps, what), vectors


def eigenvalues(matrix: Float[Tensor, "*G D D"], what: str) -> Float[Tensor, "*G D"]:
    """Eigenvalues of a positive semi-definite matrix, in float64; see `clamp_eigenvalues`."""
    try:
        values = torch.linalg.eigvalsh(matrix.double())
    except torch.linalg.LinAlgError:  # pyright: ignore
        return eigh(matrix, what)[0]
    return clamp_eigenvalues(values, torch.finfo(matrix.dtype).eps, what)


def clamp_eigenvalues(values: Float[Tensor, "*G D"], eps: float, what: str) -> Float[Tensor, "*G D"]:
    """Set negative eigenvalues to zero; warn when they exceed the rounding of a matrix with D rows and precision `eps`."""
    lowest = values.min().item()
    rounding = 10 * values.shape[-1] * eps * values.abs().max().item()
    if -lowest > rounding:
        message = f"{what} has an eigenvalue of {lowest:.3g} where none can be negative; set to 0."
        warnings.warn(message, NumericalRepairWarning, stacklevel=2)
    return values.clamp_min(0)
