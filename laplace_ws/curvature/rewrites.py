"""Calls that are computed by others, which have a reader: products of any form as linear maps, bags of embeddings as embeddings.

A rewrite has the arguments of the call, after a function that says which tensors are parameters, and returns what the call returns, up to
rounding; `NotImplemented` where the call has a reader as it is. Recurrent networks have a file of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from laplace_ws.curvature.calls import UnreadableCallError, linear_map
from laplace_ws.curvature.recurrent import RECURRENT
from laplace_ws.kfac import row_examples

IsParameter = Callable[[Any], bool]
Rewrite = Callable[..., Any]

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _einsum(is_parameter: IsParameter, equation: Any, *operands: Any) -> Tensor:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    if not isinstance(equation, str) or len(tensors) != 2:
        raise UnreadableCallError("with other than two operands and an equation in letters")
    is_first, is_second = (is_parameter(t) for t in tensors)
    if not (is_first or is_second):
        return NotImplemented
    if is_first and is_second:
        raise UnreadableCallError("as a product of two parameters")
    (of_x, of_w), out = _letters(equation, [t.ndim for t in tensors])
    x, w = tensors
    if is_first:
        x, w, of_x, of_w = w, x, of_w, of_x
    return _product(x, w, of_x, of_w, out)


def _letters(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """The axes of each operand and of the output as single letters, an ellipsis written out."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ndims):
        raise UnreadableCallError("with an equation for another number of operands")
    free = [letter for letter in _LETTERS if letter not in equation]
    n_dots = [n - len(term.replace("...", "")) if "..." in term else 0 for term, n in zip(terms, ndims, strict=True)]
    dots = "".join(free[: max(n_dots)])
    written = [term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, n_dots, strict=True)]
    if arrow:
        return written, right.replace("...", dots)
    together = "".join(written)
    return written, dots + "".join(sorted(c for c in set(together) - set(dots) if together.count(c) == 1))


def _product(x: Tensor, w: Tensor, of_x: str, of_w: str, out: str) -> Tensor:
    """A sum of products of x and a weight as a linear map of x.

    Args:
        x: any tensor.
        w: the weight.
        of_x: its axes, in letters.
        of_w: those of the weight.
        out: those of the output.
    """
    if len(set(of_x)) < len(of_x) or len(set(of_w)) < len(of_w):
        raise UnreadableCallError("on a diagonal")
    summed = [c for c in of_x if c not in of_w and c not in out]
    if summed:
        x = x.sum([of_x.index(c) for c in summed])
        of_x = "".join(c for c in of_x if c not in summed)
    if alone := [c for c in of_w if c not in of_x and c not in out]:
        w = w.sum([of_w.index(c) for c in alone])
        of_w = "".join(c for c in of_w if c not in alone)
    shared = [c for c in of_w if c in of_x and c in out]
    outputs = [c for c in of_w if c not in of_x]
    inputs = [c for c in of_w if c in of_x and c not in out]
    free = [c for c in out if c not in of_w]
    if not inputs and not outputs:  # entry by entry
        scale = w.permute([of_w.index(c) for c in shared])
        found = x.permute([of_x.index(c) for c in (*free, *shared)]) * scale
        return found.permute([(free + shared).index(c) for c in out])
    sizes = {c: x.shape[of_x.index(c)] for c in of_x} | {c: w.shape[of_w.index(c)] for c in of_w}
    columns = x.permute([of_x.index(c) for c in (*free, *shared, *inputs)])
    n_groups = [prod(sizes[c] for c in shared)] if shared else []
    columns = columns.reshape(*(sizes[c] for c in free), *n_groups, prod(sizes[c] for c in inputs))
    y = linear_map(columns, w, [of_w.index(c) for c in outputs], [of_w.index(c) for c in shared])
    y = y.reshape([sizes[c] for c in (*free, *shared, *outputs)])
    return y.permute([(free + shared + outputs).index(c) for c in out])


def _matmul(is_parameter: IsParameter, input: Tensor, other: Tensor) -> Tensor:
    if is_parameter(other) and other.ndim == 2 and not is_parameter(input):
        return NotImplemented
    n_batch = max(input.ndim, other.ndim) - 2
    batch = _LETTERS[: max(n_batch, 0)]
    of_input = "y" if input.ndim == 1 else batch[len(batch) - input.ndim + 2 :] + "xy"
    of_other = "y" if other.ndim == 1 else batch[len(batch) - other.ndim + 2 :] + "yz"
    out = batch + ("x" if input.ndim > 1 else "") + ("z" if other.ndim > 1 else "")
    for size, n in zip(reversed(input.shape[:-2]), reversed(other.shape[:-2])):  # noqa: B905 - the longer has more
        if size != n:
            raise UnreadableCallError("with a batch axis that is expanded")
    return _einsum(is_parameter, f"{of_input},{of_other}->{out}", input, other)


