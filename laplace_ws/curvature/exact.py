"""Dense oracles for small models: slow, simple, and independent of the backends.

Every matrix is over the parameters that require grad, in the order of `model.named_parameters()`, each flattened row-major, and is of the
**summed** negative log likelihood. Built from nothing but `torch.autograd.grad`, one output at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.curvature.backend import evaluation_mode, trainable_parameters
from laplace_ws.curvature.inputs import call_model
from laplace_ws.likelihoods import Likelihood, make_likelihood


def jacobian(model: nn.Module, x: Tensor) -> Float[Tensor, "N D P"]:
    """∂f/∂θ of each example, the outputs of an example flattened to D."""
    parameters = list(trainable_parameters(model).values())
    with evaluation_mode(model):
        f = call_model(model, x)
        rows: list[Tensor] = [_gradient(output, parameters) for output in f.flatten()]
    return torch.stack(rows).reshape(len(f), -1, rows[0].numel())


def ggn(model: nn.Module, likelihood: str | Likelihood, x: Tensor, y: Tensor) -> Float[Tensor, "P P"]:
    """Generalised Gauss-Newton matrix Σ_n J_nᵀ Λ_n J_n, Λ the Hessian of −log p in f by double differentiation."""
    likelihood = make_likelihood(likelihood)
    J = jacobian(model, x)
    with evaluation_mode(model):
        f = call_model(model, x).detach()
    total = J.new_zeros(J.shape[2], J.shape[2])
    for n in range(len(x)):
        H_f = torch.autograd.functional.hessian(_nll(likelihood, y[n : n + 1]), f[n : n + 1])
        total += J[n].T @ H_f.reshape(J.shape[1], J.shape[1]) @ J[n]  # pyright: ignore
    return total


def empirical_fisher(model: nn.Module, likelihood: str | Likelihood, x: Tensor, y: Tensor) -> Float[Tensor, "P P"]:
    """Σ_n ∇(−log p(y_n | x_n)) ∇(…)ᵀ at the observed labels."""
    likelihood = make_likelihood(likelihood)
    parameters = list(trainable_parameters(model).values())
    with evaluation_mode(model):
        f = call_model(model, x)
        rows = [_gradient(likelihood.nll_sum(f[n : n + 1], y[n : n + 1]), parameters) for n in range(len(x))]
    gradients = torch.stack(rows)
    return gradients.T @ gradients


def hessian(model: nn.Module, likelihood: str | Likelihood, x: Tensor, y: Tensor) -> Float[Tensor, "P P"]:
    """Hessian of the summed negative log likelihood in the parameters."""
    likelihood = make_likelihood(likelihood)
    parameters = list(trainable_parameters(model).values())
    with evaluation_mode(model):
        gradient = _gradient(likelihood.nll_sum(call_model(model, x), y), parameters, create_graph=True)
        return torch.stack([_gradient(entry, parameters) for entry in gradient])


def parameter_slices(model: nn.Module) -> dict[str, slice]:
    """Where each parameter lies in the matrices."""
    slices, start = {}, 0
    for name, parameter in trainable_parameters(model).items():
        slices[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return slices


def _gradient(scalar: Tensor, parameters: list[nn.Parameter], create_graph: bool = False) -> Float[Tensor, " P"]:
    if not scalar.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    grads = torch.autograd.grad(
        scalar, parameters, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.flatten() for g in grads])


def _nll(likelihood: Likelihood, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda f: likelihood.nll_sum(f, y)
