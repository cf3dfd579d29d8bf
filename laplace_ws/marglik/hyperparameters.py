"""Prior precisions by group, observation noise and temperature, and the damped ascent that tunes them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.posterior import Laplace
from laplace_ws.posterior.evidence import BOUNDS, Box, Evidence
from laplace_ws.posterior.groups import ELEMENTWISE, PriorGroups
from laplace_ws.values import real_number

ELEMENTWISE_START = 1.0
"""Where `ELEMENTWISE` starts: a tight prior at zero would shrink the scales, whose natural size is one, and with them the signal."""


class PriorCollapseWarning(UserWarning):
    """A prior precision was tuned up to its limit, so the weights under it are held at zero."""


class TemperatureWarning(UserWarning):
    """The temperature is tuned by a marginal likelihood that is not normalised."""


class HyperOptimizer(str, Enum):
    """How the log marginal likelihood is maximised: by steps of Adam, Newton's method or MacKay's updates."""

    ADAM = "adam"
    NEWTON = "newton"
    MACKAY = "mackay"

    @classmethod
    def _missing_(cls, value: object) -> HyperOptimizer:
        raise ValueError(f"hyper_optimizer={value!r} is not one of {[member.value for member in cls]}")


class Hyperparameters(nn.Module):
    """Log prior precisions by group, log noise and log temperature, with the optimiser that tunes them.

    Everything is float64, on `device`. `state_dict` holds the values, the state of Adam and the names already
    reported as collapsed, so that a resumed run continues as an uninterrupted one would.

    Args:
        groups: which prior precision governs which parameter.
        prior_precision: the value that every group starts from, except `ELEMENTWISE`, which next to other groups starts from
            `ELEMENTWISE_START` and stays there unless `ascend` changes it.
        sigma_noise: standard deviation of Gaussian observation noise at the start.
        temperature: of the likelihood, at the start.
        tune_prior, tune_sigma, tune_temperature: what `ascend` may change.
        hyper_optimizer: "adam", "newton" or "mackay"; only Adam tunes the temperature.
        lr: step size of Adam on the logarithms.
    """

    log_prior_precision: nn.Parameter
    log_sigma_noise: nn.Parameter
    log_temperature: nn.Parameter

    def __init__(
        self,
        groups: PriorGroups,
        *,
        prior_precision: float = 1.0,
        sigma_noise: float = 1.0,
        temperature: float = 1.0,
        tune_prior: bool = True,
        tune_sigma: bool = False,
        tune_temperature: bool = False,
        hyper_optimizer: HyperOptimizer | str = HyperOptimizer.ADAM,
        lr: float = 0.1,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.hyper_optimizer: HyperOptimizer = HyperOptimizer(hyper_optimizer)
        is_adam = self.hyper_optimizer is HyperOptimizer.ADAM
        if tune_temperature and not is_adam:
            raise ValueError(
                f'tune_temperature needs hyper_optimizer="adam": "{self.hyper_optimizer.value}" has no closed form for it'
            )
        self.groups = groups
        self.index: Tensor = groups.index.to(device)
        self.lr: float = real_number(
            "lr_hyp", lr, at_least=0
        )  # numpy's would go into Adam's state, and no checkpoint with it could be read back
        self.starts: dict[str, float] = {
            "prior_precision": prior_precision,
            "sigma_noise": sigma_noise,
            "temperature": temperature,
        }
        tuned = {"prior_precision": tune_prior, "sigma_noise": tune_sigma, "temperature": tune_temperature}
        for name, start in self.starts.items():
            start = real_number(f"the start of {name}", start, finite=False)
            if not (math.isfinite(start) and start > 0):
                raise ValueError(f"{name} starts at {start}; it must be a positive number")
            shape = (len(groups.names),) if name == "prior_precision" else ()
            value = torch.full(shape, math.log(start), dtype=torch.float64, device=device)
            if name == "prior_precision" and ELEMENTWISE in groups.names and len(groups.names) > 1:
                value[groups.names.index(ELEMENTWISE)] = math.log(ELEMENTWISE_START)
            self.register_parameter(f"log_{name}", nn.Parameter(value, requires_grad=tuned[name]))
        self.tuned_names: list[str] = [name for name, is_tuned in tuned.items() if is_tuned]
        self.tuned: list[nn.Parameter] = [p for p in self.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Adam | None = (
            torch.optim.Adam(self.tuned, lr=self.lr, maximize=True) if self.tuned and is_adam else None
        )
        self.reported: list[str] = []

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the values."""
        return {"adam": self.optimizer.state_dict() if self.optimizer else {}, "reported": list(self.reported)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        if self.optimizer:
            self.optimizer.load_state_dict(copy.deepcopy(state["adam"]))  # it would share the tensors
            self.optimizer.param_groups[0]["lr"] = self.lr  # may be another in a resumed run
        self.reported = list(state["reported"])

    def prior_precision(self) -> Tensor:
        """The prior precision of every parameter tensor [n_tensors], or of every weight [n_params]; differentiable."""
        return self.log_prior_precision.exp()[self.index]

    def sigma_noise(self) -> Tensor:
        """Standard deviation of the observation noise; differentiable."""
        return self.log_sigma_noise.exp()

    def temperature(self) -> Tensor:
        """Temperature of the likelihood; differentiable."""
        return self.log_temperature.exp()

    def by_parameter(self, named_parameters: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
        """Prior precision by parameter name; the geometric mean of a tensor whose weights have one each."""
        log_precision = self.log_prior_precision.detach()[self.index].cpu()
        if len(log_precision) == len(named_parameters):
            parts: Sequence[Tensor] = log_precision.unbind()
        else:
            parts = log_precision.split([parameter.numel() for _, parameter in named_parameters])
        return {name: part.mean().exp().item() for (name, _), part in zip(named_parameters, parts, strict=True)}

    def assign_to(self, la: Laplace) -> None:
        """Set the hyperparameters of `la` to the current values, detached."""
        la.prior_precision = self.prior_precision().detach()
        la.temperature = self.temperature().detach()
        if la.likelihood.has_noise:
            la.sigma_noise = self.sigma_noise().detach()

    def ascend(self, la: Laplace, n_steps: int, *, max_log_step: float = 1.0, stiffness: float = math.inf) -> None:
        """Take `n_steps` up the log marginal likelihood of `la` as it was last fitted.

        The mode and the curvature belong to the old values, so no logarithm ends farther than `max_log_step` from
        where it began. `la` is left holding the new values.

        Args:
            la: a fitted posterior.
            n_steps: how many steps of Adam, or MacKay's updates; any number above 0 lets Newton's method reach the optimum.
            max_log_step: the largest total change of any logarithm in this call.
            stiffness: upper limit of δ·τ·σ² of a prior precision δ. Gradient steps on a mean loss over N examples
                stay stable up to about N over the learning rate.

        Raises:
            FloatingPointError: the log marginal likelihood has no gradient there.

        Warns:
            PriorCollapseWarning: once for every group that reaches the upper limit.
        """
        start = [p.detach().clone() for p in self.tuned]
        if self.tuned and n_steps > 0:
            if self.hyper_optimizer is HyperOptimizer.ADAM:
                self._ascend_by_adam(la, n_steps, start, max_log_step, stiffness)
            else:
                self._ascend_in_closed_form(la, n_steps, max_log_step, stiffness)
                self._confine(start, max_log_step, stiffness)
        if self.log_prior_precision.requires_grad:
            self._report_collapse(stiffness)
        self.assign_to(la)

    def _ascend_by_adam(
        self, la: Laplace, n_steps: int, start: list[Tensor], max_log_step: float, stiffness: float
    ) -> None:
        assert self.optimizer is not None
        for _ in range(n_steps):
            self.optimizer.zero_grad()
            with torch.enable_grad():
                noise = {"sigma_noise": self.sigma_noise()} if la.likelihood.has_noise else {}
                log_marglik = la.log_marginal_likelihood(
                    prior_precision=self.prior_precision(), temperature=self.temperature(), **noise
                )
                log_marglik.backward(inputs=self.tuned)
            slopes = torch.stack([p.grad.isfinite().all() for p in self.tuned if p.grad is not None])
            if not slopes.all():
                raise FloatingPointError("the gradient of the log marginal likelihood is not finite")
            self.optimizer.step()
            self._confine(start, max_log_step, stiffness)

    @torch.no_grad()
    def _ascend_in_closed_form(self, la: Laplace, n_steps: int, max_log_step: float, stiffness: float) -> None:
        self.assign_to(la)
        evidence, box = Evidence(la.fitted, la.prior, self.groups), self._box(max_log_step, stiffness)
        point = self.log_prior_precision.detach().clone(), self.log_sigma_noise.item()
        if self.hyper_optimizer is HyperOptimizer.NEWTON:
            point = evidence.optimum(*point, box)
        else:
            for _ in range(n_steps):
                point = evidence.mackay(*point, box)
        self.log_prior_precision.copy_(point[0])
        self.log_sigma_noise.fill_(point[1])

    def _box(self, max_log_step: float, stiffness: float) -> Box:
        """What `max_log_step`, `BOUNDS` and the upper limit at the present noise allow; a single point where nothing is tuned."""
        low, high = (math.log(bound) for bound in BOUNDS)
        delta, sigma = self.log_prior_precision.detach(), self.log_sigma_noise.item()
        delta_limits, sigma_limits = (delta, delta), (sigma, sigma)
        if self.log_prior_precision.requires_grad:
            upper = (delta + max_log_step).clamp(low, high).clamp(max=self._log_limit(stiffness))
            delta_limits = torch.minimum((delta - max_log_step).clamp(low, high), upper), upper
        if self.log_sigma_noise.requires_grad:
            sigma_limits = max(sigma - max_log_step, low), min(sigma + max_log_step, high)
        return Box(delta_limits, sigma_limits)

    def check_start(self, stiffness: float) -> None:
        """Reject initial prior precisions that the first tuning would cut to their upper limit, see `ascend`.

        Raises:
            ValueError: names the initial value, the limit and the remedy.
        """
        highest, limit = self.log_prior_precision.max().exp().item(), math.exp(self._log_limit(stiffness))
        if self.log_prior_precision.requires_grad and highest > limit * (1 + 1e-9):
            raise ValueError(
                f"a prior precision starts at {highest:.3g}, above its limit of {limit:.3g} (N/(lr·τ·σ²), where gradient "
                f"steps become unstable, or {BOUNDS[1]:g}), to which tuning would cut it; lower prior_prec_init or the "
                "learning rate"
            )

    def collapsed(self, stiffness: float = math.inf) -> list[str]:
        """Names of the groups whose prior precision is at its upper limit."""
        at_limit = self.log_prior_precision.detach() >= self._log_limit(stiffness) - 1e-3
        return list(dict.fromkeys(self.groups.names[i] for i in at_limit.nonzero().flatten().tolist()))

    def _log_limit(self, stiffness: float) -> float:
        scale = 2 * self.log_sigma_noise.item() + self.log_temperature.item()
        return min(math.log(stiffness) - scale, math.log(BOUNDS[1])) if stiffness < math.inf else math.log(BOUNDS[1])

    @torch.no_grad()
    def _confine(self, start: list[Tensor], max_log_step: float, stiffness: float) -> None:
        for value, origin in zip(self.tuned, start, strict=True):
            value.copy_(value.clamp(origin - max_log_step, origin + max_log_step))
            value.clamp_(math.log(BOUNDS[0]), math.log(BOUNDS[1]))
        if self.log_prior_precision.requires_grad:
            self.log_prior_precision.clamp_(max=self._log_limit(stiffness))

    def _report_collapse(self, stiffness: float) -> None:
        fresh = [name for name in self.collapsed(stiffness) if name not in self.reported]
        self.reported += fresh
        for name in fresh:
            warnings.warn(
                f"the prior precision of '{name}' reached its limit of {math.exp(self._log_limit(stiffness)):.3g}: "
                "its weights are held at zero; tune later (n_epochs_burnin), in smaller steps (max_log_step), "
                "or with a coarser prior_structure",
                PriorCollapseWarning,
                stacklevel=2,
            )
