"""The torch calls whose uses of parameters have a curvature block, and how to read them.

Each reader has the signature of the call that it reads, after the `Call` itself, and returns the uses that the call makes. To cover
another call, add its reader to `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from laplace_ws.curvature.operands import Operand, StoredMap, stored_map
from laplace_ws.kfac import (
    ConvTransposeUse,
    ConvUse,
    ElementwiseUse,
    EmbeddingUse,
    ExpressionUse,
    GroupedLinearUse,
    LinearUse,
    MatrixUse,
    PackedLinearUse,
    Use,
)
from laplace_ws.kfac.conv import ConvGeometry, per_axis
from laplace_ws.kfac.conv_transpose_use import transposed_geometry
from laplace_ws.kfac.examples import Examples, Rows, declared_row_examples


class UnreadableCallError(Exception):
    """A call uses a parameter in a way that has no block; the message completes "'name' is used by call, …"."""


class NoBatchAxisError(UnreadableCallError):
    """The first axis of a call's output is not that of the examples, or a parameter has an entry for each place along it."""


@dataclass(frozen=True)
class Call:
    """One call in the forward pass.

    Attributes:
        name: name of the called function.
        operands: parameters that require grad among the arguments, by `id` of the tensor.
        output: what it returned.
        examples: the examples of the batch.
        differentiable: whether the tensors that its uses keep stay in the autograd graph.
        selected: where the rows were selected from the batch, the example of each.
    """

    name: str
    operands: Mapping[int, Operand]
    output: Tensor
    examples: Examples
    differentiable: bool = False
    selected: Int[Tensor, " B"] | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """An argument in the form in which a use keeps it."""
        return tensor if self.differentiable else tensor.detach()

    @property
    def rows(self) -> Rows:
        """Which example each row of the output, and of the input, belongs to."""
        if self.selected is not None and declared_row_examples.get() is None:
            return Rows(len(self.selected), self.examples.n, self.selected)
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
            raise NoBatchAxisError(how)
        return rows

    def other_batch_axes(self, function: Callable[..., Any], *args: Any) -> list[int]:
        """The axes other than the first that have a place for each example, and along which no parameter has more than one entry."""
        if function not in MOVABLE or self.examples.are_ragged or declared_row_examples.get() is not None:
            return []
        data = [t for t in args if isinstance(t, Tensor) and id(t) not in self.operands]
        if not data or data[0].ndim != self.output.ndim:
            return []
        n_last = MOVABLE[function](args)
        operands = [] if n_last else [operand.tensor for operand in self.operands.values()]
        ndim = self.output.ndim
        return [
            axis
            for axis in range(1, ndim - n_last)
            if self.output.shape[axis] == self.examples.n
            and all(t.ndim < ndim - axis or t.shape[axis - ndim] == 1 for t in operands)
        ]

    def parameter(self, tensor: Tensor | None) -> str | None:
        """Name of a parameter that requires grad, None for any other tensor."""
        operand = self.operands.get(id(tensor))
        if operand is not None and operand.steps:
            raise UnreadableCallError("as a part or a view of itself")
        return operand.name if operand is not None else None

    def matrix(
        self, tensor: Tensor, outputs: Sequence[int], inputs: Sequence[int], groups: Sequence[int] = ()
    ) -> tuple[str | None, StoredMap]:
        """Name of the weight of a linear map, if it requires grad, and how it holds the map.

        Args:
            tensor: the weight, or a view of it.
            outputs: its axes over the outputs.
            inputs: its axes over the inputs.
            groups: its axes over maps with inputs of their own.
        """
        operand = self.operands.get(id(tensor))
        if operand is None:
            return None, StoredMap(tuple(outputs), prod(tensor.shape[axis] for axis in groups))
        stored = stored_map(operand, groups, outputs, inputs)
        if stored is None:
            raise UnreadableCallError("as a part or a view of itself that is not the matrix of a linear map")
        return operand.name, stored


