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
    moments = []
    for p, state in zip(parameters, states, strict=True):
        g = p.grad
        assert g is not None
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if squares and "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        t = state["step"]
        state["exp_avg"].lerp_(g, 1 - beta)
        if squares:
            state["exp_avg_sq"].mul_(beta_squares).addcmul_(g, g, value=1 - beta_squares)
        moments.append(state["exp_avg"].mul(beta / (1 - beta ** (t + 1))).add_(g, alpha=(1 - beta) / (1 - beta**t)))
    return moments


def adam_step(moment: Tensor, state: dict[str, Any], beta_squares: float, eps: float) -> Tensor:
    """The step of NAdam for a learning rate of 1, up to its sign."""
    root = (state["exp_avg_sq"] / (1 - beta_squares ** state["step"])).sqrt_()
    return moment / root.add_(eps)
