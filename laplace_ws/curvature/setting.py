"""Which parameters are in the reduce setting, where K-FAC-reduce is exact for deep linear networks [Eschenhagen et al. 2023].

The shape of the outputs does not tell: a convolutional classifier has outputs `[N, C]`, but a nonlinearity stands between the positions of
its convolutions and the mean over them. What tells is the gradient at the layer's output: where positions are summed or averaged with
nothing nonlinear behind them, it is the same at all positions of an example.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from laplace_ws.kfac import MatrixUse, Use
from laplace_ws.kfac.factors import total

SMALLEST_DIFFERENCE = 1e-3
"""Relative difference between the gradients at the positions of an example that is more than rounding; in half precision, 10 ε."""


def parameters_in_reduce_setting(
    uses: Sequence[Use], g: Sequence[Float[Tensor, "K B ..."]], output_ndim: int
) -> frozenset[str]:
    """Weights of linear maps whose output gradients are the same at all sharing positions of each example; and all biases and scales, whose
    block is exact wherever they are. With outputs `[N, T, C]`, whose terms reach the loss separately, there are none.

    Args:
        uses: of one forward pass.
        g: gradients at their outputs for generic vectors of output space.
        output_ndim: number of dimensions of the outputs.
    """
    if output_ndim > 2:
        return frozenset()
    names = {name for use in uses for name in use.parameters}
    as_weight: dict[str, list[tuple[MatrixUse, Tensor]]] = {}
    for use, g_use in zip(uses, g, strict=True):
        if isinstance(use, MatrixUse) and use.weight is not None:
            as_weight.setdefault(use.weight, []).append((use, g_use))
    shared = {
        name: are_equal for name, own in as_weight.items() if (are_equal := _are_equal_at_positions(own)) is not None
    }
    verdicts = torch.stack(list(shared.values())).tolist() if shared else []  # one wait for the device
    in_setting = {name for name, are_equal in zip(shared, verdicts, strict=True) if are_equal}
    return frozenset(name for name in names if name not in as_weight or name in in_setting)


def _are_equal_at_positions(pairs: Sequence[tuple[MatrixUse, Tensor]]) -> Bool[Tensor, ""] | None:
    """Whether R·Σ_r‖g_r‖² = ‖Σ_r g_r‖² for each example, as Cauchy and Schwarz have it for equal summands only; None for a weight in roles
    that share no Kronecker block.
    """
    parts = [use.output_gradient_sum(g.double()) for use, g in pairs]
    if len({(part.shape, use.output_axes) for part, (use, _) in zip(parts, pairs, strict=True)}) > 1:
        return None
    n = total(use.n_positions for use, _ in pairs)
    sums = total(parts).square().sum(-1)  # [*G, K, N]
    squares = total(use.output_gradients(g.double()).square().sum((-1, -2)) for use, g in pairs)
    squares = squares * (n.unsqueeze(-2) if isinstance(n, Tensor) else n)
    difference = max(SMALLEST_DIFFERENCE, *(10 * torch.finfo(g.dtype).eps for _, g in pairs))
    return (squares.sum() > 0) & ((squares - sums).sum() <= difference**2 * squares.sum())
