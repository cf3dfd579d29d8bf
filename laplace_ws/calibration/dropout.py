"""Monte Carlo dropout: the mean over passes in which activations go on being dropped [Gal & Ghahramani 2016]."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from laplace_ws.calibration.config import CalibrateConfig
from laplace_ws.calibration.method import Method, Predict, mean_of
from laplace_ws.calibration.other import OtherRun, load_other
from laplace_ws.calibration.trained import TrainedRun
from laplace_ws.curvature.backend import evaluation_mode
from laplace_ws.curvature.inputs import call_model
from laplace_ws.experiment.evaluate import TEST_BATCH
from laplace_ws.experiment.folder import ExperimentError
from laplace_ws.randomness import random_state_kept

_OPTION = "methods.mc_dropout"


def check_dropout(config: CalibrateConfig, trained: TrainedRun) -> None:
    """Reject a run that was trained without dropout, or differs in more than that.

    Raises:
        ExperimentError: says which, and how to train it.
    """
    load_dropped(config, trained)


def dropout_method(config: CalibrateConfig, trained: TrainedRun) -> Iterator[Method]:
    """A network that was trained with dropout, which takes the place of the one without."""
    dropped = load_dropped(config, trained)
    if dropped is not None:
        predict = dropout_predict(dropped.model, config.methods.n_samples, config.seed)
        yield Method(
            "mc_dropout", "MC dropout", predict, {"dropout": dropped.config.model.dropout}, dropped.train_seconds
        )


def load_dropped(config: CalibrateConfig, trained: TrainedRun) -> OtherRun | None:
    """The network that was trained with dropout; None where there is to be none."""
    given = config.methods.mc_dropout
    if given is None:
        return None
    dropped = load_other(config, trained, given, _OPTION)
    if not dropped.config.model.dropout:
        raise ExperimentError(
            f"{_OPTION}: '{given}' was trained without dropout; train it with --model.dropout 0.1, say"
        )
    like = replace(trained.config.model, dropout=dropped.config.model.dropout)
    dropped.check_model(like, given, _OPTION)
    return dropped


def dropout_predict(model: nn.Module, n_samples: int, seed: int) -> Predict:
    """The mean over passes with dropout; every call drops the same."""

    def passes(x: Float[Tensor, "N C H W"]) -> Float[Tensor, "S N K"]:
        with random_state_kept(x.device), dropping(model), torch.no_grad():
            torch.manual_seed(seed)  # dropout draws from the global generator alone
            samples = [torch.cat([call_model(model, part) for part in x.split(TEST_BATCH)]) for _ in range(n_samples)]
        return torch.stack(samples).double().softmax(-1)

    return lambda x: mean_of(passes(x))


@contextmanager
def dropping(model: nn.Module) -> Iterator[None]:
    """Put dropout layers in train mode and all others in eval mode; each is left in the mode it was in, also after an exception."""
    with evaluation_mode(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        yield
