"""The curvature that an optimiser averages over its steps: layers as they are found, and the decayed averages of their factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature import Curvature
from laplace_ws.curvature.capture import BatchForm, CapturedBatch
from laplace_ws.curvature.columns import loss_columns
from laplace_ws.curvature.native import UseRecorder
from laplace_ws.curvature.processes import Shard
from laplace_ws.distributed import Processes, processes
from laplace_ws.errors import UnsupportedParameterError
from laplace_ws.kfac import Accumulator, KfacApprox, Use
from laplace_ws.kfac.factors import total
from laplace_ws.likelihoods import Likelihood
from laplace_ws.matrices.division import divided
from laplace_ws.optim.factor import check_finite
from laplace_ws.optim.layers import Layer, find_layers
from laplace_ws.optim.options import KfacOptions, LossReduction
from laplace_ws.optim.stacks import MOST_ENTRIES
from laplace_ws.optim.statistics import FactorSums, LayerAccumulator

FACTORS = ("factor_A", "factor_B", "inv_A", "inv_B", "n_inputs")
"""What the state of a weight holds of its curvature, in a precision of its own."""


_NORMALISATIONS = frozenset({"batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"})


@dataclass(eq=False)
class LayerFinder:
    """Makes the accumulator of each batch, and keeps what is known of the layers.

    Attributes:
        parameters: those of the optimiser, by name.
        approximations: expand or reduce, by parameter.
        max_factor_dim: rows of the largest block of a factor.
        strict: whether a weight without a block is an error.
        layers: those found so far, by weight.
        watched: the parameters whose uses need to be recorded: all but the affine vectors of normalisations, once a pass has shown them.
    """

    parameters: dict[str, nn.Parameter]
    approximations: dict[str, KfacApprox]
    max_factor_dim: int | None
    strict: bool
    layers: dict[str, Layer]
    watched: dict[str, nn.Parameter]

    @property
    def reduced(self) -> set[str]:
        """The parameters of K-FAC-reduce."""
        return {name for name, approx in self.approximations.items() if approx is KfacApprox.REDUCE}

    def __call__(self, recorder: UseRecorder, form: BatchForm) -> Accumulator | None:
        """See `capture.Begin`.

        Raises:
            UnsupportedParameterError: a weight is used otherwise than in a batch before, has no block although it must, or cannot have the
                one that was chosen.
        """
        uses = [kept.use for kept in recorder.kept]
        found = find_layers(uses, form.n_examples, recorder.unsupported, self.approximations, self.max_factor_dim)
        for layer in found:
            if self.layers.get(layer.weight, layer) != layer:
                raise UnsupportedParameterError(
                    f"{layer.weight!r} is used in one batch otherwise than in another, or its kfac_approx was changed, and the two "
                    "share no Kronecker factors; make a new optimizer, or freeze it (requires_grad_(False))."
                )
        if self.strict:
            self._check_all_have_blocks({layer.weight for layer in found}, recorder.unsupported)
        self.layers |= {layer.weight: layer for layer in found}
        if not found:
            return None
        self._stop_watching(uses, recorder.unsupported)
        return LayerAccumulator(found, self.parameters)

    def _stop_watching(self, uses: Sequence[Use], unsupported: Mapping[str, str]) -> None:
        """Leave out what only normalisations use, as what a recorder would note of them costs another normalisation each."""
        calls: dict[str, set[str]] = {}
        for use in uses:
            for name in use.parameters:
                calls.setdefault(name, set()).add(use.call)
        for name, of_parameter in calls.items():
            if self.parameters[name].ndim == 1 and of_parameter <= _NORMALISATIONS and name not in unsupported:
                self.watched.pop(name, None)

    def _check_all_have_blocks(self, weights: set[str], unsupported: Mapping[str, str]) -> None:
        for name, p in self.parameters.items():
            if p.ndim > 1 and name not in weights:
                why = f" (it is used by {unsupported[name]})" if name in unsupported else ""
                raise UnsupportedParameterError(
                    f"{name!r} has no Kronecker block{why}; freeze it (requires_grad_(False)), or choose strict=False, by which it "
                    "takes the first-order step."
                )


@dataclass(frozen=True)
class LikelihoodColumns:
    """Columns of the curvature of a likelihood in the outputs, whose targets are not known; see `capture.Columns`.

    Attributes:
        likelihood: p(y | f).
        curvature: which columns.
        mc_samples: random columns per example.
        generator: of the labels or signs.
    """

    likelihood: Likelihood
    curvature: Curvature
    mc_samples: int
    generator: torch.Generator

    def __call__(self, f: Float[Tensor, "N ..."]) -> Iterator[Float[Tensor, "N ..."]]:
        """The columns in the outputs of a batch; random ones are those that one process draws for the batch of all."""
        group = processes()
        if group.size == 1 or not self.curvature.is_random:
            yield from self._columns(f)
            return
        shard = Shard(group)
        f_all = shard.interleaved(group.gather(f.detach().cpu())).to(f.device)
        own = shard.own(len(f_all))
        for column in self._columns(f_all):
            yield column[own]

    def _columns(self, f: Tensor) -> Iterator[Tensor]:
        without_targets = f  # `Likelihood.ignores_targets` is false, so that no target is looked at
        return loss_columns(
            self.likelihood, self.curvature, f, without_targets, mc_samples=self.mc_samples, generator=self.generator
        )


def averaged_factors(
    batches: Sequence[CapturedBatch], states: Mapping[str, Mapping[str, Any]], options: KfacOptions, loss_scale: float
) -> dict[str, dict[str, Any]]:
    """The averages of the factors with those of one more step, by weight, in place of those in its state.

    The k-th of n steps counts as decay^(n−k), and all weights add up to one.

    Args:
        batches: of the step.
        states: of the weights.
        options: of the optimiser.
        loss_scale: factor on the loss that was differentiated.

    Raises:
        FloatingPointError: the factors are not finite.
    """
    n_own = sum(batch.n_examples for batch in batches)
    sums_of, n_examples = _summed_over(processes(), _sums(batches, _scale(options, n_own, loss_scale)), n_own)
    found: dict[str, dict[str, Any]] = {}
    for name, sums in sums_of.items():
        n_inputs = torch.as_tensor(sums.n_inputs, dtype=torch.float64, device=sums.A.device) / n_examples
        now = {"factor_A": sums.mean_A, "factor_B": sums.B / n_examples, "n_inputs": n_inputs}
        found[name] = _averaged(states.get(name, {}), now, options)
    check_finite({name: _factors(state) for name, state in found.items()})
    return found


def _scale(options: KfacOptions, n_examples: int, loss_scale: float) -> float:
    """What makes Σ g gᵀ of what a process differentiated the sum over its examples."""
    if options.curvature is not Curvature.EF:
        return 1.0
    return (n_examples**2 if options.loss_reduction is LossReduction.MEAN else 1.0) / loss_scale**2


def _sums(batches: Sequence[CapturedBatch], scale: float) -> dict[str, FactorSums]:
    """The sums of the factors over batches, by weight; those of B times a factor."""
    by_weight: dict[str, list[FactorSums]] = {}
    for batch in batches:
        accumulator = batch.accumulator
        assert isinstance(accumulator, LayerAccumulator)
        for name in accumulator.layers:
            by_weight.setdefault(name, []).append(accumulator.sums(name))
    return {name: total(found).with_B_times(scale) for name, found in by_weight.items()}


def _summed_over(group: Processes, sums: dict[str, FactorSums], n_examples: int) -> tuple[dict[str, FactorSums], int]:
    """The sums, and the number of examples, of all processes together."""
    if group.size == 1:
        return sums, n_examples
    numbers = group.gather((n_examples, {name: found.n_inputs for name, found in sums.items()}))
    factors = [factor for found in sums.values() for factor in (found.A, found.B)]
    group.sum_(
        [f for f in factors if f.ndim < 2], symmetric=[f for f in factors if f.ndim > 1]
    )  # the former are diagonals
    of_all = {name: FactorSums(s.A, s.B, total(n_inputs[name] for _, n_inputs in numbers)) for name, s in sums.items()}
    return of_all, sum(n for n, _ in numbers)


def divided_inverses(
    layers: Mapping[str, Layer], known: Mapping[str, Mapping[str, Any]], damping: Mapping[str, float]
) -> dict[str, dict[str, Tensor]]:
    """The damped inverses of the factors of each weight, each weight's made by one of the processes.

    Args:
        layers: by weight.
        known: factors by weight.
        damping: by weight.

    Raises:
        FloatingPointError: a factor is not finite.
    """
    group = processes()
    costs = [sum(factor.numel() * factor.shape[-1] for factor in _factors(known[name])) for name in known]
    owners = divided(costs, group.size)
    own = [name for name, owner in zip(known, owners, strict=True) if owner == group.rank]
    found = _inverses({name: layers[name] for name in own}, known, damping)
    for name, owner in zip(known, owners, strict=True):
        A, B = _factors(known[name])
        if owner != group.rank:
            found[name] = {"inv_A": torch.empty_like(A), "inv_B": torch.empty_like(B)}
    if group.size > 1:
        for rank in range(group.size):
            of_rank = [found[name] for name, owner in zip(known, owners, strict=True) if owner == rank]
            group.broadcast_([inverses[which] for inverses in of_rank for which in ("inv_A", "inv_B")], rank)
    return found


def _inverses(
    layers: Mapping[str, Layer], known: Mapping[str, Mapping[str, Any]], damping: Mapping[str, float]
) -> dict[str, dict[str, Tensor]]:
    """The damped inverses of the factors of each weight, those of equal form at once."""
    alike: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
    for name, layer in layers.items():
        for of, form in (("A", layer.A), ("B", layer.B)):
            factor = known[name][f"factor_{of}"]
            alone = (name, of) if factor.numel() > MOST_ENTRIES else None
            alike.setdefault((form, factor.shape, factor.dtype, factor.device, alone), []).append((name, of))
    found: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for (form, *_), places in alike.items():
        factors = [known[name][f"factor_{of}"] for name, of in places]
        dampings, names = [damping[name] for name, _ in places], [repr(name) for name, _ in places]
        for (name, of), inverse in zip(places, form.damped_inverses(factors, dampings, names), strict=True):
            found[name][f"inv_{of}"] = inverse
    return found


def _factors(state: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    return state["factor_A"], state["factor_B"]


def _averaged(state: Mapping[str, Any], now: Mapping[str, Tensor], options: KfacOptions) -> dict[str, Any]:
    n = state.get("n_factors", 0) + 1
    weight = (1 - options.factor_decay) / (1 - options.factor_decay**n)
    found: dict[str, Any] = {"n_factors": n}
    for name, value in now.items():
        value = value if options.factor_dtype is None or name == "n_inputs" else value.to(options.factor_dtype)
        found[name] = value.clone() if name not in state else state[name].lerp(value.to(state[name].dtype), weight)
    return found
