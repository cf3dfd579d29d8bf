"""The optimiser of the weights, and the schedule of its learning rate."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.marglik.plain import unwrapped

SGD_DEFAULTS: dict[str, Any] = {"lr": 0.03, "momentum": 0.9, "nesterov": True}


def make_optimizer(
    optimizer_cls: type[torch.optim.Optimizer],
    optimizer_kwargs: Mapping[str, Any] | None,
    named_parameters: list[tuple[str, nn.Parameter]],
    model: nn.Module | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of the weights.

    Args:
        optimizer_cls: its class.
        optimizer_kwargs: its options.
        named_parameters: the weights.
        model: whose weights they are, for classes that take it as their first argument, such as `KFAC`.
        grad_scaler: of the loss, for those among them that take it.

    Raises:
        ValueError: it would decay the weights a second time, or it cannot step without a closure.
    """
    if optimizer_kwargs is None:
        optimizer_kwargs = SGD_DEFAULTS if optimizer_cls is torch.optim.SGD else {}
    options = without_numpy(optimizer_kwargs)
    with _explained(optimizer_cls, "optimizer_kwargs", options):
        takes = list(inspect.signature(optimizer_cls).parameters)
        if takes[:1] == ["model"]:
            own = {"grad_scaler": grad_scaler} if "grad_scaler" in takes and grad_scaler is not None else {}
            optimizer = optimizer_cls(model, [p for _, p in named_parameters], **own, **options)  # pyright: ignore
        else:
            optimizer = optimizer_cls([p for _, p in named_parameters], **options)
    name = type(optimizer).__name__
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{name} cannot step without a closure that computes the loss again, which training does not give; "
            "choose another optimizer_cls, such as torch.optim.SGD or torch.optim.Adam"
        )
    decay = max(group.get("weight_decay", 0) for group in optimizer.param_groups)
    if decay:
        raise ValueError(
            f"{name} has weight_decay={decay}, but the prior is the weight decay: "
            "pass weight_decay=0 and set prior_prec_init to weight decay times the number of examples"
        )
    return optimizer


def scheduler_options(
    scheduler_cls: type[Any] | None, scheduler_kwargs: Mapping[str, Any] | None, n_steps: int
) -> dict[str, Any]:
    """The scheduler's options, with defaults filled in for a run of `n_steps` gradient steps."""
    if scheduler_cls is None:
        return {"factor": 1.0}
    is_cosine = scheduler_cls is torch.optim.lr_scheduler.CosineAnnealingLR
    return without_numpy(({"T_max": n_steps} if is_cosine else {}) | dict(scheduler_kwargs or {}))


def make_scheduler(
    scheduler_cls: type[Any] | None, options: Mapping[str, Any], optimizer: torch.optim.Optimizer
) -> Any:
    """The learning rate's schedule, stepped once per gradient step; constant for None."""
    scheduler_cls = scheduler_cls or torch.optim.lr_scheduler.ConstantLR
    with _explained(scheduler_cls, "scheduler_kwargs", options):
        return scheduler_cls(optimizer, **options)


@contextmanager
def _explained(cls: type[Any], option: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Say which options a class of torch refuses, in place of its own message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        known = inspect.signature(cls).parameters
        unknown = [name for name in options if name not in known]
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        refused = f"does not take {given}" if given else "needs options"
        what = f"has no option {unknown[0]!r}" if unknown else refused
        takes = ", ".join(name for name in known if name not in ("params", "optimizer"))
        raise ValueError(f"{cls.__name__} {what}; give {option} of those that it has: {takes}.") from error


def without_numpy(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with numpy scalars converted to plain ones, so that a checkpoint that holds them can be read back."""
    return {key: value if isinstance(value, Tensor) else unwrapped(value) for key, value in options.items()}


def rescale_lr(optimizer: torch.optim.Optimizer, scheduler: Any, lrs: Sequence[float]) -> None:
    """Go on under other learning rates, each at the same place of its schedule.

    Args:
        optimizer: at some step.
        scheduler: of its learning rate, at the same step.
        lrs: by parameter group, what its rate would be at the start.
    """
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        before = group.get("initial_lr", group["lr"])
        if before != lr:
            group["lr"] = group["lr"] * lr / before
            group["initial_lr"] = lr
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = list(lrs)
