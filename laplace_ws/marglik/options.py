"""The options of training besides its schedule: their defaults, and the parts that are built from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laplace_ws.curvature import Backend
from laplace_ws.curvature.inputs import BatchKeys
from laplace_ws.likelihoods import Likelihood
from laplace_ws.marglik.hyperparameters import Hyperparameters
from laplace_ws.marglik.steps import StepOptions
from laplace_ws.posterior import STRUCTURES, Laplace, PriorStructure, prior_groups
from laplace_ws.values import flag, shown

PRIOR_PRECISION_PER_EXAMPLE = 0.01
"""Prior precision at the start, divided by the number of examples."""


@dataclass(frozen=True)
class TrainingOptions:
    """The options of `marglik_training` that shape its result besides the `Schedule`; it documents each of them.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: the structures of prior and curvature do not go together, or an option of the steps is out of its range.
    """

    hessian_structure: str = "kron"
    curvature: str = "ggn_mc"
    kfac_approx: str | Mapping[str, str] | None = None
    max_factor_dim: int | None = None
    backend: str | Backend = "native"
    mc_samples: int = 1
    final_curvature: str | None = None
    final_kfac_approx: str | Mapping[str, str] = "auto"
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD
    optimizer_kwargs: Mapping[str, Any] | None = None
    refit: bool = False
    scheduler_cls: type[Any] | None = torch.optim.lr_scheduler.CosineAnnealingLR
    scheduler_kwargs: Mapping[str, Any] | None = None
    hyper_optimizer: str | None = None
    lr_hyp: float = 0.1
    prior_structure: str = "layerwise"
    prior_prec_init: float | None = None
    sigma_noise_init: float | None = None
    temperature_init: float = 1.0
    fix_sigma_noise: bool = False
    tune_temperature: bool = False
    gradient_accumulation_steps: int = StepOptions.gradient_accumulation_steps
    max_grad_norm: float | None = StepOptions.max_grad_norm
    grad_scaler: torch.amp.GradScaler | None = StepOptions.grad_scaler

    def __post_init__(self) -> None:
        flag("fix_sigma_noise", self.fix_sigma_noise)
        flag("tune_temperature", self.tune_temperature)
        flag("refit", self.refit)
        if not callable(self.optimizer_cls):
            raise TypeError(
                f"optimizer_cls must be the class of an optimizer, such as torch.optim.SGD, got {shown(self.optimizer_cls)}."
            )
        if self.scheduler_cls is not None and not callable(self.scheduler_cls):
            raise TypeError(
                f"scheduler_cls must be the class of a scheduler of torch, or None, got {shown(self.scheduler_cls)}."
            )
        for name in ("optimizer_kwargs", "scheduler_kwargs"):
            options = getattr(self, name)
            if options is not None and not isinstance(options, Mapping):
                raise TypeError(
                    f"{name} must be a mapping of options, such as {{'lr': 0.03}}, or None, got {shown(options)}."
                )
        PriorStructure(self.prior_structure).checked(STRUCTURES[self.hessian_structure])
        _ = self.steps

    @property
    def steps(self) -> StepOptions:
        """How gradients become optimiser steps."""
        return StepOptions(self.gradient_accumulation_steps, self.max_grad_norm, self.grad_scaler)

    def posteriors(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        generator: torch.Generator,
        keys: BatchKeys,
        output_ndim: int,
    ) -> tuple[Laplace, Laplace]:
        """The posterior to tune by and the one to return, which are the same unless curvature or approximation differ.

        Args:
            model: the network.
            likelihood: of the targets.
            generator: of random columns.
            keys: names of the entries of batches that are mappings.
            output_ndim: number of dimensions of a batch of outputs, which decides by which approximation to tune where none is named.
        """
        has_factors = "kfac_approx" in STRUCTURES[self.hessian_structure].option_names()
        default = "auto" if not has_factors else "reduce" if output_ndim <= 2 else "expand"

        def posterior(curvature: str, approx: str | Mapping[str, str]) -> Laplace:
            own: dict[str, Any] = {"kfac_approx": approx} if has_factors or approx != "auto" else {}
            if self.max_factor_dim is not None:
                own["max_factor_dim"] = self.max_factor_dim
            return Laplace(
                model,
                likelihood,
                hessian_structure=self.hessian_structure,
                curvature=curvature,
                backend=self.backend,
                mc_samples=self.mc_samples,
                generator=generator,
                dict_key_x=keys.x,
                dict_key_y=keys.y,
                **own,
            )

        la = posterior(self.curvature, default if self.kfac_approx is None else self.kfac_approx)
        if self.sigma_noise_init is not None and not likelihood.has_noise and self.sigma_noise_init != 1:
            raise ValueError(
                f"the {likelihood.name} likelihood has no noise that sigma_noise_init could set; leave it out."
            )
        final = posterior(self.final_curvature or self.curvature, self.final_kfac_approx)
        if final.options == la.options:
            return la, la
        final.network = la.network  # its checks hold for both
        return la, final

    def hyperparameters(self, la: Laplace, n_data: int, device: torch.device) -> Hyperparameters:
        """The initial hyperparameters of `la`, for N examples."""
        default_start = PRIOR_PRECISION_PER_EXAMPLE * n_data
        return Hyperparameters(
            prior_groups(la.shapes, PriorStructure(self.prior_structure)),
            prior_precision=default_start if self.prior_prec_init is None else self.prior_prec_init,
            sigma_noise=la.likelihood.sigma_noise if self.sigma_noise_init is None else self.sigma_noise_init,
            temperature=self.temperature_init,
            tune_sigma=la.likelihood.has_noise and not self.fix_sigma_noise,
            tune_temperature=self.tune_temperature,
            hyper_optimizer=self.hyper_optimizer or ("adam" if self.tune_temperature else "newton"),
            lr=self.lr_hyp,
            device=device,
        )
