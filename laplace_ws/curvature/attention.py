"""Multi-head attention taken apart, so that its projections are seen as linear layers.

`torch.nn.functional.multi_head_attention_forward` is one opaque call to a function mode. This is the same computation from the same
arguments, with every projection passed to a callback.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from laplace_ws.curvature.calls import Call, UnreadableCallError
from laplace_ws.kfac.factors import total
from laplace_ws.kfac.uses import LinearUse, PackedLinearUse, Use

Q, K, V = 0, 1, 2
"""Positions of the three projections in a packed in-projection."""

Parts = tuple[int, ...]
"""Neighbouring row blocks, of three, of a packed weight or bias; an empty tuple means that it is not packed."""
Project = Callable[[Tensor, Tensor, Parts, Tensor | None, Parts], Tensor]
"""`project(x, weight, its parts, bias, its parts)` is x W[parts]ᵀ + b[parts]."""


def take_parts(packed: Tensor, parts: Parts) -> Tensor:
    """The row blocks of a packed weight or bias."""
    return packed.unflatten(0, (3, -1))[parts[0] : parts[-1] + 1].flatten(0, 1) if parts else packed


def multi_head_attention(
    project: Project,
    query: Float[Tensor, "T N E"],
    key: Float[Tensor, "S N I"],
    value: Float[Tensor, "S N J"],
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Float[Tensor, "3*E E"] | None,
    in_proj_bias: Float[Tensor, " 3*E"] | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Float[Tensor, "E E"],
    out_proj_bias: Float[Tensor, " E"] | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Float[Tensor, "E E"] | None = None,
    k_proj_weight: Float[Tensor, "E I"] | None = None,
    v_proj_weight: Float[Tensor, "E J"] | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Float[Tensor, "T N E"], Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, with the projections computed by `project` on batch-first inputs.

    Raises:
        UnreadableCallError: an input without a batch axis, or keys and values that are not projections of the inputs.
    """
    if query.ndim != 3:
        raise UnreadableCallError("on an input without a batch axis")
    if any(t is not None for t in (bias_k, bias_v, static_k, static_v)) or add_zero_attn:
        raise UnreadableCallError("with keys and values beyond the inputs' own (add_bias_kv, add_zero_attn)")
    inputs = _batch_first(query, key, value)
    if use_separate_proj_weight:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = (
            project(x, w, (), in_proj_bias, (i,))
            for i, (x, w) in enumerate(zip(inputs, weights, strict=True))
            if w is not None
        )
    else:
        assert in_proj_weight is not None
        q, k, v = _packed(project, inputs, in_proj_weight, in_proj_bias)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, H, T or S, D]
    mask = _merged_mask(attn_mask, key_padding_mask, query, num_heads)
    dropout = dropout_p if training else 0.0
    if need_weights:
        y, weights = _with_weights(q, k, v, mask, dropout)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        y, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout), None
    y = project(y.transpose(1, 2).flatten(2), out_proj_weight, (), out_proj_bias, ())
    return y.transpose(0, 1), weights


def _batch_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs with the batch axis first; inputs that are the same tensor remain the same tensor."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)


def _packed(
    project: Project, inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """One product for all projections of one input."""

    def part(x: Tensor, *parts: int) -> Tensor:
        return project(x, weight, parts, bias, parts)

    x_q, x_k, x_v = inputs
    if x_q is x_k and x_k is x_v:
        return part(x_q, Q, K, V).chunk(3, -1)
    if x_k is x_v:
        return (part(x_q, Q), *part(x_k, K, V).chunk(2, -1))
    return part(x_q, Q), part(x_k, K), part(x_v, V)


def _merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, num_heads: int
) -> Float[Tensor, "N|1 H|1 T|1 S"] | None:
    masks = []
    if attn_mask is not None:
        by_head = attn_mask.ndim == 3  # [N·H, T, S]
        attn_mask = attn_mask.unflatten(0, (-1, num_heads)) if by_head else attn_mask[None, None]
        masks.append(_additive(attn_mask, query.dtype))
    if key_padding_mask is not None:
        masks.append(_additive(key_padding_mask[:, None, None], query.dtype))
    return total(masks) if masks else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores; True in a boolean mask excludes the entry."""
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


def _with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
    return weights @ v, weights


def read_projection(
    call: Call, x: Tensor, weight: Tensor, weight_parts: Parts, bias: Tensor | None, bias_parts: Parts
) -> list[Use]:
    """Uses that a projection makes of its weight and bias; they are separate uses where only one of the two is packed."""
    names = call.parameter(weight), call.parameter(bias)
    if weight_parts == bias_parts:
        return [_projection_use(call, x, weight.shape, weight_parts, *names)]
    apart = ((names[0], weight_parts, (names[0], None)), (names[1], bias_parts, (None, names[1])))
    return [_projection_use(call, x, weight.shape, parts, *pair) for name, parts, pair in apart if name]


def _projection_use(
    call: Call, x: Tensor, weight_shape: torch.Size, parts: Parts, weight: str | None, bias: str | None
) -> LinearUse:
    x = call.keep(x)
    if not parts:
        return LinearUse(rows=call.rows, call=call.name, weight=weight, bias=bias, weight_shape=weight_shape, x=x)
    return PackedLinearUse(
        rows=call.rows, call=call.name, weight=weight, bias=bias, weight_shape=weight_shape, x=x, parts=parts, n_parts=3
    )
