"""K-FAC-expand and K-FAC-reduce as a preconditioner of gradient steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from laplace_ws.curvature.capture import CapturedBatch, TrainingCapture
from laplace_ws.curvature.native import UseRecorder
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import Accumulator, KfacApprox, KfacApproxSpec, approximation_by_parameter
from laplace_ws.kfac.factors import total
from laplace_ws.optim.first_order import Grafting, adam_step, update_moments
from laplace_ws.optim.layers import Layer, find_layers
from laplace_ws.optim.preconditioner import damped_inverse, precondition
from laplace_ws.optim.statistics import LayerAccumulator, LayerFactors, average
from laplace_ws.registry import Choice
from laplace_ws.values import real_number, whole_number


class LossReduction(Choice):
    """How the loss is made of the losses of the examples."""

    MEAN = "mean"
    SUM = "sum"


_FACTORS = ("factor_A", "factor_B", "inv_A", "inv_B")


class KFAC(torch.optim.Optimizer):
    """Gradient steps preconditioned by K-FAC, for every network whose weights have Kronecker blocks.

    The direction of a weight W, with its bias b as a further column, is B⁻¹ M A⁻¹: M the Nesterov average of its gradients, A and B the
    decayed averages of its Kronecker factors over the batches, damped. Its length is that of the step that a first-order method would take
    (`grafting`), so that learning rates and schedules of that method serve. What has no block of its own (scales of normalisations, position
    parameters) takes the first-order step itself.

        optimizer = KFAC(model, lr=1e-2)
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()

    The factors come from the passes of the step itself, on the steps on which they are due: A from the forward pass, B from the backward
    pass. They are of the empirical Fisher. Call the model itself, in train mode, and differentiate each forward pass once.

    Args:
        model: the network.
        params: which of its parameters, or groups of them with options of their own (lr, betas, eps, weight_decay, damping, kfac_approx), as
            for every optimiser of torch; all that require grad where not given.
        lr: length of the steps, in units of those of the grafted method.
        betas: decay of the averages of gradients and of their squares.
        eps: added to the root of the latter.
        weight_decay: share of a weight that is taken away at each step, in units of lr.
        kfac_approx: "expand", "reduce", or a mapping from patterns of names to them.
        damping: λ; a factor X is inverted as X + λ·(tr X/D)·I.
        factor_decay: of the averages of the factors, per batch that counts.
        factor_update_steps: steps from one batch that counts to the next.
        inv_update_steps: steps from one inversion to the next.
        start_steps: first steps, on each of which both are done.
        grafting: "adam", "sgd" or "none".
        kl_clip: limit of lr²·Σ ⟨step, gradient⟩, beyond which all steps are shortened alike; None for none.
        loss_reduction: "mean" or "sum": what the loss does with the losses of the examples.
        grad_scaler: the scaler of the loss, if there is one.
        strict: whether a weight without a Kronecker block is an error.

    Raises:
        UnsupportedParameterError: with `strict`, in the first forward pass, a parameter of two or more axes has no Kronecker block.
        ValueError: an option is out of its range.

    Source: Martens & Grosse 2015; Eschenhagen et al. 2023, for expand and reduce; Agarwal et al. 2020, for grafting.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        kfac_approx: KfacApproxSpec = "expand",
        damping: float = 0.1,
        factor_decay: float = 0.95,
        factor_update_steps: int = 10,
        inv_update_steps: int = 10,
        start_steps: int = 10,
        grafting: str | Grafting = "adam",
        kl_clip: float | None = None,
        loss_reduction: str | LossReduction = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        strict: bool = False,
    ) -> None:
        self.model = model
        self.factor_decay: float = real_number("factor_decay", factor_decay, at_least=0)
        if self.factor_decay >= 1:
            raise ValueError(f"factor_decay must be below 1, got {factor_decay:g}.")
        self.factor_update_steps: int = whole_number("factor_update_steps", factor_update_steps, least=1)
        self.inv_update_steps: int = whole_number("inv_update_steps", inv_update_steps, least=1)
        self.start_steps: int = whole_number("start_steps", start_steps, least=0)
        self.grafting: Grafting = Grafting(grafting)
        self.kl_clip: float | None = None if kl_clip is None else real_number("kl_clip", kl_clip, above=0)
        self.loss_reduction: LossReduction = LossReduction(loss_reduction)
        self.grad_scaler = grad_scaler
        self.strict = strict
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        defaults: dict[str, Any] = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "damping": damping, "kfac_approx": kfac_approx,
        }  # fmt: skip
        super().__init__(list(named.values()) if params is None else params, defaults)
        self._names = {id(p): name for name, p in named.items()}
        chosen = {name: p for group in self.param_groups for p in group["params"] if (name := self._names.get(id(p)))}
        self._parameters = {name: p for name, p in named.items() if name in chosen}
        self._approximations = self._approximation_by_name()
        self._layers: list[Layer] | None = None
        self._capture = TrainingCapture(model, self._parameters, self._begin)
        self._capture.is_on = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`; checks the options of the group."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in ("lr", "eps", "weight_decay", "damping"):
            if not isinstance(group[name], Tensor):
                group[name] = real_number(name, group[name], at_least=0)
        for beta in group["betas"]:
            if not 0 <= real_number("betas", beta) < 1:
                raise ValueError(f"betas must lie in [0, 1), got {group['betas']}.")

    def _approximation_by_name(self) -> dict[str, KfacApprox]:
        found: dict[str, KfacApprox] = {}
        for group in self.param_groups:
            own = [self._names[id(p)] for p in group["params"] if id(p) in self._names]
            found |= approximation_by_parameter(group["kfac_approx"], own)
        return {name: approx.decided(False) for name, approx in found.items()}

    # ------------------------------------------------------------------ statistics

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""
        return max((state.get("step", 0) for state in self.state.values()), default=0)

    def _is_due(self, every: int) -> bool:
        return self.n_steps < self.start_steps or self.n_steps % every == 0

    def _begin(self, recorder: UseRecorder) -> Accumulator | None:
        if self._layers is None:
            self._layers = self._find_layers(recorder)
        for layer in self._layers:
            for name in (layer.weight, layer.bias):
                if name in recorder.unsupported:
                    raise UnsupportedParameterError(f"{name!r} is used by {recorder.unsupported[name]}.")
        return LayerAccumulator(self._layers, self._parameters, self._approximations) if self._layers else None

    def _find_layers(self, recorder: UseRecorder) -> list[Layer]:
        uses = [kept.use for kept in recorder.kept]
        found = find_layers(uses, self._parameters, recorder.unsupported)
        layers, reasons = [], dict(recorder.unsupported)
        for layer in found:
            own = [use for use in uses if layer.weight in use.parameters]
            try:
                LayerAccumulator([layer], self._parameters, self._approximations).start_batch(own)
                layers.append(layer)
            except UnsupportedParameterError as error:
                reasons[layer.weight] = str(error)
        if self.strict:
            weights = {layer.weight for layer in layers}
            for name, p in self._parameters.items():
                if p.ndim > 1 and name not in weights:
                    why = f": {reasons[name]}" if name in reasons else ""
                    raise UnsupportedParameterError(
                        f"{name!r} has no Kronecker block{why}; freeze it, or strict=False."
                    )
        return layers

    def _update_factors(self) -> None:
        """Take the statistics of the batches since the last step into the averages."""
        batches = self._capture.take()
        if not batches:
            return
        assert self._layers is not None
        scale = self._scale(batches)
        accumulators = [b.accumulator for b in batches if isinstance(b.accumulator, LayerAccumulator)]
        by_layer = {layer: total(of_batch.factors(layer) for of_batch in accumulators) for layer in self._layers}
        self._check_finite(by_layer)
        for layer, found in by_layer.items():
            state = self.state[self._parameters[layer.weight]]
            state["layer"] = asdict(layer)
            n = state["n_factors"] = state.get("n_factors", 0) + 1
            state["factor_A"] = average(state.get("factor_A"), found.A, n, self.factor_decay)
            state["factor_B"] = average(state.get("factor_B"), found.B * scale, n, self.factor_decay)

    @staticmethod
    def _check_finite(by_layer: Mapping[Layer, LayerFactors]) -> None:
        sums = [found.A.sum() + found.B.sum() for found in by_layer.values()]
        are_finite = torch.isfinite(torch.stack(sums)).tolist()
        for layer, is_finite in zip(by_layer, are_finite, strict=True):
            if not is_finite:
                raise FloatingPointError(
                    f"the Kronecker factors of {layer.weight!r} are not finite; lower the learning rate, or look for NaN in the "
                    "data"
                )

    def _scale(self, batches: list[CapturedBatch]) -> float:
        """What makes Σ g gᵀ of the loss as it was differentiated a mean of those of the examples' own losses."""
        n = sum(batch.n_examples for batch in batches)
        scaled = 1.0 if self.grad_scaler is None else self.grad_scaler.get_scale()
        return (n if self.loss_reduction is LossReduction.MEAN else 1 / n) / scaled**2

    def _update_inverses(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "factor_A" not in state:
                    continue
                A, B = state["factor_A"], state["factor_B"]
                is_diagonal = A.ndim < B.ndim
                state["inv_A"] = damped_inverse(A, group["damping"], is_diagonal)
                state["inv_B"] = damped_inverse(B, group["damping"], False)

    # ------------------------------------------------------------------ steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See `torch.optim.Optimizer.zero_grad`; the statistics of passes that were differentiated and took part in no step go too."""
        super().zero_grad(set_to_none)
        self._capture.forget_differentiated()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Raises:
            FloatingPointError: a factor is not finite; no weight has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        has_gradients = any(p.grad is not None for group in self.param_groups for p in group["params"])
        if not has_gradients:
            return loss
        if self._is_due(self.factor_update_steps):
            self._update_factors()
        if self._is_due(self.inv_update_steps):
            self._update_inverses()
        self._apply(self._directions())
        self._capture.is_on = self._is_due(self.factor_update_steps)
        return loss

    def _directions(self) -> dict[Tensor, Tensor]:
        """The step of each parameter that has a gradient, for a learning rate of 1 and up to its sign."""
        moments: dict[Tensor, Tensor] = {}
        steps: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self.state[p] for p in parameters]
            for state in states:
                state["step"] = state.get("step", 0) + 1
            is_adam = self.grafting is not Grafting.SGD
            of_group = update_moments(parameters, states, group["betas"], squares=is_adam)
            moments |= zip(parameters, of_group, strict=True)
            for p, state, moment in zip(parameters, states, of_group, strict=True):
                steps[p] = adam_step(moment, state, group["betas"][1], group["eps"]) if is_adam else moment
        for p in [p for p in steps if "inv_A" in self.state[p]]:
            steps |= self._preconditioned(p, moments, steps)
        return steps

    def _preconditioned(
        self, p: Tensor, moments: Mapping[Tensor, Tensor], steps: Mapping[Tensor, Tensor]
    ) -> dict[Tensor, Tensor]:
        """The steps of a weight and of its bias."""
        state = self.state[p]
        layer, inv_A, inv_B = Layer(**state["layer"]), state["inv_A"], state["inv_B"]
        bias = None if layer.bias is None else self._parameters[layer.bias]

        def matrix(of: Mapping[Tensor, Tensor]) -> Tensor:
            of_bias = None if bias is None else of.get(bias, torch.zeros_like(bias))
            return layer.as_matrix(of[p], of_bias).to(inv_B.dtype)

        direction = precondition(matrix(moments), inv_A, inv_B, diagonal_A=inv_A.ndim < inv_B.ndim)
        if self.grafting is not Grafting.NONE:
            length = direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
            direction = direction * (matrix(steps).norm() / length)
        of_weight, of_bias = layer.from_matrix(direction, p.shape)
        found = {p: of_weight.to(p.dtype)}
        if bias is not None and of_bias is not None and bias in steps:
            found[bias] = of_bias.view_as(bias).to(bias.dtype)
        return found

    def _apply(self, steps: Mapping[Tensor, Tensor]) -> None:
        """Change the parameters."""
        share = self._share(steps) if self.kl_clip is not None else 1.0
        for group in self.param_groups:
            lr = float(group["lr"])
            for p in group["params"]:
                if p not in steps:
                    continue
                if group["weight_decay"]:
                    p.mul_(1 - lr * group["weight_decay"])
                p.add_(steps[p], alpha=-lr * share)

    def _share(self, steps: Mapping[Tensor, Tensor]) -> float:
        """By how much all steps are shortened, so that lr²·Σ ⟨step, gradient⟩ is at most `kl_clip`."""
        assert self.kl_clip is not None
        products = [
            float(group["lr"]) ** 2 * (steps[p] * p.grad).sum()
            for group in self.param_groups
            for p in group["params"]
            if p in steps
        ]
        size = abs(torch.stack(products).sum().item())
        return min(1.0, math.sqrt(self.kl_clip / size)) if size else 1.0

    # ------------------------------------------------------------------ files

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; the factors keep the precision that they were saved in."""
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, saved in state_dict["state"].items():
            p = parameters[i]
            for name in _FACTORS:
                if name in saved:
                    self.state[p][name] = saved[name].detach().clone().to(p.device)
        self._layers = None
        self._capture.take()
        self._capture.is_on = self._is_due(self.factor_update_steps)
