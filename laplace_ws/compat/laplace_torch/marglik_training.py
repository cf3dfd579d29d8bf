"""Training by the marginal likelihood as laplace-torch does it, step by step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from tqdm import trange

from laplace_ws.compat.laplace_torch.baselaplace import BaseLaplace
from laplace_ws.compat.laplace_torch.curvature.asdl import AsdlGGN
from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface
from laplace_ws.compat.laplace_torch.laplace import Laplace
from laplace_ws.compat.laplace_torch.utils.data import on_device
from laplace_ws.compat.laplace_torch.utils.enums import HessianStructure, Likelihood, PriorStructure, SubsetOfWeights
from laplace_ws.compat.laplace_torch.utils.utils import expand_prior_precision, fix_prior_prec_structure


def marglik_training(
    model: nn.Module,
    train_loader: Any,
    likelihood: Likelihood | str = Likelihood.CLASSIFICATION,
    hessian_structure: HessianStructure | str = HessianStructure.KRON,
    backend: type[CurvatureInterface] = AsdlGGN,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.Adam,
    optimizer_kwargs: Mapping[str, Any] | None = None,
    scheduler_cls: type[Any] | None = None,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    n_epochs: int = 300,
    lr_hyp: float = 1e-1,
    prior_structure: PriorStructure | str = PriorStructure.LAYERWISE,
    n_epochs_burnin: int = 0,
    n_hypersteps: int = 10,
    marglik_frequency: int = 1,
    prior_prec_init: float = 1.0,
    sigma_noise_init: float = 1.0,
    temperature: float = 1.0,
    fix_sigma_noise: bool = False,
    progress_bar: bool = False,
    enable_backprop: bool = False,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
) -> tuple[BaseLaplace, nn.Module, list[float], list[float]]:
    """Train weights by gradient steps on a mean loss with the prior, and after epochs the hyperparameters by steps of one Adam.

    The loss of a batch is the mean cross entropy or the mean squared error over examples and outputs, plus ½ Σ δθ²/(N·f) with f = τ, or
    τ/(2σ²) for regression. The weights and hyperparameters of the highest log marginal likelihood are kept.

    Args:
        model: the network, which is trained in place; every epoch starts in the mode that it is in.
        train_loader: the training data; its `dataset` has N examples.
        likelihood: "classification" or "regression".
        hessian_structure: of the posterior over all weights.
        backend: its curvature and backend.
        optimizer_cls, optimizer_kwargs: of the weights; a weight decay is set to 0.
        scheduler_cls, scheduler_kwargs: stepped with it.
        n_epochs: number of epochs.
        lr_hyp: step size on the logarithms of the hyperparameters.
        prior_structure: which weights share a prior precision; "layerwise" is one for each parameter tensor.
        n_epochs_burnin: the first epoch after which they are tuned.
        n_hypersteps: steps on them at a time.
        marglik_frequency: epochs from one time to the next.
        prior_prec_init, sigma_noise_init: where they start.
        temperature: τ.
        fix_sigma_noise: leave σ where it starts.
        progress_bar: show one.
        enable_backprop, dict_key_x, dict_key_y: of the posterior.

    Returns:
        The posterior, the model, the *negative* log marginal likelihood at each step on the hyperparameters, and the mean training loss
        of each epoch.

    Source: Immer et al. 2021, algorithm 1.
    """
    is_regression = Likelihood(likelihood) is Likelihood.REGRESSION
    parameters = [p for p in model.parameters() if p.requires_grad]
    device, dtype = parameters[0].device, parameters[0].dtype
    data, n_data = on_device(train_loader, device, dict_key_y), len(train_loader.dataset)
    start = fix_prior_prec_structure(
        math.log(temperature * prior_prec_init),
        prior_structure,
        len(parameters),
        sum(p.numel() for p in parameters),
        device,
        dtype,
    )
    log_delta = start.requires_grad_()
    log_sigma = torch.full((1,), math.log(sigma_noise_init), device=device, dtype=dtype)
    log_sigma.requires_grad_(is_regression and not fix_sigma_noise)
    hyper_optimizer = torch.optim.Adam([h for h in (log_delta, log_sigma) if h.requires_grad], lr=lr_hyp)
    options = {**(optimizer_kwargs or {})}
    if "weight_decay" in options:
        options["weight_decay"] = 0.0
    optimizer = optimizer_cls(parameters, **options)
    scheduler = None if scheduler_cls is None else scheduler_cls(optimizer, **(scheduler_kwargs or {}))
    criterion = nn.MSELoss() if is_regression else nn.CrossEntropyLoss()
    modes = [(module, module.training) for module in model.modules()]

    def posterior(delta: Tensor, sigma: Tensor, **own: Any) -> BaseLaplace:
        la = Laplace(
            model,
            likelihood,
            SubsetOfWeights.ALL,
            hessian_structure,
            sigma_noise=sigma.detach(),
            prior_precision=delta.detach(),
            temperature=temperature,
            backend=backend,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
            **own,
        )
        la.fit(train_loader)
        return la

    def train_an_epoch() -> float:
        for module, mode in modes:
            module.training = mode
        delta = expand_prior_precision(log_delta.detach().exp(), model)
        factor = temperature / (2 * log_sigma.detach().exp() ** 2) if is_regression else temperature
        total = 0.0
        for x, y in data.pairs():
            optimizer.zero_grad()
            weights = parameters_to_vector(parameters)
            loss = criterion(model(x), y) + 0.5 * (delta * weights) @ weights / n_data / factor
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            total += loss.item() * len(y)
        return total / n_data

    margliks: list[float] = []
    losses: list[float] = []
    best: tuple[float, dict[str, Any], Tensor, Tensor] | None = None
    for epoch in trange(1, n_epochs + 1, disable=not progress_bar, desc="marglik training"):
        losses.append(train_an_epoch())
        if epoch % marglik_frequency or epoch < n_epochs_burnin:
            continue
        la = posterior(log_delta.exp(), log_sigma.exp())
        delta, sigma = log_delta.detach().exp(), log_sigma.detach().exp()
        for _ in range(n_hypersteps):
            hyper_optimizer.zero_grad()
            neg_log_marglik = -la.log_marginal_likelihood(log_delta.exp(), log_sigma.exp() if is_regression else None)
            delta, sigma = log_delta.detach().exp(), log_sigma.detach().exp()
            neg_log_marglik.backward()
            hyper_optimizer.step()
            margliks.append(neg_log_marglik.item())
        if best is None or margliks[-1] < best[0]:
            best = margliks[-1], copy.deepcopy(model.state_dict()), delta, sigma
    delta, sigma = log_delta.detach().exp(), log_sigma.detach().exp()
    if best is not None:
        _, weights, delta, sigma = best
        model.load_state_dict(weights)
    return posterior(delta, sigma, enable_backprop=enable_backprop), model, margliks, losses
