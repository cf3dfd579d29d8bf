"""Curvature of one batch at a time, by laplace-torch's names: each method is a fit of ours to the batch."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.compat.laplace_torch.likelihood import HALF_LOG_TWO_PI, empirical_fisher_factor, likelihood_of
from laplace_ws.compat.laplace_torch.utils.enums import Likelihood
from laplace_ws.compat.laplace_torch.utils.feature_extractor import FeatureExtractor
from laplace_ws.compat.laplace_torch.utils.matrix import Kron, factors_of
from laplace_ws.curvature import exact
from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.inputs import call_model, own_copy
from laplace_ws.matrices import Dense, Diag
from laplace_ws.matrices import Kron as OurKron
from laplace_ws.posterior import Laplace
from laplace_ws.posterior.functional import LinearisedModel

Inputs = Tensor | MutableMapping[str, Any]


class CurvatureInterface:
    """Curvature of a model's loss. What matters of a class is its `name` and its `curvature`: both say which of ours it stands for.

    Args:
        model: the network; a `FeatureExtractor` where only its last layer counts.
        likelihood: of the targets, "classification" or "regression".
        last_layer: whether only the last layer counts.
        subnetwork_indices: places of the weights that count, where not all do.
        dict_key_x, dict_key_y: entries of batches that are mappings.

    Attributes:
        name: of our backend.
        curvature: of ours.
        lossfunc: the summed loss.
        factor: what makes it a negative log likelihood at σ = 1.
    """

    name: ClassVar[str] = "native"
    curvature: ClassVar[str] = "ggn"

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: Int[Tensor, " D"] | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
    ) -> None:
        self.model = model
        self.likelihood = likelihood
        self.last_layer = last_layer
        self.subnetwork_indices = subnetwork_indices
        self.dict_key_x: str = dict_key_x
        self.dict_key_y: str = dict_key_y
        is_regression = likelihood == Likelihood.REGRESSION
        self.lossfunc: nn.Module = (
            nn.MSELoss(reduction="sum") if is_regression else nn.CrossEntropyLoss(reduction="sum")
        )
        self.factor: float = 0.5 if is_regression else 1.0

    @classmethod
    def options(cls, backend_kwargs: MutableMapping[str, Any]) -> dict[str, Any]:
        """The options of our `Laplace` that stand for this class and its options.

        Raises:
            TypeError: it has no option of this name.
        """
        unknown = set(backend_kwargs) - {"last_layer", "subnetwork_indices", "dict_key_x", "dict_key_y"}
        if unknown:
            raise TypeError(f"{cls.__name__} has no option {sorted(unknown)[0]!r}.")
        return {"backend": cls.name, "curvature": cls.curvature}

    @property
    def _model(self) -> nn.Module:
        if not self.last_layer:
            return self.model
        assert isinstance(self.model, FeatureExtractor)
        assert self.model.last_layer is not None
        return self.model.last_layer

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters that count."""
        return [p for p in self._model.parameters() if p.requires_grad]

    # ---------------------------------------------------------------- Jacobians and gradients

    def jacobians(
        self, x: Inputs, enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "N C P"], Float[Tensor, "N C"]]:
        """∂f/∂θ and f."""
        network = self._posterior("diag").network
        inputs = network.inputs(x)
        with evaluation_mode(network.model), torch.no_grad():
            shape = tuple(call_model(network.model, own_copy(inputs)).shape[1:])
        J, f = LinearisedModel(network, shape, 2**28, enable_backprop).jacobians(inputs)
        return J, f

    functorch_jacobians = jacobians

    def last_layer_jacobians(
        self, x: Inputs, enable_backprop: bool = False
    ) -> tuple[Float[Tensor, "N C P"], Float[Tensor, "N C"]]:
        """∂f/∂θ over the weights of the last layer, from its inputs, and f."""
        model = self.model
        assert isinstance(model, FeatureExtractor)
        f, features = model.forward_with_features(x)
        assert model.last_layer is not None
        identity = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        J = torch.einsum("cd,ni->ncdi", identity, features).flatten(2)
        if model.last_layer.bias is not None:
            J = torch.cat([J, identity.expand(len(J), -1, -1)], 2)
        return (J, f) if enable_backprop else (J.detach(), f.detach())

    def gradients(self, x: Inputs, y: Tensor) -> tuple[Float[Tensor, "N P"], Float[Tensor, ""]]:
        """The gradient of `lossfunc` of each example, and its sum."""
        J, f = self.last_layer_jacobians(x) if self.last_layer else self.jacobians(x)
        f = f.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.lossfunc(f, y)
        (g,) = torch.autograd.grad(loss, f)
        return torch.einsum("nc,ncp->np", g, J), loss.detach()

    # ---------------------------------------------------------------- curvature

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Float[Tensor, ""], Float[Tensor, "P P"]]:
        """Loss and dense curvature of a batch."""
        la = self._fitted("full", x, y, kwargs)
        assert isinstance(la.H, Dense)
        return self._loss(la, y), la.H.matrix * self._factor_of(la)

    def diag(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Float[Tensor, ""], Float[Tensor, " P"]]:
        """Loss and the diagonal of the curvature of a batch."""
        la = self._fitted("diag", x, y, kwargs)
        assert isinstance(la.H, Diag)
        return self._loss(la, y), la.H.values * self._factor_of(la)

    def kron(self, x: Inputs, y: Tensor, N: int, **kwargs: Any) -> tuple[Float[Tensor, ""], Kron]:
        """Loss and Kronecker factors of a batch, those of the inputs as its share of a mean over N examples."""
        la = self._fitted("kron", x, y, kwargs)
        assert isinstance(la.H, OurKron)
        share, factors = len(y) / N, factors_of(la.H)
        shared = [
            [F[0] * self._factor_of(la), F[1] * share] if len(F) == 2 else [F[0] * self._factor_of(la)] for F in factors
        ]
        return self._loss(la, y), Kron(shared)

    def _posterior(self, structure: str, **options: Any) -> Laplace:
        model, covered = self.model, {}
        if self.last_layer:
            assert isinstance(model, FeatureExtractor)
            model, covered = model.model, {"subset_of_weights": [str(model._last_layer_name)]}
        elif self.subnetwork_indices is not None:
            covered = {"subset_of_weights": "subnetwork", "subnetwork_indices": self.subnetwork_indices}
        keys = {"dict_key_x": self.dict_key_x, "dict_key_y": self.dict_key_y}
        return Laplace(
            model,
            likelihood_of(self.likelihood),
            hessian_structure=structure,
            **covered,
            **keys,
            **self._own_options(),
            **options,
        )

    def _own_options(self) -> dict[str, Any]:
        return {"backend": self.name, "curvature": self.curvature}

    def _fitted(self, structure: str, x: Inputs, y: Tensor, kwargs: MutableMapping[str, Any]) -> Laplace:
        options: dict[str, Any] = {"kfac_approx": kwargs.get("kfac_approx", "expand")} if structure == "kron" else {}
        la = self._posterior(structure, **options)
        la.mc_samples = int(kwargs.get("mc_samples", la.mc_samples))
        la.fit([(x, y)])
        return la

    def _factor_of(self, la: Laplace) -> float:
        return empirical_fisher_factor(la.likelihood, la.curvature.value)

    def _loss(self, la: Laplace, y: Tensor) -> Float[Tensor, ""]:
        return loss_of(la).to(la.mean.dtype)


