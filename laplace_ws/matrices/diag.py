"""Diagonal curvature."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws import saved
from laplace_ws.matrices import spectrum
from laplace_ws.matrices.base import CurvatureMatrix, by_parameter, expand_per_weight
from laplace_ws.matrices.pushforward import Damping, Layout, SeparablePushforward

_AT_ONCE = 2**16
"""Numbers in float64 that are worked on at a time on a CPU, as its caches hold them; elsewhere it is a parameter."""


class Diag(CurvatureMatrix):
    """diag(h), one number per weight.

    Args:
        shapes: shape of each parameter, by name.
        values: h, flat.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], values: Float[Tensor, " P"]):
        self.shapes: Mapping[str, torch.Size] = dict(shapes)
        self.values = values
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __add__(self, other: CurvatureMatrix) -> Diag:
        self._check_same_parameters(other)
        return Diag(self.shapes, self.values + other.values)  # type: ignore[attr-defined]

    def __mul__(self, factor: float) -> Diag:
        return Diag(self.shapes, self.values * factor)

    def to_dense(self) -> Tensor:
        """See `CurvatureMatrix.to_dense`."""
        return torch.diag(self.values)

    def damped(self, scale: Tensor, delta: Tensor) -> Float[Tensor, " P"]:
        """The diagonal of scale·H + diag(δ), float64."""
        return self.values.double() * scale.double() + expand_per_weight(delta, self.shapes).double()

    def log_det(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.log_det`."""
        return torch.stack([damped.log().sum() for damped in self._damped_parts(scale, delta)]).sum()

    def _damped_parts(self, scale: Tensor, delta: Tensor) -> Iterator[Float[Tensor, " D"]]:
        """`damped` in parts of one parameter each."""
        at_once = _AT_ONCE if self.values.device.type == "cpu" else max(1, self.n_params)
        sizes = [shape.numel() for shape in self.shapes.values()]
        for values, d in zip(self.values.split(sizes), by_parameter(delta, self.shapes).values(), strict=True):
            parts = values.split(at_once)
            for part, own in zip(parts, d.split(at_once) if d.ndim else [d] * len(parts), strict=True):
                yield part.double() * scale.double() + own.double()

    @torch.no_grad()
    def effective_parameters(self, scale: Tensor, delta: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """See `CurvatureMatrix.effective_parameters`."""
        if len(groups) == len(self.shapes):
            one = delta.new_ones(1)
            parts = zip(
                self.values.split([shape.numel() for shape in self.shapes.values()]), delta[groups], strict=True
            )
            sums = [spectrum.effective_parameters(part.double(), one, scale.double() / d) for part, d in parts]
            shares = torch.stack(sums, 1)
        else:
            curvature = self.values.double() * scale.double()
            p = curvature / (curvature + delta[groups])
            shares = torch.stack([p, p * (1 - p)])
        totals = delta.new_zeros(2, len(delta)).index_add_(1, groups, shares)
        return totals[0], totals[1]

    def solve(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.solve`."""
        return vectors / self.damped(scale, delta).to(vectors.dtype)

    def inv_sqrt(self, vectors: Tensor, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inv_sqrt`."""
        return vectors * self._deviations(scale, delta, vectors.dtype)

    def _deviations(self, scale: Tensor, delta: Tensor, dtype: torch.dtype) -> Float[Tensor, " P"]:
        """Standard deviations of the posterior; the last ones are kept, as one sample follows another."""

        def computed() -> Tensor:
            return torch.cat([damped.to(dtype).rsqrt() for damped in self._damped_parts(scale, delta)])

        if scale.requires_grad or delta.requires_grad:
            return computed()
        last = self._last
        if last is None or last[2].dtype != dtype or not (torch.equal(last[0], scale) and torch.equal(last[1], delta)):
            last = self._last = scale.clone(), delta.clone(), computed()
        return last[2]

    def inverse_diagonal(self, scale: Tensor, delta: Tensor) -> Tensor:
        """See `CurvatureMatrix.inverse_diagonal`."""
        return 1 / self.damped(scale, delta)

    def times(self, vectors: Tensor) -> Tensor:
        """See `CurvatureMatrix.times`."""
        return vectors.double() * self.values.double()

    def pushforward(self, dampings: Sequence[Damping], layout: Layout) -> SeparablePushforward:
        """See `CurvatureMatrix.pushforward`."""
        parts = by_parameter(self.values, self.shapes)

        def variances(name: str, scale: Tensor, delta: Tensor) -> Tensor:
            return 1 / (parts[name].double() * scale.double() + by_parameter(delta, self.shapes)[name].double())

        return SeparablePushforward(variances, dampings, layout)

    def tensors_by_parameter(self) -> Mapping[str, Sequence[Tensor]]:
        """See `CurvatureMatrix.tensors_by_parameter`."""
        return {name: [values] for name, values in by_parameter(self.values, self.shapes).items()}

    def state_dict(self) -> dict[str, Any]:
        """See `CurvatureMatrix.state_dict`."""
        return {"values": self.values}

    @classmethod
    def from_state_dict(cls, shapes: Mapping[str, torch.Size], state: Mapping[str, Any]) -> Diag:
        """See `CurvatureMatrix.from_state_dict`."""
        n_params = sum(shape.numel() for shape in shapes.values())
        return cls(shapes, saved.floats(saved.entry(state, "values", Tensor), "diagonal", (n_params,), least=0))
