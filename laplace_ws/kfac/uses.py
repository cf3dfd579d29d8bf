"""Uses of parameters, and their canonical form.

A *use* is one call in the forward pass that reads parameters: `linear(x, W, b)`, `conv2d(x, W)`, `x * scale`. Whatever the layer, a use
provides what every curvature is made of: inputs a and output gradients g by example and sharing position (matrix uses), and the
gradients of each example with respect to the parameters (all uses).

The leading axis of a use's tensors holds rows, which belong to examples as `Rows` says: one row per example, or several (images of a
video, nodes of a graph), which are further sharing positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.kfac.examples import Rows
from laplace_ws.kfac.factors import gram, total
from laplace_ws.matrices.axes import WeightAxes


def at_least_float32(x: Tensor) -> Tensor:
    """x, with half precision widened: sums over data need more digits than activations have."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Use(ABC):
    """One call that reads parameters.

    Attributes:
        rows: which example each row belongs to.
        call: name of the called function, for messages.
    """

    rows: Rows
    call: str

    hides_matrix = False
    """Whether a weight may be part of a matrix, in a way that has no Kronecker factors."""
    is_known = True
    """Whether it is known how the parameters are used."""

    @property
    def n_examples(self) -> int:
        """N."""
        return self.rows.n_examples

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters of this use that require grad."""

    def without_inputs(self) -> Use:
        """The use with only what gradients in canonical form need; its inputs, which take up the memory, are released."""
        return self

    def magnitudes(self) -> Use:
        """The use with the absolute values of its inputs: with those of g, its gradients are the sums of the magnitudes of all terms."""
        return self

    @abstractmethod
    def example_gradients(self, name: str, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "K N ..."]:
        """Vector-Jacobian product of each example with respect to the parameter, `[K, N, *shape]`, given g at the use's output."""


@dataclass(frozen=True, kw_only=True)
class MatrixUse(Use):
    """A linear map of each sharing position, y_r = W a_r + b.

    Attributes:
        weight: name of W, or None where W is frozen.
        bias: name of b, or None where there is none or it is frozen.
        weight_shape: shape of W.
        output_axes: axes of W over its outputs, see `WeightAxes`.
    """

    weight: str | None
    bias: str | None
    weight_shape: torch.Size

    output_axes: tuple[int, ...] = (0,)
    diagonal_inputs = False
    """Whether Σ a aᵀ is diagonal in the expand setting, and stored as its diagonal."""
    groups = 1

    @property
    def axes(self) -> WeightAxes:
        """How W holds the matrices of the map."""
        return WeightAxes(self.weight_shape, self.output_axes, self.groups)

    @property
    def parameters(self) -> tuple[str, ...]:
        """See `Use.parameters`."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    @abstractmethod
    def n_positions(self) -> int | Int[Tensor, "*G N"]:
        """R, the sharing positions of an example; one number per example, or per group and example, where they differ."""

    @abstractmethod
    def inputs(self) -> Float[Tensor, "*G N R I"]:
        """The inputs a; where examples differ in R, the shorter ones end in zeros."""

    def input_sum(self) -> Float[Tensor, "*G N I"]:
        """The inputs summed over the sharing positions."""
        return self.inputs().sum(-2)

    def input_total(self) -> Float[Tensor, "*G I"]:
        """The inputs summed over all positions of all examples."""
        return self.input_sum().sum(-2)

    @property
    def n_inputs(self) -> int | float | Int[Tensor, " G"]:
        """Positions of all examples together; one number per group where the groups have different ones."""
        n = self.n_positions
        if not isinstance(n, Tensor):
            return n * self.n_examples
        n = n.sum(-1)
        return n.item() if n.ndim == 0 else n

    def input_gram(self) -> Float[Tensor, "*G I I"]:
        """Σ_n Σ_r a aᵀ; `[I]`, its diagonal, where it is diagonal."""
        return gram(self.inputs().flatten(-3, -2))

    def input_squares(self) -> Float[Tensor, "*G I"]:
        """Σ_n Σ_r a², the diagonal of `input_gram`, which is not formed."""
        return self.inputs().square().sum((-3, -2))

    @abstractmethod
    def output_gradients(self, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "*G K N R O"]:
        """Gradients at the use's output in canonical form."""

    def output_gradient_sum(self, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "*G K N O"]:
        """Gradients at the use's output summed over the sharing positions."""
        return self.output_gradients(g).sum(-2)

    def output_gradient_gram(self, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "*G O O"]:
        """Σ_c Σ_n Σ_r g gᵀ."""
        return gram(self.output_gradients(g).flatten(-4, -2))

    def output_gradient_squares(self, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "*G O"]:
        """Σ_c Σ_n Σ_r g², the diagonal of `output_gradient_gram`, which is not formed."""
        return self.output_gradient_sum(at_least_float32(g).square()).sum((-3, -2))

    def bias_gradient_gram(self, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "O O"]:
        """`output_gradient_gram` with the channels of all groups side by side."""
        out = self.output_gradients(g)
        return gram((out if self.groups == 1 else out.movedim(0, -2).flatten(-2)).flatten(-4, -2))

    def bias_gradient_sum(self, g: Float[Tensor, "K B ..."]) -> Float[Tensor, "K N O"]:
        """Gradients at the use's output summed over the sharing positions, with the channels of all groups side by side."""
        out = self.output_gradient_sum(g)
        return out if self.groups == 1 else out.movedim(0, -2).flatten(-2)

    def example_gradients(self, name: str, g: Tensor) -> Tensor:
        """See `Use.example_gradients`."""
        grads = []
        if name == self.bias:
            grads.append(self.bias_gradient_sum(g))
        if name == self.weight:
            grad = torch.einsum("...knro,...nri->kn...oi", self.output_gradients(g), self.inputs())
            grads.append(self.axes.vectors(grad).reshape(*grad.shape[:2], *self.weight_shape))
        return total(grads)


