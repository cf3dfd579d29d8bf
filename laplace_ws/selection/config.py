"""What a comparison of models is made of: the settings that all share, and the candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentError, ArgumentParser

from laplace_ws.experiment.config import (
    BaselinesConfig,
    DataConfig,
    MarglikConfig,
    ModelConfig,
    RunConfig,
    UnknownKeyError,
    check_keys,
    config_keys,
)
from laplace_ws.experiment.folder import ExperimentError

_NOT_IN_NAMES = "/\\"
_SECTIONS = {"data": DataConfig, "model": ModelConfig, "marglik": MarglikConfig, "baselines": BaselinesConfig}


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
class SelectConfig:
    """One comparison; all but the candidates is as in a training run.

    Attributes:
        name: of the comparison's folder, which holds the run folders of its candidates.
        out: folder of all runs.
        seed: of initialisation, batches and sampling.
        device: auto takes a GPU if there is one.
        threads: of torch in each process.
        workers: candidates that train side by side; the numbers are those of one.
        test_every: epochs between two looks at the test set; nothing is tuned or chosen by them.
        likelihood: of the labels; images have classes.
        data: images to train and test on.
        model: the network that the candidates change.
        marglik: training and tuning.
        candidates: the models to compare.
        report: whether to write select.html at the end.
    """

    name: str = "select"
    out: str = "runs"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 1
    workers: int = 1
    test_every: int = 1
    likelihood: Literal["classification"] = "classification"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    marglik: MarglikConfig = field(default_factory=MarglikConfig)
    candidates: list[Candidate] = field(default_factory=list)
    report: bool = True

    @property
    def folder(self) -> Path:
        """Where the comparison is written."""
        return Path(self.out) / self.name

    def run_config(self, candidate: Candidate) -> RunConfig:
        """The training run of a candidate.

        Raises:
            ExperimentError: the candidate names an entry that no model has, or gives it a value of another type.
        """
        shared: dict[str, Any] = {
            key: getattr(self, key) for key in RunConfig.__dataclass_fields__ if hasattr(self, key)
        }
        own = {"name": candidate.name, "out": str(self.folder), "workers": 1, "report": False}
        return RunConfig(**{**shared, **own, "model": changed_model(self.model, candidate)})


def changed_model(model: ModelConfig, candidate: Candidate) -> ModelConfig:
    """The shared network with what a candidate changes."""
    where, changes = f"candidate '{candidate.name}', model", candidate.model
    kept = {} if changes.get("name", model.name) != model.name else asdict(model)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, as_group=False)
    try:
        check_keys(changes, config_keys(ModelConfig))
        values = parser.parse_object(kept | changes)
    except (UnknownKeyError, ArgumentError) as error:
        raise ExperimentError(f"{where}: {error}") from error
    return ModelConfig(**{f.name: values[f.name] for f in fields(ModelConfig)})


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
        if not name or name in (".", "..") or any(letter in name for letter in _NOT_IN_NAMES):
            raise ExperimentError(f"candidate '{name}' cannot be a folder's name; rename it")
        if candidate.run is not None and candidate.model:
            raise ExperimentError(f"candidate '{name}' has a run and changes to a model; give one of them")


def run_config_of(name: str, values: Mapping[str, Any]) -> RunConfig:
    """The configuration that a run folder's summary holds.

    Raises:
        ExperimentError: another version of the package wrote it.
    """
    try:
        return RunConfig(**{**values, **{key: kind(**values[key]) for key, kind in _SECTIONS.items()}})
    except (TypeError, KeyError) as error:
        raise ExperimentError(
            f"candidate '{name}': the run's configuration cannot be read ({error}); train it with this version"
        ) from error
