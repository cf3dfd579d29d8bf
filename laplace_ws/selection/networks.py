"""What criteria look at: a trained network with its images and posteriors, and the one trained on a part of the images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laplace_ws.curvature import Curvature
from laplace_ws.data import ImageData, TensorLoader, balanced_indices
from laplace_ws.experiment.config import RunConfig
from laplace_ws.experiment.folder import Task
from laplace_ws.experiment.kept import kept_by_training
from laplace_ws.experiment.run import make_model, train_one
from laplace_ws.posterior import Laplace

T = TypeVar("T")
TUNED = Task("tuned")


@dataclass(frozen=True)
class PosteriorKind:
    """Which posterior of a network, over all of its weights.

    Attributes:
        structure: of the curvature.
        kfac_approx: of a Kronecker structure.
        curvature: exact GGN, or one by sampled labels.
    """

    structure: str
    kfac_approx: str | None = None
    curvature: str = Curvature.GGN.value

    def of(self, model: nn.Module, run: RunConfig, seed: int = 0) -> Laplace:
        """The posterior before its fit; labels are drawn by the seed."""
        own: dict[str, Any] = {"kfac_approx": self.kfac_approx} if self.kfac_approx else {}
        return Laplace(
            model,
            run.likelihood,
            hessian_structure=self.structure,
            curvature=self.curvature,
            backend=run.marglik.backend,
            generator=torch.Generator(next(model.parameters()).device).manual_seed(seed),
            **own,
        )


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network and the images that it was trained on.

    Attributes:
        model: with the weights that training kept.
        run: settings of the training.
        x, y: the training images, normalised, and their classes.
        prior_precision: at the end of training, see `Kept`.
        temperature: of the likelihood.
        log_marginal_likelihood: of the training's last fit, in nats.
        extra_seconds: of a training that only criteria need.
    """

    model: nn.Module
    run: RunConfig
    x: Float[Tensor, "N C H W"]
    y: Int[Tensor, " N"]
    prior_precision: Tensor
    temperature: float
    log_marginal_likelihood: float
    extra_seconds: float = 0.0

    @classmethod
    def load(cls, folder: Path, run: RunConfig, data: ImageData, log_marginal_likelihood: float) -> Network:
        """The network that a training kept in a folder.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: it is damaged.
            ExperimentError: it is of another network.
        """
        kept = kept_by_training(folder / TUNED.checkpoint, run, data)
        prior = kept.prior_precision, kept.temperature
        return cls(kept.model, run, data.x_train, data.y_train, *prior, log_marginal_likelihood)

    def posterior(self, kind: PosteriorKind, seed: int) -> Laplace:
        """A posterior fitted to the training images, under the prior of the training."""
        la = kind.of(self.model, self.run, seed)
        la.fit(TensorLoader(self.x, self.y, batch_size=self.run.data.batch_size))
        la.temperature = self.temperature
        la.prior_precision = self.prior_precision
        return la


def n_weights(run: RunConfig, data: ImageData) -> int:
    """P, the number of weights that a run trains."""
    return sum(p.numel() for p in make_model(run, data).parameters() if p.requires_grad)


@dataclass(frozen=True)
class Split:
    """A part of the training images and the rest, both class-balanced.

    Attributes:
        fraction: share of the part, from 0 to 1.
        seed: which chooses it, and from which sampled labels are drawn.
    """

    fraction: float
    seed: int

    def n_part(self, n: int) -> int:
        """Number of images of the part, given that of all."""
        return round(self.fraction * n)

    def of(self, data: ImageData) -> ImageData:
        """The part to train on, and the rest in place of the test images; normalised as all of them were."""
        chosen = torch.zeros(len(data.y_train), dtype=torch.bool)
        chosen[balanced_indices(data.y_train, self.n_part(len(chosen)), seed=self.seed)] = True
        chosen = chosen.to(data.y_train.device)
        x, y = data.x_train, data.y_train
        return replace(data, x_train=x[chosen], y_train=y[chosen], x_test=x[~chosen], y_test=y[~chosen])


class Networks:
    """The networks of one candidate. What several criteria need is made once, and its time is known for each of them.

    Args:
        run: settings of the candidate's run, which has finished.
        folder: of the run.
        data: its images.
        log_marginal_likelihood: of the last fit, in nats.
        split: the part of the training images, and the rest.
        scratch: folder for the training on the part, which goes on from a checkpoint there.
    """

    def __init__(
        self,
        run: RunConfig,
        folder: Path,
        data: ImageData,
        log_marginal_likelihood: float,
        split: Split,
        scratch: Path,
    ) -> None:
        self.run: RunConfig = run
        self.folder: Path = folder
        self.data: ImageData = data
        self.split: Split = split
        self.scratch: Path = scratch
        self.log_marginal_likelihood: float = log_marginal_likelihood
        self._made: dict[Any, _Made] = {}
        self._asked: set[Any] = set()

    @property
    def whole(self) -> Network:
        """The network trained on all training images."""
        return self._once("whole", lambda: Network.load(self.folder, self.run, self.data, self.log_marginal_likelihood))

    @property
    def part(self) -> Network:
        """The network trained on the part, by the same settings.

        Raises:
            TrainingDiverged: a loss became NaN or infinite.
        """
        return self._once("part", self._trained_on_part)

    @property
    def rest(self) -> tuple[Float[Tensor, "M C H W"], Int[Tensor, " M"]]:
        """The images that the part leaves out, and their classes."""
        data = self.split.of(self.data)
        return data.x_test, data.y_test

    @property
    def n_weights(self) -> int:
        """P, the number of trained weights."""
        return n_weights(self.run, self.data)

    def posterior(self, kind: PosteriorKind, *, of_part: bool = False) -> Laplace:
        """A posterior of one of the networks, fitted to its images under the prior of its training; it is shared, so leave it as it is."""
        network = self.part if of_part else self.whole
        return self._once((kind, of_part), lambda: network.posterior(kind, self.split.seed))

    def timed(self, criterion: Callable[[Networks], float]) -> tuple[float, float]:
        """The value of a criterion, and the seconds that it would take alone, beside the training on all images.

        A decomposition that a posterior keeps counts for the first criterion that needs it.
        """
        self._asked, known = set(), set(self._made)
        start = time.perf_counter()
        value = criterion(self)
        elapsed = time.perf_counter() - start
        elapsed -= sum(self._made[key].elapsed for key in self._asked - known)
        return value, elapsed + sum(self._made[key].seconds for key in self._asked)

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        self._asked.add(key)
        if key not in self._made:
            start = time.perf_counter()
            thing = make()
            elapsed = time.perf_counter() - start
            self._made[key] = _Made(thing, elapsed, thing.extra_seconds if isinstance(thing, Network) else elapsed)
        return self._made[key].thing

    def _trained_on_part(self) -> Network:
        data = self.split.of(self.data)
        self.scratch.mkdir(parents=True, exist_ok=True)
        result, _ = train_one(self.run, TUNED, self.scratch, True, False, data)
        assert result.log_marginal_likelihood is not None
        assert result.train_seconds is not None
        network = Network.load(self.scratch, self.run, data, result.log_marginal_likelihood)
        return replace(network, extra_seconds=result.train_seconds)


@dataclass(frozen=True, eq=False)
class _Made:
    """What several criteria need.

    Attributes:
        thing: itself.
        elapsed: seconds until it was made here.
        seconds: that it takes in all, also where a part was done before an interruption.
    """

    thing: Any
    elapsed: float
    seconds: float