@dataclass(frozen=True, kw_only=True)
class LinearUse(MatrixUse):
    """`linear(x, W, b)` with x `[B, ..., I]`; `x @ W` where the outputs are the last axis of W."""

    x: Float[Tensor, "B ... I"]

    def without_inputs(self) -> Use:
        """See `Use.without_inputs`."""
        return replace(self, x=self.x.new_empty(0))

    def magnitudes(self) -> Use:
        """See `Use.magnitudes`."""
        return replace(self, x=self.x.abs())

    def _by_row(self) -> Float[Tensor, "B q I"]:
        x = at_least_float32(self.x)
        return x.flatten(1, -2) if x.ndim > 2 else x[:, None]

    @property
    def n_positions(self) -> int | Tensor:
        """See `MatrixUse.n_positions`."""
        return self.rows.counts * (self.x.shape[1:-1].numel())

    @property
    def n_inputs(self) -> int | float | Tensor:
        """See `MatrixUse.n_inputs`."""
        return self.x.shape[:-1].numel() if self.groups == 1 else super().n_inputs

    def inputs(self) -> Tensor:
        """See `MatrixUse.inputs`."""
        return self.rows.group(self._by_row()).flatten(1, 2)

    def input_sum(self) -> Tensor:
        """See `MatrixUse.input_sum`."""
        return self.rows.sum(_sum(self._by_row(), 1))

    def input_total(self) -> Tensor:
        """See `MatrixUse.input_total`."""
        return at_least_float32(self.x).flatten(0, -2).sum(0)

    def input_gram(self) -> Tensor:
        """See `MatrixUse.input_gram`."""
        return gram(self._by_row().flatten(0, 1))

    def input_squares(self) -> Tensor:
        """See `MatrixUse.input_squares`."""
        return replace(self, x=at_least_float32(self.x).square()).input_sum().sum(-2)

    def output_gradients(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradients`."""
        return positions(self.rows, g)

    def output_gradient_sum(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_sum`."""
        return self.rows.sum(_sum(_by_position(g), 2), 1)

    def output_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_gram`."""
        return gram(_by_position(g).flatten(0, 2))

    def bias_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.bias_gradient_gram`."""
        return self.output_gradient_gram(g)


@dataclass(frozen=True, kw_only=True)
class PackedLinearUse(LinearUse):
    """`linear(x, W[parts], b[parts])` of a W that stacks several matrices on top of each other, as attention's in-projection does.

    Each matrix is a group of its own, so W has one block for the queries, one for the keys and one for the values.

    Attributes:
        parts: which of the matrices are applied to x, in order.
        n_parts: how many W holds.
    """

    parts: tuple[int, ...]
    n_parts: int

    @property
    def groups(self) -> int:  # type: ignore[override]
        """Number of matrices."""
        return self.n_parts

    def _place(self, parts: Tensor) -> Tensor:
        """Put the parts at their positions among all matrices; the rest are zero."""
        if len(self.parts) == self.n_parts:
            return parts
        out = parts.new_zeros(self.n_parts, *parts.shape[1:])
        out[list(self.parts)] = parts
        return out

    @property
    def n_positions(self) -> int | Tensor:
        """See `MatrixUse.n_positions`."""
        n = super().n_positions
        if len(self.parts) == self.n_parts:
            return n
        n = torch.as_tensor(n, device=self.x.device).expand(self.n_examples)
        return self._place(n.expand(len(self.parts), -1))

    def inputs(self) -> Tensor:
        """See `MatrixUse.inputs`."""
        a = super().inputs()
        return self._place(a.expand(len(self.parts), *a.shape))

    def input_sum(self) -> Tensor:
        """See `MatrixUse.input_sum`."""
        a = super().input_sum()
        return self._place(a.expand(len(self.parts), *a.shape))

    def input_total(self) -> Tensor:
        """See `MatrixUse.input_total`."""
        a = super().input_total()
        return self._place(a.expand(len(self.parts), *a.shape))

    def input_gram(self) -> Tensor:
        """See `MatrixUse.input_gram`."""
        A = super().input_gram()
        return self._place(A.expand(len(self.parts), *A.shape))

    def output_gradients(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradients`."""
        return self._split(super().output_gradients(g))

    def output_gradient_sum(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_sum`."""
        return self._split(super().output_gradient_sum(g))

    def output_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.output_gradient_gram`."""
        return gram(self._split(_by_position(g)).flatten(1, 3))

    def bias_gradient_gram(self, g: Tensor) -> Tensor:
        """See `MatrixUse.bias_gradient_gram`."""
        return gram(self._split(_by_position(g)).movedim(0, -2).flatten(-2).flatten(0, 2))

    def _split(self, g: Tensor) -> Tensor:
        return self._place(g.unflatten(-1, (len(self.parts), -1)).movedim(-2, 0))


@dataclass(frozen=True, kw_only=True)
class ElementwiseUse(Use):
    """y = factor ⊙ p + terms without p, with p broadcast: scales, biases, affine parameters of normalisations.

    Attributes:
        name: name of p.
        shape: shape of p.
        broadcast_shape: shape of p as broadcast against the output, one entry per output axis except the batch axis.
        factor: ∂y/∂p element by element, broadcastable to the output `[B, ...]`.
        index: where a selection of p's entries takes the place of p, their positions in the flattened p.
    """

    name: str
    shape: torch.Size
    broadcast_shape: tuple[int, ...]
    factor: Tensor
    index: Int[Tensor, "*shape"] | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """See `Use.parameters`."""
        return (self.name,)

    def magnitudes(self) -> Use:
        """See `Use.magnitudes`."""
        return replace(self, factor=self.factor.abs())

    def example_gradients(self, name: str, g: Tensor) -> Tensor:
        """See `Use.example_gradients`."""
        g, factor = at_least_float32(g), at_least_float32(self.factor)
        constant = factor.numel() == 1
        products = g if constant else g * factor  # [K, B, *out]
        summed = [axis + 2 for axis, size in enumerate(self.broadcast_shape) if size == 1]
        if summed:
            products = products.sum(summed, keepdim=True)
        grads = self.rows.sum(products, 1)
        grads = grads * factor.reshape(()) if constant else grads
        if self.index is None:
            return grads.reshape(*grads.shape[:2], *self.shape)
        of_p = grads.new_zeros(*grads.shape[:2], self.shape.numel())
        return of_p.index_add_(2, self.index.flatten(), grads.flatten(2)).unflatten(2, self.shape)


def _sum(x: Tensor, axis: int) -> Tensor:
    """The sum over an axis; of one entry, a view of it."""
    return x.squeeze(axis) if x.shape[axis] == 1 else x.sum(axis)


def positions(rows: Rows, g: Float[Tensor, "K B ... O"]) -> Float[Tensor, "K N R O"]:
    """Gradients by example and sharing position."""
    return rows.group(_by_position(g), 1).flatten(2, 3)


def _by_position(g: Float[Tensor, "K B ... O"]) -> Float[Tensor, "K B q O"]:
    g = at_least_float32(g)
    return g.flatten(2, -2) if g.ndim > 3 else g[:, :, None]