def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    if input.ndim < 2:
        raise UnreadableCallError("on an input without a batch axis (a single example is x[None])")
    name, stored = call.matrix(weight, (0,), (1,))
    operand = call.operands.get(id(bias))
    if stored.parts is None and (operand is None or not operand.steps):
        return [_linear_use(call, input, weight, name, stored, call.parameter(bias))]
    uses: list[Use] = [_linear_use(call, input, weight, name, stored)] if name else []
    return uses if operand is None or bias is None else [*uses, _elementwise(call, bias, call.output.new_tensor(1.0))]


def _linear_use(
    call: Call, x: Tensor, weight: Tensor, name: str | None, stored: StoredMap, bias: str | None = None
) -> LinearUse:
    """The use of a weight, or of one of those that are stacked in it, as the map from the last axis of x."""
    operand = call.operands.get(id(weight))
    shape = weight.shape if operand is None else operand.shape
    options: dict[str, Any] = {
        "rows": call.rows, "call": call.name, "weight": name, "bias": bias, "weight_shape": shape, "x": call.keep(x),
        "output_axes": stored.output_axes,
    }  # fmt: skip
    if stored.parts is not None:
        return PackedLinearUse(**options, parts=stored.parts, n_parts=stored.groups)
    return LinearUse(**options)


def _matmul(call: Call, input: Tensor, other: Tensor) -> list[Use]:
    name, stored = call.matrix(other, (1,), (0,))
    if input.ndim < 2:
        raise UnreadableCallError("on an input without a batch axis (a single example is x[None])")
    return [_linear_use(call, input, other, name, stored)]


