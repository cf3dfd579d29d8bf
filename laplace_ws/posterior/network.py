"""A model, those of its weights that a posterior covers, and the backend that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.autograd import AutogradBackend
from laplace_ws.curvature.backend import Backend, differentiable_twice, evaluation_mode
from laplace_ws.curvature.checks import LinearisationCheck
from laplace_ws.curvature.finite import check_finite
from laplace_ws.curvature.forward import N_PROBED, probe
from laplace_ws.curvature.inputs import (
    BatchKeys,
    ModelInputs,
    as_inputs,
    call_model,
    check_devices,
    own_copy,
    without_targets,
)
from laplace_ws.curvature.jacobian import can_push_forward
from laplace_ws.curvature.native import NativeBackend
from laplace_ws.curvature.watch import final_operation
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.posterior.subset import WeightSubset, check_last_layer
from laplace_ws.posterior.weights import check_replaceable, weights_in_place
from laplace_ws.threads import alone_with


@dataclass(eq=False)
class Network:
    """A model, those of its weights that a posterior covers, and the backend that runs it; remembers what was already checked.

    Attributes:
        model: the network.
        subset: the weights that are covered.
        backend: what runs the model.
        keys: names of the entries of batches that are mappings.
        last_layer_among: parameters among which those of the last layer were guessed; empty where they were named.
        check: checks the backend against autograd, once for each way in which the model uses the weights.
        verified: the fit whose fingerprints the model last had, with its state and its modules then; see `fit.check_network`.
    """

    model: nn.Module
    subset: WeightSubset
    backend: Backend
    keys: BatchKeys
    last_layer_among: frozenset[str] = frozenset()
    check: LinearisationCheck = field(init=False)
    verified: tuple[Any, Any, Any] | None = field(init=False, default=None)
    _is_replaceable: bool = field(init=False, default=False)
    _can_push_forward: bool | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.check = LinearisationCheck(self.backend, self.model)

    @cached_property
    def differentiable_check(self) -> LinearisationCheck:
        """The check of the backend that keeps the graph to the inputs: of the network's own, or else of the native one."""
        return (
            self.check if isinstance(self.backend, NativeBackend) else LinearisationCheck(NativeBackend(), self.model)
        )

    @cached_property
    def by_autograd(self) -> Network:
        """The same, run by the backend that covers whatever autograd does."""
        return Network(self.model, self.subset, AutogradBackend(), self.keys, self.last_layer_among)

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Shape of the covered part of each parameter."""
        return self.subset.shapes

    @cached_property
    def n_params(self) -> int:
        """P, the number of covered weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def device(self) -> torch.device:
        """The device of the covered weights."""
        return next(iter(self.parameters().values())).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are covered in part or in whole."""
        return self.subset.parameters(self.model)

    def flat_weights(self) -> Float[Tensor, " P"]:
        """A copy of the covered weights."""
        return self.subset.flat(self.model)

    @torch.no_grad()
    def load(self, flat: Float[Tensor, " P"]) -> None:
        """Write a vector into the covered weights."""
        with alone_with(self.model):
            parameters = self.parameters()
            for name, tensor in self.subset.tensors(self.model, flat).items():
                parameters[name].copy_(tensor)

    def inputs(self, x: Any, *, is_row: bool = False) -> ModelInputs:
        """The inputs at which a user wants predictions, on the model's device.

        Args:
            x: a tensor, a mapping (with or without targets), a tuple or a list.
            is_row: whether a tuple or list is a row (x1, x2, …) for `model(x1, x2, …)`.
        """
        if isinstance(x, Mapping):
            x = without_targets(x, self.keys)
        row = x if is_row and isinstance(x, (tuple, list)) else (x,)
        inputs = as_inputs(*row, keys=self.keys)
        check_devices(next(self.model.parameters()).device, inputs)
        return inputs

    def check_last_layer(self, x: ModelInputs) -> None:
        """Raise unless what was guessed to be the last layer is the one that the model calls last."""
        if self.last_layer_among:
            check_last_layer(self.model, x[:N_PROBED], self.subset, self.last_layer_among)

    def final_operation(self, x: ModelInputs) -> str | None:
        """What makes the outputs into probabilities, see `watch.final_operation`, as the last check found it; else at a few examples."""
        if self.check.has_run:
            return self.check.final_operation
        with evaluation_mode(self.model):
            return final_operation(call_model(self.model, own_copy(probe(x))))

    def outputs(
        self, x: ModelInputs, weights: Iterator[Float[Tensor, " P"]], *, backprop: bool
    ) -> Float[Tensor, "S N ..."]:
        """Outputs at other weights, for one weight vector after another, finite or not.

        Raises:
            UnsupportedParameterError: a parameter is read from somewhere other than its module.
        """
        outputs = []
        if not self._is_replaceable:
            with evaluation_mode(self.model, self.parameters()):
                check_replaceable(self.model, x[:N_PROBED], self.subset)
            self._is_replaceable = True
        with evaluation_mode(self.model), torch.set_grad_enabled(backprop):
            for flat in weights:
                with weights_in_place(self.model, self.subset.tensors(self.model, flat)):
                    outputs.append(at_least_float32(call_model(self.model, own_copy(x))))
        return torch.stack(outputs)

    def own_outputs(self, x: ModelInputs) -> Float[Tensor, "N ..."]:
        """Outputs at the model's own weights, of at least float32.

        Raises:
            InvalidBatchError: they are not finite.
        """
        with evaluation_mode(self.model), torch.no_grad():
            f = at_least_float32(call_model(self.model, own_copy(x)))
        check_finite(self.model, f)
        return f

    def can_push_forward(self, x: ModelInputs) -> bool:
        """Whether products with the Jacobian agree with backward passes, see `jacobian.can_push_forward`; looked at once."""
        if self._can_push_forward is None:
            parameters = self.parameters()
            with evaluation_mode(self.model, parameters), differentiable_twice(self.model):
                self._can_push_forward = can_push_forward(self.model, probe(x), list(parameters.values()))
        return self._can_push_forward

    def forget(self) -> None:
        """Look anew at the weights: whether they are those of a fit, and how the model can be run."""
        self.verified = None
        self._is_replaceable = False
        self._can_push_forward = None
        vars(self).pop("differentiable_check", None)  # where `cached_property` keeps it
