"""Choices of a subnetwork, as classes: `select` chooses, and `indices` are the places of the chosen weights among all of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from laplace_ws.compat.laplace_torch.utils.data import moved
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood
from laplace_ws.compat.laplace_torch.utils.feature_extractor import FeatureExtractor
from laplace_ws.compat.laplace_torch.utils.swag import fit_diagonal_swag_var

__all__ = [
    "LargestMagnitudeSubnetMask",
    "LargestVarianceDiagLaplaceSubnetMask",
    "LargestVarianceSWAGSubnetMask",
    "LastLayerSubnetMask",
    "ModuleNameSubnetMask",
    "ParamNameSubnetMask",
    "RandomSubnetMask",
    "SubnetMask",
]

Loader = DataLoader[Any] | None


class SubnetMask(ABC):
    """A choice of weights; subclasses say which by `get_subnet_mask`.

    Args:
        model: the network, of which all parameters count, frozen ones too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameter_vector: Float[Tensor, " P"] = parameters_to_vector(model.parameters()).detach()
        self._indices: Int[Tensor, " D"] | None = None

    @property
    def _device(self) -> torch.device:
        return self.parameter_vector.device

    @property
    def indices(self) -> Int[Tensor, " D"]:
        """Places of the chosen weights; an `AttributeError` before `select`."""
        if self._indices is None:
            raise AttributeError("no weights are chosen yet; call select() first.")
        return self._indices

    @property
    def n_params_subnet(self) -> int:
        """Number of chosen weights."""
        return len(self.indices)

    def select(self, train_loader: Loader = None) -> Int[Tensor, " D"]:
        """Choose, once, by the training data where the choice depends on them."""
        if self._indices is not None:
            raise ValueError("the weights are chosen already; make a new mask for another choice.")
        self._indices = self.convert_subnet_mask_to_indices(self.get_subnet_mask(train_loader))
        return self._indices

    def convert_subnet_mask_to_indices(self, subnet_mask: Tensor) -> Int[Tensor, " D"]:
        """The places of the ones in a mask over all weights."""
        n_params = len(self.parameter_vector)
        is_mask = isinstance(subnet_mask, Tensor) and not (subnet_mask.is_floating_point() or subnet_mask.is_complex())  # pyright: ignore
        if not is_mask or subnet_mask.shape != (n_params,) or ((subnet_mask != 0) & (subnet_mask != 1)).any():
            raise ValueError(f"a mask of a subnetwork is a vector of {n_params} zeros and ones, one for each weight.")
        return subnet_mask.nonzero()[:, 0]

    @abstractmethod
    def get_subnet_mask(self, train_loader: Loader) -> Bool[Tensor, " P"]:
        """Whether each weight is chosen."""