def linear_map(
    x: Float[Tensor, "B ... I"], weight: Tensor, outputs: Sequence[int], groups: Sequence[int] = ()
) -> Float[Tensor, "B ... O"]:
    """The linear map that a weight of any shape holds, as a function of its own, so that it has a reader.

    Args:
        x: inputs, `[B, ..., G, I]` where there are groups.
        weight: the weight, or a view of it.
        outputs: its axes over the outputs, in this order.
        groups: its axes over maps with inputs of their own.

    Returns:
        `[B, ..., O]`, or `[B, ..., G, O]`.
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(linear_map, (x, weight), x, weight, outputs, groups)
    inputs = [axis for axis in range(weight.ndim) if axis not in (*outputs, *groups)]
    sizes = [prod(weight.shape[axis] for axis in axes) for axes in (groups, inputs, outputs)]
    matrices = weight.permute(*groups, *inputs, *outputs).reshape(sizes)
    return (x.unsqueeze(-2) @ matrices).squeeze(-2) if groups else x @ matrices[0]


def _linear_map(call: Call, x: Tensor, weight: Tensor, outputs: Sequence[int], groups: Sequence[int] = ()) -> list[Use]:
    if x.ndim < 2 + len(groups[:1]):
        raise UnreadableCallError("on an input without a batch axis (a single example is x[None])")
    inputs = [axis for axis in range(weight.ndim) if axis not in (*outputs, *groups)]
    name, stored = call.matrix(weight, outputs, inputs, groups)
    if not groups:
        return [_linear_use(call, x, weight, name, stored)]
    use = GroupedLinearUse(
        rows=call.rows,
        call=call.name,
        weight=name,
        bias=None,
        weight_shape=call.operands[id(weight)].shape,
        x=call.keep(x),
        output_axes=stored.output_axes,
        n_groups=stored.groups,
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


def _conv_transpose(
    call: Call,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> list[Use]:
    if input.ndim != weight.ndim:
        raise UnreadableCallError("on an input without a batch axis (a single example is x[None])")
    n_axes = weight.ndim - 2
    strides, pads, extra, dilations = (per_axis(v, n_axes) for v in (stride, padding, output_padding, dilation))
    use = ConvTransposeUse(
        rows=call.rows,
        call=call.name,
        weight=call.parameter(weight),
        bias=call.parameter(bias),
        weight_shape=weight.shape,
        x=call.keep(input),
        geometry=transposed_geometry(weight, strides, pads, extra, dilations, groups),
        stride=strides,
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
    n_axes = call.output.ndim
    if at is None:
        aligned = (1,) * (n_axes - parameter.ndim) + tuple(parameter.shape)
    else:
        aligned = tuple(len(parameter) if axis == at else 1 for axis in range(n_axes))
    if not aligned or aligned[0] != 1:
        raise NoBatchAxisError("with an entry for every example of the batch")
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
    positions = _positions(call, parameter) if factor == 1.0 and call.operands[id(parameter)].looked_up else None
    return [positions or _elementwise(call, parameter, call.output.new_tensor(factor))]


def _positions(call: Call, added: Tensor) -> Use | None:
    """The use of rows of an embedding that are looked up once and added to every example; None where they were turned before."""
    operand = call.operands[id(added)]
    index, n_columns = operand.index, operand.shape[1]
    assert index is not None
    rows = index[..., 0] // n_columns
    columns = torch.arange(n_columns, device=index.device)
    if call.output.shape[-1] != n_columns or not torch.equal(index, rows[..., None] * n_columns + columns):
        return None
    return EmbeddingUse(
        rows=call.rows,
        call=call.name,
        weight=operand.name,
        bias=None,
        weight_shape=operand.shape,
        indices=rows.expand(call.output.shape[:-1]),
        dtype=added.dtype,
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
    linear_map: _linear_map,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    F.conv1d: _conv,
    F.conv2d: _conv,
    F.conv3d: _conv,
    F.conv_transpose1d: _conv_transpose,
    F.conv_transpose2d: _conv_transpose,
    F.conv_transpose3d: _conv_transpose,
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

MOVABLE: Mapping[Callable[..., Any], Callable[[Sequence[Any]], int]] = {
    **dict.fromkeys((F.linear, linear_map, torch.matmul, torch.Tensor.matmul), lambda args: 1),
    **dict.fromkeys((F.layer_norm, F.rms_norm), lambda args: len(args[1])),
    **dict.fromkeys((torch.mul, torch.Tensor.mul, torch.add, torch.Tensor.add), lambda args: 0),
    **dict.fromkeys((torch.sub, torch.Tensor.sub), lambda args: 0),
}
"""Calls that act alike at each place along the axes of their first argument, but for the last ones, whose number is given by a function of
the arguments; 0 where the arguments are broadcast against each other.
"""

IN_PLACE: set[Any] = {torch.Tensor.mul_, torch.Tensor.add_, torch.Tensor.sub_}
"""In-place calls."""
OVERWRITES_INPUT = {torch.Tensor.mul_}
"""In-place calls whose reader needs the input as it was before."""

SUMS = {function for function, reader in READERS.items() if reader in (_add, _sub)}
"""Calls that add or subtract."""


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


def is_added_to_all(operand: Operand, function: Callable[..., Any], output: Tensor) -> bool:
    """Whether a call adds rows that were looked up to every example; otherwise each row belongs to an example."""
    return function in SUMS and (output.ndim > operand.tensor.ndim or len(operand.tensor) == 1)


def of_parameters(use: Use, operands: Iterable[Operand]) -> list[Use]:
    """A use of operands as uses of parameters: where what it uses is computed from parameters, also the use of these."""
    computed = [operand for operand in operands if operand.sources and operand.name in use.parameters]
    if not computed:
        return [use]
    uses: list[Use] = [
        ExpressionUse(
            rows=use.rows,
            call=use.call,
            of_value=use,
            value_name=operand.name,
            value=operand.parameter,
            sources=operand.sources,
        )
        for operand in computed
    ]
    if isinstance(use, MatrixUse):
        names = {operand.name for operand in computed}
        own = replace(
            use,
            weight=None if use.weight in names else use.weight,
            bias=None if use.bias in names else use.bias,
        )
        uses += [own] if own.parameters else []
    return uses
