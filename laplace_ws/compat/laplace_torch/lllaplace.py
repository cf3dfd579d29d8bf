"""The posteriors over the last layer, by laplace-torch's names and calls."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from laplace_ws.compat.laplace_torch.baselaplace import (
    DiagLaplace,
    FullLaplace,
    FunctionalLaplace,
    KronLaplace,
    ParametricLaplace,
)
from laplace_ws.compat.laplace_torch.curvature.curvature import CurvatureInterface
from laplace_ws.compat.laplace_torch.utils.data import moved
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood
from laplace_ws.compat.laplace_torch.utils.feature_extractor import FeatureExtractor, FeatureReduction

__all__ = ["DiagLLLaplace", "FullLLLaplace", "FunctionalLLLaplace", "KronLLLaplace", "LLLaplace"]


class LLLaplace(ParametricLaplace):
    """A posterior over the last layer of a copy of the network.

    Args:
        model: the network, which is copied.
        likelihood, sigma_noise, prior_precision, prior_mean, temperature, enable_backprop: see `BaseLaplace`.
        feature_reduction: see `FeatureExtractor`.
        dict_key_x, dict_key_y, backend: see `BaseLaplace`.
        last_layer_name: name of the last layer; found by running the network where not given.
        backend_kwargs: see `BaseLaplace`.
        asdl_fisher_kwargs: None.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        backend_kwargs: MutableMapping[str, Any] | None = None,
        asdl_fisher_kwargs: MutableMapping[str, Any] | None = None,
    ) -> None:
        if asdl_fisher_kwargs is not None:
            raise ValueError("asdl_fisher_kwargs is not for posteriors of the last layer; leave it out.")
        self._last_layer_name = last_layer_name
        extractor = FeatureExtractor(deepcopy(model), last_layer_name, enable_backprop, feature_reduction)
        super().__init__(
            extractor,
            likelihood,
            sigma_noise=sigma_noise,
            prior_precision=prior_precision,
            prior_mean=prior_mean,
            temperature=temperature,
            enable_backprop=enable_backprop,
            dict_key_x=dict_key_x,
            dict_key_y=dict_key_y,
            backend=backend,
            backend_kwargs=backend_kwargs,
        )
        self._backend_kwargs["last_layer"] = True
        self.data: Any = None
        if extractor.last_layer is None:
            self.mean: Tensor | None = None

    @property
    def _extractor(self) -> FeatureExtractor:
        assert isinstance(self.model, FeatureExtractor)
        return self.model

    def _set_sizes(self, parameters: list[nn.Parameter]) -> None:
        self.n_params: int | None = None
        self.n_layers: int | None = None
        if self._extractor.last_layer is not None:
            super()._set_sizes(self._covered)

    @property
    def _covered(self) -> list[nn.Parameter]:
        layer = self._extractor.last_layer
        return [] if layer is None else list(layer.parameters())

    @property
    def _network(self) -> nn.Module:
        return self._extractor.model

    @property
    def _subset(self) -> dict[str, Any]:
        return {"subset_of_weights": [str(self._extractor._last_layer_name)]}

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """See `BaseLaplace.fit`; data are not added."""
        if not override:
            raise ValueError("data are not added to a posterior of the last layer; fit all of them with override=True.")
        super().fit(train_loader, override, progress_bar)

    def _prepare(self, train_loader: Any) -> None:
        if self._extractor.last_layer is None:
            self.data = next(iter(train_loader))
            self._find_last_layer(self.data)

    @torch.no_grad()
    def _find_last_layer(self, batch: Any) -> None:
        """Run the network on a batch, and check the prior now that it is known of how many weights it is."""
        is_mapping = isinstance(batch, Mapping)
        self._extractor.find_last_layer(moved(batch if is_mapping else batch[0][:1], self._device))
        self._set_sizes(self._covered)
        self.prior_precision, self.prior_mean = self._prior_precision, self._prior_mean

    def _weights(self) -> Float[Tensor, " P"]:
        mean = parameters_to_vector(self._covered)
        return mean if self.enable_backprop else mean.detach()

    def functional_variance_fast(self, X: Any) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"]]:
        """Outputs and their variances."""
        return self._moments(X, joint=False, diagonal=True)

    def state_dict(self) -> dict[str, Any]:
        """See `ParametricLaplace.state_dict`."""
        return {**super().state_dict(), "data": self.data, "_last_layer_name": self._last_layer_name}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `ParametricLaplace.load_state_dict`."""
        if self._last_layer_name != state_dict["_last_layer_name"]:
            raise ValueError(
                f"the saved posterior has last_layer_name={state_dict['_last_layer_name']!r}, this one {self._last_layer_name!r}."
            )
        self.data = state_dict["data"]
        if self.data is not None and self._extractor.last_layer is None:
            self._find_last_layer(self.data)
        super().load_state_dict(state_dict)


class FullLLLaplace(LLLaplace, FullLaplace):
    """All covariances of the last layer."""

    _key = ("last_layer", "full")

    @property
    def H(self) -> Any:
        """See `FullLaplace.H`; None while the last layer is not known."""
        return None if self.n_params is None else FullLaplace.H.fget(self)  # pyright: ignore


class DiagLLLaplace(LLLaplace, DiagLaplace):
    """Independent weights of the last layer."""

    _key = ("last_layer", "diag")

    @property
    def H(self) -> Any:
        """See `DiagLaplace.H`; None while the last layer is not known."""
        return None if self.n_params is None else DiagLaplace.H.fget(self)  # pyright: ignore


class KronLLLaplace(LLLaplace, KronLaplace):
    """A Kronecker product for each parameter tensor of the last layer.

    Args:
        model, …, last_layer_name: see `LLLaplace`.
        damping: of no effect, as in laplace-torch once there is a prior.
        backend_kwargs, asdl_fisher_kwargs: see `LLLaplace`.
    """

    _key = ("last_layer", "kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        sigma_noise: float | Tensor = 1.0,
        prior_precision: float | Tensor = 1.0,
        prior_mean: float | Tensor = 0.0,
        temperature: float = 1.0,
        enable_backprop: bool = False,
        feature_reduction: FeatureReduction | str | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        backend: type[CurvatureInterface] | None = None,
        last_layer_name: str | None = None,
        damping: bool = False,
        backend_kwargs: MutableMapping[str, Any] | None = None,
        asdl_fisher_kwargs: MutableMapping[str, Any] | None = None,
    ) -> None:
        LLLaplace.__init__(
            self,
            model,
            likelihood,
            sigma_noise,
            prior_precision,
            prior_mean,
            temperature,
            enable_backprop,
            feature_reduction,
            dict_key_x,
            dict_key_y,
            backend,
            last_layer_name,
            backend_kwargs,
            asdl_fisher_kwargs,
        )
        self.damping: bool = damping

    @property
    def H(self) -> Any:
        """See `KronLaplace.H`; None while the last layer is not known."""
        return None if self.n_params is None else KronLaplace.H.fget(self)  # pyright: ignore


class FunctionalLLLaplace(FunctionalLaplace):
    """See `FunctionalLaplace`."""

    _key = ("last_layer", "gp")
