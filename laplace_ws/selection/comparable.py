"""Which runs can be ranked together: log marginal likelihoods are on one scale only where all this agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from laplace_ws.curvature import Curvature
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import ExperimentError

_SAMPLED = (Curvature.GGN_MC.value, Curvature.GGN_MC_RADEMACHER.value)


_LEFT_OUT = ("root", "download", "n_train", "n_test", "batch_size", "seed")
"""Options of the data that change no image, or are compared in another form."""


def yardstick(run: RunConfig, n_train: int, n_test: int) -> dict[str, Any]:
    """What a log marginal likelihood and a test NLL are measured with: data, likelihood and curvature, by key.

    Of the approximation, only what affects the last fit counts; the backend, which changes no result, does not.
    """
    data, marglik = run.data, run.marglik
    curvature = marglik.final_curvature or marglik.curvature
    is_subset = data.n_train is not None or data.n_test is not None
    return {
        **{f"data.{f.name}": getattr(data, f.name) for f in fields(data) if f.name not in _LEFT_OUT},
        "data.root": (
            Path(data.root).absolute().as_posix() if data.name == "image-folder" or data.factory is not None else None
        ),
        "data.n_train": n_train,
        "data.n_test": n_test,
        "seed (which chooses the images)": run.data_seed if is_subset else None,
        "likelihood": run.likelihood,
        "marglik.temperature_init": marglik.temperature_init,
        "marglik.hessian_structure": marglik.hessian_structure,
        "marglik.max_factor_dim": marglik.max_factor_dim,
        "the last fit's kfac_approx": marglik.final_kfac_approx,
        "the last fit's curvature": curvature,
        "marglik.mc_samples": marglik.mc_samples if curvature in _SAMPLED else None,
    }


def check_comparable(yardsticks: Mapping[str, Mapping[str, Any]], runs: Mapping[str, RunConfig]) -> None:
    """Refuse to rank candidates that are not on one scale.

    Args:
        yardsticks: of every candidate, by name.
        runs: configuration of every candidate.

    Raises:
        ExperimentError: says which two candidates differ, and in what.
    """
    for name, run in runs.items():
        if run.marglik.tune_temperature:
            raise ExperimentError(
                f"candidate '{name}' tunes its temperature, and log marginal likelihoods at different temperatures do "
                "not compare; set marglik.tune_temperature=false"
            )
    first, *others = yardsticks
    for name in others:
        for key, value in yardsticks[name].items():
            if value != yardsticks[first][key]:
                raise ExperimentError(
                    f"'{first}' and '{name}' cannot be ranked together: {key} is {yardsticks[first][key]!r} and "
                    f"{value!r}, and log marginal likelihoods compare only on the same data, with the same likelihood and "
                    "curvature; leave one out, or train it anew"
                )
