"""Online training: the weights by gradient steps, the hyperparameters by the Laplace marginal likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laplace_ws.curvature import Backend
from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.batches import Batches, Data, check_iterable
from laplace_ws.curvature.inputs import DEFAULT_KEYS, BatchKeys
from laplace_ws.curvature.models import check_visible
from laplace_ws.curvature.processes import check_alike, unwrapped
from laplace_ws.curvature.watch import warn_of_final_operation
from laplace_ws.likelihoods import Likelihood, make_likelihood
from laplace_ws.marglik.checkpoint import left_as_found
from laplace_ws.marglik.checks import check_data
from laplace_ws.marglik.optimizers import make_optimizer, make_scheduler, scheduler_options
from laplace_ws.marglik.options import TrainingOptions
from laplace_ws.marglik.passes import same_order_after
from laplace_ws.marglik.result import MarglikResult, Record
from laplace_ws.marglik.schedule import Keep, Schedule
from laplace_ws.marglik.settings import run_settings
from laplace_ws.marglik.trainer import Trainer
from laplace_ws.randomness import as_found_by_the_first, random_state
from laplace_ws.threads import alone_with_random_state
from laplace_ws.values import flag, path_of, shown


def marglik_training(
    model: nn.Module,
    train_loader: Data,
    likelihood: str | Likelihood = "classification",
    hessian_structure: str = TrainingOptions.hessian_structure,
    *,
    curvature: str = TrainingOptions.curvature,
    kfac_approx: str | Mapping[str, str] | None = TrainingOptions.kfac_approx,
    max_factor_dim: int | None = TrainingOptions.max_factor_dim,
    backend: str | Backend = TrainingOptions.backend,
    mc_samples: int = TrainingOptions.mc_samples,
    final_curvature: str | None = TrainingOptions.final_curvature,
    final_kfac_approx: str | Mapping[str, str] = TrainingOptions.final_kfac_approx,
    optimizer_cls: type[torch.optim.Optimizer] = TrainingOptions.optimizer_cls,
    optimizer_kwargs: Mapping[str, Any] | None = TrainingOptions.optimizer_kwargs,
    refit: bool = TrainingOptions.refit,
    scheduler_cls: type[Any] | None = TrainingOptions.scheduler_cls,
    scheduler_kwargs: Mapping[str, Any] | None = TrainingOptions.scheduler_kwargs,
    n_epochs: int = Schedule.n_epochs,
    n_epochs_burnin: int | None = Schedule.n_epochs_burnin,
    marglik_frequency: int | None = Schedule.marglik_frequency,
    n_hypersteps: int = Schedule.n_hypersteps,
    hyper_optimizer: str | None = TrainingOptions.hyper_optimizer,
    lr_hyp: float = TrainingOptions.lr_hyp,
    max_log_step: float = Schedule.max_log_step,
    fit_fraction: float | None = Schedule.fit_fraction,
    curvature_budget: float | None = Schedule.curvature_budget,
    keep: Keep = Schedule.keep,
    prior_structure: str = TrainingOptions.prior_structure,
    prior_prec_init: float | None = TrainingOptions.prior_prec_init,
    sigma_noise_init: float | None = TrainingOptions.sigma_noise_init,
    temperature_init: float = TrainingOptions.temperature_init,
    fix_sigma_noise: bool = TrainingOptions.fix_sigma_noise,
    tune_temperature: bool = TrainingOptions.tune_temperature,
    gradient_accumulation_steps: int = TrainingOptions.gradient_accumulation_steps,
    max_grad_norm: float | None = TrainingOptions.max_grad_norm,
    grad_scaler: torch.amp.GradScaler | None = TrainingOptions.grad_scaler,
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
    learning rate means the same throughout. After `n_epochs_burnin` epochs, every now and then and after the last one, the Laplace
    approximation is fitted at the current weights and the logarithms of the hyperparameters take `n_hypersteps` steps up its log
    marginal likelihood, by default of Adam.

    How often that is, and how many of the batches each of these fits sees, is chosen as the run goes on, such that the wall time of
    tunings stays within `curvature_budget` times that of the gradient steps; `budget.Budget` says how. Where the run is too short to pay
    for a few tunings and the last fit, they are done all the same, and `MarglikResult.over_budget` says by how much the budget was
    passed. As measured times decide, two runs differ; to repeat a run exactly, give `marglik_frequency` and `fit_fraction`, with which
    nothing is measured. "fit_batches" and "curvature_seconds" in the records of the epochs say what was chosen and what it took.

    The weights and hyperparameters of the last epoch are left, and the posterior is fitted there on all the data. `keep="best"` leaves
    those of the tuning with the highest log marginal likelihood instead: an early stopping for trainings whose learning rate does not
    fall. Laplace's approximation holds at a maximum of the joint density, so the values of early epochs, which are far from one, are often
    too high; and where `fit_fraction` is below 1, each is an estimate from its own subset of batches. It is refused where values do not
    compare at all: with numbers of batches that a budget chooses (a fit to fewer of them gives a higher value, as its curvature has fewer
    directions), with `tune_temperature`, and with the averages of an optimiser.

    The model is trained in place. The mode of its modules, its `.grad` and torch's global random state are left as
    they were. Gradient steps run with all modules in train mode, curvature with all in eval mode.

    Args:
        model: the network; parameters that do not require grad stay as they are and get no prior.
        train_loader: gives batches on the model's device, afresh each time it is iterated: pairs (x, y), rows (x1, x2, …, y) for
            `model(x1, x2, …)`, or mappings, see `curvature.inputs.split_batch`.
        likelihood: "classification", "regression", "heteroscedastic_regression", "binary", "reward_modeling", or a
            likelihood.
        hessian_structure: "kron", "ekfac", "diag", "full" or "lowrank" (which needs the same data in each pass: no augmentation, no
            `fit_fraction` of a loader that shuffles).
        curvature, backend, mc_samples: as for `Laplace`.
        kfac_approx: by which the hyperparameters are tuned: "expand", "reduce", "auto", or a mapping, as for `Laplace`. Where not given,
            reduce for outputs `[N, C]`, which is cheaper and tunes as well, and expand for `[N, T, C]`.
        max_factor_dim: as for `Laplace`, of the tuning and of the posterior that is returned.
        final_curvature: of the posterior that is returned; `curvature` where not given.
        final_kfac_approx: of the posterior that is returned. Where its factors are by another approximation than those of the tuning, its
            prior precisions (and noise) are chosen anew, where its own log marginal likelihood is highest: reduce keeps
            too little of the curvature of convolutions for predictions.
        optimizer_cls, optimizer_kwargs: for the weights; SGD with lr 0.03 and Nesterov momentum 0.9 where not given.
            It must have no weight decay, as the prior takes its place, and need no closure, which rules out LBFGS. One whose first
            argument is the model, such as `laplace_ws.optim.KFAC`, is given it.
        refit: whether tunings fit anew even where the optimizer has averaged the curvature. By default, with `KFAC` and "kron", and where
            every parameter has Kronecker factors, a tuning takes those of the optimizer, whose curvature and kfac_approx then count, and
            the training loss of the epoch; it costs no pass over the data. The posterior that is returned is fitted in any case.
        scheduler_cls, scheduler_kwargs: stepped with the optimiser; a cosine to zero where not given.
        n_epochs, n_epochs_burnin, marglik_frequency, n_hypersteps, max_log_step, fit_fraction, curvature_budget: see `Schedule`. Where
            not given, the burn-in is a fifth of the epochs and at most 20, and frequency and fraction are left to the budget; for
            "lowrank", which needs the same data in each pass, only the frequency is. `n_hypersteps=0` trains at fixed hyperparameters.
            With `curvature_budget=None` there is a tuning every 5 epochs, on all the data. Where the budget chooses the fraction, the
            curvature of a fit is averaged with that of the fits before it (`tuning.NEWEST`).
        keep: "last" or "best": whose weights and hyperparameters are left, see above.
        hyper_optimizer: how the log marginal likelihood is maximised: "newton", which goes to the optimum of prior
            precisions and noise within `max_log_step`, whatever `n_hypersteps` above 0; "adam"; or "mackay", `n_hypersteps`
            updates δ ← γ/‖θ‖², σ² ← SSE/(n − γ). Where not given, it is Newton's method, and Adam with `tune_temperature`, which needs it.
        lr_hyp: step size of Adam on the logarithms; unused by the others.
        prior_structure: "scalar", "layerwise" (a bias shares its layer's; the scales and biases of
            normalisations and Fixup share one, which starts at 1), "parameter" (one per tensor), or
            "weight" (for "diag" and "full").
        prior_prec_init: start of the prior precisions; 0.01·N where not given, because tuning works better from a large
            prior precision than from a small one. Where something is tuned, at most N/(lr·τ·σ²), the limit of stable
            steps. With prior_structure="layerwise" it does not reach the group of elementwise scales and biases: that
            one starts at 1, and with `n_hypersteps=0` it stays at 1, whatever is given here. "scalar" and "parameter"
            give these the same start as all others.
        sigma_noise_init, temperature_init: start of noise (the likelihood's own where not given) and temperature.
        fix_sigma_noise, tune_temperature: what is tuned besides the priors; the noise is, the temperature is not (its
            likelihood is not normalised: `TemperatureWarning`).
        gradient_accumulation_steps: batches per optimiser step. A step is that of one batch of all their examples, but for statistics
            over a batch, as of BatchNorm; what is left at the end of an epoch makes a step of its own.
        max_grad_norm: limit of the norm of the gradient, over all weights and with the prior, of the objective that the steps minimise;
            by default there is none.
        grad_scaler: scales losses against underflow under `torch.autocast` in float16; a step whose gradients overflow is left out.
            It is used and changed, and its state is kept in the checkpoint.
        checkpoint_path: where to keep a checkpoint, written after every tuning, and every `marglik_frequency` (or 5) epochs.
        resume: continue from `checkpoint_path` if it exists; its settings must be the same. The result is that of an
            uninterrupted run; under a budget it goes on with the times that were measured, and may differ as two runs may.
        n_data: N, the number of examples that an epoch stands for. Where not given: for a loader with `drop_last`, the length of
            its sampler or data set, if it has one; else the number of examples that one pass over the loader gives.
        dict_key_x, dict_key_y: for batches that are mappings, the entry that gives the number of examples and the device, and the
            targets.
        on_epoch: called after every epoch with a record of it, to which it may add numbers, strings, None, and dicts and
            lists of them.
        progress_bar: show one on stderr, or, where that is no terminal, a line for each epoch.

    Raises:
        UnsupportedParameterError: a parameter has no curvature block; before training.
        InvalidBatchError: the data do not fit model or likelihood, or can be iterated only once; before training.
        ValueError: an option is out of its range; before training.
        CheckpointError: the checkpoint is damaged or belongs to another run.
        TrainingDiverged: the loss became NaN or infinite, or the curvature could not be factorised; the model is back at
            its last good epoch.
        TypeError: `on_epoch` put anything else into the record; it is named.
        RuntimeError: another thread is training the model.

    Source: Immer et al. 2021, "Scalable marginal likelihood estimation for model selection in deep learning".
    """
    if flag("resume", resume) and checkpoint_path is None:
        raise ValueError("resume=True needs checkpoint_path, the file to go on from.")
    schedule = Schedule(
        n_epochs=n_epochs,
        n_epochs_burnin=n_epochs_burnin,
        marglik_frequency=marglik_frequency,
        n_hypersteps=n_hypersteps,
        fit_fraction=fit_fraction,
        max_log_step=max_log_step,
        curvature_budget=curvature_budget,
        keep=keep,
    )
    options = TrainingOptions(
        hessian_structure=hessian_structure,
        curvature=curvature,
        kfac_approx=kfac_approx,
        max_factor_dim=max_factor_dim,
        backend=backend,
        mc_samples=mc_samples,
        final_curvature=final_curvature,
        final_kfac_approx=final_kfac_approx,
        optimizer_cls=optimizer_cls,
        optimizer_kwargs=optimizer_kwargs,
        refit=refit,
        scheduler_cls=scheduler_cls,
        scheduler_kwargs=scheduler_kwargs,
        hyper_optimizer=hyper_optimizer,
        lr_hyp=lr_hyp,
        prior_structure=prior_structure,
        prior_prec_init=prior_prec_init,
        sigma_noise_init=sigma_noise_init,
        temperature_init=temperature_init,
        fix_sigma_noise=fix_sigma_noise,
        tune_temperature=tune_temperature,
        gradient_accumulation_steps=gradient_accumulation_steps,
        max_grad_norm=max_grad_norm,
        grad_scaler=grad_scaler,
    )
    trainer = prepare(
        model,
        train_loader,
        likelihood,
        schedule,
        options,
        checkpoint_path=checkpoint_path,
        n_data=n_data,
        keys=BatchKeys(dict_key_x, dict_key_y),
        on_epoch=on_epoch,
        progress_bar=progress_bar,
    )
    if resume:
        trainer.resume()
    return trainer.run()


