"""Samples of a network that is linearised in its weights, without the covariance of its outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.backend import differentiable_twice, evaluation_mode
from laplace_ws.curvature.finite import check_finite
from laplace_ws.curvature.inputs import ModelInputs, call_model, own_copy
from laplace_ws.curvature.jacobian import JacobianProducts
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.posterior.functional import check_output_axes
from laplace_ws.posterior.network import Network

_GRAPH_COPIES = 32
"""What a linearisation keeps, the graphs of the forward and of the backward pass, in units of one column at the outputs of all uses."""


@dataclass(frozen=True)
class LinearSamples:
    """f + J δ for directions δ in the space of the weights, one product with the Jacobian each, however many outputs there are.

    Attributes:
        network: the model and its covered weights.
        output_shape: of one example in the fit.
        memory_budget: bytes that linearisations may take at a time; at least one example is processed at once.
    """

    network: Network
    output_shape: tuple[int, ...]
    memory_budget: int

    def outputs(self, x: ModelInputs, directions: Iterable[Float[Tensor, "B P"]]) -> Float[Tensor, "S N ..."]:
        """The outputs of at least float32 for each direction, which come in batches.

        Where all examples fit into memory they are linearised once; otherwise part by part, once for each batch of directions.
        """
        parameters = self.network.parameters()
        n_at_once = self._examples_at_once()
        parts = [x[start : start + n_at_once] for start in range(0, len(x), n_at_once)]
        with evaluation_mode(self.network.model, parameters), differentiable_twice(self.network.model):
            if len(parts) == 1:
                products = self._linearised(x)
                return torch.cat([self._along(products, batch) for batch in directions])
            return torch.cat(
                [torch.cat([self._along(self._linearised(part), batch) for part in parts], 1) for batch in directions]
            )

    def _examples_at_once(self) -> int:
        per_example = _GRAPH_COPIES * self.network.check.column_bytes_per_example
        return max(1, int(self.memory_budget // max(1.0, per_example)))

    def _linearised(self, x: ModelInputs) -> JacobianProducts:
        model = self.network.model
        f = call_model(model, own_copy(x))
        check_finite(model, f)
        check_output_axes(model, f, self.output_shape)
        with torch.autocast(f.device.type, enabled=False):
            return JacobianProducts(f, list(self.network.parameters().values()))

    def _along(self, products: JacobianProducts, directions: Float[Tensor, "B P"]) -> Float[Tensor, "B N ..."]:
        parameters, f = list(self.network.parameters().values()), at_least_float32(products.outputs)
        rows = []
        with torch.autocast(f.device.type, enabled=False):
            for direction in directions:
                tensors = zip(self.network.subset.direction(direction), parameters, strict=True)
                rows.append(f + products([tensor.to(p.dtype) for tensor, p in tensors]))
        return torch.stack(rows)
