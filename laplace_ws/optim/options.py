"""The options of K-FAC as an optimiser, and when its factors and inverses are due."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from laplace_ws.curvature import Curvature
from laplace_ws.kfac import KfacApprox
from laplace_ws.likelihoods import Likelihood
from laplace_ws.optim.first_order import Grafting
from laplace_ws.registry import Choice
from laplace_ws.values import flag, real_number, shown, whole_number


class LossReduction(Choice):
    """How the loss is made of the losses of the examples."""

    MEAN = "mean"
    SUM = "sum"


@dataclass(frozen=True)
class KfacOptions:
    """The options that all parameters share; `KFAC` documents each.

    Raises:
        TypeError: one of them is of another type.
        ValueError: one of them is out of its range.
    """

    curvature: Curvature
    likelihood: Likelihood | None
    mc_samples: int
    factor_decay: float
    factor_update_steps: int
    inv_update_steps: int
    start_steps: int
    grafting: Grafting
    kl_clip: float | None
    max_factor_dim: int | None
    factor_dtype: torch.dtype | None
    loss_reduction: LossReduction
    grad_scaler: torch.amp.GradScaler | None
    strict: bool

    def __post_init__(self) -> None:
        if real_number("factor_decay", self.factor_decay, at_least=0) >= 1:
            raise ValueError(f"factor_decay must be below 1, got {self.factor_decay:g}.")
        for name in ("factor_update_steps", "inv_update_steps", "mc_samples"):
            whole_number(name, getattr(self, name), least=1)
        whole_number("start_steps", self.start_steps, least=0)
        flag("strict", self.strict)
        if self.kl_clip is not None:
            real_number("kl_clip", self.kl_clip, above=0)
        if self.max_factor_dim is not None:
            whole_number("max_factor_dim", self.max_factor_dim, least=1)
        if self.grad_scaler is not None and not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, or None, got {shown(self.grad_scaler)}.")
        dtype = self.factor_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"factor_dtype must be a floating point type of torch, or None, got {shown(dtype)}.")
        self._check_likelihood()

    def _check_likelihood(self) -> None:
        if self.curvature is Curvature.EF:
            if self.likelihood is not None:
                raise ValueError(
                    'curvature="ef" takes the gradients of the loss itself; leave likelihood out, or choose "ggn" or "ggn_mc".'
                )
            return
        if self.likelihood is None:
            raise ValueError(
                f'curvature={self.curvature.value!r} needs a likelihood, such as likelihood="classification"; give one, or choose "ef".'
            )
        if self.likelihood.ignores_targets:
            raise ValueError(
                f"{self.likelihood!r} leaves out terms by their targets, which an optimizer does not see; choose "
                'curvature="ef", or a likelihood whose terms all count.'
            )


_NUMBERS = ("lr", "eps", "weight_decay", "damping")


def checked_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a parameter group, in their plain form.

    Raises:
        TypeError: one of them is of another type.
        ValueError: one of them is out of its range.
    """
    checked = {name: real_number(name, group[name], at_least=0) for name in _NUMBERS}
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be two numbers, got {shown(betas)}.")
    for beta in betas:
        if not 0 <= real_number("betas", beta) < 1:
            raise ValueError(f"betas must be at least 0 and below 1, got {shown(betas)}.")
    spec = group["kfac_approx"]
    is_mapping = isinstance(spec, Mapping)
    plain = {k: KfacApprox(v).value for k, v in spec.items()} if is_mapping else KfacApprox(spec).value
    return checked | {"betas": tuple(betas), "kfac_approx": plain}


@dataclass
class Timer:
    """When something is due: on each of the first steps, then on every multiple of a number of steps, or as soon after as it can be done.

    Attributes:
        every: the number of steps.
        start_steps: how many first steps.
        next: the step, counted from 0, from which on it is due.
    """

    every: int
    start_steps: int
    next: int = 0

    def is_due(self, step: int) -> bool:
        """Whether it is due on a step."""
        return step >= self.next

    def done(self, step: int) -> None:
        """Take note that it was done on a step."""
        self.next = step + 1 if step + 1 < self.start_steps else (step // self.every + 1) * self.every
