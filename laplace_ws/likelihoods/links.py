"""From a Gaussian over a network's outputs to predicted probabilities, and draws from it.

f is `[..., C]`, its covariance `[..., C, C]`, its variances `[..., C]`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves the types of split, tolist and cholesky_ex open

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from laplace_ws.likelihoods.base import Likelihood
from laplace_ws.matrices.eigen import eigh
from laplace_ws.registry import Choice


class LinkApprox(Choice):
    """How E[p(y | f)] is approximated under a Gaussian f.

    `PROBIT`: outputs scaled by 1/√(1 + π v/8) [Spiegelhalter & Lauritzen 1990, MacKay 1992]. `MC`: a mean over samples of f. `BRIDGE`: the
    mean of the Dirichlet that the Laplace bridge gives [Hobbhahn et al. 2022]; `BRIDGE_NORM`: with f first scaled to a variance at which
    the bridge is accurate.
    """

    PROBIT = "probit"
    MC = "mc"
    BRIDGE = "bridge"
    BRIDGE_NORM = "bridge_norm"


def probabilities(
    likelihood: Likelihood,
    f: Float[Tensor, "N ..."],
    spread: Tensor,
    link: LinkApprox,
    n_samples: int = 100,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N ..."]:
    """E[p(y | f)] for outputs with mean f and the given covariances or variances.

    Args:
        likelihood: a likelihood with class labels.
        f: mean of the outputs.
        spread: their covariance for each example and term, or, for "probit" and "mc", variances.
        link: how it is approximated.
        n_samples: samples, for "mc".
        generator: source of randomness; default: torch's own.
    """
    with torch.autocast(f.device.type, enabled=False):
        if link is LinkApprox.PROBIT:
            return likelihood.predictive_mean(probit_scaled(f, spread))
        if link is LinkApprox.MC:
            return likelihood.predictive_mean(draw_outputs(f, spread, n_samples, generator)).mean(0)
        return bridge(f, spread, normalised=link is LinkApprox.BRIDGE_NORM)


def draw_outputs(
    f: Float[Tensor, "N ..."], spread: Tensor, n_samples: int, generator: torch.Generator | None, *, joint: bool = False
) -> Float[Tensor, "S N ..."]:
    """Draws from N(f, spread), spread being covariances or, if shaped like f, variances; with `joint`, the covariance of all outputs."""
    if n_samples < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}.")
    with torch.autocast(f.device.type, enabled=False):
        if joint:
            return sample_outputs(f.flatten(), spread, n_samples, generator).reshape(n_samples, *f.shape)
        if spread.shape == f.shape:
            noise = torch.randn(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
            return f + spread.clamp_min(0).sqrt() * noise  # a variance of zero may be rounded below zero
        if f.ndim == 1:  # one output per example, without an axis of its own
            return sample_outputs(f[:, None], spread, n_samples, generator)[..., 0]
        return sample_outputs(f, spread, n_samples, generator)


def probit_scaled(f: Float[Tensor, "*S C"], variances: Float[Tensor, "*S C"]) -> Float[Tensor, "*S C"]:
    """f/√(1 + π v/8), whose sigmoid or softmax approximates the mean of the sigmoid or softmax of f."""
    return f / (1 + math.pi / 8 * variances).sqrt()


def bridge(f: Float[Tensor, "*S C"], covariance: Float[Tensor, "*S C C"], *, normalised: bool) -> Float[Tensor, "*S C"]:
    """Mean of the Dirichlet distribution that matches softmax(f).

    The softmax does not see the sum of the outputs, so the Gaussian is first conditioned on Σ_c f_c = 0. The Dirichlet parameters are
    α_c = (1 − 2/C + e^{f_c} Σ_k e^{−f_k}/C²)/v_c. Where the covariance is zero, f is certain, and the result is its softmax.
    """
    n_classes = f.shape[-1]
    is_certain = (covariance == 0).flatten(-2).all(-1)[..., None, None]
    certain = f.softmax(-1)
    covariance = torch.where(is_certain, torch.eye(n_classes, dtype=f.dtype, device=f.device), covariance)
    row_sums = covariance.sum(-1)
    whole = row_sums.sum(-1)[..., None]
    f = f - row_sums * f.sum(-1, keepdim=True) / whole
    variances = covariance.diagonal(dim1=-2, dim2=-1) - row_sums.square() / whole
    if normalised:
        size = variances.mean(-1, keepdim=True) / math.sqrt(n_classes / 2)
        f, variances = f / size.sqrt(), variances / size
    log_products = f + (-f).logsumexp(-1, keepdim=True) - 2 * math.log(n_classes)
    # α relative to the largest, as e^f may not be finite
    shift = log_products.max(-1, keepdim=True).values.clamp_min(0)
    alpha = ((1 - 2 / n_classes) * (-shift).exp() + (log_products - shift).exp()) / variances
    return torch.where(is_certain[..., 0], certain, alpha / alpha.sum(-1, keepdim=True))


def sample_outputs(
    f: Float[Tensor, "*B D"],
    covariance: Float[Tensor, "*B D D"],
    n_samples: int,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "S *B D"]:
    """Draws from N(f, covariance)."""
    noise = torch.randn(n_samples, *f.shape, dtype=f.dtype, device=f.device, generator=generator)
    return f + (root(covariance) @ noise[..., None])[..., 0]


def root(covariance: Float[Tensor, "*B D D"]) -> Float[Tensor, "*B D D"]:
    """L with L Lᵀ the covariance: its Cholesky factor or, where rounding has made it indefinite, the root without its negative part."""
    wide = covariance.double()
    factor, info = torch.linalg.cholesky_ex(wide)
    if (info > 0).any():
        is_indefinite = info > 0
        values, vectors = eigh(covariance[is_indefinite], torch.float64, "a covariance of outputs")
        factor = factor.masked_scatter(is_indefinite[..., None, None], vectors * values.sqrt()[..., None, :])
    return factor.to(covariance.dtype)
