"""The values of the criteria for one candidate, and the file that keeps them while others are computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from laplace_ws.experiment.evaluate import finite_or_none
from laplace_ws.experiment.folder import write_whole
from laplace_ws.records import read_record
from laplace_ws.selection.criteria import CRITERIA
from laplace_ws.selection.networks import Networks

SCORES = "scores.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Score:
    """A criterion of a candidate.

    Attributes:
        value: higher is better; None where it has none, as the network is too large or the value is not finite.
        seconds: that it would take alone, beside the training on all images.
    """

    value: float | None
    seconds: float


@dataclass(frozen=True)
class Scores:
    """What is known of a candidate.

    Attributes:
        basis: all that the values depend on: settings, and the result of the training.
        scores: by criterion.
    """

    basis: Mapping[str, Any]
    scores: Mapping[str, Score] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write them into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / SCORES, json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=2) + "\n")


def read_scores(folder: Path) -> Scores:
    """Those that a folder holds.

    Raises:
        RecordError: there are none, or the file is damaged.
    """
    absent, broken = "compute the criteria first", "remove its folder and compare anew"
    return read_record(Scores, folder / SCORES, version=FORMAT_VERSION, absent=absent, broken=broken)


def scored(
    networks: Callable[[], Networks], criteria: Sequence[str], basis: Mapping[str, Any], folder: Path
) -> Mapping[str, Score]:
    """The values of some criteria: those of the folder that rest on the same basis, and the others anew.

    Args:
        networks: gives the networks of the candidate; called where a value is missing.
        criteria: by name.
        basis: see `Scores`.
        folder: of the values, and of the training on a part, whose checkpoint goes with the basis too.

    Raises:
        TrainingDiverged: of the network on the part.
        RecordError: the file of the folder is damaged.
    """
    basis = json.loads(json.dumps(basis))
    known = read_scores(folder) if (folder / SCORES).exists() else None
    if known is not None and known.basis != basis:
        shutil.rmtree(folder)
    if known is None or known.basis != basis:
        known = Scores(basis)
        known.write(folder)
    if missing := [name for name in criteria if name not in known.scores]:
        of = networks()
        for name in missing:
            known = Scores(basis, {**known.scores, name: _score(name, of)})
            known.write(folder)
    return {name: known.scores[name] for name in criteria}


def _score(name: str, networks: Networks) -> Score:
    criterion = CRITERIA[name]
    if not criterion.covers(networks.n_weights):
        return Score(None, 0.0)
    value, seconds = networks.timed(criterion.value)
    return Score(finite_or_none(value), seconds)
