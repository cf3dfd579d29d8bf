"""The posteriors over a subnetwork, by laplace-torch's names and calls."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.compat.laplace_torch.baselaplace import DiagLaplace, FullLaplace, ParametricLaplace
from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface, EFInterface, GGNInterface
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood

__all__ = ["DiagSubnetLaplace", "FullSubnetLaplace", "SubnetLaplace"]


class SubnetLaplace(ParametricLaplace):
    """A posterior over some weights. `n_params`, `mean` and samples are of all weights, and all else of the chosen ones, in their order.

    Args:
        model, likelihood: see `BaseLaplace`.
        subnetwork_indices: places of the chosen weights among all that require grad, int64.
        sigma_noise, prior_precision, prior_mean, temperature, backend, backend_kwargs: see `BaseLaplace`.
        asdl_fisher_kwargs: None.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        subnetwork_indices: Int[Tensor, " D"],
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        backend: type[CurvatureInterface] | None = None,
        backend_kwargs: MutableMapping[str, Any] | None = None,
        asdl_fisher_kwargs: MutableMapping[str, Any] | None = None,
    ) -> None:
        if asdl_fisher_kwargs is not None:
            raise ValueError("asdl_fisher_kwargs is not for posteriors of a subnetwork; leave it out.")
        if backend is not None and not issubclass(backend, (GGNInterface, EFInterface)):
            raise ValueError(f"a subnetwork needs the curvature of a GGN or EF class, got {backend.__name__}.")
        n_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._indices = _checked(subnetwork_indices, n_params)
        self.n_params_subnet: int = len(subnetwork_indices)
        super().__init__(
            model,
            likelihood,
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            backend=backend,
            backend_kwargs=backend_kwargs,
        )
        self._backend_kwargs["subnetwork_indices"] = subnetwork_indices

    @property
    def _prior_lengths(self) -> tuple[int, ...] | None:
        return 1, self.n_params_subnet

    @property
    def _n_prior_means(self) -> int:
        return self.n_params_subnet

    @property
    def _subset(self) -> dict[str, Any]:
        return {"subset_of_weights": "subnetwork", "subnetwork_indices": self._indices}

    @property
    def _own_backend_kwargs(self) -> dict[str, Any]:
        return {key: value for key, value in self._backend_kwargs.items() if key != "subnetwork_indices"}

    @property
    def mean_subnet(self) -> Float[Tensor, " D"]:
        """θ* of the chosen weights."""
        assert self.mean is not None
        return self.mean[self._indices]

    @property
    def _mode(self) -> Float[Tensor, " D"]:
        return self.mean_subnet if self._posterior is not None else self.prior_mean.expand(self.n_params_subnet)

    @property
    def prior_precision_diag(self) -> Float[Tensor, " D"]:
        """δ of each chosen weight."""
        return self.prior_precision.expand(self.n_params_subnet)

    def assemble_full_samples(self, subnet_samples: Float[Tensor, "S D"]) -> Float[Tensor, "S P"]:
        """All weights, of which the chosen ones are as given."""
        assert self.mean is not None
        samples = self.mean.expand(len(subnet_samples), -1).clone()
        samples[:, self._indices] = subnet_samples
        return samples

    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Float[Tensor, "S P"]:
        """All weights, of which the chosen ones are drawn from the posterior."""
        return self.assemble_full_samples(self._as_given(super().sample(n_samples, generator)))

    def square_norm(self, value: Float[Tensor, " D"]) -> Float[Tensor, ""]:
        """See `ParametricLaplace.square_norm`."""
        return super().square_norm(self._sorted(value) if self._posterior is not None else value)

    def functional_variance(self, Js: Float[Tensor, "N C D"]) -> Float[Tensor, "N C C"]:
        """See `ParametricLaplace.functional_variance`."""
        return super().functional_variance(self._sorted(Js, axes=1))

    def functional_covariance(self, Js: Float[Tensor, "N C D"]) -> Float[Tensor, "NC NC"]:
        """See `ParametricLaplace.functional_covariance`."""
        return super().functional_covariance(self._sorted(Js, axes=1))

    # ---------------------------------------------------------------- the order of the chosen weights

    def _sorted(self, value: Tensor, axes: int | None = None) -> Tensor:
        """From the order of the indices to that of the weights, in which our flat vectors are; all axes, or the last ones."""
        return _along(value, self._indices.argsort(), axes)

    def _as_given(self, value: Tensor, axes: int | None = 1) -> Tensor:
        """Back to the order of the indices."""
        return _along(value, self._indices.argsort().argsort(), axes)

    def _ordered(self, value: Tensor, shapes: Mapping[str, torch.Size]) -> Tensor:
        return value if value.numel() == 1 else self._sorted(value)

    def _given_back(self, precision: Tensor) -> Tensor:
        return precision if precision.numel() == 1 else self._as_given(precision)


class FullSubnetLaplace(SubnetLaplace, FullLaplace):
    """All covariances of the chosen weights."""

    _key = ("subnetwork", "full")

    @property
    def H(self) -> Any:
        """See `FullLaplace.H`."""
        return self._as_given(FullLaplace.H.fget(self), axes=None)  # pyright: ignore


class DiagSubnetLaplace(SubnetLaplace, DiagLaplace):
    """Independent chosen weights."""

    _key = ("subnetwork", "diag")

    @property
    def H(self) -> Any:
        """See `DiagLaplace.H`."""
        return self._as_given(DiagLaplace.H.fget(self))  # pyright: ignore


def _along(value: Tensor, order: Tensor, axes: int | None) -> Tensor:
    for axis in range(-(value.ndim if axes is None else axes), 0):
        value = value.index_select(axis, order.to(value.device))
    return value


def _checked(indices: Any, n_params: int) -> Int[Tensor, " D"]:
    """Raise `ValueError` unless these are places of distinct weights."""
    is_list = isinstance(indices, Tensor) and indices.dtype == torch.int64 and indices.ndim == 1 and len(indices)
    if not is_list or indices.min() < 0 or indices.max() >= n_params or len(indices.unique()) < len(indices):
        raise ValueError(
            f"subnetwork_indices must be one or more distinct places, 0 to {n_params - 1}, in an int64 tensor of one axis, got {indices!r}."
        )
    return indices