def _mv(is_parameter: IsParameter, input: Tensor, vec: Tensor) -> Tensor:
    return _matmul(is_parameter, input, vec)


def _tensordot(is_parameter: IsParameter, a: Tensor, b: Tensor, dims: Any = 2, out: None = None) -> Tensor:
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    axes_a, axes_b = (list(range(-dims, 0)), list(range(dims))) if isinstance(dims, int) else map(_as_list, dims)
    of_a, of_b = list(_LETTERS[: a.ndim]), list(_LETTERS[a.ndim : a.ndim + b.ndim])
    for axis_a, axis_b in zip(axes_a, axes_b, strict=True):
        of_b[axis_b] = of_a[axis_a]
    kept = [c for c in (*of_a, *of_b) if (*of_a, *of_b).count(c) == 1]
    return _einsum(is_parameter, f"{''.join(of_a)},{''.join(of_b)}->{''.join(kept)}", a, b)


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _addmm(
    is_parameter: IsParameter, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    if beta == alpha == 1 and input.ndim == 1 and is_parameter(mat2):
        return F.linear(mat1, mat2.t(), input)
    product = torch.matmul(mat1, mat2)
    return (product if alpha == 1 else alpha * product) + (input if beta == 1 else beta * input)


def _bilinear(
    is_parameter: IsParameter, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    return F.linear((input1.unsqueeze(-1) * input2.unsqueeze(-2)).flatten(-2), weight.flatten(1), bias)


def _grouped_mm(
    is_parameter: IsParameter,
    input: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if input.ndim != 2 or mat2.ndim != 3 or offs is None or bias is not None or is_parameter(input):
        raise UnreadableCallError("other than as stacked matrices, for rows that offsets divide among them")
    ends = offs.tolist()
    parts = [input[start:end] @ mat2[e] for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    out = torch.cat(parts)
    return out if out_dtype is None else out.to(out_dtype)


def _attention(
    is_parameter: IsParameter,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None or not is_parameter(attn_mask) or enable_gqa or any(map(is_parameter, (query, key, value))):
        return NotImplemented
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale) + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _embedding_bag(
    is_parameter: IsParameter,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq:
        raise UnreadableCallError("with max_norm or scale_grad_by_freq")
    if is_parameter(per_sample_weights) or not is_parameter(weight):
        raise UnreadableCallError("as per_sample_weights")
    padding = None if padding_idx is None else padding_idx % len(weight)
    bag = None
    if input.ndim == 1:
        assert offsets is not None
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        bag = torch.bucketize(torch.arange(len(input), device=input.device), ends, right=True)
        with row_examples(bag):
            rows = F.embedding(input, weight, padding)
    else:
        rows = F.embedding(input, weight, padding)
    counted = torch.ones_like(input) if padding is None else input != padding
    weights = counted.to(rows.dtype) if per_sample_weights is None else counted * per_sample_weights
    if bag is None:
        return _over_bag(rows, weights.unsqueeze(-1), counted.unsqueeze(-1), mode)
    if mode == "max":
        raise UnreadableCallError('with mode="max" and offsets')
    n_bags = len(offsets) - include_last_offset  # pyright: ignore[reportArgumentType]
    sums = rows.new_zeros(n_bags, rows.shape[1]).index_add(0, bag, rows * weights.unsqueeze(-1))
    n = torch.bincount(bag[counted.bool()], minlength=n_bags).clamp(min=1)
    return sums if mode == "sum" else sums / n.unsqueeze(-1)


def _over_bag(rows: Tensor, weights: Tensor, counted: Tensor, mode: str) -> Tensor:
    """The rows `[B, L, O]` of each bag as one; those that are not counted take no part."""
    if mode == "max":
        largest = rows.masked_fill(~counted.bool(), -torch.inf).amax(1)
        return largest.masked_fill(~counted.bool().any(1), 0)
    sums = (rows * weights).sum(1)
    return sums if mode == "sum" else sums / counted.sum(1).clamp(min=1)


_GROUPED_MM = (getattr(torch, "_grouped_mm", None), getattr(F, "grouped_mm", None))

REWRITES: Mapping[Callable[..., Any], Rewrite] = {
    torch.einsum: _einsum,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.mm: _matmul,
    torch.bmm: _matmul,
    torch.Tensor.bmm: _matmul,
    torch.mv: _mv,
    torch.Tensor.mv: _mv,
    torch.tensordot: _tensordot,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.baddbmm: _addmm,
    torch.Tensor.baddbmm: _addmm,
    F.bilinear: _bilinear,
    F.embedding_bag: _embedding_bag,
    **{function: _grouped_mm for function in _GROUPED_MM if function is not None},
    F.scaled_dot_product_attention: _attention,
    **RECURRENT,
}
"""Rewrites by the function that a `TorchFunctionMode` reports."""
