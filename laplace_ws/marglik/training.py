"""Online training: the weights by gradient steps, the hyperparameters by the Laplace marginal likelihood."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.inputs import BatchKeys
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.marglik.checkpoint import left_as_found
from laplace_ws.marglik.checks import check_data
from laplace_ws.marglik.hyperparameters import Hyperparameters
from laplace_ws.marglik.optimizers import make_optimizer, make_scheduler, scheduler_options
from laplace_ws.marglik.passes import Batches, same_order_after
from laplace_ws.marglik.schedule import Schedule
from laplace_ws.marglik.settings import run_settings
from laplace_ws.marglik.trainer import Progress, Record, Trainer
from laplace_ws.posterior import STRUCTURES, Laplace, PriorStructure, prior_groups

STIFF_START = 0.01
"""Prior precision at the start, in units of the number of examples."""


class TemperatureWarning(UserWarning):
    """The temperature is tuned by a marginal likelihood that is not normalised."""


@dataclass(frozen=True)
class MarglikResult:
    """What `marglik_training` returns. Unpacks as `la, model, margliks, losses = marglik_training(...)`.

    Attributes:
        la: the posterior of the best model, fitted on all the data.
        model: the model that was passed, now at its best.
        margliks: log marginal likelihood in nats at each tuning; higher is better.
        losses: the MAP objective of each epoch, in nats per example.
        history: one record per epoch, as `on_epoch` left them.
        prior_precision: of every parameter by name, at the best; a geometric mean where every weight has its own.
        prior_group: which group each parameter shares its prior precision with.
        best_epoch: the epoch whose weights and hyperparameters were kept: the one with the highest log marginal likelihood,
            or the last where the temperature was tuned.
        collapsed: groups of parameters whose prior precision ended at its upper limit.
        train_seconds: wall time of it all, without `on_epoch`.
        curvature_seconds: the part of it that went into fits and steps on the hyperparameters.
    """

    la: Laplace
    model: nn.Module
    margliks: list[float]
    losses: list[float]
    history: list[Record]
    prior_precision: dict[str, float]
    prior_group: dict[str, str]
    best_epoch: int
    collapsed: list[str]
    train_seconds: float
    curvature_seconds: float

    def __getitem__(self, place: int) -> Any:
        return tuple(self)[place]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.la, self.model, self.margliks, self.losses))


def marglik_training(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    hessian_structure: str = "kron",
    *,
    curvature: str = "ggn_mc",
    kfac_approx: str | Mapping[str, str] = "auto",
    backend: str = "native",
    mc_samples: int = 1,
    final_curvature: str | None = None,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    scheduler_cls: type[Any] | None = torch.optim.lr_scheduler.CosineAnnealingLR,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    n_epochs: int = 300,
    n_epochs_burnin: int = 0,
    marglik_frequency: int = 1,
    n_hypersteps: int = 100,
    hyper_optimizer: str = "adam",
    lr_hyp: float = 0.1,
    max_log_step: float = 1.0,
    fit_fraction: float = 1.0,
    prior_structure: str = "layerwise",
    prior_prec_init: float | None = None,
    sigma_noise_init: float | None = None,
    temperature_init: float = 1.0,
    fix_sigma_noise: bool = False,
    tune_temperature: bool = False,
    checkpoint_path: str | Path | None = None,
    resume: bool = False,
    n_data: int | None = None,
    dict_key_x: str = BatchKeys.x,
    dict_key_y: str = BatchKeys.y,
    on_epoch: Callable[[Record], None] | None = None,
    progress_bar: bool = True,
) -> MarglikResult:
    """Train a model and tune its prior precisions (and noise, and temperature) on the training data alone.

    Gradient steps minimise the negative log joint per example, N⁻¹(L/τ + ½ Σ_p δ_p‖θ_p‖²), scaled by τσ² so that a
    learning rate means the same throughout. After `n_epochs_burnin` epochs, every `marglik_frequency` epochs and
    after the last one, the Laplace approximation is fitted at the present weights and the logarithms of the
    hyperparameters take `n_hypersteps` steps up its log marginal likelihood, by default of Adam. The weights and hyperparameters
    with the highest log marginal likelihood are kept, and the posterior is fitted there on all the data. With
    `fit_fraction` below 1 that is the highest among estimates from different subsets of the batches, so it owes
    something to chance. With `tune_temperature` the last weights and hyperparameters are kept instead: values at
    different τ do not compare, and the highest is mostly the one at the largest τ.

    The model is trained in place. The mode of its modules, its `.grad` and torch's global random state are left as
    they were. Gradient steps run with all modules in train mode, curvature with all in eval mode.

    Args:
        model: the network; what does not require grad stays as it is and gets no prior.
        train_loader: gives batches on the model's device, anew each time it is iterated: pairs (x, y), rows (x1, x2, …, y) for
            `model(x1, x2, …)`, or mappings, see `curvature.inputs.split_batch`.
        likelihood: "classification", "regression", "heteroscedastic_regression", "binary", or a likelihood.
        hessian_structure: "kron", "ekfac", "diag", "full" or "lowrank" (which needs the same data in each pass: no augmentation, no
            `fit_fraction` of a loader that shuffles).
        curvature, kfac_approx, backend, mc_samples: as for `Laplace`.
        final_curvature: of the posterior that is returned; `curvature` where not given.
        optimizer_cls, optimizer_kwargs: for the weights; SGD with lr 0.03 and Nesterov momentum 0.9 where not given.
            Without weight decay, that is the prior's part, and without a closure, which rules out LBFGS.
        scheduler_cls, scheduler_kwargs: stepped after every batch; a cosine to zero where not given.
        n_epochs, n_epochs_burnin, marglik_frequency, n_hypersteps, max_log_step, fit_fraction: see `Schedule`.
            `n_hypersteps=0` trains at fixed hyperparameters.
        hyper_optimizer: how the hyperparameters climb: "adam"; "newton", which goes to the optimum of prior precisions and
            noise within `max_log_step`, whatever `n_hypersteps` above 0; or "mackay", `n_hypersteps` updates
            δ ← γ/‖θ‖², σ² ← SSE/(n − γ). `tune_temperature` needs "adam".
        lr_hyp: step size of Adam on the logarithms; unused by the others.
        prior_structure: "scalar", "layerwise" (a bias shares its layer's; the scales and biases of
            normalisations and Fixup share one, which starts at 1), "parameter" (one per tensor), or
            "weight" (for "diag" and "full").
        prior_prec_init: start of the prior precisions; 0.01·N where not given, because tuning finds its way better from
            a stiff start than from a loose one. Where something is tuned, at most N/(lr·τ·σ²), the limit of stable
            steps. With prior_structure="layerwise" it does not reach the group of elementwise scales and biases: that
            one starts at 1, and with `n_hypersteps=0` it stays at 1, whatever is given here. "scalar" and "parameter"
            give these the same start as all others.
        sigma_noise_init, temperature_init: start of noise (the likelihood's own where not given) and temperature.
        fix_sigma_noise, tune_temperature: what is tuned besides the priors; the noise is, the temperature is not (its
            likelihood is not normalised: `TemperatureWarning`).
        checkpoint_path: where to keep a checkpoint, written after every tuning.
        resume: go on from `checkpoint_path` if it exists; it must be of the same settings. The result is that of the
            uninterrupted run.
        n_data: N that an epoch stands for. Where not given: the length of the sampler or the data set, for a loader with
            `drop_last` that has such; else the examples that one pass over the loader gives, as of an `IterableDataset`.
        dict_key_x, dict_key_y: of batches that are mappings, the entry that tells the number of examples and the device, and the
            targets.
        on_epoch: called after every epoch with a record of it, to which it may add numbers, strings, None, and dicts and
            lists of them.
        progress_bar: show one, if stderr is a terminal.

    Raises:
        UnsupportedParameterError: a parameter has no curvature block; before training.
        InvalidBatchError: the data do not fit model or likelihood, or can be iterated only once; before training.
        ValueError: an option is out of its range; before training.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        TrainingDiverged: the loss became NaN or infinite, or the curvature could not be factorised; the model is back at
            its last good epoch.
        TypeError: `on_epoch` put something else into the record, which is named.

    Source: Immer et al. 2021, "Scalable marginal likelihood estimation for model selection in deep learning".
    """
    schedule = Schedule(n_epochs, n_epochs_burnin, marglik_frequency, n_hypersteps, fit_fraction, max_log_step)
    structure = PriorStructure(prior_structure)
    structure.checked(STRUCTURES[hessian_structure])
    likelihood = make_likelihood(likelihood)
    keys = BatchKeys(dict_key_x, dict_key_y)
    named_parameters = list(trainable_parameters(model).items())
    device = named_parameters[0][1].device
    if tune_temperature:
        warn_of_temperature()
    with left_as_found(model, device):
        with same_order_after(train_loader):
            facts = check_data(model, train_loader, likelihood, keys, n_data)
        generator = torch.Generator(device).manual_seed(int(torch.randint(2**62, ())))
        options = {"hessian_structure": hessian_structure, "backend": backend, "mc_samples": mc_samples}
        options |= {"generator": generator} | kfac_option(hessian_structure, kfac_approx)
        options |= {"dict_key_x": keys.x, "dict_key_y": keys.y}
        la = Laplace(model, likelihood, curvature=curvature, **options)
        la.check(facts.x_first)
        hyper = Hyperparameters(
            prior_groups(la.shapes, structure),
            prior_precision=STIFF_START * facts.n_data if prior_prec_init is None else prior_prec_init,
            sigma_noise=likelihood.sigma_noise if sigma_noise_init is None else sigma_noise_init,
            temperature=temperature_init,
            tune_sigma=likelihood.has_noise and not fix_sigma_noise,
            tune_temperature=tune_temperature,
            hyper_optimizer=hyper_optimizer,
            lr=lr_hyp,
            device=device,
        )
        optimizer = make_optimizer(optimizer_cls, optimizer_kwargs, named_parameters)
        lr_options = scheduler_options(scheduler_cls, scheduler_kwargs, n_epochs * facts.n_batches)
        scheduler = make_scheduler(scheduler_cls, lr_options, optimizer)
        settings = run_settings(
            schedule=schedule,
            facts=facts,
            la=la,
            final_curvature=final_curvature or curvature,
            optimizer=optimizer,
            scheduler=scheduler,
            scheduler_kwargs=lr_options,
            hyper=hyper,
        )
        trainer = Trainer(
            model=model,
            batches=Batches(train_loader, keys),
            facts=facts,
            likelihood=likelihood,
            named_parameters=named_parameters,
            hyper=hyper,
            la=la,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule=schedule,
            settings=settings,
            checkpoint_path=None if checkpoint_path is None else Path(checkpoint_path),
            on_epoch=on_epoch,
            progress_bar=progress_bar,
        )
        if n_hypersteps:
            hyper.check_start(trainer.stiffness)
        if resume and trainer.checkpoint_on_disk() is not None:
            trainer.resume()
        progress = trainer.run()
        start = time.perf_counter()
        if final_curvature not in (None, curvature):
            la = Laplace(model, likelihood, curvature=final_curvature, **options)
            hyper.assign_to(la)
        la.fit(trainer.batches, n_data=facts.n_data)
        return make_result(la, trainer, progress, time.perf_counter() - start)


def warn_of_temperature() -> None:
    """Say what tuning a temperature means."""
    warnings.warn(
        "tune_temperature: a likelihood to the power 1/τ is not normalised over y, so its marginal likelihood rises "
        "with τ as long as the loss is positive, and values at different τ do not compare; watch τ",
        TemperatureWarning,
        stacklevel=3,
    )


def kfac_option(hessian_structure: str, kfac_approx: str | Mapping[str, str]) -> dict[str, Any]:
    """The option of "kron" and "ekfac" that the other structures do not have.

    Raises:
        ValueError: it is given for another structure.
    """
    if hessian_structure in ("kron", "ekfac"):
        return {"kfac_approx": kfac_approx}
    if kfac_approx != "auto":
        raise ValueError(
            f'kfac_approx={kfac_approx!r} is for hessian_structure="kron" and "ekfac", not "{hessian_structure}"'
        )
    return {}


def make_result(la: Laplace, trainer: Trainer, progress: Progress, refit_seconds: float) -> MarglikResult:
    """Gather what the run gives back."""
    return MarglikResult(
        la=la,
        model=trainer.model,
        margliks=progress.margliks,
        losses=progress.losses,
        history=progress.history,
        prior_precision=trainer.hyper.by_parameter(trainer.named_parameters),
        prior_group=trainer.hyper.groups.by_parameter([name for name, _ in trainer.named_parameters]),
        best_epoch=progress.best["epoch"] if progress.best else progress.epoch,
        collapsed=trainer.hyper.collapsed(trainer.stiffness) if trainer.schedule.n_hypersteps else [],
        train_seconds=progress.train_seconds + refit_seconds,
        curvature_seconds=progress.curvature_seconds + refit_seconds,
    )
