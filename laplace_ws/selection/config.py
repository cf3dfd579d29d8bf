"""What a comparison of models is made of: the settings that all share, and the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from laplace_ws.experiment.config import ExperimentError, ModelConfig, RunConfig, TrainingConfig
from laplace_ws.experiment.folder import PARTIAL
from laplace_ws.option_errors import OptionError
from laplace_ws.options import from_mapping

_NOT_IN_NAMES = "/\\"


@dataclass(frozen=True)
class Candidate:
    """One of the models that are compared: an architecture to train, or a run that has finished.

    Attributes:
        name: of the candidate, and of its run folder.
        model: entries of the shared `model` that it changes; with another `name`, the other entries are that model's own
            defaults.
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
    """

    name: str = "select"
    candidates: list[Candidate] = field(default_factory=list)

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
    kept = {} if changes.get("name", model.name) != model.name else asdict(model)
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
        if not name or name in (".", "..", PARTIAL) or any(letter in name for letter in _NOT_IN_NAMES):
            raise ExperimentError(f"candidate '{name}' cannot be a folder's name; rename it")
        if candidate.run is not None and candidate.model:
            raise ExperimentError(f"candidate '{name}' has a run and changes to a model; give one of them")
