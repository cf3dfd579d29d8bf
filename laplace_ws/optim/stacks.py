"""Layers of one form side by side, so that one product preconditions the moments of all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.optim.first_order import Grafting
from laplace_ws.optim.layers import Layer

MOST_ENTRIES = 2**20
"""Entries of the inverses of a layer beyond which it stands alone: its arithmetic costs more than the calls, and stacks are copies."""


@dataclass(frozen=True, eq=False)
class Stack:
    """K layers that differ in their names alone.

    Attributes:
        layers: which.
        weights: their weights.
        biases: their biases, where they have some.
        inv_A: A⁻¹ of each, `[K, ...]`.
        inv_B: B⁻¹ of each.
    """

    layers: Sequence[Layer]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor] | None
    inv_A: Tensor
    inv_B: Tensor

    def steps(
        self, moments: Mapping[Tensor, Tensor], first_order: Mapping[Tensor, Tensor], grafting: Grafting
    ) -> dict[Tensor, Tensor]:
        """B⁻¹ M A⁻¹ of each layer, with the length of its first-order step, if that is grafted.

        Args:
            moments: of weights and biases, that make up M; of a bias without a gradient there is none, and it has no step.
            first_order: the first-order steps.
            grafting: whether lengths are grafted.
        """
        layer, dtype = self.layers[0], torch.promote_types(self.inv_B.dtype, torch.float32)
        matrices = layer.as_matrices(stacked(_parts(self.weights, moments)), self._of_biases(moments))
        direction = layer.precondition(matrices.to(dtype), self.inv_A.to(dtype), self.inv_B.to(dtype))
        if grafting is not Grafting.NONE:
            length, own = self._lengths(first_order, dtype), torch.linalg.vector_norm(direction.flatten(1), dim=1)
            scale = (length / own).nan_to_num(0.0, 0.0, 0.0)  # a direction of length 0 stays one
            direction.mul_(scale.view(-1, *[1] * (direction.ndim - 1)))
        of_weights, of_biases = layer.from_matrices(direction, self.weights[0].shape)
        steps = dict(zip(self.weights, of_weights.to(self.weights[0].dtype).unbind(), strict=True))
        if self.biases is not None and of_biases is not None:
            of_biases = of_biases.to(self.biases[0].dtype).unbind()
            steps |= {b: s.view_as(b) for b, s in zip(self.biases, of_biases, strict=True) if b in moments}
        return steps

    def _of_biases(self, values: Mapping[Tensor, Tensor]) -> Tensor | None:
        return None if self.biases is None else stacked(_parts(self.biases, values))

    def _lengths(self, steps: Mapping[Tensor, Tensor], dtype: torch.dtype) -> Float[Tensor, " K"]:
        """That of the step of each weight and its bias together."""
        lengths = _norms(_parts(self.weights, steps)).to(dtype)
        return lengths if self.biases is None else lengths.hypot(_norms(_parts(self.biases, steps)).to(dtype))


class Stacks:
    """Stacks of the layers that take a step, made anew when these are others or have other inverses.

    Args:
        layers: all there are, by weight.
        parameters: by name.
        state: of the optimiser; the inverses in it become views of those of the stacks, which takes no memory twice.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        parameters: Mapping[str, nn.Parameter],
        state: Mapping[Tensor, dict[str, Any]],
    ):
        self._layers = layers
        self._parameters = parameters
        self._state = state
        self._names: Sequence[str] = ()
        self._stacks: Sequence[Stack] = ()

    def forget(self) -> None:
        """Take note that inverses have changed."""
        self._names, self._stacks = (), ()

    def of(self, with_gradient: Collection[Tensor]) -> Sequence[Stack]:
        """Those of the layers whose weights have a gradient, and inverses."""
        weights = {name: self._parameters[name] for name in self._layers}
        names = [name for name, p in weights.items() if p in with_gradient and "inv_A" in self._state.get(p, ())]
        if names != self._names:
            alike: dict[tuple[Any, ...], list[str]] = {}
            for name in names:
                alike.setdefault(self._form(name), []).append(name)
            self._names, self._stacks = names, [self._stack(group) for group in alike.values()]
        return self._stacks

    def _form(self, name: str) -> tuple[Any, ...]:
        """What layers of one stack have in common."""
        layer, weight = self._layers[name], self._parameters[name]
        bias = None if layer.bias is None else self._parameters[layer.bias]
        inv_A, inv_B = self._state[weight]["inv_A"], self._state[weight]["inv_B"]
        alone = name if inv_A.numel() + inv_B.numel() > MOST_ENTRIES else None
        tensors = (weight, bias, inv_A, inv_B)
        forms = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        return (layer.output_axes, layer.groups, layer.A, layer.B, *forms, alone)

    def _stack(self, names: Sequence[str]) -> Stack:
        layers, weights = [self._layers[name] for name in names], [self._parameters[name] for name in names]
        biases = [self._parameters[layer.bias] for layer in layers if layer.bias is not None]
        inverses = {which: stacked([self._state[p][which] for p in weights]) for which in ("inv_A", "inv_B")}
        for which, of_all in inverses.items():
            for p, own in zip(weights, of_all.unbind(), strict=True):
                self._state[p][which] = own
        return Stack(layers, weights, biases or None, **inverses)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors along a new first axis; one alone is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _parts(parameters: Sequence[Tensor], values: Mapping[Tensor, Tensor]) -> list[Tensor]:
    """What belongs to each of the parameters; zero where it has no gradient."""
    return [values[p] if p in values else torch.zeros_like(p) for p in parameters]


def _norms(tensors: Sequence[Tensor]) -> Float[Tensor, " K"]:
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), 2, wide))  # pyright: ignore
