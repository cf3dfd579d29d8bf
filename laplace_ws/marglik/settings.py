"""What a run must have in common with the checkpoint from which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from laplace_ws.marglik.checks import DataFacts
from laplace_ws.marglik.hyperparameters import Hyperparameters
from laplace_ws.marglik.plain import described
from laplace_ws.marglik.schedule import Schedule
from laplace_ws.marglik.steps import StepOptions
from laplace_ws.posterior import Laplace
from laplace_ws.posterior.averages import averages_curvature


def run_settings(
    *,
    schedule: Schedule,
    facts: DataFacts,
    la: Laplace,
    final_options: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    scheduler_kwargs: Mapping[str, Any],
    hyper: Hyperparameters,
    steps: StepOptions,
    refit: bool,
) -> dict[str, Any]:
    """All options that the result depends on, as plain values; a function is represented by its name."""
    return described(
        {
            **schedule.settings(),
            "n_data": facts.n_data,
            "n_batches": facts.n_batches,
            "n_params": la.n_params,
            **la.options,
            "backend": la.backend.name,
            "final_curvature": final_options["curvature"],
            "final_kfac_approx": final_options.get("kfac_approx"),
            "optimizer": type(optimizer).__name__,
            "optimizer_kwargs": optimizer_options(optimizer),
            "scheduler": type(scheduler).__name__,
            "scheduler_kwargs": scheduler_kwargs,
            "hyper_optimizer": hyper.hyper_optimizer.value,
            "lr_hyp": hyper.lr,
            "tuned": hyper.tuned_names,
            # One name per weight would be long; the number of groups tells "weight" from "parameter".
            "prior_groups": list(dict.fromkeys(hyper.groups.names)),
            "n_prior_precisions": len(hyper.groups.names),
            "starts": hyper.starts,
            **({"refit": refit} if averages_curvature(optimizer) else {}),
            **steps.settings(),
        }
    )


def optimizer_options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Options of an optimiser before its first step, by number of the parameter group where there are several."""
    options = [_options_of(group) for group in optimizer.param_groups]
    return options[0] if len(options) == 1 else {str(i): group for i, group in enumerate(options)}


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    # A scheduler has already set "lr" to that of the first step, and keeps the one given as "initial_lr".
    options = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return options | {"lr": group.get("initial_lr", group["lr"])}
