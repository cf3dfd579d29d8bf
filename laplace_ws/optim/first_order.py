"""Nesterov averages of gradients, and the first-order steps whose lengths are grafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_ws.registry import Choice


class Grafting(Choice):
    """Whose steps give those of K-FAC their lengths, layer by layer: Adam's, those of SGD with momentum, or nobody's."""

    ADAM = "adam"
    SGD = "sgd"
    NONE = "none"


def update_moments(
    parameters: Sequence[Tensor], states: Sequence[dict[str, Any]], betas: tuple[float, float], *, squares: bool
) -> list[Tensor]:
    """Take the gradients into the averages `exp_avg` and, with `squares`, `exp_avg_sq`; returns the Nesterov averages, without bias.

    The Nesterov average is the average as the next step will find it, were its gradient the same as this one [Dozat 2016].

    Args:
        parameters: those with a gradient.
        states: of the optimiser, one each; `step` is the number of this step.
        betas: decay of the two.
    """
    beta, beta_squares = betas
    gradients: list[Tensor] = []
    for p, state in zip(parameters, states, strict=True):
        assert p.grad is not None
        gradients.append(p.grad)
        for name in ("exp_avg", "exp_avg_sq")[: 1 + squares]:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
    if not gradients:
        return []
    averages = [state["exp_avg"] for state in states]
    torch._foreach_lerp_(averages, gradients, 1 - beta)  # pyright: ignore[reportPrivateImportUsage]
    if squares:
        of_squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(of_squares, beta_squares)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_addcmul_(of_squares, gradients, gradients, 1 - beta_squares)  # pyright: ignore[reportPrivateImportUsage]
    of_average = [beta / (1 - beta ** (state["step"] + 1)) for state in states]
    of_gradient = [(1 - beta) / (1 - beta ** state["step"]) for state in states]
    moments = torch._foreach_mul(averages, of_average)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(moments, torch._foreach_mul(gradients, of_gradient))  # pyright: ignore[reportPrivateImportUsage]
    return list(moments)


def adam_steps(
    moments: Sequence[Tensor], states: Sequence[dict[str, Any]], beta_squares: float, eps: float
) -> list[Tensor]:
    """The steps of NAdam for a learning rate of 1, up to their sign."""
    if not moments:
        return []
    corrections = [1 - beta_squares ** state["step"] for state in states]
    roots = torch._foreach_div([state["exp_avg_sq"] for state in states], corrections)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_sqrt_(roots)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_add_(roots, eps)  # pyright: ignore[reportPrivateImportUsage]
    return list(torch._foreach_div(list(moments), roots))  # pyright: ignore[reportPrivateImportUsage]