def loss_of(la: Laplace) -> Float[Tensor, ""]:
    """The negative log likelihood of a fit at σ = 1, without the normaliser of a Gaussian; float64."""
    fit = la.fitted
    normaliser = fit.totals.n_targets * HALF_LOG_TWO_PI if fit.likelihood.has_noise else 0.0
    return torch.tensor(fit.totals.nll_sum - normaliser, dtype=torch.float64, device=fit.mean.device)


class GGNInterface(CurvatureInterface):
    """The generalised Gauss-Newton matrix, or samples of it.

    Args:
        model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y: see `CurvatureInterface`.
        stochastic: by labels drawn from the model's predictive.
        num_samples: of them for each example.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood | str,
        last_layer: bool = False,
        subnetwork_indices: Int[Tensor, " D"] | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
    ) -> None:
        super().__init__(model, likelihood, last_layer, subnetwork_indices, dict_key_x, dict_key_y)
        self.stochastic: bool = stochastic
        self.num_samples: int = num_samples

    @classmethod
    def options(cls, backend_kwargs: MutableMapping[str, Any]) -> dict[str, Any]:
        """See `CurvatureInterface.options`."""
        others = {key: value for key, value in backend_kwargs.items() if key not in ("stochastic", "num_samples")}
        found = super().options(others)
        if backend_kwargs.get("stochastic"):
            found |= {"curvature": "ggn_mc", "mc_samples": int(backend_kwargs.get("num_samples", 1))}
        return found

    def _own_options(self) -> dict[str, Any]:
        sampled = {"stochastic": self.stochastic, "num_samples": self.num_samples}
        return self.options(sampled)


class EFInterface(CurvatureInterface):
    """The empirical Fisher; for regression as `likelihood.SquaredError` says."""

    curvature = "ef"


class HessianInterface(CurvatureInterface):
    """The Hessian itself: of a batch, in full; there is no posterior with it."""

    def full(self, x: Inputs, y: Tensor, **kwargs: Any) -> tuple[Float[Tensor, ""], Float[Tensor, "P P"]]:
        """Loss and Hessian of a batch, for small models."""
        assert isinstance(x, Tensor)
        with torch.no_grad():
            loss = self.factor * self.lossfunc(self.model(x), y)
        return loss, exact.hessian(self.model, likelihood_of(self.likelihood), x, y)

    @classmethod
    def options(cls, backend_kwargs: MutableMapping[str, Any]) -> dict[str, Any]:
        """There are none."""
        raise ValueError(
            f"backend={cls.__name__} asks for the Hessian, which may be indefinite and has no posterior here; take one with GGN or EF."
        )