def prepare(
    model: nn.Module,
    train_loader: Data,
    likelihood: str | Likelihood,
    schedule: Schedule,
    options: TrainingOptions,
    *,
    checkpoint_path: str | Path | None = None,
    n_data: int | None = None,
    keys: BatchKeys = DEFAULT_KEYS,
    on_epoch: Callable[[Record], None] | None = None,
    progress_bar: bool = True,
) -> Trainer:
    """Check everything that training needs of the model and the data, and return the trainer that will run it.

    No gradient step is taken, and nothing is written; the model and torch's global random state are left as they were. The data
    are read once, and the model is run on their first batch.

    Args:
        model: the network.
        train_loader: the training data.
        likelihood: of the targets.
        schedule: when the hyperparameters are tuned.
        options: all else that shapes the result.
        checkpoint_path: where to keep a checkpoint; an existing one is used only by `Trainer.resume`.
        n_data: number of examples N that an epoch stands for.
        keys: names of the entries of batches that are mappings.
        on_epoch: called after every epoch with its record.
        progress_bar: show one on stderr, or, where that is no terminal, a line for each epoch.

    Raises:
        UnsupportedParameterError: a parameter has no curvature block.
        InvalidBatchError: the data do not fit model or likelihood, or can be iterated only once.
        ValueError: an option is out of its range.
    """
    _check_types(schedule, options, checkpoint_path, on_epoch)
    model = unwrapped(model)
    likelihood = make_likelihood(likelihood)
    named_parameters = list(trainable_parameters(model).items())
    check_visible(model, [p for _, p in named_parameters])
    check_iterable(train_loader)
    device = named_parameters[0][1].device
    with alone_with_random_state(), left_as_found(model, device), as_found_by_the_first(device):
        with same_order_after(train_loader):
            facts = check_data(model, train_loader, likelihood, keys, n_data)
        group = Batches.of(train_loader, model, keys).processes
        generator = torch.Generator(device).manual_seed(group.gather(int(torch.randint(2**62, ())))[0])
        la, final_la = options.posteriors(model, likelihood, generator, keys, facts.output_ndim)
        if la.structure.needs_same_data and schedule.fit_fraction is None:
            schedule = replace(schedule, fit_fraction=1.0)
        hyper = options.hyperparameters(la, facts.n_data, device)
        optimizer = make_optimizer(
            options.optimizer_cls,
            options.optimizer_kwargs,
            named_parameters,
            model=model,
            grad_scaler=options.steps.active_scaler,
        )
        n_steps = schedule.n_epochs * options.steps.n_steps(facts.n_batches)
        lr_options = scheduler_options(options.scheduler_cls, options.scheduler_kwargs, n_steps)
        scheduler = make_scheduler(options.scheduler_cls, lr_options, optimizer)
        trainer = Trainer(
            la=la,
            final_la=final_la,
            hyper=hyper,
            batches=Batches.of(train_loader, model, keys),
            facts=facts,
            optimizer=optimizer,
            scheduler=scheduler,
            schedule=schedule,
            prior_structure=options.prior_structure,
            step_options=options.steps,
            settings=run_settings(
                schedule=schedule,
                facts=facts,
                la=la,
                final_options=final_la.options,
                optimizer=optimizer,
                scheduler=scheduler,
                scheduler_kwargs=lr_options,
                hyper=hyper,
                steps=options.steps,
                refit=options.refit,
            ),
            rng=random_state(device),
            refit=options.refit,
            checkpoint_path=None if checkpoint_path is None else Path(checkpoint_path),
            on_epoch=on_epoch,
            progress_bar=flag("progress_bar", progress_bar),
        )
        if schedule.n_hypersteps:
            hyper.check_start(trainer.stiffness)
        with group.together("the check of the model"):
            la.check(facts.x_first)
            check_alike(group, model, trainer.settings)
        warn_of_final_operation(model, likelihood, la.network.final_operation(facts.x_first), stacklevel=3)
        return trainer


def _check_types(schedule: object, options: object, checkpoint_path: object, on_epoch: object) -> None:
    for name, value, kind in (("schedule", schedule, Schedule), ("options", options, TrainingOptions)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {shown(value)}.")
    if checkpoint_path is not None:
        path = path_of("checkpoint_path", checkpoint_path)
        if path.is_dir() or not path.parent.is_dir():
            what = "is a folder" if path.is_dir() else f"lies in '{path.parent}', which is no folder"
            raise ValueError(f"checkpoint_path '{path}' {what}; give a file in a folder that exists.")
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch must be a function of an epoch's record, or None, got {shown(on_epoch)}.")
