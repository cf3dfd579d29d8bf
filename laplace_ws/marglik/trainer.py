"""One training run: epochs of gradient steps, with the hyperparameters tuned in between."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DistributedSampler
from tqdm import tqdm

from laplace_ws.curvature.backend import trainable_parameters
from laplace_ws.curvature.batches import Batches, Data
from laplace_ws.curvature.inputs import call_model
from laplace_ws.distributed import ProcessError, Processes
from laplace_ws.errors import InvalidBatchError
from laplace_ws.files import FileFormatError
from laplace_ws.kfac.uses import at_least_float32
from laplace_ws.likelihoods import Likelihood
from laplace_ws.marglik.accuracy import n_correct
from laplace_ws.marglik.budget import OTHER_APPROXIMATION, Budget, Spent, TuningCost
from laplace_ws.marglik.checkpoint import (
    SAFE_TO_CHANGE,
    check_settings,
    copied,
    left_as_found,
    load_training,
    may_change,
    refused_by_name,
    save_checkpoint,
    snapshot,
)
from laplace_ws.marglik.checkpoint_checks import check_fits
from laplace_ws.marglik.checks import DataFacts, check_comparable, one_pass_error
from laplace_ws.marglik.hyperparameters import Hyperparameters, TemperatureWarning
from laplace_ws.marglik.lines import has_terminal, say_epoch
from laplace_ws.marglik.objective import PriorGradient
from laplace_ws.marglik.optimizers import rescale_lr
from laplace_ws.marglik.plain import plain_record
from laplace_ws.marglik.result import MarglikResult, Progress, Record
from laplace_ws.marglik.schedule import Schedule, TrainingDiverged
from laplace_ws.marglik.steps import GradientSteps, StepOptions
from laplace_ws.marglik.tuning import Tuner, Tuning
from laplace_ws.posterior import Laplace
from laplace_ws.posterior.averages import averages_of
from laplace_ws.posterior.evidence import optimal_prior_and_noise
from laplace_ws.randomness import random_state, set_random_state
from laplace_ws.saved import on_device
from laplace_ws.threads import alone_with, alone_with_modules, alone_with_random_state, trained_by_one

_STEPS_BETWEEN_LOSS_CHECKS = 20


@dataclass
class Trainer:
    """A training run that is ready to start: `run` trains. Made by `prepare`, which checks that all of this fits together.

    The hyperparameters of `la` are kept equal to `hyper`. What `run` leaves is the state after the last epoch, or, with `schedule.keep`
    "best", that with the highest log marginal likelihood.

    Attributes:
        la: the posterior whose marginal likelihood tunes the hyperparameters.
        final_la: the one that is returned, of the same model and likelihood; may be `la`.
        hyper: the hyperparameters.
        batches: the training data.
        facts: what the first pass over them revealed.
        optimizer: of the weights.
        scheduler: of its learning rate.
        schedule: when the hyperparameters are tuned.
        prior_structure: which weights share a prior precision.
        step_options: how gradients become optimiser steps.
        settings: what a checkpoint must agree with.
        rng: the state of torch's global random number generators that the training starts from.
        refit: whether tunings fit anew even where the optimiser averages curvature.
        checkpoint_path: where a checkpoint is kept.
        on_epoch: called after each epoch with its record.
        progress_bar: whether to show one, or, without a terminal, a line for each epoch.
        clock: tells the time in seconds, by which a budget is kept.
    """

    la: Laplace
    final_la: Laplace
    hyper: Hyperparameters
    batches: Batches
    facts: DataFacts
    optimizer: torch.optim.Optimizer
    scheduler: Any
    schedule: Schedule
    prior_structure: str
    step_options: StepOptions
    settings: dict[str, Any]
    rng: dict[str, torch.Tensor]
    refit: bool = False
    checkpoint_path: Path | None = None
    on_epoch: Callable[[Record], None] | None = None
    progress_bar: bool = True
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.model: torch.nn.Module = self.la.model
        self.likelihood: Likelihood = self.la.likelihood
        self.named_parameters: list[tuple[str, torch.nn.Parameter]] = list(trainable_parameters(self.model).items())
        self.parameters: list[torch.nn.Parameter] = [p for _, p in self.named_parameters]
        self.loader: Data = self.batches.loader
        self.n_data: int = self.facts.n_data
        self.device: torch.device = self.parameters[0].device
        lr = max(float(g.get("initial_lr", g["lr"])) for g in self.optimizer.param_groups)
        self.stiffness: float = self.n_data / lr if lr > 0 else math.inf
        is_other = self.final_la.structure.options() != self.la.structure.options()
        self.budget: Budget | None = self.schedule.budget(
            self.facts.n_batches, OTHER_APPROXIMATION if is_other else 1.0
        )
        averages = None
        if self.la.structure.name == "kron" and not self.refit:
            averages = averages_of(self.optimizer)
        if self.schedule.keep == "best" and self.schedule.n_hypersteps:
            check_comparable(self.hyper.tuned_names, averages=averages is not None)
        subset_generator = torch.Generator().manual_seed(self.la.generator.initial_seed())
        shuffler = getattr(self.loader, "generator", None)
        self.generators: list[torch.Generator] = [self.la.generator, subset_generator]
        self.generators += [shuffler] if isinstance(shuffler, torch.Generator) else []
        self.progress: Progress = Progress()
        self.before_epoch: dict[str, Any] | None = None
        self.saved_epoch: int = 0
        self.processes: Processes = self.batches.processes
        n_usual = max(1, round(self.n_data / self.facts.n_batches))
        self.steps: GradientSteps = GradientSteps(
            self.optimizer, self.scheduler, self.step_options, self.processes, n_usual
        )
        self.tuner: Tuner = Tuner(
            la=self.la,
            hyper=self.hyper,
            batches=self.batches,
            facts=self.facts,
            n_hypersteps=self.schedule.n_hypersteps,
            max_log_step=self.schedule.max_log_step,
            stiffness=self.stiffness,
            generator=subset_generator,
            optimizer=averages,
            averages=self.budget is not None and self.budget.varies and not self.la.structure.reads_data_again,
        )
        self.hyper.assign_to(self.la)

    def run(self) -> MarglikResult:
        """Train to the last epoch, leave model and hyperparameters as `schedule.keep` says, and fit the posterior there.

        The mode of the model's modules, its `.grad` and torch's global random state are left as they were.

        Raises:
            TrainingDiverged: a loss or a marginal likelihood is NaN or infinite, or the curvature has no factorisation.
            InvalidBatchError: the loader gave no batch.
            TypeError: `on_epoch` put something into the record that a checkpoint cannot hold.
            RuntimeError: another thread is training the model.

        Warns:
            TemperatureWarning: the temperature is tuned.
        """
        if "temperature" in self.hyper.tuned_names:
            warnings.warn(
                "tune_temperature: a likelihood to the power 1/τ is not normalised over y, so its marginal likelihood rises "
                "with τ as long as the loss is positive, and values at different τ do not compare; watch τ",
                TemperatureWarning,
                stacklevel=3,
            )
        with trained_by_one(self.model), ExitStack() as stack:
            with alone_with_random_state():  # not in the midst of another thread's `prepare`
                stack.enter_context(left_as_found(self.model, self.device))
                set_random_state(self.rng, self.device)
            with self.processes.together("the training"):
                self._train()
                start = self.clock()
                self._fit_final()
                return self._result(self.clock() - start)

    def _fit_final(self) -> None:
        """Fit the posterior that is returned; choose its hyperparameters anew where they were tuned by another approximation."""
        la, network = self.final_la, self.la.network
        self.hyper.assign_to(la)
        la.fit(self.batches, n_data=self.n_data, recheck=False)
        by_another = self.tuner.optimizer is not None or la.structure.resolved(network) != self.la.structure.resolved(
            network
        )
        if self.schedule.n_hypersteps and by_another:
            fix_noise = "sigma_noise" not in self.hyper.tuned_names
            delta, sigma = optimal_prior_and_noise(la.fitted, la.prior, self.prior_structure, fix_noise=fix_noise)
            la.prior = la.prior.changed(precision=delta, sigma_noise=sigma)

    def _train(self) -> None:
        shows = self.progress_bar and self.processes.is_first
        bar = tqdm(
            total=self.schedule.n_epochs,
            initial=self.progress.epoch,
            desc="marglik training",
            unit="epoch",
            disable=not (shows and sys.stderr.isatty()),
        )
        with bar, self._kept_if_cut_off():
            while self.progress.epoch < self.schedule.n_epochs:
                record = self._epoch(self.progress.epoch + 1)
                if shows and not has_terminal():
                    say_epoch(record, self.schedule.n_epochs)
                bar.update()
                bar.set_postfix(nll=record["train_nll"], log_marglik=self.progress.margliks[-1:] or None)
        if self.progress.best is not None:
            self._load(self.progress.best["model"])
            self.hyper.load_state_dict(self.progress.best["hyper"])
            self.hyper.assign_to(self.la)

    @contextmanager
    def _kept_if_cut_off(self) -> Iterator[None]:
        """Write the last whole epoch into the checkpoint where the training is interrupted, or diverges."""
        try:
            yield
        except (KeyboardInterrupt, TrainingDiverged, ProcessError) as error:
            diverged = isinstance(error, TrainingDiverged)
            state, path = self.before_epoch, self.checkpoint_path
            if path is not None and state is not None and (diverged or state["progress"]["epoch"] > self.saved_epoch):
                self._save({**state, "diverged": diverged})
            if isinstance(error, TrainingDiverged):
                error.checkpoint_path = self.checkpoint_on_disk()
            raise

    def _save(self, state: dict[str, Any]) -> None:
        """Write the checkpoint, which is the same in all processes, in the first of them."""
        if self.checkpoint_path is not None and self.processes.is_first:
            save_checkpoint(self.checkpoint_path, state)

    def _load(self, state: dict[str, Any]) -> None:
        with alone_with(self.model):
            self.model.load_state_dict(state)

    def _result(self, final_fit_seconds: float) -> MarglikResult:
        progress = self.progress
        return MarglikResult(
            la=self.final_la,
            model=self.model,
            margliks=progress.margliks,
            losses=progress.losses,
            history=progress.history,
            prior_precision=self.hyper.by_parameter(self.named_parameters),
            prior_group=self.hyper.groups.by_parameter([name for name, _ in self.named_parameters]),
            best_epoch=progress.best["epoch"] if progress.best else progress.epoch,
            collapsed=self.hyper.collapsed(self.stiffness) if self.schedule.n_hypersteps else [],
            train_seconds=progress.train_seconds + final_fit_seconds,
            curvature_seconds=progress.curvature_seconds + final_fit_seconds,
            final_fit_seconds=final_fit_seconds,
            curvature_budget=self.schedule.budget_in_effect,
            changes=progress.changes,
        )

    def _epoch(self, epoch: int) -> Record:
        start = self.clock()
        lr = self.optimizer.param_groups[0]["lr"]
        if self.checkpoint_path is not None and self.progress.epoch:
            self.before_epoch = self._whole_epoch()
            good = self.before_epoch["model"], self.before_epoch["hyper"]
        else:
            good = snapshot(self.model), snapshot(self.hyper)
        try:
            self._begin_epoch(epoch)
            nll, unit_nll, accuracy = self._descend(epoch)
            tuning = self._tune(epoch, unit_nll * self.n_data, self.clock() - start)
        except TrainingDiverged:
            self._load(good[0])
            self.hyper.load_state_dict(good[1])
            self.hyper.assign_to(self.la)
            raise
        seconds = self.clock() - start
        curvature_seconds = tuning.seconds if tuning else 0.0
        self.progress.epoch = epoch
        self.progress.train_seconds += seconds
        self.progress.curvature_seconds += curvature_seconds
        record: Record = {
            "epoch": epoch,
            "loss": self.progress.losses[-1],
            "train_nll": nll,
            "train_accuracy": accuracy,
            "log_marginal_likelihood": tuning.log_marglik if tuning else None,
            "fit_batches": tuning.n_batches if tuning else 0,
            "prior_precision": self.hyper.by_parameter(self.named_parameters),
            "sigma_noise": self.hyper.sigma_noise().item() if self.likelihood.has_noise else None,
            "temperature": self.hyper.temperature().item(),
            "lr": lr,
            "seconds": seconds,
            "curvature_seconds": curvature_seconds,
        }
        if self.on_epoch is not None:
            self.on_epoch(record)
        record = plain_record(record)
        self.progress.history.append(record)
        if self.checkpoint_path is not None and (tuning or self.schedule.is_round(epoch)):
            self._save(self.state_dict())
            self.saved_epoch = epoch
        return record

    def _begin_epoch(self, epoch: int) -> None:
        """Let a sampler that orders the data by the epoch know it, and have each process draw random numbers of its own."""
        sampler = getattr(self.loader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        if self.processes.size > 1:
            seed = self.processes.gather(int(torch.randint(2**62, ())))[0]
            if (
                not self.processes.is_first
            ):  # the first goes on as it is, so that its state is all that a checkpoint needs
                torch.manual_seed(seed + self.processes.rank)

    def _descend(self, epoch: int) -> tuple[float, float, float | None]:
        """Gradient steps over one epoch.

        Returns the mean NLL in nats, at the noise and at σ = 1, and the accuracy, all taken while the weights change.

        The objective is scaled by τσ², so that a learning rate means the same at any noise and temperature.
        """
        sigma, temperature = self.hyper.sigma_noise().item(), self.hyper.temperature().item()
        variance = sigma**2 if self.likelihood.has_noise else 1.0
        likelihood, unit_likelihood = self.likelihood.at_noise(sigma), self.likelihood.at_noise(1.0)
        prior = PriorGradient(
            self.parameters, self.hyper.prior_precision(), n_data=self.n_data, scale=temperature * variance
        )
        totals = torch.zeros(4, dtype=torch.float64, device=self.device)
        n_seen = 0
        modules = tuple(self.model.modules())
        self.steps.start_epoch()
        with alone_with_modules(modules):
            self.model.train()
        batches = replace(self.batches, on_empty=lambda: self.steps.add_nothing(prior))
        for step, (x, y) in enumerate(batches):
            with alone_with_modules(modules):
                self.steps.before_batch()
                f = at_least_float32(call_model(self.model, x))
                nll = likelihood.nll_sum(f, y)
                self.steps.add(nll, variance, len(x), prior)
            totals[0] += nll.detach().double()
            if likelihood.has_noise and self.tuner.optimizer is not None:
                totals[3] += unit_likelihood.nll_sum(f.detach(), y).double()
            if not likelihood.is_regression:
                mask = likelihood.term_mask(f, y)
                totals[1] += n_correct(f.detach(), y, mask)
                totals[2] += len(x) if mask is None else mask.flatten(1).any(1).sum()
            n_seen += len(x)
            if step % _STEPS_BETWEEN_LOSS_CHECKS == 0:
                self._check_finite("the training loss", totals[0].item(), epoch)
        if n_seen == 0:
            raise one_pass_error(self.loader)
        with alone_with_modules(modules):
            self.steps.end_epoch(prior)
        if self.processes.size > 1:
            n_seen = sum(self.processes.gather(n_seen))
            self.processes.sum_([totals])
            self._average_statistics()
        nll_sum, correct, labelled, unit_nll_sum = totals.tolist()
        self._check_finite("the training loss", nll_sum, epoch)
        self._check_finite("the regulariser", penalty := prior.penalty_mean(), epoch)
        self.progress.losses.append(nll_sum / n_seen / temperature + penalty)
        unit_nll = (unit_nll_sum if likelihood.has_noise else nll_sum) / n_seen
        return nll_sum / n_seen, unit_nll, correct / labelled if labelled and math.isfinite(correct) else None

    def _average_statistics(self) -> None:
        """Take the means, over the processes, of what their modules have seen of the data, such as the running means of BatchNorm."""
        with alone_with(self.model), torch.no_grad():
            buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
            self.processes.sum_(buffers)
            for buffer in buffers:
                buffer.div_(self.processes.size)

    def _tune(self, epoch: int, nll_sum: float, gradient_seconds: float) -> Tuning | None:
        """Fit, tune and measure where a tuning is due.

        Args:
            epoch: whose gradient steps have been taken.
            nll_sum: of all the data at σ = 1, as it was over the epoch.
            gradient_seconds: that they took.
        """
        n_batches = self._batches_due(epoch, gradient_seconds)
        if n_batches == 0:
            return None
        try:
            tuning = self.tuner.tune(n_batches, nll_sum, self.clock)
        except (InvalidBatchError, FloatingPointError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
            raise TrainingDiverged(f"no tuning was possible ({error})", epoch, self.checkpoint_on_disk()) from error
        self._check_finite("the log marginal likelihood", tuning.log_marglik, epoch)
        self.progress.tuning_cost = asdict(tuning.cost.learned_after(self._known_cost()))
        self.progress.margliks.append(tuning.log_marglik)
        best = self.progress.best
        if self.schedule.keep == "best" and (best is None or tuning.log_marglik > best["log_marginal_likelihood"]):
            self.progress.best = {
                "epoch": epoch,
                "log_marginal_likelihood": tuning.log_marglik,
                "model": snapshot(self.model),
                "hyper": snapshot(self.hyper),
            }
        return tuning

    def _batches_due(self, epoch: int, gradient_seconds: float) -> int:
        """Number of batches of the fit that is due after an epoch's gradient steps, 0 where none is."""
        if self.budget is None:
            return self.schedule.fit_batches(self.facts.n_batches) if self.schedule.tunes(epoch) else 0
        done = self.progress
        spent = Spent(
            gradient_seconds=done.train_seconds - done.curvature_seconds + gradient_seconds,
            tuning_seconds=done.curvature_seconds,
            n_tunings=len(done.margliks),
            cost=self._known_cost(),
        )
        return self.processes.gather(self.budget.batches_after(epoch, spent))[0]  # each has a clock of its own

    def _known_cost(self) -> TuningCost | None:
        cost = self.progress.tuning_cost
        return None if cost is None else TuningCost(**cost)

    def _check_finite(self, what: str, value: float, epoch: int) -> None:
        if not math.isfinite(value):
            raise TrainingDiverged(f"{what} became {value}", epoch, self.checkpoint_on_disk())

    def checkpoint_on_disk(self) -> Path | None:
        """The checkpoint's path, if there is one."""
        path = self.checkpoint_path
        return path if path is not None and path.exists() else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end as this one would: tensors and primitives."""
        return {
            "settings": self.settings,
            "progress": {f: getattr(self.progress, f) for f in Progress.__dataclass_fields__},
            "model": snapshot(self.model),
            "optimizer": self.optimizer.state_dict(),
            "grad_scaler": self.steps.scaler.state_dict() if self.steps.scaler else {},
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if not callable(v)},
            "hyper": self.hyper.state_dict(),
            "loader": getattr(self.loader, "state_dict", dict)(),
            "generators": [generator.get_state() for generator in self.generators],
            "averaged_curvature": None if self.tuner.earlier is None else self.tuner.earlier.state_dict(),
            "rng": random_state(self.device),
            "diverged": False,
        }

    def _whole_epoch(self) -> dict[str, Any]:
        """`state_dict` as the next epoch will leave it alone."""
        state = self.state_dict()
        state["progress"] = {k: list(v) if isinstance(v, list) else v for k, v in state["progress"].items()}
        return state | {part: copied(state[part]) for part in ("optimizer", "scheduler", "hyper", "loader")}

    def resume(self) -> None:
        """Resume from the checkpoint on disk, if there is one.

        All of it is applied, or, where it is refused, nothing. After a training that diverged, and after one that has finished, what is
        `SAFE_TO_CHANGE` may differ; `progress.changes` says since which epoch.

        Raises:
            CheckpointError: it cannot be read, is damaged, or was made under other settings.
        """
        with self.processes.together("reading the checkpoint"):
            self._resume()

    def _resume(self) -> None:
        path = self.checkpoint_on_disk()
        self.processes.check_same({"checkpoint": path is not None})
        if path is None:
            return
        state = load_training(path)
        may_differ = SAFE_TO_CHANGE if may_change(state, self.schedule.n_epochs) else ()
        changed = check_settings(path, state["settings"], self.settings, may_differ)
        lrs = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        before = copy.deepcopy(self.state_dict() | {"rng": self.rng})
        with refused_by_name(path):
            check_fits(state, before, self.model, self.optimizer, self.hyper.optimizer, self.schedule.n_epochs)
            try:
                self._apply(state)
            except Exception as error:
                self._apply(before)
                raise FileFormatError(f"the saved state does not fit this run ({type(error).__name__})") from error
        rescale_lr(self.optimizer, self.scheduler, lrs)
        self.saved_epoch = self.progress.epoch
        for setting, (was, now) in changed.items():
            self.progress.changes.append({"epoch": self.progress.epoch, "setting": setting, "was": was, "now": now})

    def _apply(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.progress = Progress(**state["progress"])
        self._load(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.steps.scaler:
            self.steps.scaler.load_state_dict(state["grad_scaler"])
        self.hyper.load_state_dict(state["hyper"])
        self.hyper.assign_to(self.la)
        if state["loader"]:
            self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        for generator, saved in zip(self.generators, state["generators"], strict=True):
            generator.set_state(saved.cpu())
        self.rng = state["rng"]
        averaged = state.get("averaged_curvature")  # checkpoints from before there were budgets have none
        matrix = self.la.structure.matrix
        self.tuner.earlier = (
            None if averaged is None else matrix.from_state_dict(self.la.shapes, on_device(averaged, self.device))
        )
