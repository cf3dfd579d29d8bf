"""Mean and covariance of a network's outputs where it is linearised in its weights, which have a Gaussian posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.autograd import AutogradBackend
from laplace_ws.curvature.backend import Linearisation, differentiable_twice, evaluation_mode
from laplace_ws.curvature.checks import LinearisationCheck
from laplace_ws.curvature.finite import check_finite
from laplace_ws.curvature.graph_inputs import parts_told_apart
from laplace_ws.curvature.inputs import ModelInputs, own_copy
from laplace_ws.curvature.native import NativeBackend
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.kfac import Use, lookups, outer_products, rotated_gradients
from laplace_ws.kfac.factors import total
from laplace_ws.matrices import CurvatureMatrix, Dense, Layout, LowRank, Pushforward
from laplace_ws.posterior.last_layer_moments import bytes_per_example, last_layer_moments, may_be_last_layer
from laplace_ws.posterior.memory_needs import check_covariances, check_jacobians, check_rows_of_full
from laplace_ws.posterior.network import Network

DIAGONAL_COLUMNS = 16
"""Outputs that are processed together where only variances are wanted."""
_ROW_COPIES = 3  # rows of the Jacobian of one parameter tensor: as they are, rotated, weighted
_ACTIVATION_COPIES = 12  # what the forward pass keeps, and the patches of a convolution, in units of one column


Result = TypeVar("Result")


@dataclass(frozen=True)
class LinearisedModel:
    """A model, the weights in which it is linearised, and how this is done.

    Attributes:
        network: the model and its covered weights.
        output_shape: of one example.
        memory_budget: bytes that Jacobians and gradients may take at a time. The least that is processed at once is one example
            with the outputs of one covariance; with `Layout.JOINT` it is all examples, and with `differentiable` the graph comes on top.
        differentiable: whether the moments can be differentiated with respect to the inputs. This takes the native backend, whatever the
            network's own is: the numbers are the same.
    """

    network: Network
    output_shape: tuple[int, ...]
    memory_budget: int
    differentiable: bool = False

    def moments(
        self, x: ModelInputs, H: CurvatureMatrix, pushforward: Pushforward
    ) -> tuple[Float[Tensor, "N ..."], list[Tensor]]:
        """Outputs f and, for each damping of the pushforward, the covariance J (s·H + Δ)⁻¹ Jᵀ in its layout; both of at least float32.

        Outputs `[N, T, C]` have, for each example, one covariance per term, `[N, T, C, C]`; variances alone have the shape of f. Time is
        linear in examples and outputs: a backward pass for each output, but none where the weights are those of the last layer.
        `Layout.JOINT`, whose result is quadratic, takes all examples at once.

        Raises:
            NotEnoughMemoryError: the covariances, or what they take, need more memory than is free.
        """
        self._check_memory(x, H, pushforward)
        outputs, covariances = [], []
        parameters = self.network.parameters()
        with evaluation_mode(self.network.model, parameters):
            try:
                self._check.start(x, parameters)
            except UnsupportedParameterError:
                if (
                    not isinstance(H, LowRank)
                    or isinstance(self.network.backend, AutogradBackend)
                    or self.differentiable
                ):
                    raise
                return replace(self, network=self.network.by_autograd).moments(x, H, pushforward)
            for f, by_damping in self._parts(x, H, pushforward):
                outputs.append(f)
                covariances.append(by_damping)
        f, joined = torch.cat(outputs), [torch.cat(parts) for parts in zip(*covariances, strict=True)]
        dtype = torch.promote_types(torch.promote_types(f.dtype, torch.float32), joined[0].dtype)
        return f.to(dtype), [covariance.to(dtype) for covariance in joined]

    def _examples_at_once(self, pushforward: Pushforward, *, is_full: bool) -> int:
        """How many examples fit into the memory budget, at least one; `is_full` where the matrix is over all weights."""
        n_columns = self.output_shape[-1] if self.output_shape else 1
        if pushforward.layout is Layout.DIAGONAL:
            n_columns = min(DIAGONAL_COLUMNS, math.prod(self.output_shape))
        subset = self.network.subset
        small = frozenset() if pushforward.forms_rows else self._check.small_rows - subset.selection.keys()
        sizes = [shape.numel() for name, shape in subset.parameter_shapes.items() if name not in small]
        of_rows = self._element_size * _ROW_COPIES * n_columns * max(sizes, default=0)
        if is_full:  # the rows of all weights are kept, and then solved for in float64
            of_rows = (self._element_size + 16) * n_columns * self.network.n_params
        of_activations = (n_columns + _ACTIVATION_COPIES) * self._check.column_bytes_per_example
        return max(1, int(self.memory_budget // (of_rows + of_activations)))

    def jacobians(self, x: ModelInputs) -> tuple[Float[Tensor, "N D P"], Float[Tensor, "N ..."]]:
        """∂f/∂θ over the covered weights, the outputs of an example flattened to D, and f; both of at least float32.

        Raises:
            NotEnoughMemoryError: they take more memory than is free.
        """
        n_outputs = math.prod(self.output_shape_at(x))
        check_jacobians(len(x), n_outputs, self.network.n_params, self._element_size, self.network.device)
        parameters = self.network.parameters()
        with evaluation_mode(self.network.model, parameters):
            self._check.start(x, parameters)
            return self._with_linearisation(x, self._rows)

    def _rows(self, linearisation: Linearisation) -> tuple[Tensor, Tensor]:
        """The rows of the Jacobian of all covered weights, and the outputs."""
        f = linearisation.outputs
        (columns,) = _columns(f, Layout.JOINT)
        g = self._pulled_back(linearisation, columns)
        parts = []
        for name in self.network.subset.parameter_shapes:
            own = [(use, g_use) for use, g_use in zip(linearisation.uses, g, strict=True) if name in use.parameters]
            parts.append(self._of_weights(name, total(use.example_gradients(name, g_use) for use, g_use in own)))
        J = torch.cat(parts, dim=-1)
        dtype = torch.promote_types(torch.promote_types(f.dtype, torch.float32), J.dtype)
        return J.to(dtype), f.to(dtype)

    def output_shape_at(self, x: ModelInputs) -> tuple[int, ...]:
        """Shape of the outputs of an example, which those of the fit need not have where there are positions; runs the model on one."""
        if len(self.output_shape) < 2:
            return self.output_shape
        return tuple(self.network.own_outputs(x[:1]).shape[1:])

    @property
    def _element_size(self) -> int:
        """Bytes of a number in a result."""
        return max(4, *(p.element_size() for p in self.network.parameters().values()))

    def _check_memory(self, x: ModelInputs, H: CurvatureMatrix, pushforward: Pushforward) -> None:
        """Raise `NotEnoughMemoryError` for what does not fit."""
        layout, device = pushforward.layout, self.network.device
        if layout is Layout.DIAGONAL and not isinstance(H, Dense):
            return
        shape = self.output_shape_at(x)
        check_covariances(layout, len(x), shape, self._element_size, device, len(pushforward.dampings))
        if isinstance(H, Dense):
            n_at_once = len(x) if layout is Layout.JOINT else 1
            n_columns = min(DIAGONAL_COLUMNS, math.prod(shape)) if layout is Layout.DIAGONAL else math.prod(shape[-1:])
            n_columns = math.prod(shape) if layout is Layout.JOINT else n_columns
            check_rows_of_full(n_at_once, n_columns, self.network.n_params, device)

    def _parts(
        self, x: ModelInputs, H: CurvatureMatrix, pushforward: Pushforward
    ) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The moments of as many examples at a time as fit into the memory budget; by closed form where there is one."""
        layout, subset, n_done = pushforward.layout, self.network.subset, 0
        if not self.differentiable and may_be_last_layer(subset, self.output_shape, H):

            def closed_form(linearisation: Linearisation) -> tuple[Tensor, list[Tensor]] | None:
                return last_layer_moments(linearisation, list(subset.parameter_shapes), H, pushforward)

            of_activations = _ACTIVATION_COPIES * self._check.column_bytes_per_example
            n_at_once = int(self.memory_budget // (bytes_per_example(self.output_shape, layout) + of_activations))
            for part in self._slices(x, 0, max(1, n_at_once), layout):
                found = self._with_linearisation(x[part], closed_form)
                if found is None:
                    break
                yield found
                n_done = part.stop
        n_at_once = self._examples_at_once(pushforward, is_full=isinstance(H, Dense))
        for part in self._slices(x, n_done, n_at_once, layout):
            yield self._part(x[part], H, pushforward)

    @staticmethod
    def _slices(x: ModelInputs, start: int, n_at_once: int, layout: Layout) -> Iterator[slice]:
        """Parts of a batch from an example on."""
        n = len(x)
        if layout is Layout.JOINT:
            return iter([slice(0, n)] if start < n else [])
        return parts_told_apart(x, (slice(first, min(first + n_at_once, n)) for first in range(start, n, n_at_once)))

    def _part(self, x: ModelInputs, H: CurvatureMatrix, pushforward: Pushforward) -> tuple[Tensor, list[Tensor]]:
        """The moments of some examples."""

        def moments(linearisation: Linearisation) -> tuple[Tensor, list[Tensor]]:
            f, layout = linearisation.outputs, pushforward.layout
            parts = [self._covariances(linearisation, columns, H, pushforward) for columns in _columns(f, layout)]
            return f, [_put_together(by_columns, f, layout) for by_columns in zip(*parts, strict=True)]

        return self._with_linearisation(x, moments)

    @property
    def _check(self) -> LinearisationCheck:
        return self.network.differentiable_check if self.differentiable else self.network.check

    def _with_linearisation(self, x: ModelInputs, compute: Callable[[Linearisation], Result]) -> Result:
        """What a function makes of the model at some examples, once its uses of the parameters have been checked."""
        for is_checked in (False, True):
            with self._linearise(x, self.network.parameters()) as linearisation:
                if not is_checked and not self._check.knows(linearisation.uses):
                    self._check.run(x)
                    continue
                f = linearisation.outputs
                check_finite(self.network.model, f)
                check_output_axes(self.network.model, f, self.output_shape)
                with torch.autocast(f.device.type, enabled=False):
                    return compute(linearisation)
        raise AssertionError

    @contextmanager
    def _linearise(self, x: ModelInputs, parameters: Mapping[str, nn.Parameter]) -> Iterator[Linearisation]:
        model, backend = self.network.model, self._check.backend
        if not self.differentiable:
            with backend.linearise(model, own_copy(x), parameters) as linearisation:
                yield linearisation
            return
        assert isinstance(backend, NativeBackend)
        with (
            differentiable_twice(model),
            backend.linearise(model, own_copy(x), parameters, differentiable=True) as linearisation,
        ):
            yield linearisation

    def _covariances(
        self, linearisation: Linearisation, columns: Tensor, H: CurvatureMatrix, pushforward: Pushforward
    ) -> list[Tensor]:
        """J Σ Jᵀ over some outputs."""
        g = self._pulled_back(linearisation, columns)
        for name in self.network.subset.parameter_shapes:
            own = [(use, g_use) for use, g_use in zip(linearisation.uses, g, strict=True) if name in use.parameters]
            self._add(name, own, H, pushforward)
        return pushforward.result()

    @staticmethod
    def _pulled_back(linearisation: Linearisation, columns: Tensor) -> list[Tensor]:
        """The columns at the output of each use."""
        pulled = [linearisation.pullback(part) for part in columns.split(linearisation.columns_at_once)]
        return [torch.cat(of_use) for of_use in zip(*pulled, strict=True)]

    def _add(self, name: str, uses: Sequence[tuple[Use, Tensor]], H: CurvatureMatrix, pushforward: Pushforward) -> None:
        """Add the part of one parameter, given its uses and the columns at their outputs."""
        basis = H.basis(name)
        if name not in self.network.subset.selection:
            if (products := outer_products(name, uses, basis)) is not None:
                pushforward.add_products(name, products)
                return
            if (found := lookups(name, uses, basis)) is not None:
                pushforward.add_lookups(name, found)
                return
        if basis is not None:
            rows = total(rotated_gradients(basis, name, use, g) for use, g in uses)
        else:
            rows = total(use.example_gradients(name, g) for use, g in uses)
        pushforward.add(name, self._of_weights(name, rows))

    def _of_weights(self, name: str, rows: Float[Tensor, "K N ..."]) -> Float[Tensor, "N K D"]:
        """The rows of one parameter tensor, of its covered weights alone."""
        rows, selection = rows.reshape(*rows.shape[:2], -1), self.network.subset.selection
        return (rows[..., selection[name]] if name in selection else rows).transpose(0, 1)


def check_output_axes(model: nn.Module, f: Tensor, output_shape: tuple[int, ...]) -> None:
    """Raise `InvalidBatchError` unless outputs have as many axes as those of the fit; those of sequences and images may be of any size."""
    if f.ndim != 1 + len(output_shape):
        in_fit = ", ".join(("N", *map(str, output_shape)))
        raise InvalidBatchError(
            f"{type(model).__name__} gives outputs {tuple(f.shape)} for these inputs, but [{in_fit}] in the fit; give inputs as in its "
            "batches, and a single example as x[None]."
        )


def _columns(f: Float[Tensor, "N ..."], layout: Layout) -> Iterator[Float[Tensor, "K N ..."]]:
    """Unit vectors of output space, for all examples at once, in the groups whose covariances are wanted."""
    n_outputs = f[0].numel()
    size = {Layout.JOINT: n_outputs, Layout.DIAGONAL: DIAGONAL_COLUMNS, Layout.EXAMPLE: f.shape[-1]}[layout]
    for start in range(0, n_outputs, size):
        chosen = torch.arange(start, min(start + size, n_outputs), device=f.device)
        units = torch.zeros(len(chosen), n_outputs, dtype=f.dtype, device=f.device)
        units[torch.arange(len(chosen)), chosen] = 1
        yield units[:, None].expand(-1, len(f), -1).reshape(len(chosen), *f.shape)


def _put_together(parts: Sequence[Tensor], f: Tensor, layout: Layout) -> Tensor:
    """The covariances of all groups of outputs, in the shape that `LinearisedModel.moments` promises."""
    if layout is Layout.DIAGONAL:
        return torch.cat(list(parts), dim=1).reshape(f.shape)
    if layout is Layout.JOINT or f.ndim < 3:
        return parts[0]
    return torch.stack(list(parts), dim=1)
