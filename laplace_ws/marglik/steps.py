"""Optimiser steps, each on the gradient of one batch or of several, with its norm limited, and with the loss scaled for float16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_ws.distributed import ALONE, Processes
from laplace_ws.marglik.objective import PriorGradient
from laplace_ws.values import real_number, shown, whole_number


@dataclass(frozen=True)
class StepOptions:
    """How gradients become optimiser steps; `marglik_training` documents each option.

    Raises:
        TypeError: one of them is of another type.
        ValueError: one of them is out of its range.
    """

    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = None
    grad_scaler: torch.amp.GradScaler | None = None

    def __post_init__(self) -> None:
        whole_number("gradient_accumulation_steps", self.gradient_accumulation_steps, least=1)
        if self.max_grad_norm is not None:
            real_number("max_grad_norm", self.max_grad_norm, above=0)
        if self.grad_scaler is not None and not isinstance(self.grad_scaler, torch.amp.GradScaler):
            raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, or None, got {shown(self.grad_scaler)}.")

    @property
    def active_scaler(self) -> torch.amp.GradScaler | None:
        """The scaler, unless it is disabled."""
        return self.grad_scaler if self.grad_scaler is not None and self.grad_scaler.is_enabled() else None

    def n_steps(self, n_batches: int) -> int:
        """Optimiser steps in an epoch of so many batches."""
        return math.ceil(n_batches / self.gradient_accumulation_steps)

    def settings(self) -> dict[str, Any]:
        """What the result depends on; None where it is the default, as in checkpoints from before there was a choice."""
        k, limit, scaler = self.gradient_accumulation_steps, self.max_grad_norm, self.active_scaler
        growth = {
            "growth_factor": scaler.get_growth_factor(),
            "backoff_factor": scaler.get_backoff_factor(),
            "growth_interval": scaler.get_growth_interval(),
        } if scaler is not None else None  # fmt: skip
        return {
            "gradient_accumulation_steps": None if k == 1 else k,
            "max_grad_norm": limit,
            "grad_scaler": growth,
        }


class GradientSteps:
    """Takes optimiser steps from the losses of batches.

    Args:
        optimizer: of the weights.
        scheduler: of its learning rate, stepped with it.
        options: how gradients become steps.
        processes: those whose gradients make up one step; each has examples of its own.
        n_usual: examples that all processes together have in a batch as a rule, by which losses are scaled until their number is known.

    Raises:
        ValueError: the gradients of float16 parameters cannot be unscaled.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: StepOptions,
        processes: Processes = ALONE,
        n_usual: int = 1,
    ) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self._processes, self._n_usual = processes, n_usual
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._n_batches = int(options.gradient_accumulation_steps)
        self._max_norm = options.max_grad_norm
        self.scaler: torch.amp.GradScaler | None = options.active_scaler
        self._pending = self._n_first = self._n_examples = 0
        if self.scaler is not None and any(p.dtype == torch.float16 for p in self._parameters):
            raise ValueError(
                "grad_scaler is for float32 parameters under torch.autocast, and some here are torch.float16; convert the model by "
                "model.float(), or leave grad_scaler out"
            )

    def start_epoch(self) -> None:
        """Forget batches that were added without a step, as in an epoch that ended early."""
        self._pending = 0

    def before_batch(self) -> None:
        """To be called before the forward pass of each batch: frees the gradients of the last step."""
        if not self._pending:
            self._optimizer.zero_grad(set_to_none=True)

    def add(self, loss_sum: Tensor, scale: float, n_examples: int, prior: PriorGradient) -> None:
        """Add the gradient of a batch, and take a step if it is the last of its group.

        Args:
            loss_sum: the loss summed over the examples of the batch.
            scale: factor on it.
            n_examples: number of examples in the batch.
            prior: the gradient of the prior, once for each step.
        """
        if not self._pending:
            self._n_first, self._n_examples = (n_examples if self._processes.size == 1 else self._n_usual), 0
        loss = loss_sum * (scale / self._n_first)  # per example of the group only once their number is known
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self._n_examples += n_examples
        self._pending += 1
        if self._pending == self._n_batches:
            self._step(prior)

    def add_nothing(self, prior: PriorGradient) -> None:
        """Take part in a batch of which this process has no example."""
        if not self._pending:
            self.before_batch()
            self._n_first, self._n_examples = self._n_usual, 0
        self._pending += 1
        if self._pending == self._n_batches:
            self._step(prior)

    def end_epoch(self, prior: PriorGradient) -> None:
        """Take a step on the batches that are left over."""
        if self._pending:
            self._step(prior)

    def _sum_over_processes(self) -> None:
        """Replace the gradients and the number of examples by their sums over all processes."""
        if self._processes.size == 1:
            return
        for p in self._parameters:
            if p.grad is None:  # no example here, or none that uses it
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        n_examples = gradients[0].new_tensor([self._n_examples], dtype=torch.float64)
        self._processes.sum_([*gradients, n_examples])
        self._n_examples = int(n_examples.item())

    def _step(self, prior: PriorGradient) -> None:
        self._pending = 0
        self._sum_over_processes()
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        if self._n_examples != self._n_first:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            torch._foreach_mul_(gradients, self._n_first / self._n_examples)  # pyright: ignore[reportPrivateImportUsage]
        prior.add_()
        if self._max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        if self.scaler is None:
            self._optimizer.step()
        else:
            scale = self.scaler.get_scale()
            self.scaler.step(self._optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < scale:  # gradients overflowed, and there was no step
                return
        self._scheduler.step()
