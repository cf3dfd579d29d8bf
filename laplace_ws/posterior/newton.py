"""Safeguarded Newton iterations for prior precisions and noise, on logarithms.

At the optimum of a group, δq = γ(δ) with q = ‖θ−μ‖² and γ its effective number of parameters [MacKay 1992]. All of this is based on
the log ratio h = log γ − log δq: MacKay's update is log δ ← log δ + h; and as
0 ≤ −∂γ/∂log δ ≤ γ, h falls with log δ at a rate between 1 and 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import scipy.optimize
import torch
from jaxtyping import Float
from torch import Tensor

Effective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From δ by group, γ and −∂γ/∂log δ: its diagonal, or in full where the groups interact."""

TOLERANCE = 1e-9
"""Largest error of a logarithm at the optimum."""
_MAX_STEPS = 200
_MAX_HALVINGS = 40
_NEAR = 1e-6
_MOST_POLISHING = 3


def log_ratio(
    gamma: Float[Tensor, " G"], square_sums: Float[Tensor, " G"], log_delta: Float[Tensor, " G"]
) -> Float[Tensor, " G"]:
    """h = log γ − log δq: +∞ where all weights are at the prior mean, −∞ where there is no curvature, 0 where both hold."""
    h = gamma.log() - log_delta - square_sums.log()
    return torch.where((gamma == 0) & (square_sums == 0), 0.0, h)


def separate_optimum(
    effective: Effective, square_sums: Float[Tensor, " G"], start: Float[Tensor, " G"], low: Tensor, high: Tensor
) -> Float[Tensor, " G"]:
    """log δ of groups that do not interact, by Newton's method on h; by bisection where its steps do not shrink fast enough.

    Each step ends in the bracket that the slope of h allows, between log δ + h/2 and log δ + h. Where the root lies outside `low` …
    `high`, so does the bracket, and the answer is that limit.
    """
    low, high = low.expand_as(start), high.expand_as(start)
    t, lower, upper = start.clamp(low, high), low, high
    h_before = torch.full_like(start, math.inf)
    for _ in range(_MAX_STEPS):
        gamma, decrease = effective(t.exp())
        h = log_ratio(gamma, square_sums, t)
        lower = torch.maximum(lower, t + torch.minimum(h, h / 2)).clamp(low, high)
        upper = torch.minimum(upper, t + torch.maximum(h, h / 2)).clamp(low, high)
        rate = torch.where(gamma > 0, decrease / gamma, 0.0).clamp(0, 1)
        # Newton's error is at most h²/4, as |h''| ≤ ½ and |h'| ≥ 1.
        settled = (h.square() <= 4 * TOLERANCE) | (upper - lower <= TOLERANCE)
        stalled = (h.abs() > h_before.abs() / 2) & ~settled
        t = torch.where(stalled, (lower + upper) / 2, (t + h / (1 + rate)).clamp(lower, upper))
        if settled.all():
            break
        h_before = h
    return t


def joint_optimum(
    effective: Effective,
    log_evidence: Callable[[Tensor], float],
    square_sums: Float[Tensor, " G"],
    start: Float[Tensor, " G"],
    low: Tensor,
    high: Tensor,
) -> Float[Tensor, " G"]:
    """log δ of groups that interact, by Newton's method on all h at once; never a step down the log marginal likelihood.

    Where Newton's step does not go up, MacKay's does, if it is short enough: h has the sign of the gradient. Where h is so small that the
    value rises by less than its rounding, Newton's steps are taken as they are.
    """
    t, n_polished = start.clamp(low, high), 0
    for _ in range(_MAX_STEPS):
        gamma, decrease = effective(t.exp())
        h = log_ratio(gamma, square_sums, t)
        at_limit = ((t >= high) & (h > 0)) | ((t <= low) & (h < 0))
        h = torch.where(at_limit, 0.0, h.clamp(low - high, high - low))
        if h.abs().max() <= TOLERANCE or n_polished == _MOST_POLISHING:
            break
        jacobian = decrease / gamma.clamp_min(torch.finfo(gamma.dtype).tiny)[:, None]
        jacobian = torch.where(at_limit[:, None], 0.0, jacobian) + torch.eye(len(t), dtype=t.dtype, device=t.device)
        if h.abs().max() <= _NEAR:
            t, n_polished = (t + torch.linalg.solve(jacobian, h)).clamp(low, high), n_polished + 1
            continue
        origin = t
        for step, n_halvings in ((torch.linalg.solve(jacobian, h), 3), (h, _MAX_HALVINGS)):
            t = uphill(lambda x: log_evidence(x.clamp(low, high)), origin, step, n_halvings).clamp(low, high)
            if not torch.equal(t, origin):
                break
        else:  # no step is uphill beyond rounding
            break
    return t


def uphill(value: Callable[[Tensor], float], origin: Tensor, step: Tensor, n_halvings: int = _MAX_HALVINGS) -> Tensor:
    """`origin + step`, the step halved until the value does not fall by more than its rounding; `origin` where no halving helps."""
    before = value(origin)
    for k in range(n_halvings):
        if value(origin + step / 2**k) >= before - 1e-13 * abs(before):
            return origin + step / 2**k
    return origin


def decreasing_root(slope: Callable[[float], float], start: float, low: float, high: float) -> float:
    """Where a falling function crosses zero between two limits; the limit beyond which it does."""
    slope = functools.cache(slope)  # near the root, another evaluation might round to the other sign
    point, width, is_up = start, 1.0, slope(start) > 0
    while True:
        if point == (high if is_up else low):
            return point
        beyond = min(point + width, high) if is_up else max(point - width, low)
        if (slope(beyond) > 0) != is_up:
            return scipy.optimize.root_scalar(slope, bracket=sorted((point, beyond)), xtol=TOLERANCE / 10).root
        point, width = beyond, 2 * width
