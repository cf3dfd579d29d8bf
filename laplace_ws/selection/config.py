"""What a comparison of models is made of: the settings that all share, and the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from laplace_ws.experiment.config import ExperimentError, ModelConfig, RunConfig, TrainingConfig
from laplace_ws.experiment.folder import PARTIAL
from laplace_ws.option_errors import OptionError
from laplace_ws.options import from_mapping
from laplace_ws.posterior import STRUCTURES, PriorStructure
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.networks import Split

CRITERIA_FOLDER = "select.criteria"
"""Folder in that of a comparison with what criteria need of each candidate."""
_NOT_IN_NAMES = "/\\"
CHEAP = ("marglik", "train_log_likelihood", "fewest_weights")
"""Criteria that take no fit and no training of their own."""
BEST = "validation_log_likelihood"
"""The criterion that foretold the test NLL best over five seeds (`experiments/select_study.py`), evidences included. Each network
is trained a second time for it, on a part of the images."""


@dataclass(frozen=True)
class Candidate:
    """One of the models that are compared: an architecture to train, or a run that has finished.

    Attributes:
        name: of the candidate, and of its run folder.
        model: entries of the shared `model` that it changes; with another `name` or `factory`, the other entries are that
            model's own defaults.
        run: folder of a finished run, in place of training one.
    """

    name: str
    model: dict[str, Any] = field(default_factory=dict)
    run: str | None = None


@dataclass(frozen=True)
class SelectConfig(TrainingConfig):
    """One comparison; all but the candidates is as in a training run.

    Attributes:
        candidates: the models to compare, each a change to `model` or a finished run.
        criteria: what is computed of each, by the names of `laplace_ws.selection.criteria`; `BEST` and those of `CHEAP` if not given.
        rank_by: the criterion that ranks them, one of `criteria`; the first of these if not given.
        part: share of the training images on which criteria train a second network, to predict the rest.
    """

    name: str = "select"
    candidates: list[Candidate] = field(default_factory=list)
    criteria: list[str] = field(default_factory=lambda: [BEST, *CHEAP])
    rank_by: str | None = None
    part: float = 0.8

    @property
    def ranked_by(self) -> str:
        """The criterion that ranks them."""
        return self.criteria[0] if self.rank_by is None else self.rank_by

    @property
    def split(self) -> Split:
        """The part of the training images, and the rest."""
        return Split(self.part, self.seed)

    def run_config(self, candidate: Candidate) -> RunConfig:
        """The training run of a candidate.

        Raises:
            ExperimentError: the candidate names an entry that no model has, or gives it a value of another type.
        """
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(TrainingConfig)}
        own = {"name": candidate.name, "out": str(self.folder), "workers": 1, "report": False}
        return RunConfig(**{**shared, **own, "model": changed_model(self.model, candidate)})


def changed_model(model: ModelConfig, candidate: Candidate) -> ModelConfig:
    """The shared network with what a candidate changes."""
    where, changes = f"candidate '{candidate.name}', model", candidate.model
    is_other = any(changes.get(key, getattr(model, key)) != getattr(model, key) for key in ("name", "factory"))
    kept = {} if is_other else asdict(model)
    try:
        return from_mapping(ModelConfig, kept | changes)
    except OptionError as error:
        raise ExperimentError(f"{where}: {error}") from error


def check_candidates(candidates: Sequence[Candidate]) -> None:
    """Refuse a list that cannot be ranked.

    Raises:
        ExperimentError: fewer than two, two of one name, a name that is no name of a folder, or a run with changes to a
            model.
    """
    names = [candidate.name for candidate in candidates]
    if len(names) < 2:
        raise ExperimentError(f"candidates holds {len(names)}; a comparison needs two or more")
    for i, candidate in enumerate(candidates):
        name = candidate.name
        if name in names[:i]:
            raise ExperimentError(f"candidate '{name}' is given twice; rename one")
        if not name or name in (".", "..", PARTIAL, CRITERIA_FOLDER) or any(letter in name for letter in _NOT_IN_NAMES):
            raise ExperimentError(f"candidate '{name}' cannot be a folder's name; rename it")
        if candidate.run is not None and candidate.model:
            raise ExperimentError(f"candidate '{name}' has a run and changes to a model; give one of them")


def check_criteria(config: SelectConfig) -> None:
    """Refuse criteria that cannot be computed or cannot rank, whatever the candidates are.

    Raises:
        ExperimentError: none or an unknown one, one twice, a ranking by none of them, or a part that is all or nothing.
    """
    if not config.criteria:
        raise ExperimentError("criteria is empty; name one at least, such as marglik")
    for name in config.criteria:
        try:
            _ = CRITERIA[name]
        except ValueError as error:
            raise ExperimentError(f"criteria: {error}") from error
    if len(set(config.criteria)) < len(config.criteria):
        raise ExperimentError(f"criteria names one twice: {', '.join(config.criteria)}")
    if config.ranked_by not in config.criteria:
        raise ExperimentError(
            f"rank_by={config.rank_by} is none of the criteria ({', '.join(config.criteria)}); add it to them, or rank by one of them"
        )
    if not 0 < config.part < 1:
        raise ExperimentError(f"part={config.part:g} must be above 0 and below 1")


def check_criteria_of(config: SelectConfig, name: str, run: RunConfig, n_train: int, n_weights: int) -> None:
    """Refuse criteria that a candidate cannot have.

    Args:
        config: of the comparison.
        name: of the candidate.
        run: its settings.
        n_train: number of its training images.
        n_weights: number of weights that it trains.

    Raises:
        ExperimentError: it is too large for the criterion that ranks, the split leaves a part or a rest without images, or its prior does
            not go with a posterior.
    """
    for criterion_name in config.criteria:
        criterion = CRITERIA[criterion_name]
        if criterion_name == config.ranked_by and not criterion.covers(n_weights):
            raise ExperimentError(
                f"candidate '{name}' has {n_weights:,} weights and so no {criterion_name}, which takes at most "
                f"{criterion.most_weights:,}; set another rank_by, or leave it out"
            )
        if criterion.needs_part and not 0 < config.split.n_part(n_train) < n_train:
            raise ExperimentError(
                f"part={config.part:g} of {n_train} training images leaves none to train on or none to predict; change part or "
                "data.n_train"
            )
        if criterion.kind is not None and run.marglik.prior_structure == PriorStructure.WEIGHT.value:
            structure = STRUCTURES[criterion.kind.structure]
            if not structure.prior_per_weight:
                raise ExperimentError(
                    f"candidate '{name}' has a prior precision for each weight, which the {structure.name} posterior of {criterion_name} "
                    "does not take; leave this criterion out, or set marglik.prior_structure=layerwise"
                )