class ScoreBasedSubnetMask(SubnetMask):
    """The weights of the highest scores.

    Args:
        model: the network.
        n_params_subnet: how many.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int) -> None:
        super().__init__(model)
        n_params = len(self.parameter_vector)
        if n_params_subnet is None or n_params_subnet > n_params:  # pyright: ignore[reportUnnecessaryComparison]
            raise ValueError(
                f"n_params_subnet must be a number of weights, at most the {n_params} of the model, got {n_params_subnet}."
            )
        self._n_params_subnet = n_params_subnet

    @property
    def n_params_subnet(self) -> int:
        """Number of chosen weights."""
        return self._n_params_subnet

    @abstractmethod
    def compute_param_scores(self, train_loader: Loader) -> Float[Tensor, " P"]:
        """A score of each weight."""

    def get_subnet_mask(self, train_loader: Loader) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        scores = self.compute_param_scores(train_loader)
        if scores.shape != self.parameter_vector.shape:
            raise ValueError(
                f"there must be one score for each of {len(self.parameter_vector)} weights, got {list(scores.shape)}."
            )
        mask = torch.zeros_like(self.parameter_vector, dtype=torch.bool)
        mask[scores.topk(self._n_params_subnet).indices] = True
        return mask


class RandomSubnetMask(ScoreBasedSubnetMask):
    """Weights drawn at random."""

    def compute_param_scores(self, train_loader: Loader) -> Float[Tensor, " P"]:
        """Uniform random numbers."""
        return torch.rand_like(self.parameter_vector)


class LargestMagnitudeSubnetMask(ScoreBasedSubnetMask):
    """The weights of largest magnitude."""

    def compute_param_scores(self, train_loader: Loader) -> Float[Tensor, " P"]:
        """Magnitudes."""
        return self.parameter_vector.abs()


class LargestVarianceDiagLaplaceSubnetMask(ScoreBasedSubnetMask):
    """The weights of largest variance under a diagonal posterior, which `select` fits.

    Args:
        model: the network.
        n_params_subnet: how many weights.
        diag_laplace_model: a diagonal posterior over all of them.
    """

    def __init__(self, model: nn.Module, n_params_subnet: int, diag_laplace_model: Any) -> None:
        super().__init__(model, n_params_subnet)
        self.diag_laplace_model = diag_laplace_model

    def compute_param_scores(self, train_loader: Loader) -> Float[Tensor, " P"]:
        """Variances."""
        self.diag_laplace_model.fit(_given(train_loader))
        return self.diag_laplace_model.posterior_variance


class LargestVarianceSWAGSubnetMask(ScoreBasedSubnetMask):
    """The weights of largest variance along further SGD.

    Args:
        model: the network.
        n_params_subnet: how many weights.
        likelihood: of the targets, "classification" or "regression".
        swag_n_snapshots, swag_snapshot_freq, swag_lr: see `fit_diagonal_swag_var`.
    """

    def __init__(
        self,
        model: nn.Module,
        n_params_subnet: int,
        likelihood: Likelihood | str = Likelihood.CLASSIFICATION,
        swag_n_snapshots: int = 40,
        swag_snapshot_freq: int = 1,
        swag_lr: float = 0.01,
    ) -> None:
        super().__init__(model, n_params_subnet)
        losses: dict[str, Callable[[Tensor, Tensor], Tensor]]
        losses = {"classification": nn.CrossEntropyLoss(), "regression": nn.MSELoss()}
        self.likelihood: Likelihood = Likelihood(likelihood)
        if self.likelihood.value not in losses:
            raise ValueError(f"SWAG is for classification and regression, not for {self.likelihood.value!r}.")
        self._loss = losses[self.likelihood.value]
        self._options = {"n_snapshots_total": swag_n_snapshots, "snapshot_freq": swag_snapshot_freq}
        self._lr = swag_lr

    def compute_param_scores(self, train_loader: Loader) -> Float[Tensor, " P"]:
        """Variances."""
        return fit_diagonal_swag_var(self.model, _given(train_loader), self._loss, lr=self._lr, **self._options)


class ParamNameSubnetMask(SubnetMask):
    """All weights of some parameters.

    Args:
        model: the network.
        parameter_names: their names.
    """

    def __init__(self, model: nn.Module, parameter_names: Sequence[str]) -> None:
        super().__init__(model)
        self._parameter_names = list(parameter_names)

    def get_subnet_mask(self, train_loader: Loader) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        known = dict(self.model.named_parameters())
        missing = [name for name in self._parameter_names if name not in known]
        if missing or not self._parameter_names:
            raise ValueError(
                f"name one or more parameters of the model; there is no {', '.join(map(repr, missing)) or 'name'}."
            )
        return _mask({name: name in self._parameter_names for name in known}, known)


class ModuleNameSubnetMask(SubnetMask):
    """All weights of some modules that have no others below them.

    Args:
        model: the network.
        module_names: their names.
    """

    def __init__(self, model: nn.Module, module_names: Sequence[str]) -> None:
        super().__init__(model)
        self._module_names = list(module_names)

    def get_subnet_mask(self, train_loader: Loader) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        modules, names = dict(self.model.named_modules()), self._module_names
        if not names:
            raise ValueError("name one or more modules of the model; module_names is empty.")
        for name in names:
            if name not in modules:
                raise ValueError(f"there is no module {name!r} in the model; see model.named_modules().")
            if list(modules[name].children()) or not list(modules[name].parameters()):
                raise ValueError(f"module {name!r} must have parameters and no modules below it.")
        chosen = {id(p) for name in names for p in modules[name].parameters()}
        known = dict(self.model.named_parameters())
        return _mask({name: id(p) in chosen for name, p in known.items()}, known)


class LastLayerSubnetMask(ModuleNameSubnetMask):
    """All weights of the last layer.

    Args:
        model: the network.
        last_layer_name: its name; found by running the model on the first batch where not given.
    """

    def __init__(self, model: nn.Module, last_layer_name: str | None = None) -> None:
        super().__init__(model, [])
        self._feature_extractor = FeatureExtractor(model, last_layer_name=last_layer_name)

    @torch.no_grad()
    def get_subnet_mask(self, train_loader: Loader) -> Bool[Tensor, " P"]:
        """See `SubnetMask.get_subnet_mask`."""
        batch = next(iter(_given(train_loader)))
        if self._feature_extractor.last_layer is None:
            self._feature_extractor.eval()
            self._feature_extractor.find_last_layer(moved(batch[0], self._device))
        self._module_names = [str(self._feature_extractor._last_layer_name)]
        return super().get_subnet_mask(train_loader)


def _mask(is_chosen: dict[str, bool], parameters: dict[str, nn.Parameter]) -> Bool[Tensor, " P"]:
    return torch.cat([torch.full((p.numel(),), is_chosen[name], device=p.device) for name, p in parameters.items()])


def _given(train_loader: Loader) -> DataLoader[Any]:
    if train_loader is None:
        raise ValueError("the choice depends on the training data; pass them to select().")
    return train_loader
