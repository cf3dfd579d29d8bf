"""The torch calls whose uses of parameters have a curvature block, and how to read them.

Each reader has the signature of the call that it reads, after the `Call` itself, and returns the uses that the call makes. To cover
another call, add its reader to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from laplace_ws.kfac import ConvUse, ElementwiseUse, EmbeddingUse, LinearUse, Use
from laplace_ws.kfac.conv import ConvGeometry
from laplace_ws.kfac.examples import Examples, Rows, declared_row_examples


class UnreadableCallError(Exception):
    """A call uses a parameter in a way that has no block; the message completes "'name' is used by call, …"."""


@dataclass(frozen=True)
class Operand:
    """A parameter, its transpose, or a selection of its entries, as an argument of a call.

    Attributes:
        name: name of the parameter.
        shape: shape of the parameter.
        tensor: the tensor that is passed to the call.
        transposed: whether that is the transpose of the parameter.
        index: where it is a selection (a slice, a view, rows looked up), the place of each entry in the flattened parameter.
        looked_up: whether it is rows of an embedding, looked up without a batch axis, as position embeddings are.
        provisional: the use that the look-up makes, if the rows turn out to be one per example after all.
    """

    name: str
    shape: torch.Size
    tensor: Tensor
    transposed: bool = False
    index: Int[Tensor, "*shape"] | None = None
    looked_up: bool = False
    provisional: Use | None = None

    def follow(self, function: Callable[..., Any], output: Any, *args: Any, **kwargs: Any) -> Operand | None:
        """The operand that a call produces from this one, its first argument: the transpose or a selection; None for any other call."""
        if not isinstance(output, Tensor):
            return None
        if self.index is None and function in TRANSPOSES and output.ndim == 2:
            return replace(
                self, tensor=output, transposed=self.transposed != TRANSPOSES[function](self.tensor, *args, **kwargs)
            )
        if function not in SELECTIONS or self.transposed:
            return None
        return self.select(function, output, *args, **kwargs)

    @torch.no_grad()
    def select(self, function: Callable[..., Tensor], output: Tensor, *args: Any, **kwargs: Any) -> Operand:
        """The operand whose entries a call selects from this one."""
        index = self.index
        if index is None:
            index = torch.arange(self.shape.numel(), device=output.device).view(self.shape)
        return replace(self, tensor=output, index=function(index, *args, **kwargs))

    def is_added_to_all(self, function: Callable[..., Any], output: Tensor) -> bool:
        """Whether a call adds the looked-up rows to every example; otherwise each row belongs to an example."""
        return function in SUMS and (output.ndim > self.tensor.ndim or len(self.tensor) == 1)


@dataclass(frozen=True)
class Call:
    """One call in the forward pass.

    Attributes:
        name: name of the called function.
        operands: parameters that require grad among the arguments, by `id` of the tensor.
        output: what it returned.
        examples: the examples of the batch.
        differentiable: whether the tensors that its uses keep stay in the autograd graph.
    """

    name: str
    operands: Mapping[int, Operand]
    output: Tensor
    examples: Examples
    differentiable: bool = False

    def keep(self, tensor: Tensor) -> Tensor:
        """An argument in the form in which a use keeps it."""
        return tensor if self.differentiable else tensor.detach()

    @property
    def rows(self) -> Rows:
        """Which example each row of the output, and of the input, belongs to."""
        rows = self.examples.rows(len(self.output)) if self.output.ndim else None
        if rows is None:
            how = (
                f"whose output {tuple(self.output.shape)} has no leading axis of the batch's {self.examples.n} examples"
            )
            declared = declared_row_examples.get()
            if declared is not None:
                how = f"whose output {tuple(self.output.shape)} has other rows than the {len(declared)} that row_examples declares"
            elif self.examples.are_ragged:
                how += " (say which example each row belongs to: with laplace_ws.row_examples(index): …)"
            raise UnreadableCallError(how)
        return rows

    def parameter(self, tensor: Tensor | None) -> str | None:
        """Name of a parameter that requires grad, None for any other tensor."""
        operand = self.operands.get(id(tensor))
        if operand is not None and operand.transposed:
            raise UnreadableCallError("transposed")
        if operand is not None and operand.index is not None:
            raise UnreadableCallError("as a part or a view of itself")
        return operand.name if operand is not None else None

    def matrix(self, tensor: Tensor) -> tuple[str | None, bool]:
        """Name of a weight matrix and whether it enters transposed."""
        operand = self.operands.get(id(tensor))
        if operand is None or not operand.transposed:
            return self.parameter(tensor), False
        return operand.name, True


def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    if input.ndim < 2:
        raise UnreadableCallError("on an input without a batch axis (a single example is x[None])")
    name, transposed = call.matrix(weight)
    use = LinearUse(
        rows=call.rows,
        call=call.name,
        weight=name,
        bias=call.parameter(bias),
        weight_shape=weight.shape if not transposed else weight.shape[::-1],
        x=call.keep(input),
        output_axes=(1,) if transposed else (0,),
    )
    return [use]


def _matmul(call: Call, input: Tensor, other: Tensor) -> list[Use]:
    name, transposed = call.matrix(other)
    if other.ndim != 2 or input.ndim < 2 or name is None:
        raise UnreadableCallError("other than as the matrix on the right of x @ W")
    use = LinearUse(
        rows=call.rows,
        call=call.name,
        weight=name,
        bias=None,
        weight_shape=other.shape if not transposed else other.shape[::-1],
        x=call.keep(input),
        output_axes=(0,) if transposed else (1,),
    )
    return [use]


def _conv(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> list[Use]:
    if input.ndim != weight.ndim:
        raise UnreadableCallError("on an input without a batch axis (a single example is x[None])")
    use = ConvUse(
        rows=call.rows,
        call=call.name,
        weight=call.parameter(weight),
        bias=call.parameter(bias),
        weight_shape=weight.shape,
        x=call.keep(input),
        geometry=ConvGeometry.from_call(weight, stride, padding, dilation, groups),
    )
    return [use]


def _embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use]:
    if max_norm is not None or scale_grad_by_freq:
        raise UnreadableCallError("with max_norm or scale_grad_by_freq")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    use = EmbeddingUse(
        rows=call.rows,
        call=call.name,
        weight=call.parameter(weight),
        bias=None,
        weight_shape=weight.shape,
        indices=input,
        dtype=weight.dtype,
        padding_idx=padding_idx,
    )
    return [use]


def _elementwise(call: Call, parameter: Tensor, factor: Tensor, at: int | None = None) -> ElementwiseUse:
    """A use of a parameter that is broadcast to the output, aligned to the right as in torch, or with its single axis at `at`."""
    operand = call.operands[id(parameter)]
    if operand.transposed:
        raise UnreadableCallError("transposed")
    n_axes = call.output.ndim
    if at is None:
        aligned = (1,) * (n_axes - parameter.ndim) + tuple(parameter.shape)
    else:
        aligned = tuple(len(parameter) if axis == at else 1 for axis in range(n_axes))
    if not aligned or aligned[0] != 1:
        raise UnreadableCallError("with an entry for every example of the batch")
    return ElementwiseUse(
        rows=call.rows,
        call=call.name,
        name=operand.name,
        shape=operand.shape,
        broadcast_shape=aligned[1:],
        factor=factor,
        index=operand.index,
    )


def _mul(call: Call, input: Tensor, other: Tensor) -> list[Use]:
    parameter, factor = (input, other) if id(input) in call.operands else (other, input)
    return [_elementwise(call, parameter, call.keep(torch.as_tensor(factor)))]


def _add(call: Call, input: Tensor, other: Tensor, *, alpha: float = 1) -> list[Use]:
    return _sum(call, input, other, float(alpha))


def _sub(call: Call, input: Tensor, other: Tensor, *, alpha: float = 1) -> list[Use]:
    return _sum(call, input, other, -float(alpha))


def _sum(call: Call, input: Tensor, other: Tensor, sign: float) -> list[Use]:
    parameter, factor = (input, 1.0) if id(input) in call.operands else (other, sign)
    if call.operands[id(parameter)].looked_up:
        return [_added_positions(call, parameter, factor)]
    return [_elementwise(call, parameter, call.output.new_tensor(factor))]


def _added_positions(call: Call, positions: Tensor, sign: float) -> Use:
    """Rows of an embedding that are looked up once and added to every example."""
    operand = call.operands[id(positions)]
    assert operand.index is not None
    if sign != 1.0 or positions.shape[-1] != operand.shape[1] or call.output.shape[-1] != operand.shape[1]:
        raise UnreadableCallError("other than added to every example")
    rows = operand.index[..., 0] // operand.shape[1]
    return EmbeddingUse(
        rows=call.rows,
        call=call.name,
        weight=operand.name,
        bias=None,
        weight_shape=operand.shape,
        indices=rows.expand(call.output.shape[:-1]),
        dtype=positions.dtype,
    )


def _expand(call: Call, input: Tensor, *sizes: Any) -> list[Use]:
    return [_elementwise(call, input, call.output.new_tensor(1.0))]


def _batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Use]:
    if training or running_mean is None:
        raise UnreadableCallError(
            "with statistics of the batch, which tie the examples together (keep running statistics)"
        )
    return _affine(call, F.batch_norm(input, running_mean, running_var, eps=eps), weight, bias, at=1)


def _layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Use]:
    return _affine(call, F.layer_norm(input, normalized_shape, eps=eps), weight, bias)


def _rms_norm(
    call: Call, input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> list[Use]:
    return _affine(call, F.rms_norm(input, normalized_shape, eps=eps), weight, None)


def _instance_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Use]:
    statistics = {"use_input_stats": use_input_stats, "eps": eps}
    if use_input_stats:  # and the running ones, which a second call would update, are not read
        running_mean = running_var = None
    return _affine(call, F.instance_norm(input, running_mean, running_var, **statistics), weight, bias, at=1)


def _prelu(call: Call, input: Tensor, weight: Tensor) -> list[Use]:
    at = 1 if weight.numel() > 1 and input.ndim > 1 else None
    return [_elementwise(call, weight, call.keep(input).clamp(max=0), at)]


def _group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[Use]:
    return _affine(call, F.group_norm(input, num_groups, eps=eps), weight, bias, at=1)


def _affine(
    call: Call, normalised: Tensor, weight: Tensor | None, bias: Tensor | None, at: int | None = None
) -> list[Use]:
    uses: list[Use] = []
    if weight is not None and call.parameter(weight):
        uses.append(_elementwise(call, weight, call.keep(normalised), at))
    if bias is not None and call.parameter(bias):
        uses.append(_elementwise(call, bias, normalised.new_tensor(1.0), at))
    return uses


READERS: dict[Callable[..., Any], Callable[..., list[Use]]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.embedding: _embedding,
    torch.mul: _mul,
    torch.Tensor.mul: _mul,
    torch.Tensor.mul_: _mul,
    torch.add: _add,
    torch.Tensor.add: _add,
    torch.Tensor.add_: _add,
    torch.sub: _sub,
    torch.Tensor.sub: _sub,
    torch.Tensor.sub_: _sub,
    torch.Tensor.expand: _expand,
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.prelu: _prelu,
}
"""Readers by the function that a `TorchFunctionMode` reports."""

IN_PLACE: set[Any] = {torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.sub_}
"""In-place calls."""
OVERWRITES_INPUT = {torch.Tensor.mul_}
"""In-place calls whose reader needs the input as it was before."""

SUMS = {function for function, reader in READERS.items() if reader in (_add, _sub)}
"""Calls that add or subtract."""

SELECTIONS: set[Callable[..., Any]] = {
    torch.Tensor.__getitem__,
    torch.Tensor.view,
    torch.Tensor.reshape,
    torch.reshape,
    torch.Tensor.flatten,
    torch.flatten,
    torch.Tensor.unsqueeze,
    torch.unsqueeze,
    torch.Tensor.squeeze,
    torch.squeeze,
    torch.Tensor.permute,
    torch.permute,
    torch.Tensor.transpose,
    torch.transpose,
    torch.Tensor.contiguous,
    torch.Tensor.index_select,
    torch.index_select,
    torch.Tensor.narrow,
    torch.narrow,
}
"""Calls that select or rearrange entries of their first argument."""

TRANSPOSES: dict[Callable[..., Any], Callable[..., bool]] = {
    torch.Tensor.t: lambda matrix: True,
    torch.t: lambda matrix: True,
    torch.Tensor.T.__get__: lambda matrix, *owner: True,  # pyright: ignore
    torch.Tensor.mT.__get__: lambda matrix, *owner: True,  # pyright: ignore
    torch.Tensor.transpose: lambda matrix, dim0, dim1: dim0 % 2 != dim1 % 2,
    torch.transpose: lambda matrix, dim0, dim1: dim0 % 2 != dim1 % 2,
}
"""Calls that transpose a matrix, and whether they do so with the given arguments."""


def read_call(function: Callable[..., Any], call: Call, *args: Any, **kwargs: Any) -> list[Use]:
    """Uses that a call makes of the parameters among its arguments.

    Raises:
        UnreadableCallError: it uses one of them in a way that has no block.
    """
    if function not in READERS:
        raise UnreadableCallError("which has no curvature block")
    uses = READERS[function](call, *args, **kwargs)
    if {p for use in uses for p in use.parameters} != {operand.name for operand in call.operands.values()}:
        raise UnreadableCallError("as more than the weight or the bias of the call")
    return uses
