"""Which way to samples of linearised outputs is cheaper: through their covariance, or through samples of the weights.

The covariance takes a backward pass for each output, then [C, C] numbers, and their root, for each example. A sample of the weights takes
a draw, which does not depend on the number of examples, and a product with the Jacobian, which does not depend on the number of outputs.
All costs are estimated in products of two numbers, from sizes alone, so that the choice is the same on every machine and in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from laplace_ws.matrices import CurvatureMatrix, Layout, LowRank

_PER_BACKWARD = 2.0
"""Products of one backward pass for one example's output, in those of its forward pass: the gradients of layers, and of weights."""
_PER_LINEARISATION = 6.0
_PER_JACOBIAN_PRODUCT = 4.0
"""Likewise, of `JacobianProducts`: a training step is 3."""
_PER_ENTRY = 20.0
"""Products in the time in which a large tensor's entry is read, changed and written."""
_ROW_ENTRIES = 3
"""How often an entry of a Jacobian is, where its rows are formed: as it is, turned into coordinates of the curvature, weighted."""
_DRAW_ENTRIES = 8
"""How often an entry of a sample of the weights is: a normal number, and what makes it one of the posterior."""
_DOUBLE = 2.0
"""Products of float32 in one of float64."""


@dataclass(frozen=True)
class Route:
    """What samples of the outputs of a batch cost.

    Attributes:
        H: the curvature.
        shapes: of the parameters that are covered in part or in whole, by name.
        positions: sharing positions of an example by weight, see `LinearisationCheck.positions`.
        n_examples: N.
        output_shape: of one example.
        n_samples: S.
        layout: which covariances there would be.
    """

    H: CurvatureMatrix
    shapes: Mapping[str, torch.Size]
    positions: Mapping[str, float]
    n_examples: int
    output_shape: tuple[int, ...]
    n_samples: int
    layout: Layout

    @property
    def is_through_weights(self) -> bool:
        """Whether it is cheaper to sample the weights."""
        return self.through_weights() < self.through_covariance()

    def through_weights(self) -> float:
        """Draws of the weights, and products with the Jacobian."""
        of_network = self.n_examples * self._forward
        draw = _DRAW_ENTRIES * _PER_ENTRY * self.H.n_params + self._root()
        return _PER_LINEARISATION * of_network + self.n_samples * (draw + _PER_JACOBIAN_PRODUCT * of_network)

    def through_covariance(self) -> float:
        """Backward passes, covariances of outputs and their roots, and draws."""
        n_outputs = math.prod(self.output_shape)
        in_block = {  # outputs that have a covariance
            Layout.EXAMPLE: self.output_shape[-1] if self.output_shape else 1,
            Layout.JOINT: self.n_examples * n_outputs,
            Layout.DIAGONAL: 1,
        }[self.layout]
        row = _PER_BACKWARD * self._forward + self._rows(in_block) + self._turn()
        root_and_draws = in_block * self.n_samples + _DOUBLE * in_block**2 / 3
        return self.n_examples * n_outputs * (row + root_and_draws)

    # ---------------------------------------------------------------- parts

    @cached_property
    def _forward(self) -> float:
        """One example through the covered weights."""
        return sum(n * self.shapes[name].numel() for name, n in self.positions.items() if name in self.shapes)

    def _rows(self, in_block: int) -> float:
        """A row of the Jacobian, and its products with those of its block."""
        total = 0.0
        for name, shape in self._covered:
            n_positions = self.positions.get(name, 0.0) if self._is_sum(name) else 0.0
            if n_positions:  # in parts that stay in a cache, or by pairs of positions, see `matrices.pushforward`
                of_pairs = _DOUBLE * n_positions * (n_positions + 1) / 2 / in_block
                total += shape.numel() * min(n_positions + _PER_ENTRY + in_block, of_pairs)
            else:
                total += shape.numel() * (_ROW_ENTRIES * _PER_ENTRY + in_block)
        return total

    def _turn(self) -> float:
        """A row of the Jacobian into the coordinates of the curvature: the gradient as a whole, or its two factors."""
        if not self.H.is_separable:
            return self._root()
        total = 0.0
        for name, _ in self._covered:
            n_groups, n_out, n_in, turns_out, turns_in = self._sides(name)
            of_gradient = n_groups * n_out * n_in * (n_out * turns_out + n_in * turns_in)
            of_factors = n_groups * self.positions.get(name, math.inf) * n_out**2 * turns_out if turns_out else 0.0
            total += min(of_gradient, of_factors) if name in self.positions else of_gradient
        return total

    def _root(self) -> float:
        """A vector over the weights times a root of their covariance."""
        if isinstance(self.H, LowRank):
            return _DOUBLE * 2 * self.H.n_params * self.H.rank
        if not self.H.is_separable:
            return _DOUBLE * self.H.n_params**2 / 2
        sides = [self._sides(name) for name, _ in self._covered]
        return float(sum(g * n_out * n_in * (n_out * o + n_in * i) for g, n_out, n_in, o, i in sides))

    @property
    def _covered(self) -> list[tuple[str, torch.Size]]:
        return list(self.H.shapes.items())

    def _is_sum(self, name: str) -> bool:
        """Whether rows are sums over positions that need not be formed."""
        return self.H.is_separable and self.layout is not Layout.JOINT and self.H.shapes[name] == self.shapes[name]

    def _sides(self, name: str) -> tuple[int, int, int, bool, bool]:
        """Groups, outputs and inputs of a parameter, and whether the outputs and the inputs have eigenvectors."""
        shape, basis = self.H.shapes[name], self.H.basis(name)
        if basis is None:
            n_out = shape[0] if shape else 1
            return 1, n_out, shape.numel() // max(1, n_out), False, False
        *groups, n_out, n_in = basis.sizes
        return math.prod(groups), n_out, n_in, basis.Q_B is not None, basis.Q_A is not None
