"""Deep ensembles: the mean over networks that were trained alike from other seeds [Lakshminarayanan et al. 2017]."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, mean_over
from laplace_ws.calibration.other import OtherRun, load_other
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.experiment.folder import ExperimentError

_OPTION = "methods.ensemble"


def check_ensemble(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject members that are no further networks of the same kind on the same images.

    Raises:
        ExperimentError: names the run and what differs.
    """
    members = load_members(config, trained)
    runs = {config.checkpoint: trained.config.seed}
    for given, member in zip(config.methods.ensemble, members, strict=True):
        same = next((name for name, seed in runs.items() if seed == member.config.seed), None)
        if same is not None:
            raise ExperimentError(
                f"{_OPTION}: '{given}' has seed {member.config.seed}, as '{same}' has; train it with another --seed and with --data.seed "
                f"{trained.config.data_seed}"
            )
        runs[given] = member.config.seed


def ensemble_method(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """The network and the further ones."""
    members = load_members(config, trained)
    if members:
        models = [trained.model, *(member.model for member in members)]
        seconds = trained.train_seconds + sum(member.train_seconds for member in members)
        facts = {"n_members": len(models)}
        yield Method("ensemble", f"deep ensemble of {len(models)}", mean_over(models), facts, seconds)


def load_members(config: CalibrateConfig, trained: TrainedRun) -> Sequence[OtherRun]:
    """The further networks, of the architecture and the images of the first.

    Raises:
        ExperimentError: one is not.
    """
    members = [load_other(config, trained, given, _OPTION) for given in config.methods.ensemble]
    for given, member in zip(config.methods.ensemble, members, strict=True):
        member.check_model(trained.config.model, given, _OPTION)
    return members
