"""Negative log likelihood, accuracy, expected calibration error and Brier score, and the check of their inputs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from laplace_ws.registry import Choice
from laplace_ws.values import tensor

_SUMS_TO_ONE = 1e-3
_NEARLY_SUMS_TO_ONE = 5e-2
_LARGEST_BELOW_ONE = 1.0 - 2.0**-24  # the float32 number just below 1


class OutputKind(Choice):
    """What a classifier's output is: unnormalised log probabilities, or probabilities."""

    AUTO = "auto"
    LOGITS = "logits"
    PROBS = "probs"


def accuracy(probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Fraction of examples whose top label is right."""
    # torchmetrics takes seconds to import; nothing else in the package needs it
    from torchmetrics.functional.classification import multiclass_accuracy

    return multiclass_accuracy(probs, labels, num_classes=probs.shape[-1], average="micro").item()


def calibration_error(probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"], n_bins: int = 15) -> float:
    """Expected calibration error of the top label, a fraction, in equal bins of confidence [Naeini et al. 2015]."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    # torchmetrics gives a confidence of exactly 1 a bin of its own, beyond the last of the n_bins
    below_one = probs.clamp(max=_LARGEST_BELOW_ONE)
    return multiclass_calibration_error(below_one, labels, num_classes=probs.shape[-1], n_bins=n_bins).item()


def mean_nll(log_probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Negative log probability of the labels, −N⁻¹ Σ_n log p(y_n), in nats."""
    return -log_probs.gather(1, labels[:, None]).mean()


def brier_score(probs: Float[Tensor, "N C"], labels: Int[Tensor, " N"]) -> float:
    """Squared distance of the probabilities to the one-hot label, N⁻¹ Σ_n Σ_c (p_nc − [y_n = c])² [Brier 1950]."""
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[-1]).to(probs.dtype)
    return (probs - one_hot).square().sum(-1).mean().item()


def doubt(probs: Float[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """Summed probability of all classes but the top one, which is 1 − max p without its cancellation."""
    return probs.sort(-1).values[:, :-1].sum(-1)


def to_log_probs(
    outputs: Float[Tensor, "*batch C"], labels: Int[Tensor, "*batch"], *, kind: OutputKind | str = OutputKind.AUTO
) -> tuple[Float[Tensor, "M C"], Int[Tensor, " M"]]:
    """Check outputs and labels, and give both with the leading dimensions merged; log probabilities in float64.

    Raises:
        TypeError: if outputs or labels are no tensors.
        ValueError: if shapes or labels do not fit, a value is NaN or infinite, or rows sum to one only approximately.
    """
    kind = OutputKind(kind)
    tensor("outputs", outputs, "[N, C] of logits or probabilities")
    tensor("labels", labels, "[N] of class numbers")
    if not outputs.is_floating_point():
        raise ValueError(f"outputs must be floating point, but they are {outputs.dtype}; give logits or probabilities")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, but they are {labels.dtype}; give class numbers, labels.long()")
    if outputs.ndim < 2 or outputs.shape[-1] < 2 or outputs.shape[:-1] != labels.shape:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} do not fit labels of shape {tuple(labels.shape)}; "
            "give outputs [N, C] with labels [N], or [N, T, C] with [N, T], with C of at least 2"
        )
    outputs = outputs.detach().reshape(-1, outputs.shape[-1]).double()
    labels = labels.detach().reshape(-1).to(outputs.device, torch.long)
    if outputs.shape[0] == 0:
        raise ValueError("outputs hold no example; give at least one")
    if outputs.isnan().any():
        raise ValueError(
            f"{outputs.isnan().any(-1).sum().item()} of {len(outputs)} outputs hold NaN; the model has diverged"
        )
    if (outputs == math.inf).any():
        raise ValueError("outputs hold infinity; the model has diverged")
    if labels.min() < 0 or labels.max() >= outputs.shape[-1]:
        raise ValueError(
            f"labels run from {labels.min().item()} to {labels.max().item()}, "
            f"outputs have {outputs.shape[-1]} classes; give class numbers from 0 to {outputs.shape[-1] - 1}"
        )
    if kind is OutputKind.AUTO:
        kind = _guess_kind(outputs)
    elif kind is OutputKind.PROBS and ((outputs < 0).any() or _largest_deviation(outputs) > _NEARLY_SUMS_TO_ONE):
        raise ValueError("outputs are not probabilities (negative, or rows do not sum to one); say kind='logits'")
    return (outputs.log() if kind is OutputKind.PROBS else outputs.log_softmax(-1)), labels


def _largest_deviation(outputs: Float[Tensor, "N C"]) -> float:
    return (outputs.sum(-1) - 1).abs().max().item()


def _guess_kind(outputs: Float[Tensor, "N C"]) -> OutputKind:
    if (outputs < 0).any():
        return OutputKind.LOGITS
    deviation = _largest_deviation(outputs)
    if deviation <= _SUMS_TO_ONE:
        return OutputKind.PROBS
    if deviation <= _NEARLY_SUMS_TO_ONE:
        raise ValueError(
            f"rows of outputs sum to one only within {deviation:.1e}, "
            "so logits and probabilities cannot be told apart; say kind='logits' or kind='probs'"
        )
    return OutputKind.LOGITS
