"""The steps of parameters: preconditioned where there are factors, of first order elsewhere, and how they are applied."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from laplace_ws.optim.first_order import Grafting, adam_steps, update_moments
from laplace_ws.optim.stacks import Stacks

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of an optimiser, with their options."""


def directions(
    groups: Groups, state: Mapping[Tensor, dict[str, Any]], stacks: Stacks, grafting: Grafting
) -> dict[Tensor, Tensor]:
    """Take the gradients into their averages; returns the step of each parameter that has one, for a learning rate of 1, up to its sign.

    Args:
        groups: of the optimiser.
        state: of the optimiser.
        stacks: of the layers that are preconditioned.
        grafting: whose lengths they have.
    """
    is_adam = grafting is not Grafting.SGD
    moments: dict[Tensor, Tensor] = {}
    steps: dict[Tensor, Tensor] = {}
    for group in groups:
        with_gradient = [p for p in group["params"] if p.grad is not None]
        states = [state[p] for p in with_gradient]
        for of_parameter in states:
            of_parameter["step"] = of_parameter.get("step", 0) + 1
        of_group = update_moments(with_gradient, states, group["betas"], squares=is_adam)
        first_order = adam_steps(of_group, states, group["betas"][1], group["eps"]) if is_adam else of_group
        moments |= zip(with_gradient, of_group, strict=True)
        steps |= zip(with_gradient, first_order, strict=True)
    for stack in stacks.of(moments.keys()):
        steps |= stack.steps(moments, steps, grafting)
    return steps


def apply_steps(groups: Groups, steps: Mapping[Tensor, Tensor], kl_clip: float | None) -> None:
    """Change the parameters: decay them, and take their steps, which are shortened where `kl_clip` says so."""
    share = 1.0 if kl_clip is None else _share(groups, steps, kl_clip)
    for group in groups:
        lr = float(group["lr"])
        parameters = [p for p in group["params"] if p in steps]
        if not parameters:
            continue
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(parameters, [steps[p] for p in parameters], alpha=-lr * share)  # pyright: ignore[reportPrivateImportUsage]


def _share(groups: Groups, steps: Mapping[Tensor, Tensor], kl_clip: float) -> float:
    """By how much all steps are shortened, so that lr²·Σ ⟨step, gradient⟩ is at most `kl_clip`."""
    products = [
        float(group["lr"]) ** 2 * (steps[p] * p.grad).sum().double()
        for group in groups
        for p in group["params"]
        if p in steps
    ]
    size = abs(torch.stack(products).sum().item())
    return min(1.0, math.sqrt(kl_clip / size)) if size else 1.0
