"""The candidates of a comparison with their runs: found, checked before any work, and read when they have finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from laplace_ws.data import ImageData
from laplace_ws.errors import InvalidBatchError, UnsupportedParameterError
from laplace_ws.experiment.config import ModelConfig, RunConfig, read_config
from laplace_ws.experiment.folder import ExperimentError, check_whole
from laplace_ws.experiment.records import SUMMARY, read_run
from laplace_ws.experiment.run import make_model
from laplace_ws.experiment.training import check_config, check_training
from laplace_ws.marglik.checkpoint import check_settings
from laplace_ws.selection.comparable import check_comparable, yardstick
from laplace_ws.selection.config import Candidate, SelectConfig, check_criteria_of
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.networks import TUNED, n_weights
from laplace_ws.selection.ranking import Entry
from laplace_ws.selection.scores import Score


@dataclass(frozen=True)
class Member:
    """A candidate with its run.

    Attributes:
        name: of the candidate.
        run: its configuration.
        folder: of the run.
        is_trained: whether the comparison trains it, rather than loading it.
        n_train, n_test: numbers of examples of a loaded run.
    """

    name: str
    run: RunConfig
    folder: Path
    is_trained: bool = True
    n_train: int | None = None
    n_test: int | None = None


def find(config: SelectConfig, candidate: Candidate) -> Member:
    """A candidate's run: the one that will be trained, or the one that it names."""
    if candidate.run is None:
        run = config.run_config(candidate)
        return Member(candidate.name, run, Path(run.out) / run.name)
    folder = Path(candidate.run)
    check_whole(folder)
    found = read_run(folder)
    with named(candidate.name):
        run = replace(read_config(found.config), device=config.device)
    return Member(candidate.name, run, folder, False, found.data.n_train, found.data.n_test)


def check_members(config: SelectConfig, members: Sequence[Member], data: ImageData) -> None:
    """Reject candidates that are not on one scale, whose training could not start, or that cannot have the criteria."""
    n_train, n_test = len(data.y_train), len(data.y_test)
    runs = {member.name: member.run for member in members}
    yardsticks = {m.name: yardstick(m.run, m.n_train or n_train, m.n_test or n_test) for m in members}
    check_comparable(yardsticks, runs)
    for member in members:
        with named(member.name):
            if member.is_trained:
                check_config(member.run, [TUNED])
                check_training(member.run, make_model(member.run, data), data)
        size = n_weights(member.run, data)
        check_criteria_of(config, member.name, member.run, n_train, size)
        kinds = {CRITERIA[name].kind for name in config.criteria if CRITERIA[name].covers(size)}
        with named(member.name):
            for kind in filter(None, kinds):
                kind.of(make_model(member.run, data), member.run).check(data.x_train[: member.run.data.batch_size])


@contextmanager
def named(candidate: str) -> Iterator[None]:
    """Say which candidate is rejected."""
    try:
        yield
    except (ValueError, UnsupportedParameterError, InvalidBatchError) as error:
        raise ExperimentError(f"candidate '{candidate}': {error}") from error


def is_finished(member: Member) -> bool:
    """Whether a candidate was trained to its end.

    Raises:
        CheckpointError: it was, under other settings.
    """
    path = member.folder / SUMMARY
    if not path.exists():
        return False
    check_settings(path, dict(read_run(member.folder).config), member.run.settings())
    return True


def read_entry(member: Member, data: ImageData, scores: Mapping[str, Score]) -> Entry:
    """The results of a run that has finished."""
    model = read_run(member.folder).tuned
    assert model.log_marginal_likelihood is not None
    assert model.test_nll is not None
    return Entry(
        name=member.name,
        architecture=architecture(member.run.model),
        n_weights=n_weights(member.run, data),
        log_marginal_likelihood=model.log_marginal_likelihood,
        test_nll=model.test_nll,
        test_accuracy=model.test_accuracy or 0.0,
        train_seconds=model.train_seconds or 0.0,
        folder=member.folder.as_posix(),
        scores=scores,
    )


def architecture(model: ModelConfig) -> str:
    """A model in words: "mlp hidden=[100, 50] activation=tanh"."""
    options = {
        key: value for key, value in asdict(model).items() if key not in ("name", "factory") and value is not None
    }
    return " ".join([model.factory or model.name, *(f"{key}={value}" for key, value in options.items())])
