"""Networks with Laplace posteriors as estimators of scikit-learn, for its pipelines, searches and scores.

They need scikit-learn, `pip install 'laplace_ws[sklearn]'`, which nothing else of the package imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from laplace_ws.data import TensorLoader
from laplace_ws.likelihoods import Likelihood
from laplace_ws.marglik import marglik_training
from laplace_ws.models import MLP
from laplace_ws.posterior import Laplace
from laplace_ws.values import real_number, shown, whole_number

if TYPE_CHECKING:
    # scikit-learn has no types; what users call of its classes has these

    class BaseEstimator:
        """See scikit-learn."""

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            """Its parameters by name."""
            ...

        def set_params(self, **params: Any) -> Any:
            """Change some; returns the estimator."""
            ...

        def __sklearn_tags__(self) -> Any: ...

    class ClassifierMixin:
        """See scikit-learn."""

        def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
            """Share of right labels, or the coefficient of determination R²."""
            ...

    class RegressorMixin(ClassifierMixin):
        """See scikit-learn."""


try:
    if not TYPE_CHECKING:
        from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
except ImportError as _error:
    raise ImportError(
        "laplace_ws.sklearn needs scikit-learn, 1.6 or newer; install it by: pip install 'laplace_ws[sklearn]'."
    ) from _error

__all__ = ["LaplaceClassifier", "LaplaceRegressor"]

ModuleFactory = Callable[[int, int], nn.Module]
"""(number of features, number of outputs) -> a network that maps `[N, features]` to `[N, outputs]`."""
_TYPES: dict[Any, torch.dtype] = {np.dtype("float32"): torch.float32, np.dtype("float64"): torch.float64}


class _LaplaceEstimator(BaseEstimator):
    """What the two estimators share: a network, its training by `marglik_training`, and its posterior."""

    posterior_: Laplace
    log_marginal_likelihood_value_: float
    n_features_in_: int
    _seed: int

    def __init__(
        self,
        module: ModuleFactory | None = None,
        *,
        hidden: Sequence[int] = (50,),
        activation: str = "tanh",
        n_epochs: int = 100,
        batch_size: int = 64,
        lr: float = 0.02,
        hessian_structure: str = "kron",
        pred_type: str = "glm",
        n_samples: int = 100,
        training_options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.module = module
        self.hidden = hidden
        self.activation = activation
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.hessian_structure = hessian_structure
        self.pred_type = pred_type
        self.n_samples = n_samples
        self.training_options = training_options
        self.device = device
        self.random_state = random_state

    @property
    def module_(self) -> nn.Module:
        """The trained network."""
        return self.posterior_.model

    def _train(self, X: np.ndarray, y: Tensor, likelihood: str | Likelihood, n_outputs: int) -> None:
        """Train a new network and keep its posterior.

        Args:
            X: inputs.
            y: targets.
            likelihood: of the targets.
            n_outputs: of the network.
        """
        self._seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        x = self._tensor(X)
        loader = TensorLoader(
            x,
            y.to(x.device),
            batch_size=min(whole_number("batch_size", self.batch_size, least=1), len(x)),
            shuffle=True,
            seed=self._seed,
        )
        options = {
            "hessian_structure": self.hessian_structure,
            "final_curvature": "ggn",
            "optimizer_cls": torch.optim.Adam,
            "optimizer_kwargs": {"lr": real_number("lr", self.lr, above=0)},
            "n_epochs": self.n_epochs,
            "marglik_frequency": 10,  # with the next, what makes a training repeat itself exactly
            "fit_fraction": 1.0,
            "progress_bar": False,
            **(self.training_options or {}),
        }
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            model = self._new_module(x, n_outputs)
            result = marglik_training(model, loader, likelihood, **options)
        self.posterior_ = result.la

    def _new_module(self, x: Tensor, n_outputs: int) -> nn.Module:
        n_features = x.shape[1]
        if self.module is None:
            return MLP(n_features, self.hidden, n_outputs, self.activation).to(x)
        if isinstance(self.module, nn.Module) or not callable(self.module):
            raise TypeError(
                "module must be a function of the numbers of features and of outputs that makes a network, such as lambda n_in, n_out: "
                f"nn.Linear(n_in, n_out), got {shown(self.module)}."
            )
        made = self.module(n_features, n_outputs)
        if not isinstance(made, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"module must return a network, a torch.nn.Module, but it returned {shown(made)}.")
        with torch.no_grad():
            outputs = made.to(x).eval()(x[:1])
        if outputs.shape != (1, n_outputs):
            raise ValueError(
                f"module must return a network that maps [N, {n_features}] to [N, {n_outputs}], but for N=1 it gives "
                f"{list(outputs.shape)}; its second argument is the number of outputs."
            )
        return made

    def _inputs(self, X: Any) -> Tensor:
        """Inputs at which to predict, checked against those of the fit."""
        check_is_fitted(self, "posterior_")
        return self._tensor(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))

    def _tensor(self, X: Any) -> Tensor:
        """A copy on the device, in the type of the network, or, before there is one, of the numbers."""
        dtype = _TYPES[X.dtype] if not hasattr(self, "posterior_") else self.posterior_.mean.dtype
        return torch.tensor(X, dtype=dtype, device=self.device)

    def _generator(self) -> torch.Generator:
        """Source of the samples of a prediction: the same each time."""
        return torch.Generator(self.device).manual_seed(self._seed)


class LaplaceClassifier(ClassifierMixin, _LaplaceEstimator):
    """A network for classes whose prior precisions tune themselves while it trains, with a Laplace posterior.

    It is trained by `laplace_ws.marglik_training` on all the data: the log marginal likelihood chooses how far each layer is held to zero,
    so there is no weight decay to search for. Inputs are taken as they are; scale them by a `StandardScaler` before it.

    Args:
        module: makes the network, given the numbers of features and of outputs; a perceptron if not given.
        hidden: widths of the perceptron's hidden layers.
        activation: between them, see `laplace_ws.models.MLP`.
        n_epochs: of the training.
        batch_size: examples per gradient step.
        lr: step size of Adam at the start, from which a cosine takes it to zero.
        hessian_structure: of the posterior, see `laplace_ws.Laplace`.
        pred_type: "glm", by the linearised network, or "nn", by networks drawn from the posterior.
        link_approx: for "glm", how probabilities follow from Gaussian outputs: "probit", "mc", "bridge" or "bridge_norm".
        n_samples: of predictions that are sampled; the same draws at each call.
        training_options: further options of `laplace_ws.marglik_training`, or others in place of the above.
        device: where it is trained and predicts.
        random_state: of the initial weights, the order of the batches and all samples.

    Attributes:
        classes_: the labels, sorted; the columns of `predict_proba`.
        posterior_: the `Laplace` posterior, of class numbers.
        module_: the trained network.
        log_marginal_likelihood_value_: log p(y | X) in nats.
        n_features_in_, feature_names_in_: of the inputs.
    """

    classes_: np.ndarray

    def __init__(
        self,
        module: ModuleFactory | None = None,
        *,
        hidden: Sequence[int] = (50,),
        activation: str = "tanh",
        n_epochs: int = 100,
        batch_size: int = 64,
        lr: float = 0.02,
        hessian_structure: str = "kron",
        pred_type: str = "glm",
        link_approx: str = "probit",
        n_samples: int = 100,
        training_options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        super().__init__(
            module,
            hidden=hidden,
            activation=activation,
            n_epochs=n_epochs,
            batch_size=batch_size,
            lr=lr,
            hessian_structure=hessian_structure,
            pred_type=pred_type,
            n_samples=n_samples,
            training_options=training_options,
            device=device,
            random_state=random_state,
        )
        self.link_approx = link_approx

    def fit(self, X: Any, y: Any) -> LaplaceClassifier:
        """Train the network and fit its posterior.

        Args:
            X: inputs `[N, features]`.
            y: labels `[N]`, of any kind.
        """
        self.__dict__.pop("posterior_", None)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, numbers = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"{type(self).__name__} needs two classes or more, but y holds one class alone, {self.classes_[0]!r}."
            )
        self._train(X, torch.as_tensor(numbers), "classification", len(self.classes_))
        self.log_marginal_likelihood_value_: float = float(self.posterior_.log_marginal_likelihood())
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[N, classes]` of the posterior predictive, in the order of `classes_`."""
        x, generator = self._inputs(X), self._generator()
        found = self.posterior_.predict_proba(x, self.pred_type, self.link_approx, self.n_samples, generator=generator)
        return found.cpu().numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The most probable labels `[N]`."""
        return self.classes_[self.predict_proba(X).argmax(1)]


class LaplaceRegressor(RegressorMixin, _LaplaceEstimator):
    """A network for numbers whose prior precisions and noise tune themselves while it trains, with a Laplace posterior.

    It is trained by `laplace_ws.marglik_training` on all the data: the log marginal likelihood chooses the noise and how far each layer is
    held to zero. Inputs are taken as they are; scale them by a `StandardScaler` before it.

    Args:
        module: makes the network, given the numbers of features and of outputs; a perceptron if not given.
        hidden: widths of the perceptron's hidden layers.
        activation: between them, see `laplace_ws.models.MLP`.
        n_epochs: of the training.
        batch_size: examples per gradient step.
        lr: step size of Adam at the start, from which a cosine takes it to zero.
        hessian_structure: of the posterior, see `laplace_ws.Laplace`.
        pred_type: "glm", by the linearised network, or "nn", by networks drawn from the posterior.
        n_samples: of predictions that are sampled; the same draws at each call.
        training_options: further options of `laplace_ws.marglik_training`, or others in place of the above.
        device: where it is trained and predicts.
        random_state: of the initial weights, the order of the batches and all samples.
        normalize_y: whether the network learns targets of mean 0 and standard deviation 1; what is predicted has their own units.

    Attributes:
        posterior_: the `Laplace` posterior, of normalised targets.
        module_: the trained network.
        noise_: standard deviation of the observation noise in the units of y: a number, or `[D]` for targets `[N, D]`.
        log_marginal_likelihood_value_: log p(y | X) in nats, of y in its own units.
        n_features_in_, feature_names_in_: of the inputs.
    """

    noise_: float | np.ndarray

    def __init__(
        self,
        module: ModuleFactory | None = None,
        *,
        hidden: Sequence[int] = (50,),
        activation: str = "tanh",
        n_epochs: int = 100,
        batch_size: int = 64,
        lr: float = 0.02,
        hessian_structure: str = "kron",
        pred_type: str = "glm",
        n_samples: int = 100,
        training_options: Mapping[str, Any] | None = None,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
        normalize_y: bool = True,
    ) -> None:
        super().__init__(
            module,
            hidden=hidden,
            activation=activation,
            n_epochs=n_epochs,
            batch_size=batch_size,
            lr=lr,
            hessian_structure=hessian_structure,
            pred_type=pred_type,
            n_samples=n_samples,
            training_options=training_options,
            device=device,
            random_state=random_state,
        )
        self.normalize_y = normalize_y

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> LaplaceRegressor:
        """Train the network and fit its posterior.

        Args:
            X: inputs `[N, features]`.
            y: targets `[N]` or `[N, D]`.
        """
        self.__dict__.pop("posterior_", None)
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=X.dtype)
        self._is_flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        self._y_mean, self._y_std = np.zeros(y.shape[1], y.dtype), np.ones(y.shape[1], y.dtype)
        if self.normalize_y:
            deviation = y.std(0)
            self._y_mean, self._y_std = y.mean(0), np.where(deviation > 0, deviation, 1.0).astype(y.dtype)
        self._train(X, self._tensor((y - self._y_mean) / self._y_std), "regression", y.shape[1])
        noise = self._y_std * self.posterior_.sigma_noise.item()
        self.noise_ = float(noise[0]) if self._is_flat else noise
        # the density of y is that of the normalised targets by their scale
        log_scale = len(y) * float(np.log(self._y_std.astype(np.float64)).sum())
        self.log_marginal_likelihood_value_: float = float(self.posterior_.log_marginal_likelihood()) - log_scale
        return self

    def predict(
        self, X: Any, return_std: bool = False, return_cov: bool = False, include_noise: bool = True
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Means of the targets, and on request how far from them the targets may lie.

        Args:
            X: inputs `[N, features]`.
            return_std: whether to return standard deviations too, in the shape of the means.
            return_cov: whether to return the covariance over all inputs instead, `[N, N]`, or `[N, N, D]` of each of D targets.
            include_noise: whether these are of targets, observation noise included, or of the function alone.

        Returns:
            Means `[N]` or `[N, D]`; with `return_std` or `return_cov`, a pair.
        """
        if return_std and return_cov:
            raise ValueError("return_std and return_cov exclude each other; ask for one of them.")
        x, n_outputs = self._inputs(X), len(self._y_std)
        sampling: dict[str, Any] = {"n_samples": self.n_samples, "generator": self._generator()}
        if not (return_std or return_cov):
            return self._in_units(self.posterior_.predict(x, self.pred_type, **sampling))
        options = sampling | {"pred_type": self.pred_type, "observation_noise": include_noise}
        if return_cov:
            mean, joint = self.posterior_(x, joint=True, **options)
            blocks = joint.reshape(len(x), n_outputs, len(x), n_outputs).diagonal(dim1=1, dim2=3)
            covariance = blocks.cpu().numpy() * self._y_std**2
            return self._in_units(mean.reshape(len(x), n_outputs)), covariance[..., 0] if self._is_flat else covariance
        mean, variances = self.posterior_(x, diagonal_output=True, **options)
        deviations = variances.sqrt().cpu().numpy() * self._y_std
        return self._in_units(mean), deviations[:, 0] if self._is_flat else deviations

    def _in_units(self, mean: Tensor) -> np.ndarray:
        """Means of the targets, in the form of those of the fit."""
        found = mean.cpu().numpy() * self._y_std + self._y_mean
        return found[:, 0] if self._is_flat else found
