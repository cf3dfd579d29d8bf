"""What every curvature matrix can do, whatever its structure."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves the types of split, tolist and cholesky_ex open

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.matrices.eigenbasis import EigenBasis
from laplace_ws.matrices.pushforward import Damping, Layout, Pushforward

_ROWS_AT_ONCE = 256
"""Right-hand sides that are solved for together."""


class CurvatureMatrix(ABC):
    """A positive semi-definite matrix H over the parameters of a model, in nats, and the algebra of s·H + diag(δ).

    A vector over the parameters is flat, `[P]`: the parameters in the order of `shapes`, each row-major. The damping δ is a scalar, one
    number per parameter tensor (`[len(shapes)]`), or, where the structure allows it, one per weight (`[P]`).

    Attributes:
        shapes: shape of each parameter, by name.
        is_separable: whether parameter tensors (and weights, where each may have its own δ) do not interact.
    """

    is_separable: ClassVar[bool] = True
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
    def effective_parameters(
        self, scale: Tensor, delta: Float[Tensor, " G"], groups: Int[Tensor, " K"]
    ) -> tuple[Float[Tensor, " G"], Float[Tensor, " G"] | Float[Tensor, "G G"]]:
        """Effective number of parameters in each group [MacKay 1992], γ_g = Σ_{i∈g} (1 − δ_g [(scale·H + Δ)⁻¹]_ii), in float64.

        Args:
            scale: factor on H.
            delta: damping of each group.
            groups: the group of every parameter tensor, or, where the structure allows it, of every weight.

        Returns:
            γ, and −∂γ_g/∂log δ_h: its diagonal where the groups do not interact, in full where they do.
        """

    @abstractmethod
    def solve(self, vectors: Float[Tensor, "S P"], scale: Tensor, delta: Tensor) -> Float[Tensor, "S P"]:
        """(scale·H + diag(δ))⁻¹ v for each row v."""

    @abstractmethod
    def inv_sqrt(self, vectors: Float[Tensor, "S P"], scale: Tensor, delta: Tensor) -> Float[Tensor, "S P"]:
        """L v for each row v, with L Lᵀ = (scale·H + diag(δ))⁻¹: turns white noise into posterior samples."""

    def inverse_diagonal(self, scale: Tensor, delta: Tensor) -> Float[Tensor, " P"]:
        """The diagonal of (scale·H + diag(δ))⁻¹ in float64: the variance of each weight.

        As written here it takes a `solve` for each weight; structures that know better say so.
        """
        units = torch.eye(self.n_params, dtype=torch.float64, device=delta.device).split(_ROWS_AT_ONCE)
        parts = [self.solve(rows, scale, delta) for rows in units]
        return torch.cat(parts).diagonal()

    def times(self, vectors: Float[Tensor, "S P"]) -> Float[Tensor, "S P"]:
        """H v for each row v, in float64."""
        return vectors.double() @ self.to_dense().double()

    def basis(self, name: str) -> EigenBasis | None:
        """The coordinates in which `pushforward` takes the rows of one parameter tensor; None for its own, flattened."""
        return None

    @abstractmethod
    def pushforward(self, dampings: Sequence[Damping], layout: Layout) -> Pushforward:
        """The sum of J Σ Jᵀ over the parameter tensors, with Σ = (s·H + diag(δ))⁻¹ for each (s, δ)."""

    def tensors_by_parameter(self) -> Mapping[str, Sequence[Tensor]]:
        """What is stored of each parameter tensor, by its name, for checks; a class of one's own that does not say is not checked."""
        return {}

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
    """Damping of every weight, given a scalar, one number per parameter tensor, or one per weight."""
    n_params = sum(shape.numel() for shape in shapes.values())
    if delta.ndim == 0:
        return delta.expand(n_params)
    if delta.shape == (len(shapes),):
        repeats = torch.tensor([shape.numel() for shape in shapes.values()], device=delta.device)
        return delta.repeat_interleave(repeats)
    if delta.shape == (n_params,):
        return delta
    raise ValueError(
        f"the precision must be a scalar, {len(shapes)} numbers (one per parameter tensor) or {n_params} (one per weight), "
        f"got shape {tuple(delta.shape)}."
    )


def by_parameter(delta: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The damping of each parameter tensor by name: a scalar, or `[D]`, one per weight."""
    if delta.ndim == 0 or delta.shape == (len(shapes),):
        return dict(zip(shapes, delta.expand(len(shapes)), strict=True))
    parts = expand_per_weight(delta, shapes).split([shape.numel() for shape in shapes.values()])
    return dict(zip(shapes, parts, strict=True))


def rows_by_parameter(rows: Float[Tensor, "P k"], shapes: Mapping[str, torch.Size]) -> dict[str, list[Tensor]]:
    """The rows of a matrix that belong to each parameter tensor."""
    parts = rows.split([shape.numel() for shape in shapes.values()])
    return {name: [part] for name, part in zip(shapes, parts, strict=True)}
